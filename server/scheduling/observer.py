"""Whom a scheduler tells of what it does."""

from typing import Literal, Protocol

Shed = Literal["in_flight", "queue", "deadline"]
Quota = Literal["tokens_per_second", "requests_per_second", "max_queue"]


class Observer(Protocol):
    """Gets tenants' ids. All on the event loop."""

    def record_service(self, tenant: str, service: float) -> None:
        """A tenant was served, by so much as the fair queue counts it."""

    def set_tenant_queued(self, tenant: str, requests: int) -> None:
        """So many requests of a tenant wait for their turn."""

    def set_tenant_in_flight(self, tenant: str, requests: int) -> None:
        """So many requests of a tenant have their turn."""

    def record_quota_refusal(self, tenant: str, quota: Quota) -> None:
        """A request was refused for a quota of its tenant."""

    def record_shed(self, tenant: str, reason: Shed) -> None:
        """A request was given up under load."""


class Unobserved:
    """An observer that takes no notice."""

    def record_service(self, tenant: str, service: float) -> None:
        pass

    def set_tenant_queued(self, tenant: str, requests: int) -> None:
        pass

    def set_tenant_in_flight(self, tenant: str, requests: int) -> None:
        pass

    def record_quota_refusal(self, tenant: str, quota: Quota) -> None:
        pass

    def record_shed(self, tenant: str, reason: Shed) -> None:
        pass
