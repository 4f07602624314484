"""Who may ask which tasks, and how much: tenants.yaml, API keys, client certificates."""

from server.tenants.config import OPEN_TENANT, UNAUTHENTICATED, Priority, Tenant, TenantsError
from server.tenants.directory import Directory, Tenants, read_tenants

__all__ = [
    "OPEN_TENANT",
    "UNAUTHENTICATED",
    "Directory",
    "Priority",
    "Tenant",
    "Tenants",
    "TenantsError",
    "read_tenants",
]
