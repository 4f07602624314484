"""What the drills wait for, and what they call a success."""

from collections import Counter

import pytest

from tests.fleet._drills import FleetCalls, only_what_ran_failed


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"OK": 90, "UNAVAILABLE: lost": 3, "UNAVAILABLE: reset": 2}, True),
        ({"OK": 90}, False),
        ({"OK": 90, "UNAVAILABLE: lost": 6}, False),
        ({"OK": 90, "UNAVAILABLE: lost": 2, "DEADLINE_EXCEEDED: late": 1}, False),
    ],
)
def test_a_kill_fails_some_calls_and_no_more_than_ran_there(ends: dict[str, int], expected: bool) -> None:
    assert only_what_ran_failed([FleetCalls(Counter(ends)), FleetCalls(Counter(OK=9))], ran=5) is expected
