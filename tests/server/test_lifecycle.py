"""Starts that fail, and an engine that dies, with servers of their own."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.harness.waiting import wait_until
from mtlora.backbone import identify
from mtlora.client import ServerError
from server.app import App, StartError
from server.cli.process import ServerProcess
from server.settings import load_settings
from tests.server.adapters import entry, write_adapter
from tests.server.helpers import LONG


@pytest.fixture(scope="module")
def adapters(short_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-adapter")
    tasks = [entry("open", stop=(), max_new_tokens=16)]
    write_adapter(folder / "a" / "1", tasks, backbone=identify(short_backbone))
    return folder


@pytest.fixture(scope="module")
def small(adapters: Path, short_backbone: Path) -> dict[str, Any]:
    """Settings of a server that starts soon."""
    return {"adapters": adapters, "backbone": short_backbone, "kv_cache_gib": 0.25, "max_num_seqs": 8}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", "serve", "--port", "0", "--metrics-port", "0", *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


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


def test_a_signal_while_starting_ends_everything(small: dict[str, Any]) -> None:
    with ServerProcess(wait=False, **small) as server:
        root = psutil.Process(server.process.pid)
        # The first child tracks resources; the second is the engine.
        wait_until(lambda: len(root.children()) > 1, 60)
        children = root.children(recursive=True)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 10
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


async def test_a_second_signal_exits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr("server.app.app.exit_at_once", exits.append)
    started = app(tmp_path)
    started._on_signal(signal.SIGTERM)
    assert exits == []
    started._on_signal(signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]


@pytest.fixture(scope="module")
def failing(small: dict[str, Any]) -> Iterator[ServerProcess]:
    """The server of the next two tests, whose engine fails four times, once more than it may."""
    with ServerProcess(engine_hang_s=3, engine_max_failures=3, engine_failure_window_s=10_000, **small) as server:
        yield server


def test_an_engine_that_dies_or_hangs_is_replaced(failing: ServerProcess) -> None:
    with failing.client() as client:
        before = client.generate("open", "Once").text
        for number, limit in ((signal.SIGKILL, 2.0), (signal.SIGSTOP, 6.0)):
            stream = client.stream("open", "Once", **LONG)
            next(stream)
            _engine(failing).send_signal(number)
            began = time.monotonic()
            with pytest.raises(ServerError) as raised:
                list(stream)
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE
            assert raised.value.retry_after_s
            wait_until(lambda: not client.is_serving("mtlora.v1.Inference"), 20)
            assert client.is_serving("live")
            # Generous: a busy machine.
            assert time.monotonic() - began < 3 * limit
            with pytest.raises(ServerError) as raised:
                client.generate("open", "x")
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE
            client.wait_ready(150)
            assert client.generate("open", "Once").text == before
            assert _engine(failing).status() != psutil.STATUS_STOPPED


def test_an_engine_that_keeps_dying_ends_the_server(failing: ServerProcess) -> None:
    _engine(failing).kill()
    with failing.client() as client:
        wait_until(lambda: not client.is_serving(), 20)
    # The next one dies while it starts.
    wait_until(lambda: any("EngineCore" in child.name() for child in _children(failing)), 60)
    _engine(failing).kill()
    assert failing.process.wait(120) == 1
    assert "failed 4 times within 10000 s" in failing.log()


def _children(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def _engine(server: ServerProcess) -> psutil.Process:
    return next(child for child in _children(server) if "EngineCore" in child.name())
