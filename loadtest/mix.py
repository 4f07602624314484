"""Distributes requests over tasks or tenants: uniformly, by a Zipf law, or with one hot name."""

import difflib
from collections.abc import Sequence

from loadtest import LoadTestError

_DEFAULT_EXPONENT = 1.0
_DEFAULT_HOT_SHARE = 0.5


def weights(mix: str, names: Sequence[str], kind: str) -> list[float]:
    """The share of each name, summing to 1.

    `uniform`; `zipf:S`: 1/rank^S, ranked in the given order; `hot:NAME=SHARE`: the other names share the rest.
    Raises LoadTestError for an unknown hot name, with near matches; `kind` says what the names are.
    """
    law, _, rest = mix.partition(":")
    if law == "uniform":
        raw = [1.0] * len(names)
    elif law == "zipf":
        exponent = float(rest or _DEFAULT_EXPONENT)
        raw = [1 / rank**exponent for rank in range(1, len(names) + 1)]
    else:
        hot, _, given = rest.partition("=")
        require_known([hot], names, kind)
        share = float(given or _DEFAULT_HOT_SHARE)
        if not 0 < share <= 1:
            raise LoadTestError(f"mix {mix!r}: found a share of {share:g}; allowed: above 0, up to 1")
        others = len(names) - 1
        raw = [share if name == hot else (1 - share) / others for name in names] if others else [1.0]
    total = sum(raw)
    return [weight / total for weight in raw]


def require_known(wanted: Sequence[str], known: Sequence[str], kind: str, where: str = "the mix") -> None:
    """Raise LoadTestError with near matches if a wanted name is unknown."""
    have = set(known)
    for name in wanted:
        if name not in have:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"near: {', '.join(near)}" if near else f"allowed: {_some(known)}"
            raise LoadTestError(f"no {kind} {name!r} (in {where}); {hint}")


def _some(names: Sequence[str], count: int = 10) -> str:
    shown = ", ".join(names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown or "none"
