"""The tenant and the class of a request that a trusted proxy forwards: by the headers of the Gateway API's inference
extension, or by llm-d's names of the same.

Only headers of a caller whose own entry has `speaks_for` count: a gateway may forward a client's own headers.
"""

from collections.abc import Iterable

import grpc

from server.errors import RequestFailedError
from server.tenants.config import Tenant
from server.tenants.directory import Tenants

FAIRNESS_ID = "x-gateway-inference-fairness-id"
OBJECTIVE = "x-gateway-inference-objective"
# Each header's names.
_MEANINGS = {
    FAIRNESS_ID: FAIRNESS_ID,
    "x-llm-d-inference-fairness-id": FAIRNESS_ID,
    OBJECTIVE: OBJECTIVE,
    "x-llm-d-inference-objective": OBJECTIVE,
}


def named_tenant(proxy: Tenant, tenants: Tenants, metadata: Iterable[tuple[str, str | bytes]]) -> Tenant:
    """The tenant that the fairness id names, else the proxy itself, in the objective's class if that is less urgent.

    An objective that the tenants file does not list changes nothing. Raises PERMISSION_DENIED for a tenant that the
    proxy may not name, for a header that comes twice, and if two names of a header have different values, because one
    may come from the client.
    """
    found: dict[str, str | bytes] = {}
    seen = set[str]()
    for name, value in metadata:
        if meaning := _MEANINGS.get(name):
            if name in seen or found.get(meaning, value) != value:
                raise _denied(proxy, f"sent {name} twice; allowed: once; the proxy must remove its client's header")
            seen.add(name)
            found[meaning] = value
    tenant = proxy
    if named := found.get(FAIRNESS_ID):
        other = tenants.by_id.get(str(named))
        if other is None or not proxy.may_name(other):
            raise _denied(proxy, f"names a tenant in {FAIRNESS_ID} that is unknown or not in its `speaks_for`")
        tenant = other
    priority = tenants.objectives.get(str(found.get(OBJECTIVE)))
    return tenant if priority is None else tenant.lowered(priority)


def _denied(proxy: Tenant, reason: str) -> RequestFailedError:
    return RequestFailedError(grpc.StatusCode.PERMISSION_DENIED, f"proxy {proxy.id} {reason}")
