"""The error of a failed request, with the details in the server's status."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS = (
    error_details_pb2.BadRequest,
    error_details_pb2.QuotaFailure,
    error_details_pb2.ResourceInfo,
    error_details_pb2.RetryInfo,
)
# How gRPC's library begins its refusal of a message, in C++, Python and Go.
_TOO_LARGE = "message larger than max"


class ServerError(Exception):
    """A request that ended in a status other than OK.

    violations: (field, description) of each wrong field. quotas: (subject, description) of each quota exceeded.
    """

    def __init__(self, error: Any) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        # gRPC's own refusal names no setting.
        if _TOO_LARGE in self.message:
            self.message += "; the server's max_message_bytes allows no larger one: send a smaller input, or raise it"
        trailer = dict(error.trailing_metadata() or ())
        self.request_id = str(trailer.get("x-request-id", ""))
        self.violations: list[tuple[str, str]] = []
        self.quotas: list[tuple[str, str]] = []
        self.retry_after_s: float | None = None
        self.resource: str | None = None
        for detail in _unpack(trailer.get("grpc-status-details-bin", b"")):
            if isinstance(detail, error_details_pb2.BadRequest):
                self.violations = [(each.field, each.description) for each in detail.field_violations]
            elif isinstance(detail, error_details_pb2.QuotaFailure):
                self.quotas = [(each.subject, each.description) for each in detail.violations]
            elif isinstance(detail, error_details_pb2.ResourceInfo):
                self.resource = detail.resource_name
            elif isinstance(detail, error_details_pb2.RetryInfo):
                self.retry_after_s = detail.retry_delay.ToTimedelta().total_seconds()
        super().__init__(f"{self.code.name}: {self.message}")


class StatusOf:
    """An item's google.rpc.Status with the interface of a call's grpc.RpcError."""

    def __init__(self, status: status_pb2.Status) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return next(code for code in grpc.StatusCode if code.value[0] == self._status.code)

    def details(self) -> str:
        return str(self._status.message)

    def trailing_metadata(self) -> list[tuple[str, bytes]]:
        return [("grpc-status-details-bin", self._status.SerializeToString())]


@contextmanager
def server_errors() -> Iterator[None]:
    """Turn gRPC errors raised in this block into ServerError."""
    try:
        yield
    except grpc.RpcError as error:
        raise ServerError(error) from None


def _unpack(serialized: bytes) -> Iterator[Any]:
    try:
        packed = status_pb2.Status.FromString(serialized).details
    except DecodeError:
        return
    for each in packed:
        for kind in _DETAILS:
            if each.Is(kind.DESCRIPTOR):
                message = kind()
                each.Unpack(message)
                yield message
