"""What happened to the requests of a phase, as counts and histograms."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from loadtest.histogram import Latency
from loadtest.settings import Objective
from loadtest.workload import Request
from mtlora.task import is_correct

OTHER = "(other)"
CUT_OFF = "CUT_OFF"
_MAX_ANSWERS = 20_000
_MAX_FLAWS = 20


class Answer(NamedTuple):
    """An answer to check after the run: the request's message, task and target, and the answer's text."""

    message: bytes
    task_id: str
    target: str | None
    text: str
    reasoning: str = ""


@dataclass(slots=True)
class Outcome:
    """One request that has ended. Times are seconds from the start of the phase; `intended` is when it was due.

    `status` is a gRPC status name, or CUT_OFF if the generator cancelled the request at the end of the run. `gaps` are
    the seconds between messages of a stream. `flaw` says why a reply cannot be right; empty if it can.
    """

    request: Request
    intended: float
    sent: float
    ended: float
    status: str = "OK"
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    flaw: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "OK" and not self.flaw

    def to_json(self) -> dict[str, Any]:
        """The request as a result keeps it."""
        return {
            "task_id": self.request.task_id,
            "tenant": self.request.tenant.name,
            "status": self.status,
            "intended_s": round(self.intended, 6),
            "time_to_first_token_s": None if self.ttft is None else round(self.ttft, 6),
            "seconds": round(self.e2e, 6),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.intended

    @property
    def e2e(self) -> float:
        return self.ended - self.intended


@dataclass(slots=True)
class Group:
    """Requests counted together: all, one task's, or one tenant's."""

    offered: int = 0
    ok: int = 0
    good: int = 0
    exact: int = 0
    scored: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    ttft: Latency = field(default_factory=Latency)
    itl: Latency = field(default_factory=Latency)
    e2e: Latency = field(default_factory=Latency)

    def add(self, outcome: Outcome, *, good: bool, exact: bool | None) -> None:
        """Count an outcome; its request is already counted in `offered`."""
        self.statuses[outcome.status] += 1
        if not outcome.ok:
            return
        self.ok += 1
        self.good += good
        self.scored += exact is not None
        self.exact += bool(exact)
        self.prompt_tokens += outcome.prompt_tokens
        self.completion_tokens += outcome.completion_tokens
        self.e2e.record(outcome.e2e)
        if (ttft := outcome.ttft) is not None:
            self.ttft.record(ttft)
        for gap in outcome.gaps:
            self.itl.record(gap)

    def to_json(self) -> dict[str, Any]:
        return {
            each.name: value.to_json() if isinstance(value := getattr(self, each.name), Latency) else value
            for each in fields(self)
        }


class Recorder:
    """Records one phase. Times are seconds from its start; `window` is the part that counts.

    `tasks` and `tenants` get groups of their own; all others share the group `(other)`.
    """

    def __init__(
        self, window: tuple[float, float], objective: Objective, tasks: Iterable[str], tenants: Iterable[str]
    ) -> None:
        self.window = window
        self.total = Group()
        # Every request of the phase, warm-up included, like the server's own histograms.
        self.everything = Group()
        self.tasks = {task_id: Group() for task_id in tasks}
        self.tenants = {name: Group() for name in tenants}
        # Answers that ended within the window, whenever they were due, and their tokens.
        self.ended = 0
        self.ended_tokens = 0
        self.lag = Latency()
        # The generator's own delay.
        self.held_up = Latency()
        self.in_flight = 0
        self.unreachable_in_a_row = 0
        self.last_ended = 0.0
        # Answers that differ from the exact target, with their counts; they are checked after the run.
        self.answers: Counter[Answer] = Counter()
        self.flaws: list[str] = []
        self.errors: dict[str, str] = {}
        # Every request of the window, if the result keeps them.
        self.outcomes: list[dict[str, Any]] | None = None
        self._objective = objective

    def start(self, request: Request, intended: float, now: float) -> None:
        """Record that a request is sent."""
        self.in_flight += 1
        self.everything.offered += 1
        self.lag.record(now - intended)
        if self._counts(intended):
            for group in self._groups(request):
                group.offered += 1

    def end(self, outcome: Outcome) -> None:
        """Record the end of a request."""
        self.in_flight -= 1
        self.last_ended = max(self.last_ended, outcome.ended)
        self.unreachable_in_a_row = self.unreachable_in_a_row + 1 if outcome.status == "UNAVAILABLE" else 0
        request = outcome.request
        exact = None
        if outcome.ok:
            text = outcome.text.strip()
            exact = None if request.target is None else is_correct(text, request.target)
            if not exact and len(self.answers) < _MAX_ANSWERS:
                self.answers[Answer(request.message, request.task_id, request.target, text, outcome.reasoning)] += 1
        elif outcome.flaw and len(self.flaws) < _MAX_FLAWS:
            self.flaws.append(f"{request.task_id}: {outcome.flaw}")
        elif outcome.status != "OK":
            self.errors.setdefault(outcome.status, outcome.message)
        level = self._objective
        good = outcome.ok and outcome.e2e <= level.e2e_s and (outcome.ttft is None or outcome.ttft <= level.ttft_s)
        self.everything.add(outcome, good=good, exact=exact)
        if self._counts(outcome.intended):
            if self.outcomes is not None:
                self.outcomes.append(outcome.to_json())
            for group in self._groups(request):
                group.add(outcome, good=good, exact=exact)
        if outcome.ok and self._counts(outcome.ended):
            self.ended += 1
            self.ended_tokens += outcome.completion_tokens

    def end_window(self, now: float) -> None:
        """End the window now, unless it has ended before."""
        start, end = self.window
        self.window = (start, max(start, min(end, now)))

    @property
    def seconds(self) -> float:
        """Length of the window."""
        return self.window[1] - self.window[0]

    def _counts(self, moment: float) -> bool:
        return self.window[0] <= moment < self.window[1]

    def _groups(self, request: Request) -> Iterable[Group]:
        yield self.total
        yield _group(self.tasks, request.task_id)
        yield _group(self.tenants, request.tenant.name)


def _group(groups: dict[str, Group], name: str) -> Group:
    found = groups.get(name)
    return found if found is not None else groups.setdefault(OTHER, Group())
