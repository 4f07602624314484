"""Runs one request through scheduler, residency and engine, and collects its answer."""

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from server.call import Call
from server.engine import Engine
from server.job import Delta, FinishReason, GenerationJob, TokenLogprobs
from server.registry.residency import Residency
from server.scheduling import Reservation, Scheduler
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from server.rpc.seeing import Sight


class AnswerSplitter:
    """Splits a growing text into working and answer at the first marker.

    `working` is the working returned so far; empty if the text ended without a marker.
    """

    def __init__(self, marker: str | None) -> None:
        self._marker = marker
        self._held = ""
        self.working = ""

    def feed(self, text: str, *, last: bool) -> tuple[str, str]:
        """(working, text of the answer) that the next piece adds.

        A text without a marker is all answer: the last call returns it completely, including parts returned as working
        before.
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
        # The end of the text may be a part of the marker: hold it back.
        kept = max(n for n in range(len(self._marker)) if self._held.endswith(self._marker[:n]))
        working, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self.working += working
        return working, ""


@dataclass
class Generation:
    """Runs a job once, then holds the complete answer. Times are seconds since the request was received."""

    job: GenerationJob
    call: Call
    metrics: Metrics
    # The image of a task that takes one.
    sight: "Sight | None" = None
    text: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    cumulative_logprob: float | None = None
    cached_tokens: int = 0
    working_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    queue_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    # A time of time.monotonic().
    first_token_at: float = 0.0

    async def run(
        self,
        engine: Engine,
        scheduler: Scheduler,
        residency: Residency,
        emit: Callable[[Delta], None] = lambda _: None,
        *,
        reserved: Reservation | None = None,
    ) -> None:
        """Wait for the job's turn and its adapter version, then run it to its end; cancelling aborts it in the engine.

        `emit` is called with every delta, with working and answer separated. An exception from it ends the job.
        `reserved`: see `Scheduler.turn`.
        The caller must hold the version. Raises AdapterError if it cannot be loaded.
        """
        call = self.call
        try:
            await self._run(engine, scheduler, residency, emit, reserved)
        except BaseException as error:
            call.failed(self.job, error)
            raise
        self.metrics.observe_e2e(call.tenant.id, self.total_s, call.exemplar)
        if call.trace:
            call.trace.answered(self.finish_reason, self.cached_tokens, self.working_tokens)
        if call.genai:
            call.genai.answered(self.job, self.completion_tokens, self.ttft_s, self.total_s)

    async def _run(
        self,
        engine: Engine,
        scheduler: Scheduler,
        residency: Residency,
        emit: Callable[[Delta], None],
        reserved: Reservation | None,
    ) -> None:
        """The job's sequence; `run` accounts for the whole answer."""
        job, call, sight = self.job, self.call, self.sight
        version = None if job.without_adapter else job.task.version
        splitter = AnswerSplitter(self.marker)
        if sight is not None:
            job = self.job = replace(job, soft=await sight.look(call))
        async with scheduler.turn(call.tenant, job, call.deadline, reserved) as turn:
            if call.trace and not job.further:
                call.trace.submitted(job)
            async with (
                residency.lease(version, turn.aside) if version else nullcontext(),
                aclosing(engine.generate(job)) as deltas,
            ):
                turn.submitted()
                # Count an input once, although several generations may answer one call.
                if not job.further:
                    call.sequences += 1
                    call.prompt_tokens += len(job.prompt_ids)
                async for delta in deltas:
                    if self.marker is not None:
                        reasoning, text = splitter.feed(delta.text, last=delta.finish_reason is not None)
                        delta = replace(delta, text=text, reasoning=reasoning)
                        self.reasoning = splitter.working
                    self._observe(delta)
                    if delta.finish_reason and splitter.working:
                        self.working_tokens = engine.prompts.working_tokens(self.token_ids, splitter.working)
                    if delta.tokens and not turn.tokens:
                        turn.found(self.cached_tokens)
                    if delta.tokens:
                        turn.served(delta.tokens, self.first_token_at)
                    emit(delta)

    @property
    def marker(self) -> str | None:
        """The marker between working and answer; None for the backbone alone, which was not trained to write it."""
        return None if self.job.without_adapter else self.job.task.spec.answer_marker

    @property
    def answer(self) -> str:
        """The whole text, in the form of a unary reply."""
        return self.text.strip() if self.job.strip else self.text

    def _observe(self, delta: Delta) -> None:
        if not self.queue_s and delta.scheduled_at is not None:
            self.queue_s = max(0.0, delta.scheduled_at - self.call.received)
            if not self.job.further:
                self.metrics.observe_queue(self.queue_s, self.call.exemplar)
            if self.call.trace:
                self.call.trace.scheduled(delta.scheduled_at)
        if delta.tokens:
            self._time(delta)
        self.text += delta.text
        self.logprobs += delta.logprobs
        if self.job.return_token_ids or self.marker is not None:
            self.token_ids += delta.token_ids
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.cumulative_logprob = delta.cumulative_logprob
        self.completion_tokens += delta.tokens
        self.call.completion_tokens += delta.tokens
        self.finish_reason = delta.finish_reason

    def _time(self, delta: Delta) -> None:
        call, now, tokens = self.call, time.monotonic(), delta.tokens
        if not self.completion_tokens:
            self.cached_tokens = delta.cached_tokens
            # In a piece of several tokens, the first came earlier: use the engine's time of it.
            came = delta.first_token_at if tokens > 1 and delta.first_token_at is not None else now
            self.first_token_at = min(now, max(call.received, came))
            self.ttft_s = self.total_s = self.first_token_at - call.received
            if not self.job.further:
                call.cached_tokens += delta.cached_tokens
                self.metrics.observe_ttft(call.tenant.id, self.ttft_s, call.exemplar)
            if call.trace:
                call.trace.step(1, self.first_token_at)
            tokens -= 1
        if tokens:
            self.metrics.itl.observe((now - call.received - self.total_s) / tokens, tokens)
            self.total_s = now - call.received
            if call.trace:
                call.trace.step(tokens, now)
