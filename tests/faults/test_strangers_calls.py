"""The strangers of the fault rows: what they count is what the server holds."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import http2
from tests.faults import _strangers
from tests.faults._strangers import HALF_OPEN, IDLE, SLOW, Strangers
from tests.faults.strangers import were_open
from tests.server.fakes import Service
from tests.waiting import eventually


@pytest.mark.slow
async def test_strangers_count_what_the_server_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in {"IDLE": 50, "HALF_OPEN": 80, "SLOW": 5, "_REFUSED_S": 0.5, "_AGAIN_S": 0.1}.items():
        monkeypatch.setattr(_strangers, name, number)
    async with Service.with_tenants(
        tmp_path, {"a": {}}, request_timeout_s=2, max_anonymous_calls=8
    ).running() as service:
        strangers = Strangers(service.address)
        await strangers.open()
        # Each of eight peers opens ten calls; the server refuses two of them.
        await eventually(lambda: sum(service.anonymous._open.values()) == 64)
        await eventually(lambda: strangers.count() == (50, 64, 5))
        # The server ends them after a while; they come again.
        first = {min(each.calls) for each in strangers._connections if each.calls}
        await eventually(lambda: not first & {min(each.calls, default=0) for each in strangers._connections})
        await eventually(lambda: sum(service.anonymous._open.values()) == 64)
        idle, slow = strangers.count()[::2]
        assert (idle, slow) == (50, 5)
        await strangers.close()
        await eventually(lambda: not service.anonymous._open)
        assert strangers.count() == (0, 0, 0)


@pytest.mark.slow
async def test_a_connection_that_the_server_closes_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in {"IDLE": 50, "HALF_OPEN": 8, "SLOW": 0}.items():
        monkeypatch.setattr(_strangers, name, number)
    async with Service.with_tenants(tmp_path, {"a": {}}).running() as service:
        strangers = Strangers(service.address)
        await strangers.open()
        assert strangers.count() == (50, 8, 0)
    await eventually(lambda: strangers.count() == (0, 0, 0))


@pytest.mark.parametrize(
    ("found", "held"),
    [
        ((IDLE, HALF_OPEN, SLOW), True),
        ((IDLE * 9 // 10, HALF_OPEN * 9 // 10, SLOW * 9 // 10), True),
        ((IDLE, 50, SLOW), False),
        ((IDLE // 2, HALF_OPEN, SLOW), False),
        ((IDLE, HALF_OPEN, 0), False),
    ],
)
def test_strangers_that_hold_little_miss_the_goal(found: tuple[int, int, int], held: bool) -> None:
    assert were_open(found) is held


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**31 - 1), st.binary(max_size=50))),
    st.data(),
)
def test_frames_are_read_however_they_are_cut(frames: list[tuple[int, int, int, bytes]], data: st.DataObject) -> None:
    sent = b"".join(http2.frame(*each) for each in frames)
    at = data.draw(st.integers(0, len(sent)))
    first, rest = http2.parse(sent[:at])
    second, none = http2.parse(rest + sent[at:])
    assert [*first, *second] == frames
    assert none == b""
