"""What a registry is put together from."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from server.registry.catalog import Catalog
from server.registry.events import Events
from server.registry.mirror import Mirror
from server.registry.residency import Residency
from server.registry.source import Found
from server.registry.spool import Spool
from server.registry.verifier import Verified
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from mtlora.checkpoint.format import AdapterManifest

# (adapter name, version, folder, manifest, first id) -> a vLLM LoRARequest for each task id.
MakeSlots = Callable[[str, str, Path, "AdapterManifest", int], Mapping[str, Any]]


class Verifies(Protocol):
    async def verify(self, root: Path, found: Found) -> Verified: ...


@dataclass(frozen=True)
class Parts:
    """`warm` runs a short sequence on a slot; `publish` gets each new table."""

    root: Path
    verifier: Verifies
    spool: Spool
    residency: Residency
    make_slots: MakeSlots
    warm: Callable[[Any], Awaitable[None]]
    publish: Callable[[Catalog], None]
    events: Events
    metrics: Metrics
    mirror: Mirror | None = None
