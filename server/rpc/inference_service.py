"""The Inference service. Each method: admit, decode, call the engine, encode."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from server.call import current_call
from server.engine import Engine
from server.errors import RequestFailedError, Violation, invalid_argument, task_not_found
from server.job import ServedTask
from server.registry.catalog import Catalog
from server.registry.residency import Residency
from server.rpc import encoding
from server.rpc.generation import Generation
from server.rpc.stream import unhurried
from server.rpc.validation import PromptLimits, page_size, validate
from server.scheduling import Scheduler
from server.scheduling.admission import Admission
from server.telemetry.logs import get_logger
from server.telemetry.metrics import UNKNOWN_TASK, Metrics
from server.tenants import Directory

logger = get_logger("prompt")

# Unary calls get tokens in batches: each hand-over delays the next step. Tenants' counts follow batch by batch.
_UNARY_DELTA_TOKENS = 64
# Above this many bytes, tokenizing takes long enough to hold up other streams.
_TOKENIZE_APART_BYTES = 8192


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """`catalog` may be replaced at any time. The other attributes are set before admission opens.

    A tenant sees the tasks that it may ask, and no sign of the others.
    """

    engine: Engine
    residency: Residency
    tokenizer: Any
    limits: PromptLimits

    def __init__(
        self,
        admission: Admission,
        metrics: Metrics,
        scheduler: Scheduler,
        directory: Directory,
        *,
        log_prompts: bool = False,
    ) -> None:
        self.catalog = Catalog()
        self._admission = admission
        self._scheduler = scheduler
        self._directory = directory
        self._metrics = metrics
        self._log_prompts = log_prompts
        # One thread: many large inputs take one core at most.
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        return encoding.response(await self.answer(request, self.find(request.task_id)))

    async def answer(self, request: pb.GenerateRequest, task: ServedTask | None) -> Generation:
        """Run one request of the current call to its end. `task` is what `find` gives for it."""
        call = current_call.get()
        with self._admission.admit(call.tenant):
            self._scheduler.check_quotas(call.tenant)
            with self._version_for(request, task) as task:
                generation = await self._generation(request, task, _UNARY_DELTA_TOKENS)
                await generation.run(self.engine, self._scheduler, self.residency)
                return generation

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        call, task = current_call.get(), self.find(request.task_id)
        with self._admission.admit(call.tenant):
            self._scheduler.check_quotas(call.tenant)
            with self._version_for(request, task) as task:
                generation = await self._generation(request, task, delta_tokens=1)
                async with unhurried(partial(generation.run, self.engine, self._scheduler, self.residency)) as deltas:
                    async for delta in deltas:
                        message = encoding.stream_response(delta, generation)
                        # Most deltas of working have nothing for the reader.
                        if message.ByteSize() or generation.marker is None:
                            yield message

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        self._admission.check_serving()
        size, after = page_size(request), _decode_page_token(request.page_token)
        if violations := [each for each in (size, after) if isinstance(each, Violation)]:
            raise invalid_argument(violations)
        tasks, last = self.visible().page(str(after), int(size))  # type: ignore[arg-type]
        return pb.ListTasksResponse(tasks=map(encoding.task, tasks), next_page_token=_encode_page_token(last))

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> pb.GetTaskResponse:
        task = self.find(request.task_id)
        self._admission.check_serving()
        if task is None:
            raise self.not_found(request.task_id)
        return pb.GetTaskResponse(task=encoding.task(task))

    def find(self, task_id: str) -> ServedTask | None:
        """A task that the current call's tenant may ask; the one place where this is checked. Labels the call."""
        call = current_call.get()
        task = self.catalog.tasks.get(task_id)
        if task is None or not call.tenant.allows(task_id):
            call.task = UNKNOWN_TASK
            return None
        call.task = task_id
        return task

    def not_found(self, task_id: str) -> RequestFailedError:
        """The failure of a task that `find` does not give: the same whether it is absent or not the tenant's."""
        if not task_id:
            return invalid_argument([Violation("task_id", "found none; ListTasks has those that can be asked")])
        return task_not_found(task_id, self.visible().tasks)

    def visible(self) -> Catalog:
        """The catalog, as far as the current call's tenant may know it."""
        tenant = current_call.get().tenant
        tasks = {task_id: task for task_id, task in self.catalog.tasks.items() if tenant.allows(task_id)}
        return replace(self.catalog, tasks=MappingProxyType(tasks))

    async def _generation(self, request: pb.GenerateRequest, task: ServedTask | None, delta_tokens: int) -> Generation:
        """A valid request, ready to run. Raises NOT_FOUND or INVALID_ARGUMENT."""
        call = current_call.get()
        if task is None and request.task_id:
            raise self.not_found(request.task_id)
        # Tenants share no cached blocks, unless their file says so: answer times would tell of another's prompts.
        cache_salt = None if self._directory.current.share_prefix_cache else call.tenant.id
        arguments = (request, task, self.tokenizer, self.limits, cache_salt, delta_tokens)
        if request.ByteSize() <= _TOKENIZE_APART_BYTES:
            job = validate(*arguments)
        else:
            job = await asyncio.get_running_loop().run_in_executor(self._tokenizing, validate, *arguments)
        if isinstance(job, list):
            raise invalid_argument(job)
        if self._log_prompts:
            prompt = self.tokenizer.decode(job.prompt_ids)
            logger.info("prompt", extra={"fields": {"request_id": call.request_id, "prompt": prompt}})
        return Generation(job, call, self._metrics)

    @contextmanager
    def _version_for(self, request: pb.GenerateRequest, task: ServedTask | None) -> Iterator[ServedTask | None]:
        """Give the task on the version that answers this request, held until the end.

        A version that is not in the engine begins to load.
        """
        if task is not None and task.spec.id in self.catalog.splits:
            task = self.catalog.choose(task, _routing_key(request))
        if task is None or task.version is None or request.without_adapter:
            yield task
            return
        with self.residency.hold(task.version):
            self.residency.prefetch(task.version)
            yield task


def _routing_key(request: pb.GenerateRequest) -> bytes:
    if request.routing_key:
        return request.routing_key.encode()
    given = request.WhichOneof("input")
    value = getattr(request, given) if given else ""
    return value.encode() if isinstance(value, str) else value.SerializeToString(deterministic=True)


def _encode_page_token(last: str) -> str:
    return base64.urlsafe_b64encode(last.encode()).decode()


def _decode_page_token(token: str) -> str | Violation:
    try:
        return base64.b64decode(token.encode("ascii"), b"-_", validate=True).decode()
    except (UnicodeError, binascii.Error):
        return Violation("page_token", "found no page token of this server; allowed: next_page_token of a reply")
