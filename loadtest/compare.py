"""Two results against each other: ratios, and how sure one can be of them.

A run is cut into time slices. Resampling the slices of each run with replacement, many times over, shows how far a
figure would have moved had other slices come up (bootstrap); the spread of the ratio over these draws gives its
interval, and the share of draws on one side of 1 the confidence that there is a difference at all. What changes more
slowly than a run is long, such as another program on the machine, no single run can show.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.histogram import Latency

_DRAWS = 1000
_MIN_SLICES = 5
# A difference is told where at least this share of the draws is on one side.
CONFIDENCE = 0.975
# A ratio nearer to 1 than this is of no interest, however sure.
RELEVANT = 0.02

# Name, and whether more is better.
_RATES = (
    ("answers/s", "ended_ok", True),
    ("good answers/s", "good", True),
    ("tokens/s", "ended_tokens", True),
)
_LATENCIES = (("TTFT", "ttft"), ("ITL", "itl"), ("E2E", "e2e"))
_QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Row:
    """One figure in both results, and B over A with its 95 % interval. `confidence` is that there is a difference."""

    name: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    confidence: float
    verdict: str


def compare(a: Mapping[str, Any], b: Mapping[str, Any], seed: int = 0) -> dict[str, list[Row]]:
    """Rows by phase, of the phases that both results have under one name; the rounds of a closed loop count as one."""
    mine, theirs = _phases(a), _phases(b)
    return {name: _rows(mine[name], theirs[name], seed) for name in mine if name in theirs}


def summary(rows: Mapping[str, Sequence[Row]]) -> str:
    """A verdict in a line."""
    told = [row for each in rows.values() for row in each if row.verdict != "no difference shown"]
    better = sum(row.verdict == "better" for row in told)
    worse = len(told) - better
    if not told:
        return "verdict: no difference shown"
    sure = min(row.confidence for row in told)
    what = "B is better" if not worse else "B is worse" if not better else "B is better in some, worse in others"
    return f"verdict: {what} ({better} figures better, {worse} worse, each with confidence of at least {sure:.3f})"


def _phases(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for phase in result["phases"]:
        if phase["name"] != "warm-up":
            phases.setdefault(phase["name"].partition(", round")[0], []).append(phase)
    return phases


def _rows(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for name, key, more_is_better in _RATES:
        rates = [_rates(phases, key) for phases in (a, b)]
        draws = [_draw_means(each, rng) for each in rates]
        values = [_mean(each) for each in rates]
        rows.append(_row(name, values, draws, more_is_better))
    for name, key in _LATENCIES:
        sampled = [_Sampled(phases, key) for phases in (a, b)]
        picks = [each.draw(rng) for each in sampled]
        for q in _QUANTILES:
            draws = [each.quantile(q, drawn) for each, drawn in zip(sampled, picks, strict=True)]
            values = [_whole(phases, key).quantile(q) for phases in (a, b)]
            rows.append(_row(f"{name} p{100 * q:g}", values, draws, more_is_better=False))
    return [row for row in rows if row is not None]


def _row(name: str, values: Sequence[float], draws: Sequence[Any], more_is_better: bool) -> Any:
    """None where either side has nothing to compare."""
    if not all(values):
        return None
    ratio = values[1] / values[0]
    if any(draw is None for draw in draws):
        return Row(name, values[0], values[1], ratio, float("nan"), float("nan"), 0.0, "no difference shown")
    ratios = draws[1] / np.maximum(draws[0], 1e-12)
    low, high = (float(x) for x in np.quantile(ratios, (0.025, 0.975)))
    above = float(np.mean(ratios > 1)) + 0.5 * float(np.mean(ratios == 1))
    confidence = max(above, 1 - above)
    if confidence < CONFIDENCE or abs(ratio - 1) < RELEVANT:
        verdict = "no difference shown"
    else:
        verdict = "better" if (ratio > 1) == more_is_better else "worse"
    return Row(name, values[0], values[1], ratio, low, high, confidence, verdict)


def _rates(phases: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A rate a slice; a round of a closed loop, which has no slices, is one."""
    rates: list[float] = []
    for phase in phases:
        if phase["slices"]:
            rates += [each[key] / phase["slice_s"] for each in phase["slices"]]
        else:
            rates.append(
                {
                    "ended_ok": phase["throughput_per_second"],
                    "good": phase["goodput_per_second"],
                    "ended_tokens": phase["completion_tokens_per_second"],
                }[key]
            )
    return rates


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _draw_means(values: Sequence[float], rng: np.random.Generator) -> Any:
    if len(values) < _MIN_SLICES:
        return None
    return rng.choice(np.array(values), (_DRAWS, len(values))).mean(axis=1)


def _whole(phases: Sequence[Mapping[str, Any]], key: str) -> Latency:
    whole = Latency()
    for phase in phases:
        whole.merge(Latency.decode(phase["total"][key]["hdr"]))
    return whole


class _Sampled:
    """Histograms of slices as one table, counts by value, so that a draw of slices is a sum of rows."""

    def __init__(self, phases: Sequence[Mapping[str, Any]], key: str) -> None:
        encoded = [each for p in phases for each in ([s[key] for s in p["slices"]] or [p["total"][key]["hdr"]])]
        points = [Latency.decode(each).points() for each in encoded]
        self._values = np.array(sorted({value for each in points for value, _ in each}))
        column = {value: i for i, value in enumerate(self._values)}
        self._counts = np.zeros((len(points), len(self._values)), np.float32)
        for row, each in enumerate(points):
            for value, count in each:
                self._counts[row, column[value]] += count

    def draw(self, rng: np.random.Generator) -> Any:
        """Observations up to each value, a row a draw of slices; None where there are too few slices."""
        slices = len(self._counts)
        if slices < _MIN_SLICES or not self._counts.any():
            return None
        times = rng.multinomial(slices, np.full(slices, 1 / slices), size=_DRAWS).astype(np.float32)
        return np.cumsum(times @ self._counts, axis=1)

    def quantile(self, q: float, cumulative: Any) -> Any:
        """The quantile of each draw."""
        if cumulative is None:
            return None
        return self._values[np.argmax(cumulative >= q * cumulative[:, -1:], axis=1)]
