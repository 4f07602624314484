"""The health protocol and its service names.

| name | SERVING while |
| --- | --- |
| "" and "mtlora.v1.Inference" | requests are served |
| "live" | the process is alive: it starts, serves, replaces its engine, or drains |

After too many engine failures nothing is SERVING, and the process exits.

The main port answers from the moment at which the server serves; `health_port` answers from the start.

A liveness probe asks for "live", a readiness probe for "mtlora.v1.Inference". Kubernetes' own gRPC probes speak no TLS,
so with TLS on the main port they need `health_port`.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mtlora_pb.v1 import inference_pb2

from server.errors import slow_reader

LIVE = "live"


class Health(health_pb2_grpc.HealthServicer):
    """The health of one server. `set` it whenever its state changes. slow_reader_s: for a watcher to take a status.

    grpcio-health-checking's servicer is not used: it writes to watchers while it holds the lock that `set` needs, so a
    stranger who does not read would block restarts and shutdown.
    """

    SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

    def __init__(self, slow_reader_s: float) -> None:
        self._slow_reader_s = slow_reader_s
        self._changed = asyncio.Event()
        self._statuses: dict[str, Any] = {}
        self.set(serving=False)

    def set(self, *, serving: bool, live: bool = True) -> None:
        """Set every name's status."""
        inference = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
        self._statuses = {"": _status(serving), inference: _status(serving), LIVE: _status(live)}
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The status of a name. NOT_FOUND for an unknown one."""
        if request.service not in self._statuses:
            allowed = ", ".join(name or "an empty name" for name in self._statuses)
            found = f"service: found {request.service[:64]!r}; allowed: {allowed}"
            await context.abort(grpc.StatusCode.NOT_FOUND, found)
        return health_pb2.HealthCheckResponse(status=self._statuses[request.service])

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """The status of a name, now and whenever it changes."""
        seconds, last = self._slow_reader_s, None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != last:
                try:
                    async with asyncio.timeout(seconds):
                        await context.write(health_pb2.HealthCheckResponse(status=status))
                except TimeoutError:
                    raise slow_reader(f"no status was taken for {seconds:g} s") from None
            last = status
            await changed.wait()


def _status(good: bool) -> Any:
    return health_pb2.HealthCheckResponse.SERVING if good else health_pb2.HealthCheckResponse.NOT_SERVING
