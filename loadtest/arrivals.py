"""When requests are meant to be sent, in an open loop: times in seconds from the start of a phase."""

import random
from collections.abc import Iterator


def poisson(rate: float, seconds: float, seed: str) -> Iterator[float]:
    """A Poisson process of `rate` a second, for so many seconds; the same for the same seed."""
    rng = random.Random(seed)
    now = rng.expovariate(rate)
    while now < seconds:
        yield now
        now += rng.expovariate(rate)
