"""The drills' waits and their conditions of success."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from tests.faults._certificates import authority
from tests.fleet import _drills
from tests.fleet._drills import FleetCalls, only_what_ran_failed
from tests.fleet._fleet import Fleet, Member


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


class Silent(Member):
    """A server that answers nothing."""

    def answered(self) -> float:
        return 0.0


async def test_a_server_that_answers_nothing_ends_the_drill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_drills, "_TIMEOUT_S", 0.1)
    fleet = Fleet(tmp_path, [Silent({})], authority(tmp_path))
    async with asyncio.timeout(10):
        with pytest.raises(TimeoutError):
            await _drills.kill_one(fleet, [FleetCalls()], calls_between=0)
