"""Checks answers: if an answer is not the task's exact one, its input is sent again, alone, for comparison.

A model's greedy answer to an input is fixed, but it is not always the task's exact answer. So an answer is right if it
equals the exact one, or the server's answer to the same input alone. Inputs are sent again after the run: if they were
sent before it, the prefix cache would make the run faster than a real one.

In bfloat16 the last bits of a sum depend on the batch, which can flip the choice between two tokens that are almost as
likely. An answer that differs from the answer alone first at such a choice, within `tie_nats` of log-probability,
counts as a tie, not as wrong; the report says how many there were. Everything else is wrong: the text of another
request, broken text, or an answer by other weights.

The difference depends on the batch too, most where the model is unsure. So a difference that is not clearly small
is measured again among other requests. It is a tie if their median is within `tie_nats`, and no further than that from
the difference alone: a fault that shifts every answer in a batch by more is no rounding.
"""

import asyncio
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from mtlora_pb.v1 import inference_pb2 as pb

from loadtest.connection import Connection
from loadtest.departure import nats_apart, nats_between, whole
from loadtest.recorder import Answer
from loadtest.tenants import Tenant

_TOP = 5
_LINE_EVERY_S = 5.0
_MOST_SHOWN = 20
# A difference above this share of `tie_nats` is measured again beside these numbers of other requests.
_CLEAR = 0.5
_COMPANY = (1, 2, 4, 8, 12, 16, 24, 32)
_LEAST_MEASURED = len(_COMPANY) // 2
_MOST_AGAIN = 50


@dataclass
class Checked:
    """Counts of requests by the verdict on their answer. `unchecked`: asking again failed."""

    exact: int = 0
    same_alone: int = 0
    ties: int = 0
    wrong: int = 0
    unchecked: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    # For each tie, the nats by which the token alone was likelier than the token in the batch.
    tie_nats: list[float] = field(default_factory=list)
    # For each choice that was measured again, the nats alone and then in company; below 0 if the order had changed.
    measured_again: list[list[float]] = field(default_factory=list)

    def add_wrong(
        self, answer: Answer, count: int, came: str, alone: str | None = None, nats: float | None = None
    ) -> None:
        """Count a wrong answer; keep the first few.

        alone: the answer to the same input alone. nats: by how much its token was likelier where they differ; None if
        the other token is not among the likely ones.
        """
        self.wrong += count
        if len(self.examples) < _MOST_SHOWN:
            found = {"task": answer.task_id, "answer": came, "alone": alone, "target": answer.target, "nats": nats}
            self.examples.append(found)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


async def ask_again(
    connection: Connection,
    tenant: Tenant,
    answers: Mapping[Answer, int],
    tasks: Mapping[str, pb.Task],
    *,
    tie_nats: float,
    timeout_s: float,
    stopped: Callable[[], bool] = lambda: False,
) -> Checked:
    """Ask every answer's input again, one at a time, and judge the answers. `tasks`: the server's tasks by id.

    A difference near `tie_nats` or above is measured again among other inputs.
    """
    asker = _Asker(connection, tenant, timeout_s)
    checked = Checked()
    by_message: dict[bytes, list[tuple[Answer, int]]] = {}
    for answer, count in answers.items():
        by_message.setdefault(answer.message, []).append((answer, count))
    told = time.monotonic()
    for done, (message, asked) in enumerate(by_message.items()):
        if time.monotonic() - told >= _LINE_EVERY_S:
            told = time.monotonic()
            print(f"  check: {done} of {len(by_message)} inputs asked again alone", flush=True)
        reply = None if stopped() else await asker.with_logprobs(message)
        for answer, count in asked:
            if reply is None:
                checked.unchecked += count
                continue
            task = tasks[answer.task_id]
            came, alone = whole(answer.reasoning, answer.text, task), whole(reply.reasoning, reply.text, task)
            if " ".join(came.split()) == " ".join(alone.split()):
                checked.same_alone += count
                continue
            apart = nats_apart(came, reply.logprobs, task.stop)
            tie = apart is not None and apart <= tie_nats
            again = apart is not None and apart > _CLEAR * tie_nats and len(checked.measured_again) < _MOST_AGAIN
            if apart is not None and again and not stopped():
                company = await _in_company(asker, message, list(by_message), came, alone, task)
                checked.measured_again.append([round(each, 4) for each in (apart, *company) if math.isfinite(each)])
                if len(company) >= _LEAST_MEASURED:
                    median = statistics.median(company)
                    tie = abs(median) <= tie_nats and abs(apart - median) <= tie_nats
            if apart is not None and tie:
                checked.ties += count
                checked.tie_nats += [round(apart, 4)] * count
            else:
                checked.add_wrong(answer, count, came, alone, apart and round(apart, 4))
    return checked


def against_targets(answers: Mapping[Answer, int]) -> Checked:
    """Judge every answer that is not the exact one as wrong. Inputs without an exact answer are not checked."""
    checked = Checked()
    for answer, count in answers.items():
        if answer.target is None:
            checked.unchecked += count
        else:
            checked.add_wrong(answer, count, answer.text)
    return checked


@dataclass(frozen=True)
class _Asker:
    connection: Connection
    tenant: Tenant
    timeout_s: float

    async def ask(self, message: bytes) -> bytes | None:
        """The serialized reply, or None if the request failed."""
        try:
            reply: bytes = await self.connection.generate(
                message, timeout=self.timeout_s, metadata=self.tenant.metadata
            )
        except grpc.aio.AioRpcError:
            return None
        return reply

    async def with_logprobs(self, message: bytes) -> pb.GenerateResponse | None:
        request = pb.GenerateRequest.FromString(message)
        request.parameters.logprobs = _TOP
        reply = await self.ask(request.SerializeToString())
        return None if reply is None else pb.GenerateResponse.FromString(reply)


async def _in_company(
    asker: _Asker, message: bytes, inputs: Sequence[bytes], came: str, alone: str, task: pb.Task
) -> list[float]:
    """Ask `message` together with some of `inputs`, several times; return the differences between the two tokens."""
    others = [each for each in inputs if each != message]
    draw = random.Random(message)
    gaps = []
    for count in _COMPANY:
        company = draw.sample(others, min(count, len(others)))
        async with asyncio.TaskGroup() as group:
            for each in company:
                group.create_task(asker.ask(each))
            reply = await asker.with_logprobs(message)
        if reply is not None:
            again = whole(reply.reasoning, reply.text, task)
            gap = nats_between(came, alone, again, reply.logprobs, task.stop)
            gaps += [] if gap is None else [gap]
    return gaps
