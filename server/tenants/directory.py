"""The current tenants: a snapshot of the file, read again whenever the file changes."""

import asyncio
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from mtlora.files import signature
from server.isolation import ChildEndedError, ChildError, Limits, in_child
from server.telemetry.logs import get_logger
from server.tenants.config import OPEN_TENANT, ApiKey, Issuer, Priority, Tenant, TenantsFile
from server.tenants.file import TENANTS_A_PART, read_file, read_parts

logger = get_logger("tenants")

_LIMITS = Limits(timeout_s=60.0)


@dataclass(frozen=True)
class Tenants:
    """An immutable snapshot. `open`: every caller is the only tenant."""

    by_id: Mapping[str, Tenant]
    by_key_id: Mapping[str, tuple[Tenant, ApiKey]] = field(default_factory=lambda: MappingProxyType({}))
    by_certificate: Mapping[str, Tenant] = field(default_factory=lambda: MappingProxyType({}))
    issuers: Mapping[str, Issuer] = field(default_factory=lambda: MappingProxyType({}))
    objectives: Mapping[str, Priority] = field(default_factory=lambda: MappingProxyType({}))
    share_prefix_cache: bool = True
    open: bool = True


class _Snapshot:
    """A snapshot that is being built."""

    def __init__(self) -> None:
        self._by_id: dict[str, Tenant] = {}
        self._by_key_id: dict[str, tuple[Tenant, ApiKey]] = {}
        self._by_certificate: dict[str, Tenant] = {}

    def add(self, tenants: Iterable[Tenant]) -> None:
        for tenant in tenants:
            self._by_id[tenant.id] = tenant
            for key in tenant.api_keys:
                self._by_key_id[key.id] = tenant, key
            for name in tenant.certificates:
                self._by_certificate[name] = tenant

    def finished(self, file: TenantsFile) -> Tenants:
        return Tenants(
            by_id=MappingProxyType(self._by_id),
            by_key_id=MappingProxyType(self._by_key_id),
            by_certificate=MappingProxyType(self._by_certificate),
            issuers=MappingProxyType({issuer.issuer: issuer for issuer in file.issuers}),
            objectives=MappingProxyType(file.objectives),
            share_prefix_cache=file.share_prefix_cache,
            open=False,
        )


def read_tenants(path: Path, replicas: int | None = None) -> Tenants:
    """Read and check a tenants file. `replicas`: the servers that share quotas of a fleet. Raises TenantsError."""
    file = read_file(path, replicas)
    snapshot = _Snapshot()
    snapshot.add(file.tenants)
    return snapshot.finished(file)


async def read_tenants_aside(path: Path, replicas: int | None) -> Tenants:
    """Like `read_tenants`, in a child process; blocks the event loop only for one part at a time. Raises ChildError."""
    first, *parts = await asyncio.to_thread(in_child, read_parts, path, replicas, limits=_LIMITS)
    snapshot = _Snapshot()
    for part in parts:
        snapshot.add(pickle.loads(part))
        await asyncio.sleep(0)
    return snapshot.finished(pickle.loads(first))


class Directory:
    """Holds the current snapshot; `watch` replaces it while the server runs.

    path: the tenants file; None means one open tenant for ever, an admin if `open_admin`. replicas: the servers that
    share quotas of a fleet. on_change gets every new snapshot; on_failure is called once for every refused state of the
    file. Raises TenantsError if the first read fails.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        replicas: int | None = None,
        open_admin: bool = False,
        on_change: Callable[[Tenants], None] = lambda _: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._replicas = replicas
        self._on_change = on_change
        self._on_failure = on_failure
        self._seen = signature(path) if path else None
        everybody = OPEN_TENANT.model_copy(update={"admin": open_admin})
        self.current = read_tenants(path, replicas) if path else Tenants(MappingProxyType({everybody.id: everybody}))

    async def reload_if_changed(self) -> None:
        """Read the file again if it changed; a wrong file is logged and changes nothing."""
        if self._path is None or (now := await asyncio.to_thread(signature, self._path)) == self._seen:
            return
        self._seen = now
        try:
            tenants = await read_tenants_aside(self._path, self._replicas)
        except ChildEndedError as error:
            # Memory, processes or time ran out. Retry, because the file may be valid and revoke a key.
            self._seen = None
            logger.error("tenants file not read; trying again", extra={"fields": {"reason": str(error)}})
            self._on_failure()
            return
        except ChildError as error:
            logger.error("tenants file refused; the old tenants stay", extra={"fields": {"reason": str(error)}})
            self._on_failure()
            return
        old = list(self.current.by_id.values())
        self.current = tenants
        self._on_change(tenants)
        logger.info("tenants reloaded", extra={"fields": {"tenants": len(tenants.by_id)}})
        # Free the old tenants in parts too: freeing thousands at once would block the event loop.
        while old:
            del old[-TENANTS_A_PART:]
            await asyncio.sleep(0)

    async def watch(self, interval_s: float = 1.0) -> None:
        """Check the file until cancelled. Polling works on NFS too, and where a ConfigMap replaces a link."""
        while True:
            await asyncio.sleep(interval_s)
            await self.reload_if_changed()
