"""The life of an adapter version: its stages, its place in the engine, and every move between them.

A version's `stage` says what may be done with it. The adapter's record says which version *should* serve; the stage
says what *is*.

    FOUND ───► VERIFIED ───► LOADED ───► WARMED ───► SERVING
     │ ▲         ▲ │           │           │            │
     │ │         │ └───────────┴─────┬─────┴────────────┘
     ▼ │         │                   ▼
    FAILED ◄─────┼─────────────── DRAINING ───► DRAINED
       │         │                   │ │
       └─────────┴───────────────────┘ └───► FOUND

| stage | what it means | who moves a version there |
| --- | --- | --- |
| FOUND | Its files lie in the folder, without a copy. | `AdapterRecord.note`, the end of a drain |
| VERIFIED | It has a copy: to be brought up, or kept for a rollback. | `Lifecycle.verify`, the end of a drain |
| LOADED | The engine has it; its first sequence is due. | `Lifecycle.bring` |
| WARMED | Its first sequence was run. | `Lifecycle.bring` |
| SERVING | New requests begin on it: all, or a canary's share. | `Registry` |
| DRAINING | No new request begins on it. It leaves the engine with its last. | `Lifecycle.retire` |
| DRAINED | The end: neither files nor copy. | the end of a drain |
| FAILED | It did not reach a stage. Only other files, or a Load by name, get another try. | `Registry` |

VANISHED and UNLOADED are events alone: the files of a version are gone, or Unload stopped it.

What holds at all times:
- Only a version that is WARMED begins to serve; at the start of the server, one that is VERIFIED.
- The spool has a copy of a version from VERIFIED until it has drained; after that only to roll back to it.
- While a request holds a version (`holds`), its copy stays; while it has a lease (`leases`), its place stays.
- A version that serves may leave the engine for others (its `place`); the next request loads it again.
- Places other than OUT and QUEUED are at most as many as the engine's capacity.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import AdapterError
from server.registry.source import Found

if TYPE_CHECKING:
    from mtlora.task import TaskSpec
    from server.registry.record import AdapterRecord

_NUMBERS = re.compile(r"v?(\d+(?:\.\d+)*)", re.ASCII)


class Stage(Enum):
    """How far a version has come. Each stage that it reaches is an event; a failure names the one not reached."""

    FOUND = "found"
    VERIFIED = "verified"
    LOADED = "loaded"
    WARMED = "warmed"
    SERVING = "serving"
    DRAINING = "draining"
    DRAINED = "drained"
    FAILED = "failed"
    VANISHED = "vanished"
    UNLOADED = "unloaded"


class Place(Enum):
    """Where a version is in the engine's memory."""

    OUT = "out"
    # Waits for room.
    QUEUED = "queued"
    LOADING = "loading"
    RESIDENT = "resident"
    # Makes room for another: takes no new lease, and goes with its last.
    CLOSING = "closing"
    UNLOADING = "unloading"


_MOVES: Mapping[Enum, set[Enum]] = {
    Stage.FOUND: {Stage.VERIFIED, Stage.FAILED},
    Stage.VERIFIED: {Stage.LOADED, Stage.SERVING, Stage.DRAINING},
    Stage.LOADED: {Stage.WARMED, Stage.DRAINING},
    Stage.WARMED: {Stage.SERVING, Stage.DRAINING},
    Stage.SERVING: {Stage.DRAINING},
    # Back to VERIFIED: kept for a rollback, or wanted again before it has left.
    Stage.DRAINING: {Stage.VERIFIED, Stage.FOUND, Stage.DRAINED, Stage.FAILED},
    Stage.DRAINED: set(),
    Stage.FAILED: {Stage.VERIFIED},
    # An engine that is lost moves every version OUT.
    Place.OUT: {Place.QUEUED},
    Place.QUEUED: {Place.LOADING, Place.OUT},
    Place.LOADING: {Place.RESIDENT, Place.OUT},
    Place.RESIDENT: {Place.CLOSING, Place.UNLOADING, Place.OUT},
    Place.CLOSING: {Place.UNLOADING, Place.OUT},
    Place.UNLOADING: {Place.OUT},
}


class StageError(AdapterError):
    """A version that did not reach a stage; the message says why."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason


@dataclass(eq=False, repr=False)
class AdapterVersion:
    """One version of an adapter: a folder's files, identified by their signature, then their content.

    The same NAME/VERSION with other bytes is another AdapterVersion, with another copy and other slots: nothing of
    one, its cached blocks included, serves the other.

    found: its files, as they were seen last. present: whether they lie in the folder still. seen: since when, in
        seconds of time.monotonic().
    passed_over: somebody chose not to serve these files, by Rollback or by Load of a lower version.
    reason: why it is FAILED.
    content: sha256 of its manifest, which holds that of its tensors. Empty before VERIFIED, like all that follows.
    folder: the copy in the spool, while `copied`.
    specs: its tasks by id.
    slots: vLLM's LoRARequest of every task; tasks without a bias of their own share one.
    holds: requests that run on it or wait for it. leases: those of them that keep it in the engine.
    last_used: time.monotonic() of the last lease.
    """

    adapter: "AdapterRecord"
    found: Found
    present: bool = True
    seen: float = field(default_factory=time.monotonic)
    stage: Stage = Stage.FOUND
    passed_over: bool = False
    reason: str = ""
    content: str = ""
    copied: bool = False
    folder: Path = field(init=False)
    specs: Mapping[str, "TaskSpec"] = field(default_factory=dict)
    slots: Mapping[str, Any] = field(default_factory=dict)
    place: Place = Place.OUT
    holds: int = 0
    leases: int = 0
    last_used: float = 0.0

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.adapter.name

    @property
    def version(self) -> str:
        """The version's name."""
        return self.found.version

    def be_present(self, files: Found) -> None:
        """These files of it lie in the folder now. The choice to pass over others does not go for them."""
        self.found, self.present, self.passed_over, self.seen = files, True, False, time.monotonic()

    def enter(self, stage: Stage) -> None:
        """Move to another stage. Raises RuntimeError for a move that `_MOVES` does not have."""
        self._check(self.stage, stage)
        self.stage = stage

    def move(self, place: Place) -> None:
        """Move to another place in the engine. Raises RuntimeError for a move that `_MOVES` does not have."""
        self._check(self.place, place)
        self.place = place

    @property
    def leaving(self) -> bool:
        """Whether it leaves the engine, and the spool, with its last request."""
        return self.copied and self.stage in (Stage.DRAINING, Stage.FAILED)

    @property
    def resident(self) -> bool:
        """Whether requests can run on it now."""
        return self.place in (Place.RESIDENT, Place.CLOSING)

    @property
    def pinned(self) -> bool:
        """Whether it stays in the engine: a pin holds what serves, not its canaries."""
        return self.adapter.pinned and self.adapter.serving is self

    @property
    def distinct_slots(self) -> list[Any]:
        """One entry a slot, by id."""
        return [slot for _, slot in sorted({slot.lora_int_id: slot for slot in self.slots.values()}.items())]

    def _check(self, before: Enum, after: Enum) -> None:
        if after not in _MOVES[before]:
            raise RuntimeError(f"{self}: {before.value} cannot become {after.value}")

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


def version_key(version: str) -> tuple[int, tuple[int, ...], str]:
    """Sorts versions: words by letter; above them numbers by value, a leading v or not: `2` < `10` < `v10.1`."""
    if match := _NUMBERS.fullmatch(version):
        return 1, tuple(int(part) for part in match[1].split(".")), version
    return 0, (), version
