"""The Inference service. Each method: admit, decode, call the engine, encode."""

from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from server.accounting import Usage
from server.call import Call, current_call
from server.engine import Engine
from server.errors import RequestFailedError, Violation, invalid_argument, task_not_found
from server.job import GenerationJob, ServedTask
from server.registry.catalog import Catalog
from server.registry.residency import Residency
from server.rpc import encoding
from server.rpc.analysis import Analysis, led
from server.rpc.batch import (
    TOKENIZE_APART_BYTES,
    UNARY_DELTA_TOKENS,
    Batches,
    Item,
    TextItem,
    finish,
    samples,
    text_items,
)
from server.rpc.classify import Classifier, classifying
from server.rpc.documents import Document, Documents
from server.rpc.generation import Generation
from server.rpc.listing import page_of, page_token
from server.rpc.own_types import OwnTypes
from server.rpc.pictures import Decoding
from server.rpc.pieces import in_pieces
from server.rpc.scoring import scored_items, scored_pictures, scoring
from server.rpc.seeing import Sight
from server.rpc.stream import unhurried
from server.rpc.validation import PromptLimits, Received, samples_of, validate
from server.scheduling import Admission, Scheduler
from server.scheduling.fair_thread import FairThread
from server.telemetry.logs import get_logger
from server.telemetry.metrics import UNKNOWN_TASK, Metrics
from server.tenants import Directory

logger = get_logger("prompt")

# Most cached lists of visible tasks per catalog.
_KEPT_LISTS = 64


