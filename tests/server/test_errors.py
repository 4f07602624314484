"""Exceptions become statuses with the right code and details, small enough for trailers, without secrets."""

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from server.errors import (
    EngineAbortedError,
    EngineDeadError,
    RequestFailedError,
    Violation,
    from_exception,
    invalid_argument,
    resource_exhausted,
    task_not_found,
    unavailable,
)

# Clients refuse trailers of more than 8 KiB.
_ROOM = 6000


def details(error: RequestFailedError, kind: type[Message]) -> Message:
    status = status_pb2.Status.FromString(error.status_details())
    assert status.code == error.code.value[0]
    message = kind()
    assert status.details[0].Unpack(message)
    return message


def test_not_found_names_the_resource_and_near_matches() -> None:
    error = task_not_found("sort_word", ["sort_words", "count_words", "unrelated"])
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert "near: sort_words" in error.message
    assert "unrelated" not in error.message
    info = details(error, error_details_pb2.ResourceInfo)
    assert (info.resource_type, info.resource_name) == ("mtlora.v1.Task", "sort_word")


def test_invalid_argument_names_every_violation() -> None:
    error = invalid_argument([Violation("a", "one"), Violation("b", "two")])
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message == "a: one (and 1 more)"
    found = details(error, error_details_pb2.BadRequest)
    assert [(each.field, each.description) for each in found.field_violations] == [("a", "one"), ("b", "two")]


@pytest.mark.parametrize("make", [resource_exhausted, unavailable])
def test_retriable_statuses_say_when_to_retry(make: object) -> None:
    error = make("no room", 1.5)
    assert details(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize("error", [EngineDeadError("secret"), EngineAbortedError("secret"), ValueError("secret /path")])
def test_hides_the_texts_of_unknown_exceptions(error: Exception) -> None:
    failure = from_exception(error)
    assert "secret" not in failure.message
    assert b"secret" not in failure.status_details()


def test_known_exceptions_have_codes() -> None:
    assert from_exception(EngineDeadError()).code is grpc.StatusCode.UNAVAILABLE
    assert from_exception(EngineAbortedError()).code is grpc.StatusCode.UNAVAILABLE
    assert from_exception(KeyError("x")).code is grpc.StatusCode.INTERNAL
    own = unavailable("x", 1)
    assert from_exception(own) is own


@given(st.lists(st.builds(Violation, st.text(max_size=400), st.text(max_size=400)), min_size=1, max_size=60))
def test_violations_fit_into_trailers(violations: list[Violation]) -> None:
    error = invalid_argument(violations)
    assert len(error.status_details()) < _ROOM


@given(st.text(min_size=1, max_size=5000))
def test_any_unknown_task_id_fits_into_trailers(task_id: str) -> None:
    error = task_not_found(task_id, ["a", "b"])
    assert len(error.status_details()) < _ROOM
