"""Sends requests when they are due and records what comes back."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any

import grpc
from mtlora_pb.v1 import inference_pb2 as pb

from loadtest.connection import Connection
from loadtest.recorder import CUT_OFF, Outcome, Recorder
from loadtest.workload import Request

# Refused connections in a row after which the server counts as gone.
_GONE_AFTER = 50
# A client of a closed loop pauses after a failure; otherwise it would only produce failures.
_PAUSE_S = 0.2
_FINISHED = (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)


class Driver:
    """Runs one phase. `began` is its start on the monotonic clock; all other times are relative to it.

    Latency counts from the moment a request was due, not from the moment it was sent. So it includes the delay that a
    stalled server or a late generator causes (no coordinated omission).
    """

    def __init__(
        self, connection: Connection, recorder: Recorder, began: float, *, timeout_s: float, unary: bool
    ) -> None:
        self._connection = connection
        self._recorder = recorder
        self._began = began
        self._timeout_s = timeout_s
        self._ask = self._ask_unary if unary else self._ask_stream
        self._running: set[asyncio.Task[object]] = set()
        self._stopped = asyncio.Event()
        self._prefix = uuid.uuid4().hex[:12]
        self._count = 0
        self.gone = False

    def stop(self) -> None:
        """Send nothing more and cancel the requests under way."""
        self._stopped.set()
        for task in self._running:
            task.cancel()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    async def open_loop(self, due: Iterable[tuple[float, Request]]) -> None:
        """Send every request at its time, without waiting for earlier ones; return when all have ended."""
        for intended, request in due:
            if (delay := intended - self._now()) > 0:
                await self._sleep(delay)
            if self.stopped:
                break
            self._start(self._send(request, intended))
        while self._running:
            await asyncio.wait(self._running)

    async def closed_loop(self, requests: Iterator[Request], in_flight: int, until: float) -> None:
        """Keep `in_flight` requests under way until second `until` of the phase or until no request is left."""

        async def client() -> None:
            while not self.stopped and self._now() < until:
                if (request := next(requests, None)) is None:
                    return
                if not await self._send(request, self._now()):
                    await self._sleep(_PAUSE_S)

        if (delay := -self._now()) > 0:
            await self._sleep(delay)
        for _ in range(in_flight):
            self._start(client())
        while self._running:
            await asyncio.wait(self._running)

    def _now(self) -> float:
        return time.monotonic() - self._began

    async def _sleep(self, seconds: float) -> None:
        if seconds < 0.5:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _send(self, request: Request, intended: float) -> bool:
        """Ask and record; return whether the request was answered."""
        now = self._now()
        self._recorder.start(request, intended, now)
        outcome = Outcome(request, intended, now, now)
        self._count += 1
        request_id = f"{self._prefix}-{self._count}"
        try:
            summary = await self._ask(outcome, (("x-request-id", request_id), *request.tenant.metadata))
        except grpc.aio.AioRpcError as error:
            outcome.status, outcome.message = error.code().name, error.details() or ""
        except asyncio.CancelledError:
            # `stop` cancels our task. Without it, gRPC raises this when the server cancels the call.
            outcome.status = CUT_OFF if self.stopped else "CANCELLED"
        else:
            outcome.flaw = _flaw(request, summary, request_id)
            if summary is not None:
                outcome.prompt_tokens, outcome.completion_tokens = summary.prompt_tokens, summary.completion_tokens
        outcome.ended = self._now()
        self._recorder.end(outcome)
        if self._recorder.unreachable_in_a_row >= _GONE_AFTER and not self.gone:
            self.gone = True
            self.stop()
        return outcome.ok

    async def _ask_stream(self, outcome: Outcome, metadata: Any) -> pb.Summary | None:
        call = self._connection.generate_stream(outcome.request.message, timeout=self._timeout_s, metadata=metadata)
        summary, last, texts, reasoning = None, 0.0, [], []
        while not isinstance(serialized := await call.read(), type(grpc.aio.EOF)):
            now = self._now()
            if outcome.first is None:
                outcome.first = now
            else:
                outcome.gaps.append(now - last)
            last = now
            message = pb.GenerateStreamResponse.FromString(serialized)
            texts.append(message.text)
            reasoning.append(message.reasoning)
            if message.HasField("summary"):
                summary = message.summary
        outcome.text, outcome.reasoning = "".join(texts), "".join(reasoning)
        # Without an answer marker there is no reasoning: the server repeats everything as text.
        if outcome.text.startswith(outcome.reasoning):
            outcome.reasoning = ""
        return summary

    async def _ask_unary(self, outcome: Outcome, metadata: Any) -> pb.Summary | None:
        call = self._connection.generate(outcome.request.message, timeout=self._timeout_s, metadata=metadata)
        reply = pb.GenerateResponse.FromString(await call)
        outcome.text, outcome.reasoning = reply.text, reply.reasoning
        if not reply.HasField("summary"):
            return None
        # A unary answer arrives whole; the server reports when its first token was ready.
        outcome.first = outcome.sent + reply.summary.timings.time_to_first_token.ToTimedelta().total_seconds()
        return reply.summary


def _flaw(request: Request, summary: pb.Summary | None, request_id: str) -> str:
    """Why a reply cannot be right: it is incomplete or belongs to another request. Empty if it can."""
    if summary is None:
        return "the reply ended without its summary"
    if summary.task_id != request.task_id:
        return f"the reply is for task {summary.task_id!r}"
    if summary.request_id != request_id:
        return f"the reply is for request {summary.request_id!r}, this one was {request_id!r}"
    if summary.finish_reason not in _FINISHED:
        return "the reply does not say why it ended"
    if not summary.completion_tokens:
        return "the reply holds no token"
    return ""
