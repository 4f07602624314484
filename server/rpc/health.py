"""The health protocol: what each service name means, and a listener of its own for probes.

| name | SERVING while |
| --- | --- |
| "" and "mtlora.v1.Inference" | requests are served |
| "live" | the process may yet serve, or finishes what runs: while it starts, serves, replaces its engine, drains |

After too many engine failures nothing is SERVING, and the process exits.

The main port answers from the moment at which the server serves; `health_port` answers from the start.

A liveness probe asks for "live", a readiness probe for "mtlora.v1.Inference". Kubernetes' own gRPC probes speak no TLS,
so with TLS on the main port they need `health_port`.
"""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from mtlora_pb.v1 import inference_pb2

from server.settings import joined

LIVE = "live"


class Health:
    """The health of one server. `set` it whenever its state changes."""

    SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

    def __init__(self) -> None:
        self._names = ("", inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name)
        self._servicer = HealthServicer()

    def add_to(self, server: Any) -> None:
        """Answer health checks on a gRPC server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, *, serving: bool, live: bool = True) -> None:
        """Set every name's status."""
        for name in self._names:
            await self._servicer.set(name, _status(serving))
        await self._servicer.set(LIVE, _status(live))

    async def listen(self, host: str, port: int, interceptor: grpc.aio.ServerInterceptor) -> tuple[Any, int]:
        """A second gRPC server, in plain text, with health alone; returns it and its port, 0 if it cannot listen."""
        server = grpc.aio.server(interceptors=[interceptor], options=[("grpc.so_reuseport", 0)])
        self.add_to(server)
        try:
            bound = server.add_insecure_port(joined(host, port))
        except RuntimeError:
            bound = 0
        if bound:
            await server.start()
        else:
            await server.stop(None)
        return server, bound


def _status(good: bool) -> Any:
    return health_pb2.HealthCheckResponse.SERVING if good else health_pb2.HealthCheckResponse.NOT_SERVING
