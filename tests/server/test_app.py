"""The server's life beside its requests, without an engine."""

import asyncio
import logging

import pytest

from server.app import App
from server.settings import load_settings
from tests.server.fakes import eventually


@pytest.fixture
def app() -> App:
    return App(load_settings({"allow_no_tasks": True, "port": 0, "metrics_port": 0}))


async def test_background_work_that_ends_is_logged_counted_and_started_again(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.app._RESTART_S", 0.0)
    monkeypatch.setattr(logging.getLogger("mtlora.server"), "propagate", True)
    starts = 0

    async def work() -> None:
        nonlocal starts
        starts += 1
        match starts:
            case 1:
                raise ValueError("day is out of range for month")
            case 2:
                return
        await asyncio.Event().wait()

    running = app._run_beside("some work", work)
    await eventually(lambda: starts == 3)
    running.cancel()
    ends = app._metrics.registry.get_sample_value("mtlora_background_ends_total", {"work": "some work"})
    assert ends == 2
    lines = [record for record in caplog.records if record.message == "background work ended"]
    assert [bool(line.exc_info and line.exc_info[0]) for line in lines] == [True, False]


async def test_without_its_supervisor_the_server_exits(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    async def fail() -> None:
        raise RuntimeError

    monkeypatch.setattr(app, "_exit", leave)
    monkeypatch.setattr(asyncio, "create_task", lambda work, name: work)
    with pytest.raises(SystemExit):
        await app._run_beside("supervisor", fail)
