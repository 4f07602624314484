"""The status of a failed request; unexpected errors are logged."""

import traceback

import grpc

from server.errors import RequestFailedError, from_exception
from server.telemetry.logs import get_logger

logger = get_logger("request")


def failure_of(error: Exception, request_id: str) -> RequestFailedError:
    """The failure that the caller sees. Logs unexpected errors."""
    failure = from_exception(error)
    if failure.code is grpc.StatusCode.INTERNAL and not isinstance(error, RequestFailedError):
        # Log only the place in the code: an exception's message may contain a tenant's data.
        fields = {"request_id": request_id, "error": type(error).__name__, "where": _where(error)}
        logger.error("internal error", extra={"fields": fields})
    return failure


def _where(error: BaseException) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
