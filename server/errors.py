"""Errors of requests, and their gRPC statuses with google.rpc details."""

import difflib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"
# A status is sent in HTTP/2 trailers, which clients limit to 8 KiB in total.
_MAX_MESSAGE = 600
_MAX_DESCRIPTION = 240
_MAX_VIOLATIONS_BYTES = 2500
_SHOWN = 128
# Most known ids that are fully compared with an unknown one.
_COMPARED = 6
# Rough seconds of an engine's restart.
RESTART_RETRY_S = 20.0


@dataclass(frozen=True)
class Violation:
    """One error in one field of a request."""

    field: str
    description: str


class RequestFailedError(Exception):
    """A request that ends in a status other than OK."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Message] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = shorten(message, _MAX_MESSAGE)
        self.details = tuple(details)

    def status(self) -> status_pb2.Status:
        """Code, message and details."""
        packed = []
        for detail in self.details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)

    def status_details(self) -> bytes:
        """The value of the `grpc-status-details-bin` trailer."""
        return bytes(self.status().SerializeToString())


class EngineDeadError(Exception):
    """The engine has died, or hung and was killed; the server starts another."""


class EngineAbortedError(Exception):
    """The engine aborted one sequence by itself."""


class AdapterError(Exception):
    """An adapter version cannot serve; the message says why. `public`: what tenants may know of it."""

    public = "the task's adapter cannot be loaded now; the server's log says why"


def task_not_found(task_id: str, known: Iterable[str]) -> RequestFailedError:
    """No such task; names the nearest of the `known` ids."""
    shown = shorten(task_id, _SHOWN)
    # Compare only the likeliest ids: difflib's ratio takes up to milliseconds per pair, and clients choose how often it
    # runs.
    likeliest = heapq.nlargest(_COMPARED, known, key=lambda each: _alike(shown, each))
    near = difflib.get_close_matches(shown, likeliest, n=3, cutoff=0.6)
    message = f"no task {shown!r}" + (f"; near: {', '.join(near)}" if near else "; ListTasks has them all")
    return not_found("mtlora.v1.Task", shown, message)


def _alike(one: str, other: str) -> float:
    """The share of two ids' characters in their common prefix and suffix."""
    begin = _common(one, other)
    end = _common(one[begin:][::-1], other[begin:][::-1])
    return 2 * (begin + end) / (len(one) + len(other))


def _common(one: str, other: str) -> int:
    """The length of the common beginning."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def not_found(kind: str, name: str, message: str) -> RequestFailedError:
    """No such resource. `kind`: the resource's message in the contract."""
    info = error_details_pb2.ResourceInfo(
        resource_type=kind, resource_name=shorten(name, _SHOWN), description=shorten(message, _MAX_MESSAGE)
    )
    return RequestFailedError(grpc.StatusCode.NOT_FOUND, message, [info])


def invalid_argument(violations: Sequence[Violation]) -> RequestFailedError:
    bad_request = error_details_pb2.BadRequest()
    for violation in violations:
        bad_request.field_violations.add(
            field=shorten(violation.field, _SHOWN), description=shorten(violation.description, _MAX_DESCRIPTION)
        )
        if bad_request.ByteSize() > _MAX_VIOLATIONS_BYTES:
            del bad_request.field_violations[-1]
            break
    first = bad_request.field_violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    message = f"{first.field}: {first.description}{more}"
    return RequestFailedError(grpc.StatusCode.INVALID_ARGUMENT, message, [bad_request])


def resource_exhausted(message: str, retry_after_s: float) -> RequestFailedError:
    return RequestFailedError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, [_retry_info(retry_after_s)])


def quota_exceeded(subject: str, quota: str, retry_after_s: float | None) -> RequestFailedError:
    """A request exceeds a limit of `subject`, such as `tenant:NAME`; `quota` names the limit and its value.

    `retry_after_s` is None if waiting does not help.
    """
    violation = error_details_pb2.QuotaFailure.Violation(subject=subject, description=quota)
    details: list[Message] = [error_details_pb2.QuotaFailure(violations=[violation])]
    if retry_after_s is not None:
        details.insert(0, _retry_info(retry_after_s))
    return RequestFailedError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{subject}: over its quota: {quota}", details)


def deadline_out_of_reach(message: str) -> RequestFailedError:
    return RequestFailedError(grpc.StatusCode.DEADLINE_EXCEEDED, message)


def unauthenticated(message: str) -> RequestFailedError:
    return RequestFailedError(grpc.StatusCode.UNAUTHENTICATED, message)


def slow_reader(message: str) -> RequestFailedError:
    """The error of a stream whose reader does not read."""
    return RequestFailedError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)


def late_message(message: str) -> RequestFailedError:
    """The error of a call whose message did not arrive after its headers."""
    return RequestFailedError(grpc.StatusCode.DEADLINE_EXCEEDED, message)


def unavailable(message: str, retry_after_s: float) -> RequestFailedError:
    return RequestFailedError(grpc.StatusCode.UNAVAILABLE, message, [_retry_info(retry_after_s)])


def from_exception(error: Exception) -> RequestFailedError:
    """The status of any exception. An unknown failure is INTERNAL, without its cause."""
    if isinstance(error, RequestFailedError):
        return error
    if isinstance(error, EngineDeadError):
        return unavailable("the engine has died and is being started again", RESTART_RETRY_S)
    if isinstance(error, AdapterError):
        return unavailable(error.public, 5.0)
    if isinstance(error, EngineAbortedError):
        return unavailable("the engine aborted this request", 1.0)
    return RequestFailedError(grpc.StatusCode.INTERNAL, "internal error; see the server's log for this request id")


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)
