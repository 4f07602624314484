"""Starts that fail or are ended."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.harness.waiting import wait_until
from mtlora.backbone import identify
from server.app import App, StartError
from server.cli.process import ServerProcess
from server.settings import load_settings
from tests.server.adapters import entry, write_adapter
from tests.server.helpers import run_cli


@pytest.fixture(scope="module")
def adapters(short_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-adapter")
    tasks = [entry("open", stop=(), max_new_tokens=16)]
    write_adapter(folder / "a" / "1", tasks, backbone=identify(short_backbone))
    return folder


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_cli("serve", "--port", "0", "--metrics-port", "0", *arguments, timeout_s=120)


def app(folder: Path, **settings: Any) -> App:
    return App(load_settings({"adapters": folder, "port": 0, "metrics_port": 0, **settings}))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another process listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


def test_a_taken_port_ends_the_start(adapters: Path, taken: int) -> None:
    done = run("--adapters", str(adapters), "--port", str(taken))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{taken}" in done.stderr
    assert "Traceback" not in done.stderr


async def test_taken_ports_of_metrics_and_probes_are_named(tmp_path: Path, taken: int) -> None:
    with pytest.raises(StartError, match=rf"cannot listen on 127\.0\.0\.1:{taken}.*metrics_port"):
        app(tmp_path, metrics_port=taken)._open_metrics()
    with pytest.raises(StartError, match=rf"cannot listen on 127\.0\.0\.1:{taken}.*health_port"):
        await app(tmp_path, health_port=taken)._listen_for_probes()


async def test_a_starting_server_has_its_port_and_answers_nobody(tmp_path: Path) -> None:
    """A client of several servers asks the others meanwhile."""
    listening, address = await app(tmp_path, allow_no_tasks=True)._listen()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=0.5)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await listening.server.start()
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
    await listening.server.stop(0)


async def test_rejects_a_backbone_without_config(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"no config\.json"):
        await app(tmp_path, backbone=str(tmp_path))._start()


def test_no_adapter_that_can_be_served_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "a" / "1").mkdir(parents=True)
    done = run("--adapters", str(tmp_path))
    assert done.returncode == 1
    assert "no adapter there can be served" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_while_starting_ends_everything(
    adapters: Path, short_backbone: Path, number: signal.Signals, status: int
) -> None:
    with ServerProcess(wait=False, adapters=adapters, backbone=short_backbone, kv_cache_gib=0.25) as server:
        root = psutil.Process(server.process.pid)
        # The first child tracks resources; the second is the engine.
        wait_until(lambda: len(root.children()) > 1, 60)
        children = root.children(recursive=True)
        server.process.send_signal(number)
        assert server.process.wait(10) == status
        # The engine of a killed server ends once it has loaded the plugins.
        _, alive = psutil.wait_procs(children, timeout=10 if status == 0 else 60)
        assert not alive


async def test_a_second_signal_exits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr("server.app.app.exit_at_once", exits.append)
    started = app(tmp_path)
    started._on_signal(signal.SIGTERM)
    assert exits == []
    started._on_signal(signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]
