"""The current tenants: a snapshot of the file, read again whenever the file changes."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from mtlora.errors import describe
from mtlora.files import signature
from server.telemetry.logs import get_logger
from server.tenants.config import OPEN_TENANT, ApiKey, Tenant, TenantsError, TenantsFile

logger = get_logger("tenants")

_MAX_FILE_BYTES = 16 << 20


@dataclass(frozen=True)
class Tenants:
    """An immutable snapshot. `open`: every caller is the open tenant."""

    by_id: Mapping[str, Tenant] = field(default_factory=lambda: MappingProxyType({OPEN_TENANT.id: OPEN_TENANT}))
    by_key_id: Mapping[str, tuple[Tenant, ApiKey]] = field(default_factory=lambda: MappingProxyType({}))
    by_certificate: Mapping[str, Tenant] = field(default_factory=lambda: MappingProxyType({}))
    share_prefix_cache: bool = True
    open: bool = True


def read_tenants(path: Path, replicas: int | None = None) -> Tenants:
    """Read and check a tenants file. `replicas`: the servers that share quotas of a fleet. Raises TenantsError."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TenantsError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
        found: Any = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise TenantsError(f"{path}: not a readable YAML file: {error}") from None
    try:
        file = TenantsFile.model_validate(found)
    except ValidationError as error:
        raise TenantsError(f"{path}: {describe(error)}") from None
    try:
        tenants = file.tenants_of_replica(replicas)
    except ValueError as error:
        raise TenantsError(f"{path}: {error}") from None
    return Tenants(
        by_id=MappingProxyType({tenant.id: tenant for tenant in tenants}),
        by_key_id=MappingProxyType({key.id: (tenant, key) for tenant in tenants for key in tenant.api_keys}),
        by_certificate=MappingProxyType({name: tenant for tenant in tenants for name in tenant.certificates}),
        share_prefix_cache=file.share_prefix_cache,
        open=False,
    )


class Directory:
    """Holds the current snapshot; `watch` replaces it while the server runs.

    path: the tenants file; None means one open tenant for ever. replicas: the servers that share quotas of a fleet.
    on_change gets every new snapshot; on_failure is called once for every refused state of the file. Raises
    TenantsError if the first read fails.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        replicas: int | None = None,
        on_change: Callable[[Tenants], None] = lambda _: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._replicas = replicas
        self._on_change = on_change
        self._on_failure = on_failure
        self._seen = signature(path) if path else None
        self.current = read_tenants(path, replicas) if path else Tenants()

    def reload_if_changed(self) -> None:
        """Read the file again if it changed; a wrong file is logged and changes nothing."""
        if self._path is None or (now := signature(self._path)) == self._seen:
            return
        self._seen = now
        try:
            tenants = read_tenants(self._path, self._replicas)
        except TenantsError as error:
            logger.error("tenants file refused, the old tenants stay", extra={"fields": {"reason": str(error)}})
            self._on_failure()
            return
        self.current = tenants
        self._on_change(tenants)
        logger.info("tenants read again", extra={"fields": {"tenants": len(tenants.by_id)}})

    async def watch(self, interval_s: float = 1.0) -> None:
        """Check the file for ever. Polling works on NFS too, and where a ConfigMap replaces a link."""
        while self._path is not None:
            await asyncio.sleep(interval_s)
            self.reload_if_changed()