@dataclass(frozen=True)
class TextBackend:
    """What answers texts: the engine that runs, the versions in it, and what both allow of a prompt."""

    engine: Engine
    residency: Residency
    limits: PromptLimits


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """`catalog` may be replaced at any time. Each engine that starts sets `backend`, the first before admission opens.

    generates: whether there is a language backbone; without one, every task takes images.
    A tenant sees only the tasks that it may ask; all others look as if they did not exist.
    """

    backend: TextBackend

    def __init__(
        self,
        admission: Admission,
        metrics: Metrics,
        scheduler: Scheduler,
        directory: Directory,
        usage: Usage,
        documents: Documents,
        decoding: Decoding,
        *,
        position_cost: float = 1.0,
        log_prompts: bool = False,
        generates: bool = True,
    ) -> None:
        self.catalog = Catalog()
        self._admission = admission
        self._scheduler = scheduler
        self._directory = directory
        self._usage = usage
        self._metrics = metrics
        self._log_prompts = log_prompts
        self._generates = generates
        self._tokenizing = FairThread("tokenize")
        self._own_types = OwnTypes()
        self.batches = Batches(self, admission, scheduler, usage, metrics)
        self._analysis = Analysis(self, self._tokenizing, documents)
        self.classifier = Classifier(self, admission, scheduler, usage, metrics, decoding, position_cost)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        call, task = current_call.get(), self.find(request.task_id)
        if (count := samples_of(request, task)) > 1:
            item: TextItem = Item(request, task, call, count)
            await self.batches.whole([item], samples)
            return encoding.item_response(item)
        with self._admission.admit(call.tenant), self.version_for(request, task) as task:
            generation = await self.generation(request, task, UNARY_DELTA_TOKENS)
            await generation.run(self.backend.engine, self._scheduler, self.backend.residency)
            return encoding.response(generation)

    async def GenerateBatch(self, request: pb.GenerateBatchRequest, context: Any) -> pb.GenerateBatchResponse:
        items = text_items(self.find, request.items, "items", "GenerateBatchItem")
        await finish(self.batches.run(items, samples))
        return pb.GenerateBatchResponse(items=[encoding.batch_item(item) async for item in in_pieces(items)])

    async def GenerateBatchStream(
        self, request: pb.GenerateBatchRequest, context: Any
    ) -> AsyncIterator[pb.GenerateBatchStreamResponse]:
        items = text_items(self.find, request.items, "items", "GenerateBatchItem")
        async with aclosing(self.batches.run(items, samples)) as ended:
            async for item in ended:
                yield pb.GenerateBatchStreamResponse(item=encoding.batch_item(item))

    async def Analyze(self, request: pb.AnalyzeRequest, context: Any) -> pb.AnalyzeResponse:
        self._admission.check_serving()
        asked = self._analysis.asked(request)
        await finish(self.batches.run(asked.items, led(asked), self._analysis.document_of(asked)))
        answers = [encoding.batch_item(item) async for item in in_pieces(asked.items)]
        document = asked.document
        return pb.AnalyzeResponse(document_id=document.id, document_tokens=len(document.ids), items=answers)

    async def AnalyzeStream(self, request: pb.AnalyzeRequest, context: Any) -> AsyncIterator[pb.AnalyzeStreamResponse]:
        self._admission.check_serving()
        asked = self._analysis.asked(request)
        batch = self.batches.run(asked.items, led(asked), self._analysis.document_of(asked))
        async with aclosing(batch) as ended:
            async for item in ended:
                document = asked.document
                yield pb.AnalyzeStreamResponse(
                    document_id=document.id, document_tokens=len(document.ids), item=encoding.batch_item(item)
                )

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        items, tasks = self.classifier.items(request), len(request.task_ids)
        await finish(self.classifier.batches.run(items, classifying(calibrated=not request.uncalibrated)))
        results = [encoding.classification(item, item.index // tasks) async for item in in_pieces(items)]
        return pb.ClassifyResponse(results=results)

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        task = self.task(request.task_id)
        if task.spec.image is not None:
            pictures = self.classifier.of(scored_pictures(request, task), "ScoreItem")
            await finish(self.classifier.batches.run(pictures, classifying(calibrated=not request.uncalibrated)))
            return pb.ScoreResponse(scores=[encoding.score(item) async for item in in_pieces(pictures)])
        texts = scored_items(request, task, current_call.get())
        await finish(self.batches.run(texts, scoring(self.backend, calibrated=not request.uncalibrated)))
        return pb.ScoreResponse(scores=[encoding.score(item) async for item in in_pieces(texts)])

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        call, task = current_call.get(), self.find(request.task_id)
        with self._admission.admit(call.tenant), self.version_for(request, task) as task:
            generation = await self.generation(request, task, delta_tokens=1, stream=True)
            run = partial(generation.run, self.backend.engine, self._scheduler, self.backend.residency)
            async with unhurried(run) as deltas:
                async for delta in deltas:
                    if delta.finish_reason:
                        call.count_in(self._usage)
                    message = encoding.stream_response(delta, generation)
                    # Skip deltas without text for the reader, such as most deltas of working.
                    if message.ByteSize() or generation.marker is None:
                        yield message

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        self._admission.check_serving()
        violations, size, after = page_of(request)
        if violations:
            raise invalid_argument(violations)
        ids, tasks = await self.visible(), self.catalog.tasks
        begin = bisect_right(ids, after)
        end = begin + size
        return pb.ListTasksResponse(
            tasks=(encoding.task(tasks[task_id]) for task_id in ids[begin:end] if task_id in tasks),
            next_page_token=page_token(ids[end - 1]) if end < len(ids) else "",
        )

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> pb.GetTaskResponse:
        task = self.find(request.task_id)
        self._admission.check_serving()
        if task is None:
            raise self.not_found(request.task_id)
        return pb.GetTaskResponse(task=encoding.task(task))

    def find(self, task_id: str, call: Call | None = None) -> ServedTask | None:
        """Return a task that the call's tenant may ask; permission is checked only here. Labels the call.

        By default, for the current call.
        """
        call = call or current_call.get()
        task = self.catalog.tasks.get(task_id)
        if task is None or not call.tenant.allows(task_id):
            call.task = UNKNOWN_TASK
            return None
        call.task = task_id
        return task

    def task(self, task_id: str) -> ServedTask:
        """Like `find`, for the current call. Raises `not_found`."""
        task = self.find(task_id)
        if task is None:
            raise self.not_found(task_id)
        return task

    def not_found(self, task_id: str) -> RequestFailedError:
        """The failure for a task that `find` refuses; the same for a missing task and for a forbidden one."""
        if not task_id:
            return invalid_argument([Violation("task_id", "found none; allowed: a task that ListTasks shows")])
        tenant = current_call.get().tenant
        return task_not_found(task_id, filter(tenant.allows, self.catalog.near(task_id)))

    async def visible(self) -> Sequence[str]:
        """The sorted ids of tasks that the current call's tenant may see."""
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

    async def generation(
        self,
        request: pb.GenerateRequest,
        task: ServedTask | None,
        delta_tokens: int,
        *,
        apart: bool = False,
        stream: bool = False,
        call: Call | None = None,
        document: Document | None = None,
    ) -> Generation:
        """Make a generation from a request. A large one, or any with `apart`, is tokenized in a thread.

        Raises NOT_FOUND or INVALID_ARGUMENT.
        """
        call = call or current_call.get()
        self._check_generates(request, task)
        # Tenants do not share cached blocks by default, because answer times would reveal another tenant's prompts.
        cache_salt = None if self._directory.current.share_prefix_cache else call.tenant.id
        own = None
        if request.HasField("answer"):
            spec = task.spec if task else None
            own = await self._own_types.constraint(request, spec, call.tenant, self.backend.engine)
        sight = None
        if task is not None and task.spec.picture is not None and not request.without_adapter:
            sight = Sight(request, task, self.classifier)
        job = await self._job(
            Received(
                request,
                task,
                call.tenant,
                cache_salt=cache_salt,
                delta_tokens=delta_tokens,
                stream=stream,
                own=own,
                document=document,
                sight=sight,
            ),
            apart=apart,
        )
        if sight is not None:
            sight.check()
        if self._log_prompts:
            prompt = self.backend.engine.prompts.tokenizer.decode(job.prompt_ids)
            logger.info("prompt", extra={"fields": {"request_id": call.request_id, "prompt": prompt}})
        return Generation(job, call, self._metrics, sight)

    def _check_generates(self, request: pb.GenerateRequest, task: ServedTask | None) -> None:
        """Raise NOT_FOUND, or INVALID_ARGUMENT for a task of images."""
        if task is None and (request.task_id or not self._generates):
            raise self.not_found(request.task_id)
        if task is not None and task.spec.image is not None:
            allowed = "tasks of texts (Classify and Score take images)"
            found = f"found {task.spec.id!r}, a task of images; allowed: {allowed}"
            raise invalid_argument([Violation("task_id", found)])

    async def _job(self, received: Received, *, apart: bool) -> GenerationJob:
        """The job of a request, tokenized here or in a thread. Raises INVALID_ARGUMENT."""
        size = received.request.ByteSize()
        work = partial(validate, received, self.backend.engine.prompts, self.backend.limits)
        if apart or size > TOKENIZE_APART_BYTES:
            job = await self._tokenizing.run(received.tenant, size, work)
        else:
            job = work()
        if isinstance(job, list):
            raise invalid_argument(job)
        return job

    @contextmanager
    def version_for(
        self, request: pb.GenerateRequest, task: ServedTask | None, *, prefetch: bool = True
    ) -> Iterator[ServedTask | None]:
        """The task with the version that answers this request; holds the version while the block runs.

        With `prefetch`, a version that is not in the engine starts to load.
        """
        if task is not None and task.spec.id in self.catalog.splits:
            task = self.catalog.choose(task, _routing_key(request))
        # Do not load for a text request to an image task, which will be refused.
        if task is None or task.version is None or task.spec.image is not None or request.without_adapter:
            yield task
            return
        with self.backend.residency.hold(task.version):
            if prefetch:
                self.backend.residency.prefetch(task.version)
            yield task


def _routing_key(request: pb.GenerateRequest) -> bytes:
    if request.routing_key:
        return request.routing_key.encode()
    given = request.WhichOneof("input")
    value = getattr(request, given) if given else ""
    key = value.encode() if isinstance(value, str) else value.SerializeToString(deterministic=True)
    return key + request.image.SerializeToString(deterministic=True) if request.HasField("image") else key
