"""One request on its way through the engine: what it has produced so far, and when."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from server.call import Call
from server.job import Delta, FinishReason, GenerationJob, TokenLogprobs
from server.registry.residency import Aside
from server.scheduling import Scheduler
from server.telemetry.metrics import Metrics


class GeneratesDeltas(Protocol):
    def generate(self, job: GenerationJob, aside: Aside) -> AsyncIterator[Delta]: ...


class AnswerSplitter:
    """Parts a growing text into working and answer at the first marker.

    `working` is what has been handed out as such so far; none where the text ended without a marker.
    """

    def __init__(self, marker: str | None) -> None:
        self._marker = marker
        self._held = ""
        self.working = ""

    def feed(self, text: str, *, last: bool) -> tuple[str, str]:
        """(working, text of the answer) that the next piece adds.

        All of a text without a marker is the answer: its end brings it whole, what was taken for working included.
        """
        if self._marker is None:
            return "", text
        self._held += text
        working, found, answer = self._held.partition(self._marker)
        if found:
            self._marker = None
            self.working += working
            return working, answer
        if last:
            whole, self.working = self.working + self._held, ""
            return "", whole
        # The end of it may be the beginning of the marker.
        kept = max(n for n in range(len(self._marker)) if self._held.endswith(self._marker[:n]))
        working, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self.working += working
        return working, ""


@dataclass
class Generation:
    """Runs a job once; afterwards holds the whole answer. Times are seconds from the receipt of the request."""

    job: GenerationJob
    call: Call
    metrics: Metrics
    text: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    queue_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0

    async def run(self, engine: GeneratesDeltas, scheduler: Scheduler) -> AsyncIterator[Delta]:
        """The deltas, as the engine makes them once it is the job's turn, but with working and answer apart.

        `text` is the answer's alone. Closing the iterator aborts the sequence.
        """
        # Several generations may answer one call.
        self.call.prompt_tokens += len(self.job.prompt_ids)
        splitter = AnswerSplitter(self.job.answer_marker)
        async with (
            scheduler.turn(self.call.tenant, self.job, self.call.deadline) as turn,
            aclosing(engine.generate(self.job, turn.aside)) as deltas,  # type: ignore[type-var]
        ):
            if self.call.trace:
                self.call.trace.submitted()
            async for delta in deltas:
                if delta.tokens:
                    turn.served(delta.tokens)
                reasoning, text = splitter.feed(delta.text, last=delta.finish_reason is not None)
                if self.job.answer_marker is not None:
                    delta = replace(delta, text=text, reasoning=reasoning)
                self.reasoning = splitter.working
                self._observe(delta)
                yield delta
        self.metrics.observe_e2e(self.call, self.total_s)

    @property
    def answer(self) -> str:
        """The whole text, in the form that a unary reply gives it."""
        return self.text.strip() if self.job.strip else self.text

    def _observe(self, delta: Delta) -> None:
        now = time.monotonic() - self.call.received
        if not self.queue_s and delta.scheduled_at is not None:
            self.queue_s = max(0.0, delta.scheduled_at - self.call.received)
            self.metrics.observe_queue(self.call, self.queue_s)
            if self.call.trace:
                self.call.trace.scheduled(delta.scheduled_at)
        if delta.tokens:
            if self.completion_tokens:
                self.metrics.itl.observe((now - self.total_s) / delta.tokens, delta.tokens)
            else:
                self.ttft_s = now
                self.metrics.observe_ttft(self.call, now)
            self.total_s = now
            if self.call.trace:
                self.call.trace.step(delta.tokens)
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.completion_tokens += delta.tokens
        self.call.completion_tokens += delta.tokens
        self.finish_reason = delta.finish_reason
