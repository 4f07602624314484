"""Several sequences of one call, side by side: the samples of a request, the items of a batch."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mtlora_pb.v1 import inference_pb2 as pb

from server.call import Call
from server.errors import RequestFailedError
from server.job import GenerationJob, ServedTask
from server.rpc.documents import Document
from server.rpc.failures import failure_of
from server.rpc.generation import Generation

# Sequences of one call.
MAX_BATCH = 1024


@dataclass(eq=False)
class Item:
    """One input of a call, and what became of it.

    document: what it is about, in a call about one document.
    samples: sequences that it asks for. generations: one each. failure: why it has no answer.
    """

    request: pb.GenerateRequest
    task: ServedTask | None
    call: Call
    samples: int
    index: int = 0
    document: Document | None = None
    generations: list[Generation] = field(default_factory=list)
    failure: RequestFailedError | None = None

    @property
    def answers(self) -> list[Generation]:
        """Of the generations, those that answer: all in order, or the likeliest first."""
        n = self.generations[0].job.n
        if n == len(self.generations):
            return self.generations
        return sorted(self.generations, key=lambda each: each.cumulative_logprob or 0.0, reverse=True)[:n]


# Makes what an item runs of its valid request.
Expand = Callable[[Generation], list[Generation]]


def samples(first: Generation) -> list[Generation]:
    """A generation for each sample of a request."""
    return [Generation(job, first.call, first.metrics) for job in _sample_jobs(first.job)]


def _sample_jobs(job: GenerationJob) -> Iterator[GenerationJob]:
    """A job for each sample, with a seed of its own if the request has one. The first reports on the prompt."""
    yield job
    sampling = job.sampling
    for sample in range(1, job.best_of):
        seed = None if sampling.seed is None else (sampling.seed + sample) % (1 << 63)
        more = sampling.more and replace(sampling.more, prompt_logprobs=0)
        yield replace(job, sampling=replace(sampling, seed=seed, more=more))


async def side_by_side(
    items: Sequence[Item], places: int, run: Callable[[Generation], Awaitable[None]]
) -> AsyncGenerator[Item, None]:
    """Run the items' generations, `places` at a time in order; gives each item when all of its own have ended.

    A failure goes to its item. Closing the iterator cancels what runs.
    """
    waiting = iter([(item, generation) for item in items for generation in item.generations])
    left = {item: len(item.generations) for item in items}
    ended: asyncio.Queue[Item] = asyncio.Queue()

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
