"""Starts that fail, drains, and an engine that dies, with servers of their own."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from mtlora.client import Client, ServerError
from server.app import App
from server.cli.process import ServerProcess
from server.settings import load_settings
from tests.server.adapters import entry, write_adapter
from tests.server.helpers import LONG

SMALL: dict[str, Any] = {"kv_cache_gib": 0.25, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-adapter")
    write_adapter(folder / "a" / "1", [entry("open", stop=(), max_new_tokens=16)])
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", "serve", "--port", "0", "--metrics-port", "0", *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_taken_port(adapters: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for flag in ("--port", "--metrics-port", "--health-port"):
            done = run("--adapters", str(adapters), flag, str(taken.getsockname()[1]))
            assert done.returncode == 1
            assert "cannot listen on 127.0.0.1" in done.stderr
            assert "Traceback" not in done.stderr


def test_a_backbone_that_is_none(adapters: Path, tmp_path: Path) -> None:
    done = run("--adapters", str(adapters), "--backbone", str(tmp_path))
    assert done.returncode == 1
    assert "no config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_adapter_that_can_be_served(tmp_path: Path) -> None:
    (tmp_path / "a" / "1").mkdir(parents=True)
    done = run("--adapters", str(tmp_path))
    assert done.returncode == 1
    assert "no adapter there can be served" in done.stderr
    assert done.stdout == ""


def test_an_engine_that_does_not_start(adapters: Path) -> None:
    done = run("--adapters", str(adapters), "--max-model-len", "1000000")
    assert done.returncode == 1
    assert "mtlora-server: the engine did not start" in done.stderr
    assert "max_model_len" in done.stderr


def test_a_signal_while_starting_ends_everything(adapters: Path) -> None:
    with ServerProcess(adapters=adapters, wait=False, **SMALL) as server:
        root = psutil.Process(server.process.pid)
        # The first child tracks resources; the second is the engine.
        _until(lambda: len(root.children()) > 1, 60)
        children = root.children(recursive=True)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 10
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


async def test_a_second_signal_exits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr("server.app.exit_at_once", exits.append)
    app = App(load_settings({"adapters": tmp_path}))
    app._on_signal(signal.SIGTERM)
    assert exits == []
    app._on_signal(signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]


def test_an_engine_that_keeps_dying_ends_the_server(adapters: Path) -> None:
    with ServerProcess(adapters=adapters, engine_max_failures=1, engine_failure_window_s=1000, **SMALL) as server:
        _engine(server).kill()
        with server.client() as client:
            _until(lambda: not client.is_serving())
            # The next one dies while it starts.
            _until(lambda: any("EngineCore" in child.name() for child in _children(server)), 60)
            _engine(server).kill()
        assert server.process.wait(120) == 1
        assert "failed 2 times within 1000 s" in server.log()


def test_a_server_that_is_killed_leaves_nothing_running(adapters: Path) -> None:
    with ServerProcess(adapters=adapters, **SMALL) as server:
        children = _children(server)
        assert "EngineCore" in "".join(child.name() for child in children)
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


@pytest.fixture(scope="module")
def server(adapters: Path) -> Iterator[ServerProcess]:
    """The server of the tests below, which follow it to its end."""
    with ServerProcess(adapters=adapters, engine_hang_s=3, grace_period_s=300, **SMALL) as server:
        yield server


def test_an_engine_that_dies_or_hangs_is_replaced(server: ServerProcess) -> None:
    with server.client() as client:
        before = client.generate("open", "Once").text
        for number, limit in ((signal.SIGKILL, 2.0), (signal.SIGSTOP, 6.0)):
            stream = client.stream("open", "Once", **LONG)
            next(stream)
            _engine(server).send_signal(number)
            began = time.monotonic()
            with pytest.raises(ServerError) as raised:
                list(stream)
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE
            assert raised.value.retry_after_s
            _until(lambda: not client.is_serving("mtlora.v1.Inference"))
            assert client.is_serving("live")
            # Generous: a busy machine.
            assert time.monotonic() - began < 3 * limit
            with pytest.raises(ServerError) as raised:
                client.generate("open", "x")
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE
            client.wait_ready(150)
            assert client.generate("open", "Once").text == before
            assert _engine(server).status() != psutil.STATUS_STOPPED


def test_sigterm_lets_a_long_stream_finish(server: ServerProcess) -> None:
    # The last of them: the server is gone then.
    logged = len(server.log())
    with server.client() as client:
        stream = client.stream("open", "Once", **LONG | {"max_new_tokens": 200})
        pieces = [next(stream)]
        stopped: list[int] = []
        # As Ctrl-C in a terminal does it: every process gets a signal, and the engine's must not mind.
        server.process.send_signal(signal.SIGTERM)
        for child in psutil.Process(server.process.pid).children(recursive=True):
            child.send_signal(signal.SIGINT)
        waiting = threading.Thread(target=lambda: stopped.append(server.process.wait(300)))
        waiting.start()
        pieces.append(next(stream))
        with Client(server.address) as other:
            _until(lambda: not other.is_serving())
            with pytest.raises(ServerError) as raised:
                other.generate("open", "too late")
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE
        pieces += stream
        assert pieces[-1].summary.completion_tokens > 100
        waiting.join(60)
        assert stopped == [0]
        assert "Traceback" not in server.log()[logged:]


def _children(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def _engine(server: ServerProcess) -> psutil.Process:
    return next(child for child in _children(server) if "EngineCore" in child.name())


def _until(condition: Any, timeout: float = 20.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
