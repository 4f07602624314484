"""Where a server's knee is: the highest offered load that still holds its service level.

A load holds if goodput is at least a given share of the offered load and the latency quantile is within the service
level. The search multiplies the rate until a load does not hold, then bisects between the last load that held and the
first that did not. It knows no server: it says which rate to measure next and is told what was measured.
"""

import math
from dataclasses import dataclass

from loadtest.settings import Objective, RampSettings

# The search gives up at the starting rate divided by this.
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
        """Which parts of the service level the load breaks, in words; empty if it holds."""
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
    """Proposes rates until the knee is known to `resolution`: call `next_rate`, measure, call `add`, repeat."""

    def __init__(self, ramp: RampSettings, objective: Objective) -> None:
        self._ramp = ramp
        self._objective = objective
        self.steps: list[Step] = []
        self._holds: float | None = None
        self._fails: float | None = None

    def next_rate(self) -> float | None:
        """The rate to measure next; None when the search is over."""
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
        """Add a measurement; return whether the load held."""
        self.steps.append(step)
        holds = not step.breaches(self._objective)
        if holds:
            self._holds = step.rate
        else:
            self._fails = step.rate
        return holds

    @property
    def knee(self) -> Step | None:
        """The highest measured load that held; None if none did."""
        return max((s for s in self.steps if s.rate == self._holds), key=lambda s: s.offered, default=None)

    @property
    def bounded(self) -> bool:
        """Whether some measured load did not hold; otherwise the knee may be higher."""
        return self._fails is not None
