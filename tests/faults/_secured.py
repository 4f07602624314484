"""A server with TLS and tenants, access to it, and its idle state."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.native_server import native_server
from benchmarks.harness.tenants import tenant, write_tenants
from benchmarks.harness.waiting import wait_until
from mtlora.client import Access, MetricsPage
from server.cli.process import ServerProcess
from tests.faults._certificates import authority, issue
from tests.faults.scenario import Options


@dataclass(frozen=True)
class Secured:
    """A running server, and each tenant's access to it."""

    server: ServerProcess
    access: Mapping[str, Access]


@contextlib.contextmanager
def secured_server(options: Options, tenants: Mapping[str, Mapping[str, Any]], **settings: Any) -> Iterator[Secured]:
    """Start a server with a certificate and these tenants (id -> fields of its entry)."""
    keys, entries = {}, []
    for tenant_id, fields in tenants.items():
        keys[tenant_id], entry = tenant(tenant_id, **fields)
        entries.append(entry)
    ca = authority(options.folder)
    certificate = issue(ca, options.folder, "server")
    defaults: dict[str, Any] = {"backbone": options.backbone, "adapters": options.adapters}
    files: dict[str, Any] = {
        "tenants": write_tenants(options.folder / "tenants.yaml", *entries),
        "tls_certificate": certificate.pem,
        "tls_key": certificate.key,
    }
    with native_server(**{"kv_cache_gib": 0.5} | defaults | files | settings) as server:
        yield Secured(server, {tenant_id: Access(api_key=key, ca=ca.pem) for tenant_id, key in keys.items()})


IDLE = (
    "mtlora_engine_running_sequences",
    "mtlora_engine_waiting_sequences",
    "mtlora_engine_kv_cache_usage_ratio",
    "mtlora_requests_in_flight",
    "mtlora_requests_queued",
)


def what_is_left(server: ServerProcess, timeout_s: float = 15.0) -> dict[str, float]:
    """Metrics of `IDLE` that do not return to 0 in time, with their values."""

    def left() -> dict[str, float]:
        samples = MetricsPage.fetch(server.metrics).samples
        return {name: value for name in IDLE for _, value in samples[name] if value}

    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not left(), timeout_s, every_s=0.2)
    return left()
