"""The server's life beside its requests, without an engine."""

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.tenants import tenant, write_tenants
from server.app import App
from server.cli.process import exit_on_sigterm
from server.settings import load_settings
from tests.faults._certificates import authority, issue
from tests.waiting import eventually


@pytest.fixture
def app() -> App:
    return App(load_settings({"allow_no_tasks": True, "port": 0, "metrics_port": 0}))


def test_sigterm_ends_a_program_through_its_cleanup() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        exit_on_sigterm()
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_background_work_that_ends_is_logged_counted_and_started_again(
    app: App, monkeypatch: pytest.MonkeyPatch, server_log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.app.app._RESTART_S", 0.0)
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
    lines = [record for record in server_log.records if record.message == "background work ended"]
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


@pytest.mark.parametrize(
    ("host", "tenants", "tls", "admin", "warning"),
    [
        ("127.0.0.1", False, False, True, "no tenants file: everybody who reaches 127.0.0.1 is an admin"),
        ("127.9.9.9", False, False, True, "no tenants file: everybody who reaches 127.9.9.9 is an admin"),
        ("::1", False, False, True, "no tenants file: everybody who reaches ::1 is an admin"),
        ("[::1]", False, False, True, "no tenants file: everybody who reaches ::1 is an admin"),
        ("localhost", False, False, True, "no tenants file: everybody who reaches localhost is an admin"),
        *(
            (
                host, False, tls, False,
                f"no tenants file: everybody who reaches {host.strip('[]')} may ask every task, and nobody is an admin",
            )
            for host in ("0.0.0.0", "::", "[::]", "10.0.0.1", "example.com")
            for tls in (False, True)
        ),
        ("0.0.0.0", True, False, None, "no TLS on 0.0.0.0: keys and tokens travel unencrypted"),
        ("0.0.0.0", True, True, None, None),
        ("127.0.0.1", True, False, None, None),
    ],
)  # fmt: skip
async def test_nobody_is_an_admin_without_a_key_off_this_machine(
    tmp_path: Path, server_log: pytest.LogCaptureFixture, host: str, tenants: bool, tls: bool, admin: bool | None,
    warning: str | None,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {"allow_no_tasks": True, "host": host}
    if tenants:
        settings["tenants"] = write_tenants(tmp_path / "tenants.yaml", tenant("a")[1])
    if tls:
        certificate = issue(authority(tmp_path), tmp_path, "server")
        settings |= {"tls_certificate": certificate.pem, "tls_key": certificate.key}
    app = App(load_settings(settings))
    app._warn_of_open_doors()
    assert [record.message for record in server_log.records if record.levelno == logging.WARNING] == [warning][
        : bool(warning)
    ]
    if admin is not None:
        assert (await app._authenticator.tenant((), dict)).admin is admin
