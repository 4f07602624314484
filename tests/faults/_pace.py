"""How fast a server answers, measured first: a scenario's lengths, loads and patience follow from it."""

import statistics
from dataclasses import dataclass

from benchmarks.harness.waiting import wait_until
from mtlora.client import OPEN, Access, Client
from tests.faults._load import PARAMETERS, BackgroundLoad, questions

_IN_FLIGHT = 12
# Ends a measurement that hangs.
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Pace:
    """Medians with 12 answers of full length in flight. step_s: from token to token. answer_s: of a whole answer."""

    step_s: float
    answer_s: float

    def answers_per_s(self, max_new_tokens: int) -> float:
        """Answers of this length a second."""
        return _IN_FLIGHT / (self.answer_s - (PARAMETERS["max_new_tokens"] - max_new_tokens) * self.step_s)

    @property
    def patience_s(self) -> float:
        """Longer than any call takes that does not hang."""
        return 60.0 + 1000 * self.step_s

    def __str__(self) -> str:
        return f"a step takes {1e3 * self.step_s:.0f} ms, an answer {self.answer_s:.2f} s, {_IN_FLIGHT} at a time"


def measure_pace(client: Client, address: str, access: Access = OPEN) -> Pace:
    """Ask three times as many questions as are in flight; the first third warms up."""
    asked = questions(client, _IN_FLIGHT, seed=0)

    def ended() -> bool:
        return sum(bool(each.status) for each in load.asked) >= 3 * _IN_FLIGHT

    with BackgroundLoad(address, asked, seed=0, in_flight=_IN_FLIGHT, access=access) as load:
        wait_until(ended, _TIMEOUT_S)
    measured = [each for each in load.asked[_IN_FLIGHT : 3 * _IN_FLIGHT] if each.status == "OK"]
    return Pace(
        step_s=statistics.median(gap for each in measured for gap in each.gaps_s),
        answer_s=statistics.median(each.ended - each.began for each in measured),
    )
