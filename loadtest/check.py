"""Checks answers: if an answer is not the task's exact one, its input is sent again, alone, for comparison.

A model's greedy answer to an input is fixed, but it is not always the task's exact answer. So an answer is right if it
equals the exact one, or the server's answer to the same input alone. Inputs are sent again after the run: if they were
sent before it, the prefix cache would make the run faster than a real one.

In bfloat16 the last bits of a sum depend on the batch, which can flip the choice between two tokens that are almost as
likely. An answer that differs from the answer alone first at such a choice, within `tie_nats` of log-probability,
counts as a tie, not as wrong; the report says how many there were. Everything else is wrong: the text of another
request, broken text, or an answer by other weights.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from mtlora_pb.v1 import inference_pb2 as pb

from loadtest.connection import Connection
from loadtest.recorder import Answer
from loadtest.tenants import Tenant

_TOP = 5
_LINE_EVERY_S = 5.0
_MOST_SHOWN = 20


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
    """Ask every answer's input again, one at a time, and judge the answers. `tasks`: the server's tasks by id."""
    checked = Checked()
    by_message: dict[bytes, list[tuple[Answer, int]]] = {}
    for answer, count in answers.items():
        by_message.setdefault(answer.message, []).append((answer, count))
    told = time.monotonic()
    for done, (message, asked) in enumerate(by_message.items()):
        if time.monotonic() - told >= _LINE_EVERY_S:
            told = time.monotonic()
            print(f"  check: {done} of {len(by_message)} inputs asked again alone", flush=True)
        reply = None if stopped() else await _alone(connection, tenant, message, timeout_s)
        for answer, count in asked:
            if reply is None:
                checked.unchecked += count
                continue
            task = tasks[answer.task_id]
            came, alone = whole(answer.reasoning, answer.text, task), whole(reply.reasoning, reply.text, task)
            if " ".join(came.split()) == " ".join(alone.split()):
                checked.same_alone += count
                continue
            gap = nats_apart(came, reply.logprobs, task.stop)
            if gap is not None and gap <= tie_nats:
                checked.ties += count
                checked.tie_nats += [round(gap, 4)] * count
            else:
                checked.add_wrong(answer, count, came, alone, gap and round(gap, 4))
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


def whole(reasoning: str, text: str, task: pb.Task) -> str:
    """The generated text, reasoning included, with one blank on either side of the marker."""
    if not reasoning:
        return text.strip()
    return f"{reasoning.strip()} {task.answer_marker} {text.strip()}"


def nats_apart(text: str, alone: Iterable[pb.TokenLogprobs], stop: Sequence[str]) -> float | None:
    """Nats between the two tokens at which `text` departed from the answer alone; None if its token is not in `top`.

    Walks the tokens of the answer alone while `text` begins with them. `text` may have departed at any of them: the
    smallest difference counts.
    """
    found: float | None = None
    rest = text.strip()
    for position, token in enumerate(alone):
        chosen = token.chosen.token if position else token.chosen.token.lstrip()
        departs = not rest.startswith(chosen)
        for other in token.top:
            gap = token.chosen.logprob - other.logprob
            # A blank begins most tokens: it counts only where the texts depart.
            counts = other.token_id != token.chosen.token_id and (departs or other.token.strip())
            if counts and _goes_on(rest, other.token, stop, first=position == 0):
                found = gap if found is None else min(found, gap)
        if departs:
            break
        rest = rest[len(chosen) :]
    return found


def _goes_on(rest: str, token: str, stop: Sequence[str], *, first: bool) -> bool:
    """Whether an answer that continues with `rest` can have this token next. first: nothing came before `rest`."""
    ends = not token or token.startswith("<|") or any(s in token for s in stop)
    if ends:
        # The text before a stop string in the same token is part of the answer.
        before = min((token.partition(s)[0] for s in stop if s in token), key=len, default="")
        return rest.strip() == before.strip()
    # Only at its beginning has a text lost its blanks. Later a token may be one: "1pm 4pm" departs from "1pm =>" there.
    token = token.lstrip() if first else token
    return bool(token) and rest.startswith(token)


async def _alone(
    connection: Connection, tenant: Tenant, message: bytes, timeout_s: float
) -> pb.GenerateResponse | None:
    request = pb.GenerateRequest.FromString(message)
    request.parameters.logprobs = _TOP
    try:
        reply = await connection.generate(request.SerializeToString(), timeout=timeout_s, metadata=tenant.metadata)
    except grpc.aio.AioRpcError:
        return None
    return pb.GenerateResponse.FromString(reply)
