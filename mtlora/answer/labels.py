"""Label probabilities from next-token probabilities at each position where the labels' tokens differ."""

import math
from collections.abc import Mapping, Sequence


class LabelTree:
    """The token ids of labels as a tree.

    branches: for each prefix that several tokens may follow, the ids of the prefix and the ids that may follow. Where
    only one token may follow, no model call is needed.
    """

    def __init__(self, tokens: Mapping[str, Sequence[int]]) -> None:
        """tokens: the ids of each label, with an end token last, such as the end-of-sequence token."""
        self._tokens = {label: tuple(ids) for label, ids in tokens.items()}
        following: dict[tuple[int, ...], dict[int, None]] = {}
        for ids in self._tokens.values():
            for at, token in enumerate(ids):
                following.setdefault(ids[:at], {})[token] = None
        self.branches = [(before, tuple(after)) for before, after in following.items() if len(after) > 1]

    def probabilities(self, logprobs: Sequence[Mapping[int, float]], temperature: float = 1.0) -> dict[str, float]:
        """The probability of every label; they add up to 1.

        logprobs: for each branch, the log-probabilities of the ids that may follow; a constant may be added to all.
        """
        steps: dict[tuple[int, ...], dict[int, float]] = {}
        for (before, after), found in zip(self.branches, logprobs, strict=True):
            total = _log_sum([found[token] for token in after])
            steps[before] = {token: found[token] - total for token in after}
        logs = [
            sum(steps[ids[:at]][token] for at, token in enumerate(ids) if ids[:at] in steps)
            for ids in self._tokens.values()
        ]
        return dict(zip(self._tokens, tempered(logs, temperature), strict=True))


def tempered(logs: Sequence[float], temperature: float) -> list[float]:
    """Turn log-probabilities into probabilities at a temperature; a temperature above 1 makes them more even."""
    scaled = [log / temperature for log in logs]
    total = _log_sum(scaled)
    return [math.exp(log - total) for log in scaled]


def _log_sum(logs: Sequence[float]) -> float:
    most = max(logs)
    return most + math.log(sum(math.exp(log - most) for log in logs))
