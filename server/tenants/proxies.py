"""The tenant and the class of a request that a trusted proxy forwards: by the headers of the Gateway API's inference
extension.

Only headers of a caller whose own entry has `speaks_for` count: a gateway may let a client's headers pass.
"""

from collections.abc import Iterable

import grpc

from server.errors import RequestFailedError
from server.tenants.config import Tenant
from server.tenants.directory import Tenants

FAIRNESS_ID = "x-gateway-inference-fairness-id"
OBJECTIVE = "x-gateway-inference-objective"


def named_tenant(proxy: Tenant, tenants: Tenants, metadata: Iterable[tuple[str, str | bytes]]) -> Tenant:
    """The tenant that the fairness id names, else the proxy itself, in the objective's class if that is less urgent.

    An objective that the tenants file does not list changes nothing. Raises PERMISSION_DENIED for a tenant that the
    proxy may not name, and for a header that comes twice: one of them may be the client's.
    """
    found: dict[str, str | bytes] = {}
    for name, value in metadata:
        if name in (FAIRNESS_ID, OBJECTIVE):
            if name in found:
                raise _denied(proxy, f"sent {name} twice; allowed: once, set by the proxy, without the client's")
            found[name] = value
    tenant = proxy
    if named := found.get(FAIRNESS_ID):
        other = tenants.by_id.get(str(named))
        if other is None or not proxy.may_name(other):
            raise _denied(proxy, f"names a tenant in {FAIRNESS_ID} that is none, or not one of its `speaks_for`")
        tenant = other
    priority = tenants.objectives.get(str(found.get(OBJECTIVE)))
    return tenant if priority is None else tenant.lowered(priority)


def _denied(proxy: Tenant, reason: str) -> RequestFailedError:
    return RequestFailedError(grpc.StatusCode.PERMISSION_DENIED, f"proxy {proxy.id} {reason}")
