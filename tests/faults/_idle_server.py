"""A server with nothing to do but health checks, in a process of its own: how late is a reply for the machine's sake?

`python -m tests.faults._idle_server` prints its port.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from benchmarks.harness.guard import guarded_process


@contextlib.contextmanager
def idle_server() -> Iterator[str]:
    """Start one; yields its address."""
    command = [sys.executable, "-m", "tests.faults._idle_server"]
    with guarded_process(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"127.0.0.1:{process.stdout.readline().strip()}"


async def main() -> None:
    """Serve until killed."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
