"""Whether the next step is worth holding up for the request that follows an answer.

A client that asks one thing after another leaves its place in the batch empty for a step: it has its answer when the
step has ended, and its next request comes when the next step has begun. Where steps are long and few sequences run,
waiting for it costs the others less than the empty place costs the engine. The idea, and the name, are of Iyer and
Druschel, "Anticipatory scheduling: A disk scheduling framework to overcome deceptive idleness in synchronous I/O" (SOSP
2001). As there, what is waited for is learned: where no request follows an answer, no step waits.
"""

from collections import deque

# Whoever takes longer than this is no client that asks one thing after another.
HORIZON_S = 0.025
# Of a step, at most so much is waited: the others' tokens come that much later.
_SHARE_OF_STEP = 0.25
# What an empty place costs, in steps of one sequence. A step with a sequence less is shorter, too.
_EMPTY_PLACE = 0.5
# Of the smoothed estimates, and of their spread, as TCP takes them of round trips (RFC 6298).
_GAIN = 1 / 16
_SPREADS = 4
_REMEMBERED = 1024


class Anticipation:
    """Learns from the ends of steps and the arrivals of requests. Times are seconds on one clock.

    `arrived` may be called from any thread, the rest from the one that makes the steps.
    """

    def __init__(self) -> None:
        # Ends of answers that no request has followed so far, and arrivals not looked at yet.
        self._ended: deque[float] = deque(maxlen=_REMEMBERED)
        self._arrived: deque[float] = deque(maxlen=_REMEMBERED)
        # Share of answers that a request follows; how long after the answer it comes, and the spread of that.
        self.follows = 0.0
        self.delay_s = HORIZON_S
        self._spread_s = 0.0
        self._step_s = 0.0

    def arrived(self, now: float) -> None:
        """A request came."""
        self._arrived.append(now)

    def stepped(self, now: float, seconds: float, finished: int) -> None:
        """A step ended that took so long and ended so many answers."""
        self._step_s = self._step_s + (seconds - self._step_s) / 4 if self._step_s else seconds
        self._match(now)
        self._ended.extend([now] * finished)

    def expected(self, now: float) -> int:
        """Answers that have just ended and that no request has followed yet."""
        self._match(now)
        return len(self._ended)

    def patience_s(self, now: float, running: int) -> float:
        """How long from now the next step should wait, at most, while so many sequences wait for it; 0: not at all."""
        if not (expected := self.expected(now)):
            return 0.0
        limit = min(self.delay_s + _SPREADS * self._spread_s, HORIZON_S, _SHARE_OF_STEP * self._step_s)
        if self.delay_s > limit:
            return 0.0
        gain = self.follows * expected * _EMPTY_PLACE * self._step_s
        cost = running * (self.follows * self.delay_s + (1 - self.follows) * limit)
        return max(0.0, limit - (now - self._ended[-1])) if gain > cost else 0.0

    def _match(self, now: float) -> None:
        """Have every arrival follow the answer that ended first; learn from it, and from answers nothing followed."""
        while self._arrived:
            at = self._arrived.popleft()
            self._expire(at)
            if self._ended and at >= self._ended[0]:
                self._learn(at - self._ended.popleft())
        self._expire(now)

    def _expire(self, now: float) -> None:
        while self._ended and self._ended[0] < now - HORIZON_S:
            self._ended.popleft()
            self.follows -= _GAIN * self.follows

    def _learn(self, delay_s: float) -> None:
        if not self.follows:
            self.delay_s, self._spread_s = delay_s, delay_s / 2
        else:
            self._spread_s += _GAIN * (abs(delay_s - self.delay_s) - self._spread_s)
            self.delay_s += _GAIN * (delay_s - self.delay_s)
        self.follows += _GAIN * (1 - self.follows)
