"""Runs several sequences of one call concurrently: the samples of a request, the items of a batch."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, aclosing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import grpc
from mtlora_pb.v1 import inference_pb2 as pb

from server.accounting import Usage
from server.call import Call, current_call
from server.errors import RequestFailedError, Violation, invalid_argument
from server.job import GenerationJob, Job, Lane, ServedTask
from server.registry.residency import Residency
from server.rpc.documents import Document
from server.rpc.failures import failure_of
from server.rpc.generation import Generation
from server.rpc.pieces import in_pieces
from server.rpc.validation import samples_of
from server.scheduling import Admission, Reservation, Scheduler
from server.telemetry.metrics import Metrics

# Unary calls get tokens in batches: each hand-over delays the next step. Tenants' counts are updated once per such
# batch.
UNARY_DELTA_TOKENS = 64
# Texts with more bytes than this are tokenized in a thread, so that they do not delay other streams.
TOKENIZE_APART_BYTES = 8192
# Most sequences of one call.
MAX_BATCH = 1024


class Message(Protocol):
    """An input of a call: a GenerateRequest, or a Picture."""

    def ByteSize(self) -> int: ...


class Run(Protocol):
    """The work of one input in an engine, run once: a Generation or a Classification."""

    @property
    def job(self) -> Job: ...
    async def run(
        self, engine: Any, scheduler: Scheduler, residency: Residency, *, reserved: Reservation | None = None
    ) -> None: ...


M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Run)
# Makes an item's sequences from its valid request.
Expand = Callable[[R], Sequence[R]]


@dataclass(eq=False)
class Item(Generic[M, R]):
    """One input of a call, and its result.

    document: the document, in a call about one. samples: number of requested sequences. generations: one per sample.
    failure: why there is no answer.
    """

    request: M
    task: ServedTask | None
    call: Call
    samples: int
    index: int = 0
    document: Document | None = None
    generations: Sequence[R] = ()
    failure: RequestFailedError | None = None


TextItem = Item[pb.GenerateRequest, Generation]


def answering(generations: Sequence[Generation]) -> Sequence[Generation]:
    """The generations to return: all in order, or the likeliest first."""
    n = generations[0].job.n
    if n == len(generations):
        return generations
    return sorted(generations, key=lambda each: each.cumulative_logprob or 0.0, reverse=True)[:n]


def text_items(
    find: Callable[[str, Call], ServedTask | None], requests: Sequence[pb.GenerateRequest], name: str, method: str
) -> list[TextItem]:
    """A call's inputs, each a call of its own for usage, metrics and the log. Raises INVALID_ARGUMENT.

    find: `InferenceServicer.find`. name: the field of the inputs, for messages.
    """
    call = current_call.get()
    if not 1 <= len(requests) <= MAX_BATCH:
        raise invalid_argument([Violation(name, f"found {len(requests)}; allowed: 1 to {MAX_BATCH}")])
    items = []
    for index, each in enumerate(requests):
        own = call.item(index, method)
        task = find(each.task_id, own)
        items.append(TextItem(each, task, own, samples_of(each, task), index))
    if (sequences := sum(item.samples for item in items)) > MAX_BATCH:
        raise invalid_argument([Violation(name, f"found {sequences} samples; allowed: 1 to {MAX_BATCH}")])
    return items


# The context of items that need no preparation.
_AS_THEY_ARE: AbstractAsyncContextManager[None] = nullcontext()


def samples(first: Generation) -> list[Generation]:
    """A generation for each sample of a request."""
    return [Generation(job, first.call, first.metrics, first.sight) for job in _sample_jobs(first.job)]


def _sample_jobs(job: GenerationJob) -> Iterator[GenerationJob]:
    """A job for each sample, with a seed of its own if the request has one. The first reports on the prompt."""
    yield job
    sampling = job.sampling
    for sample in range(1, job.best_of):
        seed = None if sampling.seed is None else (sampling.seed + sample) % (1 << 63)
        more = sampling.more and replace(sampling.more, prompt_logprobs=0)
        yield replace(job, sampling=replace(sampling, seed=seed, more=more))


async def side_by_side(
    items: Sequence[Item[M, R]], places: int, run: Callable[[R], Awaitable[None]]
) -> AsyncGenerator[Item[M, R], None]:
    """Run the items' generations in order, `places` at a time; gives an item when all its generations have ended.

    A failure is stored in its item. Closing the iterator cancels running generations.
    """
    waiting = iter([(item, generation) for item in items for generation in item.generations])
    left = {item: len(item.generations) for item in items}
    ended: asyncio.Queue[Item[M, R]] = asyncio.Queue()

    async def work() -> None:
        for item, generation in waiting:
            try:
                if item.failure is None:
                    await run(generation)
            except Exception as error:
                item.failure = failure_of(error, item.call.request_id)
            left[item] -= 1
            if not left[item]:
                ended.put_nowait(item)

    workers = [asyncio.create_task(work()) for _ in range(min(places, sum(left.values())))]
    try:
        for _ in items:
            yield await ended.get()
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def finish(ended: AsyncGenerator[Item[M, R], None]) -> None:
    """Run all items to the end."""
    async with aclosing(ended):
        async for _ in ended:
            pass


MContra = TypeVar("MContra", contravariant=True)
RCo = TypeVar("RCo", covariant=True)


class Service(Protocol[MContra, RCo]):
    """The interface to run one kind of items; see InferenceServicer."""

    @property
    def backend(self) -> Any: ...
    def version_for(
        self, request: MContra, task: ServedTask | None, /, *, prefetch: bool
    ) -> AbstractContextManager[ServedTask | None]: ...
    async def generation(
        self,
        request: MContra,
        task: ServedTask | None,
        delta_tokens: int,
        /,
        *,
        apart: bool,
        call: Call,
        document: Document | None,
    ) -> RCo: ...


class Batches(Generic[M, R]):
    """Runs the items of a call through `service`, as it runs one request. lane: whose turns and places they take."""

    def __init__(
        self,
        service: Service[M, R],
        admission: Admission,
        scheduler: Scheduler,
        usage: Usage,
        metrics: Metrics,
        lane: Lane = Lane.TEXT,
    ) -> None:
        self._service = service
        self._lane = lane
        self._admission = admission
        self._scheduler = scheduler
        self._usage = usage
        self._metrics = metrics

    async def whole(self, items: Sequence[Item[M, R]], expand: Expand[R]) -> None:
        """Run the items of the current call; the first failure ends all of them."""
        await finish(self._run(items, places=sum(item.samples for item in items), strict=True, expand=expand))

    async def run(
        self,
        items: Sequence[Item[M, R]],
        expand: Expand[R],
        prepared: AbstractAsyncContextManager[None] = _AS_THEY_ARE,
    ) -> AsyncGenerator[Item[M, R], None]:
        """Run the items of the current call, and account for each at its end.

        `expand` turns an item's valid request into the sequences that it runs. `prepared` is entered after the call has
        got its places.
        """
        call = current_call.get()
        places = self._scheduler.places(call.tenant, sum(item.samples for item in items), self._lane)

        def settle(item: Item[M, R], code: grpc.StatusCode) -> None:
            item.call.settle(code, self._usage)
            item.call.record(code, self._metrics)

        code, left = grpc.StatusCode.CANCELLED, dict.fromkeys(items)
        try:
            batch = self._run(items, places=places, strict=False, expand=expand, prepared=prepared)
            async with aclosing(batch) as ended:
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
        self,
        items: Sequence[Item[M, R]],
        *,
        places: int,
        strict: bool,
        expand: Expand[R],
        prepared: AbstractAsyncContextManager[None] = _AS_THEY_ARE,
    ) -> AsyncGenerator[Item[M, R], None]:
        """Run items of the current call, `places` sequences at a time; gives each as it ends.

        They are admitted and charged as a whole before anything starts. `strict`: the first failure ends all.
        """
        call, size = current_call.get(), sum(item.samples for item in items)
        async with AsyncExitStack() as held:
            held.enter_context(self._admission.admit_batch(call.tenant, size, places, self._lane))
            await held.enter_async_context(prepared)
            apart = sum(item.request.ByteSize() for item in items) > TOKENIZE_APART_BYTES
            # Choose all versions before the next await, so that they come from one catalog.
            for item in items:
                chosen = self._service.version_for(item.request, item.task, prefetch=item.index < places)
                item.task = held.enter_context(chosen)
            async for item in in_pieces(items):
                await self._prepare(item, expand, strict=strict, apart=apart)
                if item.failure is not None:
                    yield item
            ready = [item for item in items if item.failure is None]
            jobs = [generation.job for item in ready for generation in item.generations]
            with self._scheduler.reserve(call.tenant, jobs) as reserved:

                async def run(sequence: R) -> None:
                    # The engine may be replaced while a long batch runs.
                    backend = self._service.backend
                    await sequence.run(backend.engine, self._scheduler, backend.residency, reserved=reserved)

                async with aclosing(side_by_side(ready, places, run)) as ended:
                    async for item in ended:
                        if strict and item.failure is not None:
                            raise item.failure
                        yield item

    async def _prepare(self, item: Item[M, R], expand: Expand[R], *, strict: bool, apart: bool) -> None:
        try:
            first = await self._service.generation(
                item.request, item.task, UNARY_DELTA_TOKENS, apart=apart, call=item.call, document=item.document
            )
        except RequestFailedError as failure:
            if strict:
                raise
            item.failure = failure
        else:
            item.generations = expand(first)
