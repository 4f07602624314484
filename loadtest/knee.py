"""Where a server's knee is: the highest offered load that still holds its service level.

A load holds where goodput is at least a share of what was offered and the latency quantile is within the service level.
The search steps up by a factor until a load does not hold, then bisects between the last that held and the first that
did not. It knows no server: it says which rate to measure next and is told what was found.
"""

import math
from dataclasses import dataclass

from loadtest.settings import Objective, RampSettings

# Below the starting rate by this factor, no load is worth looking at.
_LOWEST = 32.0


@dataclass(frozen=True)
class Step:
    """One measured load: requests a second, and seconds at the service level's quantile."""

    rate: float
    offered: float
    throughput: float
    goodput: float
    ttft: float
    e2e: float
    mean_e2e: float = 0.0

    def breaches(self, objective: Objective) -> list[str]:
        """What of the service level the load does not hold, in words; none where it holds."""
        found = []
        percent = f"p{100 * objective.quantile:g}"
        if self.goodput < objective.goodput_share * self.offered:
            share = self.goodput / self.offered if self.offered else 0.0
            found.append(f"goodput is {share:.0%} of the offered load, below {objective.goodput_share:.0%}")
        if self.ttft > objective.ttft_s:
            found.append(f"TTFT {percent} {self.ttft:.2f} s, above {objective.ttft_s:g} s")
        if self.e2e > objective.e2e_s:
            found.append(f"E2E {percent} {self.e2e:.2f} s, above {objective.e2e_s:g} s")
        return found


class KneeSearch:
    """Asks for rates until the knee is known to `resolution`: `next_rate`, measure, `add`, and again."""

    def __init__(self, ramp: RampSettings, objective: Objective) -> None:
        self._ramp = ramp
        self._objective = objective
        self.steps: list[Step] = []
        self._holds: float | None = None
        self._fails: float | None = None

    def next_rate(self) -> float | None:
        """The rate to measure next; None where the search is over."""
        ramp = self._ramp
        if self._holds is None and self._fails is None:
            return ramp.start_rate
        if self._fails is None:
            assert self._holds is not None
            return None if self._holds >= ramp.max_rate else min(self._holds * ramp.growth, ramp.max_rate)
        if self._holds is None:
            lower = self._fails / ramp.growth
            return lower if lower * _LOWEST >= ramp.start_rate else None
        if self._fails / self._holds <= 1 + ramp.resolution:
            return None
        return math.sqrt(self._fails * self._holds)

    def add(self, step: Step) -> bool:
        """Take in what was measured; whether the load held."""
        self.steps.append(step)
        holds = not step.breaches(self._objective)
        if holds:
            self._holds = step.rate
        else:
            self._fails = step.rate
        return holds

    @property
    def knee(self) -> Step | None:
        """The highest load measured that held; None where none did."""
        return max((s for s in self.steps if s.rate == self._holds), key=lambda s: s.offered, default=None)

    @property
    def bounded(self) -> bool:
        """Whether a load was found that does not hold; else the knee is at least this."""
        return self._fails is not None
