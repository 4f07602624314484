"""A rate limit that allows bursts."""


class TokenBucket:
    """Fills at a rate up to a capacity. Its content may become negative; it must then refill before it gives anything.

    That happens for amounts above the capacity, which need only a full bucket. The rate is an argument of every call,
    because it may change.
    """

    def __init__(self, now: float) -> None:
        self._level: float | None = None
        self._at = now

    def seconds_until(self, amount: float, rate: float, capacity: float, now: float) -> float:
        """Seconds until `amount`, but at most the capacity, can be taken; 0 if it can be taken now."""
        missing = min(amount, capacity) - self._refill(rate, capacity, now)
        return max(0.0, missing / rate)

    def take(self, amount: float, rate: float, capacity: float, now: float) -> None:
        """Take `amount`; the content may become negative."""
        self._level = self._refill(rate, capacity, now) - amount

    def give_back(self, amount: float, rate: float, capacity: float, now: float) -> None:
        """Return an unused amount."""
        self._level = min(capacity, self._refill(rate, capacity, now) + amount)

    def _refill(self, rate: float, capacity: float, now: float) -> float:
        # New buckets are full.
        level = capacity if self._level is None else self._level + (now - self._at) * rate
        self._level, self._at = min(capacity, level), now
        return self._level
