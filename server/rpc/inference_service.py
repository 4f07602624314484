"""The Inference service. Each method: admit, decode, call the engine, encode."""

import base64
import binascii
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
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
from server.rpc.batch import MAX_BATCH, Expand, Item, samples, side_by_side
from server.rpc.documents import Document, Documents
from server.rpc.generation import Generation
from server.rpc.pieces import in_pieces
from server.rpc.scoring import Scoring
from server.rpc.stream import unhurried
from server.rpc.validation import PromptLimits, page_size, samples_of, sharing_violation, validate
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
# Inputs of one Score.
MAX_SCORED = 256
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
        documents: Documents,
        *,
        log_prompts: bool = False,
    ) -> None:
        self.catalog = Catalog()
        self._admission = admission
        self._scheduler = scheduler
        self._directory = directory
        self._usage = usage
        self._documents = documents
        self._metrics = metrics
        self._log_prompts = log_prompts
        self._tokenizing = FairThread("tokenize")
        self._own_types = OwnTypes()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        call, task = current_call.get(), self.find(request.task_id)
        if (count := samples_of(request, task)) > 1:
            item = Item(request, task, call, count)
            async with aclosing(self._run([item], places=count, strict=True)) as ended:
                async for _ in ended:
                    pass
            return encoding.item_response(item)
        with self._admitted(call), self._version_for(request, task) as task:
            generation = await self._generation(request, task, _UNARY_DELTA_TOKENS)
            await generation.run(self.engine, self._scheduler, self.residency)
            return encoding.response(generation)

    async def GenerateBatch(self, request: pb.GenerateBatchRequest, context: Any) -> pb.GenerateBatchResponse:
        items = self._items(request)
        async with aclosing(self._run_batch(items)) as ended:
            async for _ in ended:
                pass
        return pb.GenerateBatchResponse(items=[encoding.batch_item(item) async for item in in_pieces(items)])

    async def GenerateBatchStream(
        self, request: pb.GenerateBatchRequest, context: Any
    ) -> AsyncIterator[pb.GenerateBatchStreamResponse]:
        async with aclosing(self._run_batch(self._items(request))) as ended:
            async for item in ended:
                yield pb.GenerateBatchStreamResponse(item=encoding.batch_item(item))

    async def Analyze(self, request: pb.AnalyzeRequest, context: Any) -> pb.AnalyzeResponse:
        document, items = await self._about(request)
        async with aclosing(self._run_batch(items, _led(document))) as ended:
            async for _ in ended:
                pass
        answers = [encoding.batch_item(item) async for item in in_pieces(items)]
        return pb.AnalyzeResponse(document_id=document.id, document_tokens=len(document.ids), items=answers)

    async def AnalyzeStream(self, request: pb.AnalyzeRequest, context: Any) -> AsyncIterator[pb.AnalyzeStreamResponse]:
        document, items = await self._about(request)
        async with aclosing(self._run_batch(items, _led(document))) as ended:
            async for item in ended:
                yield pb.AnalyzeStreamResponse(
                    document_id=document.id, document_tokens=len(document.ids), item=encoding.batch_item(item)
                )

    async def _about(self, request: pb.AnalyzeRequest) -> tuple[Document, list[Item]]:
        """The document of a call, and its tasks as items. Raises INVALID_ARGUMENT or NOT_FOUND."""
        self._admission.check_serving()
        source = request.WhichOneof("source")
        if source is None or (source == "document" and not request.document.strip()):
            found = "none" if source is None else "nothing but blanks"
            raise invalid_argument([Violation("document", f"found {found}; allowed: a text, or a document_id")])
        items = self._batch([document_request(each) for each in request.tasks], "tasks", "AnalyzeTask")
        document = self._documents.get(current_call.get().tenant, request.document_id) if source != "document" else None
        asked = [item.task for item in items if item.task is not None]
        template = document.template if document else next((each.spec.document_template or "" for each in asked), "")
        violations = [
            Violation(f"tasks[{item.index}].task_id", reason)
            for item in items
            if item.task is not None and (reason := sharing_violation(item.task, template))
        ]
        if violations:
            raise invalid_argument(violations)
        if not asked:
            raise self.not_found(items[0].request.task_id)
        document = document or await self._document(request.document, template)
        for item in items:
            item.document = document
            item.request.routing_key = item.request.routing_key or document.id
        return document, items

    async def _document(self, text: str, template: str) -> Document:
        """Encode a document of the current call, and keep it. Raises INVALID_ARGUMENT if it leaves a task no room."""
        tenant, longest = current_call.get().tenant, self.limits.max_model_len - 2
        rendered = template.format(document=text)
        if (found := self.prompts.fewest_tokens(rendered)) <= longest:
            encode = partial(self.prompts.prompt, rendered)
            apart = len(rendered) > _TOKENIZE_APART_BYTES
            ids = await self._tokenizing.run(tenant, len(rendered), encode) if apart else encode()
            if (found := len(ids)) <= longest:
                return self._documents.keep(tenant, template, ids)
        allowed = f"up to {longest}, which leaves room for a task and its answer in {self.limits.max_model_len}"
        raise invalid_argument([Violation("document", f"found {found} tokens or more; allowed: {allowed}")])

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        items = self._scored(request)
        async with aclosing(self._run_batch(items, self._scoring(calibrated=not request.uncalibrated))) as ended:
            async for _ in ended:
                pass
        return pb.ScoreResponse(scores=[encoding.score(item) async for item in in_pieces(items)])

    def _scored(self, request: pb.ScoreRequest) -> list[Item]:
        """The inputs, each a call of its own for usage, metrics and the log. Raises NOT_FOUND or INVALID_ARGUMENT."""
        call, task = current_call.get(), self.find(request.task_id)
        if task is None:
            raise self.not_found(request.task_id)
        if task.spec.labels is None:
            kind = task.spec.answer_type.type if task.spec.answer_type else "text"
            found = f"task {task.spec.id} answers with a {kind}; allowed: a task of labels"
            raise invalid_argument([Violation("task_id", found)])
        if not 1 <= len(request.inputs) <= MAX_SCORED:
            raise invalid_argument([Violation("inputs", f"found {len(request.inputs)}; allowed: 1 to {MAX_SCORED}")])
        items = []
        for index, each in enumerate(request.inputs):
            own = replace(call, request_id=f"{call.request_id}.{index}", method="ScoreItem", audited=None)
            one = pb.GenerateRequest(task_id=request.task_id, routing_key=each.routing_key)
            if given := each.WhichOneof("input"):
                one.MergeFrom(pb.GenerateRequest(**{given: getattr(each, given)}))
            items.append(Item(one, task, own, 1, index))
        return items

    def _scoring(self, *, calibrated: bool) -> Expand:
        return lambda first: [Scoring.of(first, self.prompts, calibrated=calibrated)]

    async def score_batch(self, requests: Sequence[pb.GenerateRequest], task: ServedTask) -> list[Generation]:
        """As `answer_batch`, with the labels scored: gives a Scoring each."""
        return await self._all(requests, task, self._scoring(calibrated=True))

    async def answer_batch(self, requests: Sequence[pb.GenerateRequest], task: ServedTask) -> list[Generation]:
        """Run requests of the current call to their ends, and give each one's best answer. `task` is what `find` gives.

        The first failure ends all of it.
        """
        return await self._all(requests, task, samples)

    async def _all(self, requests: Sequence[pb.GenerateRequest], task: ServedTask, expand: Expand) -> list[Generation]:
        call = current_call.get()
        items = [Item(each, task, call, samples_of(each, task), index) for index, each in enumerate(requests)]
        places = sum(item.samples for item in items)
        async with aclosing(self._run(items, places=places, strict=True, expand=expand)) as ended:
            async for _ in ended:
                pass
        return [item.answers[0] for item in items]

    def _items(self, request: pb.GenerateBatchRequest) -> list[Item]:
        return self._batch(request.items, "items", "GenerateBatchItem")

    def _batch(self, requests: Sequence[pb.GenerateRequest], name: str, method: str) -> list[Item]:
        """A call's inputs, each a call of its own for usage, metrics and the log. Raises INVALID_ARGUMENT.

        name: the field that they come in.
        """
        call = current_call.get()
        if not 1 <= len(requests) <= MAX_BATCH:
            raise invalid_argument([Violation(name, f"found {len(requests)}; allowed: 1 to {MAX_BATCH}")])
        items = []
        for index, each in enumerate(requests):
            own = replace(call, request_id=f"{call.request_id}.{index}", method=method, audited=None)
            task = self.find(each.task_id, own)
            items.append(Item(each, task, own, samples_of(each, task), index))
        if (sequences := sum(item.samples for item in items)) > MAX_BATCH:
            raise invalid_argument([Violation(name, f"found {sequences} samples; allowed: 1 to {MAX_BATCH}")])
        return items

    async def _run_batch(self, items: Sequence[Item], expand: Expand = samples) -> AsyncGenerator[Item, None]:
        """Run the items of the current call, and account for each at its end. `expand`: see `_run`."""
        call = current_call.get()
        places = self._scheduler.places(call.tenant, sum(item.samples for item in items))

        def settle(item: Item, code: grpc.StatusCode) -> None:
            item.call.settle(code, self._usage)
            item.call.record(code, self._metrics)

        code, left = grpc.StatusCode.CANCELLED, dict.fromkeys(items)
        try:
            async with aclosing(self._run(items, places=places, strict=False, expand=expand)) as ended:
                async for item in ended:
                    del left[item]
                    settle(item, item.failure.code if item.failure else grpc.StatusCode.OK)
                    yield item
        except RequestFailedError as failure:
            code = failure.code
            raise
        finally:
            if code is grpc.StatusCode.CANCELLED and call.expired:
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            for item in left:
                if item.call.sequences:
                    settle(item, code)

    async def _run(
        self, items: Sequence[Item], *, places: int, strict: bool, expand: Expand = samples
    ) -> AsyncGenerator[Item, None]:
        """Run items of the current call, `places` sequences at a time; gives each as it ends.

        `expand` makes what an item runs of its valid request.

        They are admitted and charged as a whole before anything starts. `strict`: the first failure ends all.
        """
        call, size = current_call.get(), sum(item.samples for item in items)
        self._scheduler.check_batch(call.tenant, size, places)
        with self._admitted(call, size, places), ExitStack() as held:
            self._scheduler.count_batch(call.tenant, size)
            apart = sum(item.request.ByteSize() for item in items) > _TOKENIZE_APART_BYTES
            # All are chosen before the first wait.
            for item in items:
                chosen = self._version_for(item.request, item.task, prefetch=item.index < places)
                item.task = held.enter_context(chosen)
            async for item in in_pieces(items):
                await self._prepare(item, expand, strict=strict, apart=apart)
                if item.failure is not None:
                    yield item
            ready = [item for item in items if item.failure is None]
            jobs = [generation.job for item in ready for generation in item.generations]
            with self._scheduler.reserve(call.tenant, jobs) as reserved:

                async def run(sequence: Any) -> None:
                    # A long batch may outlive an engine.
                    await sequence.run(self.engine, self._scheduler, self.residency, reserved=reserved)

                async with aclosing(side_by_side(ready, places, run)) as ended:
                    async for item in ended:
                        if strict and item.failure is not None:
                            raise item.failure
                        yield item

    async def _prepare(self, item: Item, expand: Expand, *, strict: bool, apart: bool) -> None:
        try:
            first = await self._generation(
                item.request, item.task, _UNARY_DELTA_TOKENS, apart=apart, call=item.call, document=item.document
            )
        except RequestFailedError as failure:
            if strict:
                raise
            item.failure = failure
        else:
            item.generations = expand(first)

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        call, task = current_call.get(), self.find(request.task_id)
        with self._admitted(call), self._version_for(request, task) as task:
            generation = await self._generation(request, task, delta_tokens=1, stream=True)
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

    def find(self, task_id: str, call: Call | None = None) -> ServedTask | None:
        """A task that the tenant of a call may ask; the one place where this is checked. Labels the call.

        By default that is the current call.
        """
        call = call or current_call.get()
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
    def _admitted(self, call: Call, requests: int = 1, places: int = 1) -> Iterator[None]:
        """Hold places for requests of a call, from receipt to end."""
        with self._admission.admit(call.tenant, places), self._scheduler.admit(call.tenant, places):
            if call.tenant.has_budget or self._usage.stuck:
                self._usage.check(call.tenant, requests)
            yield

    async def _generation(
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
        """A valid request, ready to run. A large one is tokenized beside the event loop, and so are all with `apart`.

        Raises NOT_FOUND or INVALID_ARGUMENT.
        """
        call = call or current_call.get()
        if task is None and request.task_id:
            raise self.not_found(request.task_id)
        # Tenants share no cached blocks, unless their file says so: answer times would tell of another's prompts.
        cache_salt = None if self._directory.current.share_prefix_cache else call.tenant.id
        own = None
        if request.HasField("answer"):
            own = await self._own_types.hold(request, task.spec if task else None, call.tenant, self.engine)
        arguments = (request, task, self.prompts, self.limits, call.tenant, cache_salt, delta_tokens, own, document)
        if apart or request.ByteSize() > _TOKENIZE_APART_BYTES:
            work = partial(validate, *arguments, stream=stream)
            job = await self._tokenizing.run(call.tenant, request.ByteSize(), work)
        else:
            job = validate(*arguments, stream=stream)
        if isinstance(job, list):
            raise invalid_argument(job)
        if self._log_prompts:
            prompt = self.prompts.tokenizer.decode(job.prompt_ids)
            logger.info("prompt", extra={"fields": {"request_id": call.request_id, "prompt": prompt}})
        return Generation(job, call, self._metrics)

    @contextmanager
    def _version_for(
        self, request: pb.GenerateRequest, task: ServedTask | None, *, prefetch: bool = True
    ) -> Iterator[ServedTask | None]:
        """Give the task on the version that answers this request, held until the end.

        A version that is not in the engine begins to load, unless not `prefetch`.
        """
        if task is not None and task.spec.id in self.catalog.splits:
            task = self.catalog.choose(task, _routing_key(request))
        if task is None or task.version is None or request.without_adapter:
            yield task
            return
        with self.residency.hold(task.version):
            if prefetch:
                self.residency.prefetch(task.version)
            yield task


def document_request(task: pb.DocumentTask) -> pb.GenerateRequest:
    """A task of a document as the request that it is, without the document."""
    request = pb.GenerateRequest(
        task_id=task.task_id,
        parameters=task.parameters,
        fields=task.fields,
        include_reasoning=task.include_reasoning,
        routing_key=task.routing_key,
        free=task.free,
    )
    if task.HasField("answer"):
        request.answer.CopyFrom(task.answer)
    return request


def _led(document: Document) -> Expand:
    """Of a call's sequences, all but the first are charged for their own part: the first computes the document."""
    leads = True

    def expand(first: Generation) -> list[Generation]:
        nonlocal leads
        made = samples(first)
        for each in made[leads:]:
            each.job = replace(each.job, shared=len(document.ids))
        leads = False
        return made

    return expand


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
