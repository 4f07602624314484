"""The Inference service. Each method: admit, decode, call the engine, encode."""

import asyncio
import base64
import binascii
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from mtlora.prompt import PromptEncoder
from server.accounting import Usage
from server.call import Call, current_call
from server.engine import Engine
from server.errors import RequestFailedError, Violation, invalid_argument, task_not_found
from server.job import ServedTask
from server.registry.catalog import Catalog
from server.registry.residency import Residency
from server.rpc import encoding
from server.rpc.answers import OwnTypes
from server.rpc.generation import Generation
from server.rpc.pieces import in_pieces
from server.rpc.stream import unhurried
from server.rpc.validation import PromptLimits, page_size, validate
from server.scheduling import Scheduler
from server.scheduling.admission import Admission
from server.scheduling.fair_thread import FairThread
from server.telemetry.logs import get_logger
from server.telemetry.metrics import UNKNOWN_TASK, Metrics
from server.tenants import Directory

logger = get_logger("prompt")

# Unary calls get tokens in batches: each hand-over delays the next step. Tenants' counts follow batch by batch.
_UNARY_DELTA_TOKENS = 64
# Above this many bytes, tokenizing takes long enough to hold up other streams.
_TOKENIZE_APART_BYTES = 8192
# Lists of visible tasks kept with a catalog.
_KEPT_LISTS = 64


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """`catalog` may be replaced at any time. The other attributes are set before admission opens.

    A tenant sees the tasks that it may ask, and no sign of the others.
    """

    engine: Engine
    residency: Residency
    prompts: PromptEncoder
    limits: PromptLimits

    def __init__(
        self,
        admission: Admission,
        metrics: Metrics,
        scheduler: Scheduler,
        directory: Directory,
        usage: Usage,
        *,
        log_prompts: bool = False,
    ) -> None:
        self.catalog = Catalog()
        self._admission = admission
        self._scheduler = scheduler
        self._directory = directory
        self._usage = usage
        self._metrics = metrics
        self._log_prompts = log_prompts
        self._tokenizing = FairThread("tokenize")
        self._own_types = OwnTypes()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        call, task = current_call.get(), self.find(request.task_id)
        with self._admitted(call), self._version_for(request, task) as task:
            generation = await self._generation(request, task, _UNARY_DELTA_TOKENS)
            await generation.run(self.engine, self._scheduler, self.residency)
            return encoding.response(generation)

    async def answer_batch(self, requests: Sequence[pb.GenerateRequest], task: ServedTask) -> list[Generation]:
        """Run requests of the current call to their ends. `task` is what `find` gives for them.

        The batch is admitted and charged as a whole before anything of it starts. The first failure ends all of it.
        """
        call, size = current_call.get(), len(requests)
        self._scheduler.check_batch(call.tenant, size)
        with self._admitted(call, size), ExitStack() as held:
            self._scheduler.count_batch(call.tenant, size)
            apart = sum(request.ByteSize() for request in requests) > _TOKENIZE_APART_BYTES
            # All are chosen before the first wait.
            chosen = [(each, held.enter_context(self._version_for(each, task))) for each in requests]
            generations = [await self._generation(*each, _UNARY_DELTA_TOKENS, apart=apart) for each in chosen]
            with self._scheduler.reserve(call.tenant, [each.job for each in generations]) as reserved:
                run = partial(Generation.run, engine=self.engine, scheduler=self._scheduler, residency=self.residency)
                running = [asyncio.create_task(run(each, reserved=reserved)) for each in generations]
                try:
                    await asyncio.gather(*running)
                finally:
                    for each in running:
                        each.cancel()
                    await asyncio.gather(*running, return_exceptions=True)
            return generations

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        call, task = current_call.get(), self.find(request.task_id)
        with self._admitted(call), self._version_for(request, task) as task:
            generation = await self._generation(request, task, delta_tokens=1)
            async with unhurried(partial(generation.run, self.engine, self._scheduler, self.residency)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason:
                        call.count_in(self._usage)
                    message = encoding.stream_response(delta, generation)
                    # Most deltas of working have nothing for the reader.
                    if message.ByteSize() or generation.marker is None:
                        yield message

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        self._admission.check_serving()
        size, after = page_size(request), _decode_page_token(request.page_token)
        if violations := [each for each in (size, after) if isinstance(each, Violation)]:
            raise invalid_argument(violations)
        ids = await self.visible()
        begin = bisect_right(ids, str(after))
        end = begin + int(size)  # type: ignore[arg-type]
        tasks = self.catalog.tasks
        return pb.ListTasksResponse(
            tasks=(encoding.task(tasks[task_id]) for task_id in ids[begin:end] if task_id in tasks),
            next_page_token=_encode_page_token(ids[end - 1]) if end < len(ids) else "",
        )

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
        tenant = current_call.get().tenant
        return task_not_found(task_id, filter(tenant.allows, self.catalog.near(task_id)))

    async def visible(self) -> Sequence[str]:
        """The ids that the current call's tenant may know, in order."""
        catalog, tenant = self.catalog, current_call.get().tenant
        if "*" in tenant.tasks:
            return catalog.ids
        ids = catalog.visible.get(tenant.tasks)
        if ids is None:
            ids = [task_id async for task_id in in_pieces(catalog.ids) if tenant.allows(task_id)]
            if len(catalog.visible) >= _KEPT_LISTS:
                catalog.visible.clear()
            catalog.visible[tenant.tasks] = ids
        return ids

    @contextmanager
    def _admitted(self, call: Call, requests: int = 1) -> Iterator[None]:
        """Hold places for requests of a call, from receipt to end."""
        with self._admission.admit(call.tenant, requests), self._scheduler.admit(call.tenant, requests):
            if call.tenant.has_budget or self._usage.stuck:
                self._usage.check(call.tenant)
            yield

    async def _generation(
        self, request: pb.GenerateRequest, task: ServedTask | None, delta_tokens: int, *, apart: bool = False
    ) -> Generation:
        """A valid request, ready to run. A large one is tokenized beside the event loop, and so are all with `apart`.

        Raises NOT_FOUND or INVALID_ARGUMENT.
        """
        call = current_call.get()
        if task is None and request.task_id:
            raise self.not_found(request.task_id)
        # Tenants share no cached blocks, unless their file says so: answer times would tell of another's prompts.
        cache_salt = None if self._directory.current.share_prefix_cache else call.tenant.id
        own = None
        if request.HasField("answer"):
            own = await self._own_types.hold(request, task.spec if task else None, call.tenant, self.engine)
        arguments = (request, task, self.prompts, self.limits, call.tenant, cache_salt, delta_tokens, own)
        if apart or request.ByteSize() > _TOKENIZE_APART_BYTES:
            job = await self._tokenizing.run(call.tenant, request.ByteSize(), partial(validate, *arguments))
        else:
            job = validate(*arguments)
        if isinstance(job, list):
            raise invalid_argument(job)
        if self._log_prompts:
            prompt = self.prompts.tokenizer.decode(job.prompt_ids)
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
