"""Estimates how long a request will take, from recent requests."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_MEMORY = 0.1
_MAX_TASKS = 4096
# Seconds after which measurements are ignored: the engine's speed may have changed.
_STALE_S = 10.0


@dataclass
class _Measured:
    """Moving averages, in seconds, at one number of running sequences."""

    at: float
    first_token: float
    per_token: float
    whole: float


class ServiceTimes:
    """Times in the engine since the hand-over of a sequence, by the number of concurrent sequences.

    Estimates are rather too short, so that a request is refused only if its deadline is really out of reach. They need
    measurements of the last seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_load: dict[int, _Measured] = {}
        self._tokens: OrderedDict[str, float] = OrderedDict()

    def observe(self, task: str, tokens: int, first_token_s: float, whole_s: float, running: int) -> None:
        """Count a finished sequence: its generated tokens, and how many sequences (itself included) ran when it began.

        A sequence without tokens ended after `first_token_s`.
        """
        now, load = self._clock(), running.bit_length()
        held = self._by_load.get(load)
        if held is None or now - held.at > _STALE_S:
            held = self._by_load[load] = _Measured(now, first_token_s, 0.0, whole_s)
        else:
            held.at = now
            held.first_token += _MEMORY * (first_token_s - held.first_token)
            held.whole += _MEMORY * (whole_s - held.whole)
        if tokens > 1:
            # Weigh by tokens: a short sequence's steps may have been slow because of another one's prefill.
            share = 1 - (1 - _MEMORY) ** (tokens - 1)
            held.per_token += share * ((whole_s - first_token_s) / (tokens - 1) - held.per_token)
        self._tokens[task] = self._tokens.get(task, tokens) + _MEMORY * (tokens - self._tokens.get(task, tokens))
        self._tokens.move_to_end(task)
        if len(self._tokens) > _MAX_TASKS:
            self._tokens.popitem(last=False)

    def service_s(self, task: str, max_new_tokens: int, running: int) -> float | None:
        """Seconds in the engine for a request of this task, handed over beside `running` others; None if unknown."""
        if (measured := self._measured(running + 1)) is None:
            return None
        tokens = min(float(max_new_tokens), self._tokens.get(task, 1.0))
        return measured.first_token + max(0.0, tokens - 1) * measured.per_token

    def wait_s(self, ahead: int, turns: int) -> float | None:
        """Seconds until `ahead` requests got their turn, while all of `turns` are taken; None if unknown."""
        measured = self._measured(turns)
        return None if measured is None else ahead * measured.whole / turns

    def _measured(self, running: int) -> _Measured | None:
        now = self._clock()
        loads = [
            load for load, held in self._by_load.items() if load <= running.bit_length() and now - held.at <= _STALE_S
        ]
        return self._by_load[max(loads)] if loads else None
