"""Decides whether a call is repeated, and after which wait."""

import random
import time
from dataclasses import dataclass

import grpc

from mtlora.client.errors import ServerError


@dataclass(frozen=True)
class Retry:
    """Repeats calls that end in UNAVAILABLE, within their deadline. Calls without a deadline are not repeated.

    The wait before the next attempt grows by `factor` from `first_s` to `most_s`, half of it at random. It is never
    shorter than the server's RetryInfo; if that wait would end after the deadline, the call fails at once.
    """

    attempts: int = 10
    first_s: float = 0.1
    most_s: float = 5.0
    factor: float = 2.0

    def wait_s(self, error: ServerError, attempt: int, left_s: float) -> float | None:
        """Seconds to wait after the failure of attempt number `attempt`; None to give up."""
        if error.code is not grpc.StatusCode.UNAVAILABLE or attempt >= self.attempts:
            return None
        backoff = min(self.most_s, self.first_s * self.factor ** (attempt - 1)) * random.uniform(0.5, 1.0)
        wait = (error.retry_after_s or 0.0) + backoff
        return wait if wait < left_s else None


class Attempts:
    """The attempts of one call. timeout: seconds for all of them; None: one attempt."""

    def __init__(self, retry: Retry | None, timeout: float | None) -> None:
        self._retry = retry
        self._until = None if timeout is None else time.monotonic() + timeout
        self._made = 0

    @property
    def left_s(self) -> float | None:
        """The timeout of the next attempt."""
        return None if self._until is None else max(0.0, self._until - time.monotonic())

    def got_on(self) -> None:
        """The last attempt made progress: restart the count of attempts."""
        self._made = 0

    def after(self, error: ServerError) -> float:
        """Seconds to wait after a failed attempt. Raises the error if there is no further attempt."""
        self._made += 1
        left = self.left_s
        wait = None if self._retry is None or left is None else self._retry.wait_s(error, self._made, left)
        if wait is None:
            raise error
        return wait
