"""How this folder's server ends. This file must be the last by name, because the server is gone afterwards."""

import signal

import grpc
import pytest

from benchmarks.harness.processes import process_tree
from benchmarks.harness.waiting import wait_until
from mtlora.client import Client, ServerError
from server.cli.process import ServerProcess
from tests.server.helpers import LONG


def test_sigterm_lets_a_long_stream_finish(server: ServerProcess, client: Client) -> None:
    logged = len(server.log())
    stream = client.stream("open", "Once", **LONG | {"max_new_tokens": 80})
    pieces = [next(stream)]
    # Ctrl-C in a terminal signals every process; the engines' ignore it.
    server.process.send_signal(signal.SIGTERM)
    for child in process_tree(server.process.pid)[1:]:
        child.send_signal(signal.SIGINT)
    pieces.append(next(stream))
    with server.client() as other:
        wait_until(lambda: not other.is_serving(), 20)
        with pytest.raises(ServerError) as raised:
            other.generate("open", "too late")
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    pieces += stream
    assert pieces[-1].summary.completion_tokens > 40
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log()[logged:]
