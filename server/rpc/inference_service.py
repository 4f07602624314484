"""The Inference service. Each method: admit, decode, call the engine, encode."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from server.call import current_call
from server.errors import Violation, invalid_argument, task_not_found
from server.job import GenerationJob, ServedTask
from server.registry.catalog import Catalog
from server.rpc import encoding
from server.rpc.generation import Generation
from server.rpc.stream import unhurried
from server.rpc.validation import Limits, page_size, validate
from server.scheduling import Scheduler
from server.scheduling.admission import Admission
from server.telemetry.logs import get_logger
from server.telemetry.metrics import Metrics
from server.tenants import Tenant

logger = get_logger("prompt")

# Nobody reads a unary answer as it grows. Every token handed on takes time from the next step where cores are few;
# often enough for the tenants' counts to follow.
_UNARY_DELTA_TOKENS = 16
# Above this many bytes, tokenizing takes long enough to hold up the streams of others.
_TOKENIZE_APART_BYTES = 8192


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """`catalog` may be replaced at any time; `engine`, `tokenizer` and `limits` are set before admission opens.

    A tenant sees the tasks that it may ask, and no sign of the others. `cache_salt` gives a tenant's salt.
    """

    engine: Any
    tokenizer: Any
    limits: Limits

    def __init__(
        self,
        admission: Admission,
        metrics: Metrics,
        scheduler: Scheduler,
        *,
        cache_salt: Callable[[Tenant], str | None] = lambda _: None,
        log_prompts: bool = False,
    ) -> None:
        self.catalog = Catalog()
        self._admission = admission
        self._scheduler = scheduler
        self._cache_salt = cache_salt
        self._metrics = metrics
        self._log_prompts = log_prompts
        # One thread: however many large inputs come, they take one core at most.
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        return encoding.response(await self.answer(request))

    async def answer(self, request: pb.GenerateRequest) -> Generation:
        """The current call's tenant's request, run to its end: the way of every front."""
        with self._admission.admit():
            self._scheduler.check_quotas(current_call().tenant)
            generation = await self._generation(request, _UNARY_DELTA_TOKENS)
            async with aclosing(generation.run(self.engine, self._scheduler)) as deltas:  # type: ignore[type-var]
                async for _ in deltas:
                    pass
            return generation

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        with self._admission.admit():
            self._scheduler.check_quotas(current_call().tenant)
            generation = await self._generation(request)
            async with unhurried(generation.run(self.engine, self._scheduler)) as deltas:
                async for delta in deltas:
                    message = encoding.stream_response(delta, generation)
                    # While working is written there is mostly nothing to say.
                    if message.ByteSize() or generation.job.answer_marker is None:
                        yield message

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        self._admission.check_serving()
        size, after = page_size(request), _decode_page_token(request.page_token)
        if violations := [each for each in (size, after) if isinstance(each, Violation)]:
            raise invalid_argument(violations)
        tasks, last = self.visible().page(str(after), int(size))  # type: ignore[arg-type]
        return pb.ListTasksResponse(tasks=map(encoding.task, tasks), next_page_token=_encode_page_token(last))

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> pb.GetTaskResponse:
        self._admission.check_serving()
        return pb.GetTaskResponse(task=encoding.task(self.task(request.task_id)))

    async def _generation(self, request: pb.GenerateRequest, delta_tokens: int = 1) -> Generation:
        task = self._version_for(request, self.task(request.task_id)) if request.task_id else None
        result = await self._validate(request, task)
        if isinstance(result, list):
            raise invalid_argument(result)
        call = current_call()
        if self._log_prompts:
            prompt = self.tokenizer.decode(result.prompt_ids)
            logger.info("prompt", extra={"fields": {"request_id": call.request_id, "prompt": prompt}})
        job = replace(result, cache_salt=self._cache_salt(call.tenant), delta_tokens=delta_tokens)
        return Generation(job, call, self._metrics)

    async def _validate(self, request: pb.GenerateRequest, task: ServedTask | None) -> GenerationJob | list[Violation]:
        arguments = (request, task, self.tokenizer, self.limits)
        if request.ByteSize() <= _TOKENIZE_APART_BYTES:
            return validate(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, validate, *arguments)

    def _version_for(self, request: pb.GenerateRequest, task: ServedTask) -> ServedTask:
        """The task on the version that answers this request; it begins to load where it is not in the engine."""
        if task.spec.id in self.catalog.splits:
            task = self.catalog.choose(task, _routing_key(request))
        if not request.without_adapter:
            self.engine.prefetch(task)
        return task

    def visible(self) -> Catalog:
        """The catalog, as far as the current call's tenant may know it."""
        tenant = current_call().tenant
        tasks = {task_id: task for task_id, task in self.catalog.tasks.items() if tenant.allows(task_id)}
        return replace(self.catalog, tasks=MappingProxyType(tasks))

    def task(self, task_id: str) -> ServedTask:
        """A task that the tenant may ask. Raises the same NOT_FOUND whether there is none or it may not."""
        if not task_id:
            raise invalid_argument([Violation("task_id", "found none; ListTasks has those that can be asked")])
        task = self.catalog.tasks.get(task_id)
        if task and current_call().tenant.allows(task_id):
            return task
        raise task_not_found(task_id, self.visible().tasks)


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
