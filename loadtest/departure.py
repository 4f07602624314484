"""Where two answers to one input depart from each other, and by how much the chosen token was likelier there."""

import math
from collections.abc import Iterable, Sequence
from itertools import takewhile

from mtlora_pb.v1 import inference_pb2 as pb


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


def nats_between(
    came: str, alone: str, again: str, logprobs: Iterable[pb.TokenLogprobs], stop: Sequence[str]
) -> float | None:
    """What a third answer, `again`, says about the choice at which `came` departed from `alone`.

    Returns by how many nats the token of `alone` was likelier than that of `came`: negative if `again` chose that of
    `came`, infinite if the other token is not in `top`. None if `again` departed from both, there or before.
    """
    common = _shared(came, alone)
    for other, mine, sign in ((came, alone, 1.0), (alone, came, -1.0)):
        if again == mine or _shared(again, mine) > common:
            apart = nats_apart(other, logprobs, stop)
            return sign * (math.inf if apart is None else apart) + 0.0  # no negative zero
    return None


def _shared(a: str, b: str) -> int:
    """Number of characters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


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
