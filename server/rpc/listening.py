"""The gRPC ports: services, TLS, and limits on the resources of connections."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from mtlora_pb.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc, usage_pb2, usage_pb2_grpc
from openinference_pb import grpc_predict_v2_pb2, grpc_predict_v2_pb2_grpc

from server.rpc.adapters_service import AdaptersServicer
from server.rpc.health import Health
from server.rpc.inference_service import InferenceServicer
from server.rpc.openinference import OpenInferenceServicer
from server.rpc.tls import Certificates
from server.rpc.usage_service import UsageServicer
from server.scheduling.admission import Admission, State
from server.settings import Settings, joined
from server.telemetry.logs import get_logger

logger = get_logger("listening")

_MAX_PENDING = 1 << 16
# Seconds to admit calls that have arrived, and for aborted calls to get their status.
_LAST_ADMISSIONS_S = 0.2
# Seconds for calls that arrive after the GOAWAY, on a busy loop. A server without open calls does not wait.
_LAST_CALLS_S = 1.0
_LAST_STATUSES_S = 5.0


class Listening:
    """The gRPC server before its start. Call `add`, then `bind`, then `server.start()`. Raises TLSError.

    Interceptors limit open calls. gRPC's `maximum_concurrent_rpcs` is not used, because it counts strangers' calls too.
    """

    def __init__(self, settings: Settings, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> None:
        self._wanted = (settings.host, settings.port)
        self._reflection = settings.reflection
        self._drain_delay_s = settings.drain_delay_s
        self._grace_s = settings.grace_period_s
        self.certificates: Certificates | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self.certificates = Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        self.server = cast(Any, grpc.aio.server(interceptors=interceptors, options=channel_options(settings)))
        # Use generic handlers, which find methods by name. For registered methods, gRPC keeps a pending request for
        # each, so a call costs more the more methods there are.
        self.server.add_registered_method_handlers = lambda service, handlers: None

    def add(
        self,
        inference: InferenceServicer,
        adapters: AdaptersServicer,
        usage: UsageServicer,
        open_inference: OpenInferenceServicer,
        health: Health,
    ) -> None:
        """Answer the calls of every contract, health checks and, unless it is switched off, reflection."""
        server = self.server
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
        adapters_pb2_grpc.add_AdaptersServicer_to_server(adapters, server)
        usage_pb2_grpc.add_UsageServicer_to_server(usage, server)
        grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(open_inference, server)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        if not self._reflection:
            return
        contracts = (inference_pb2, adapters_pb2, usage_pb2, grpc_predict_v2_pb2)
        names = [service.full_name for each in contracts for service in each.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection((*names, Health.SERVICE, reflection.SERVICE_NAME), server)

    async def drain(self, health: Health, admission: Admission) -> None:
        """Send clients elsewhere, let running calls finish for the grace period, and end the rest with UNAVAILABLE.

        First the health changes while calls are still answered, so that watching clients and balancers leave in time.
        Then connections get a GOAWAY; gRPC cancels calls that arrive after it.
        """
        health.set(serving=False)
        await asyncio.sleep(self._drain_delay_s)
        stopping = asyncio.create_task(self.server.stop(self._grace_s + _LAST_STATUSES_S))
        # Calls that have already arrived are admitted meanwhile.
        await asyncio.sleep(_LAST_ADMISSIONS_S)
        if not await admission.drained(self._grace_s):
            logger.warning("grace period over, aborting running requests")
            admission.abort_running()
            await admission.drained(_LAST_STATUSES_S)
        admission.state = State.DRAINING
        # Only event streams are left, which never end by themselves.
        await self.server.stop(_LAST_CALLS_S)
        await stopping
        logger.info("drained")

    def bind(self) -> str:
        """Take the port; returns HOST:PORT. Raises OSError."""
        host, port = self._wanted
        address = joined(host, port)
        try:
            if self.certificates is None:
                taken = self.server.add_insecure_port(address)
            else:
                taken = self.server.add_secure_port(address, self.certificates.credentials())
        except RuntimeError:
            taken = 0
        if not taken:
            raise OSError(f"cannot listen on {address}: taken, or not an address of this machine (host, port)")
        return joined(host, taken)


async def listen_for_probes(
    settings: Settings, port: int, health: Health, interceptor: grpc.aio.ServerInterceptor
) -> tuple[Any, int]:
    """Start a second gRPC server on `port`, in plain text, with health alone.

    Returns it and its port, 0 if it cannot listen.
    """
    server = grpc.aio.server(interceptors=[interceptor], options=channel_options(settings))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        bound = server.add_insecure_port(joined(settings.host, port))
    except RuntimeError:
        bound = 0
    if bound:
        await server.start()
    else:
        await server.stop(None)
    return server, bound


def channel_options(settings: Settings) -> list[tuple[str, int]]:
    """gRPC's own limits."""
    return [
        ("grpc.max_receive_message_length", settings.message_limit),
        # With so_reuseport=1, two servers would share a port unknowingly.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1e3)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_timeout_s * 1e3)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(settings.min_ping_interval_s * 1e3)),
        ("grpc.max_connection_idle_ms", round(settings.max_connection_idle_s * 1e3)),
        ("grpc.max_connection_age_ms", round(settings.max_connection_age_s * 1e3)),
        ("grpc.max_connection_age_grace_ms", round(settings.max_connection_age_grace_s * 1e3)),
        # gRPC refuses random calls if more than this many wait for the event loop, so a stranger's flood would also hit
        # tenants.
        ("grpc.server.max_pending_requests", _MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
        # Milliseconds for TLS and the first frames of HTTP/2.
        ("grpc.server_handshake_timeout_ms", round(settings.request_timeout_s * 1e3)),
    ]
