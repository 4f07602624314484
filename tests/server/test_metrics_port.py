"""The HTTP port of the metrics."""

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from server.telemetry import port as metrics_port
from server.telemetry.port import serve_metrics


@pytest.fixture
def port() -> Iterator[int]:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    port, close = serve_metrics(registry, "127.0.0.1", 0)
    yield port
    close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


def scrape(port: int, **headers: str) -> tuple[str, str]:
    """(content type, body)."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=5) as reply:
        return reply.headers["Content-Type"], reply.read().decode()


def test_answers_in_the_form_that_is_asked_for(port: int) -> None:
    kind, body = scrape(port)
    assert kind.startswith("text/plain")
    assert "things_total 3.0" in body
    kind, body = scrape(port, Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", data=b"x", timeout=5)


def test_unfinished_requests_hold_no_thread_and_no_scrape(port: int) -> None:
    before = set(threading.enumerate())
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(800)]
    for each in held:
        each.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
    assert "things_total 3.0" in scrape(port)[1]
    assert set(threading.enumerate()) <= before
    for each in held:
        each.close()


def test_an_unfinished_request_ends(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_port, "_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as held:
        held.sendall(b"GET /metrics")
        # A client may see an aborted connection in either way.
        with contextlib.suppress(ConnectionResetError):
            assert held.recv(1) == b""


def test_bytes_that_are_no_request_harm_nothing(port: int) -> None:
    for garbage in (
        b"\r\n\r\n",
        b"\xff\xfe\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n:\r\n\r\n",
        b"x" * 40_000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sent:
            sent.sendall(garbage)
    assert "things_total 3.0" in scrape(port)[1]
