"""The states of an adapter version: its stage, its place in the engine, and every move between them.

The adapter's record decides which version should serve; a version's stage is its progress towards that.

    FOUND ───► VERIFIED ───► LOADED ───► WARMED ───► SERVING
      │         ▲ ▲ │          │           │            │
      ▼         │ │ └──────────┴─────┬─────┴────────────┘
    FAILED ─────┘ │                  ▼
                  └────────────── DRAINING ───► FOUND, FAILED or DRAINED

| stage | what it means | who moves a version there |
| --- | --- | --- |
| FOUND | Its files lie in the folder, without a copy. | `AdapterRecord.note`, the end of a drain |
| VERIFIED | It has a copy: to be brought up, or kept for a rollback. | `Lifecycle.verify`, the end of a drain |
| LOADED | The engine has it; its first sequence is due. | `Lifecycle.bring` |
| WARMED | Its first sequence was run. | `Lifecycle.bring` |
| SERVING | New requests begin on it: all, or a canary's share. | `Registry` |
| DRAINING | No new request begins on it. It leaves the engine with its last. | `Lifecycle.retire` |
| DRAINED | The end: neither files nor copy. | the end of a drain |
| FAILED | It did not reach the next stage. Changed files, or a Load by name, start a new try. | `Registry` |

VANISHED (its files are gone) and UNLOADED (by a call) are only events, not stages that a version stays in.

Invariants:
- A version begins to serve when WARMED; while the server starts, when VERIFIED.
- The spool has its copy from VERIFIED until it has drained, and while it is kept for a rollback.
- A version keeps its copy while a request holds it, from the choice of the version to the end of the answer, and stays
  resident while a request has a lease on it.
- The engine may evict a serving version (`place`); the next request loads it again.
- At most `capacity` versions are in a place other than OUT and QUEUED. A QUEUED one gets room or fails within `ROOM_S`.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from server.errors import AdapterError
from server.job import Lane
from server.registry.source import Found

if TYPE_CHECKING:
    from mtlora.task import TaskSpec
    from server.registry.heads import Head, ServedProjector
    from server.registry.record import AdapterRecord

_NUMBERS = re.compile(r"v?(\d+(?:\.\d+)*)", re.ASCII)


class Stage(Enum):
    """The progress of a version; also the kind of an event."""

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
    # It waits for room.
    QUEUED = "queued"
    LOADING = "loading"
    RESIDENT = "resident"
    # It will make room for another version: takes no new lease, and is evicted after its last.
    CLOSING = "closing"
    UNLOADING = "unloading"


_MOVES: Mapping[Enum, set[Enum]] = {
    Stage.FOUND: {Stage.VERIFIED, Stage.FAILED},
    Stage.VERIFIED: {Stage.LOADED, Stage.SERVING, Stage.DRAINING},
    Stage.LOADED: {Stage.WARMED, Stage.DRAINING},
    Stage.WARMED: {Stage.SERVING, Stage.DRAINING},
    Stage.SERVING: {Stage.DRAINING},
    # VERIFIED: kept for a rollback, or needed again before its last request.
    Stage.DRAINING: {Stage.VERIFIED, Stage.FOUND, Stage.DRAINED, Stage.FAILED},
    Stage.DRAINED: set(),
    Stage.FAILED: {Stage.VERIFIED},
    # A lost engine moves every version OUT.
    Place.OUT: {Place.QUEUED},
    Place.QUEUED: {Place.LOADING, Place.OUT},
    Place.LOADING: {Place.RESIDENT, Place.OUT},
    Place.RESIDENT: {Place.CLOSING, Place.UNLOADING, Place.OUT},
    Place.CLOSING: {Place.UNLOADING, Place.OUT},
    Place.UNLOADING: {Place.OUT},
}


class StageError(AdapterError):
    """A version did not reach `stage`; the message says why."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason


class ElsewhereError(StageError):
    """A valid version, but this server has no engine for it."""

    def __init__(self, reason: str) -> None:
        super().__init__(Stage.VERIFIED, reason)


class NoRoomError(StageError):
    """The engine had no room for a version in time; the next attempt may find some.

    taken: the versions that filled the engine. The message does not name them, because tenants see it.
    """

    def __init__(self, reason: str, taken: Sequence[str]) -> None:
        super().__init__(Stage.LOADED, reason)
        self.public = reason
        self.taken = taken


@dataclass(eq=False, repr=False)
class AdapterVersion:
    """The files of one NAME/VERSION.

    Changed files under the same name become a new AdapterVersion with its own copy and slots, so that cached blocks of
    the old one are never used for the new one.

    found, present: its files as last seen, and whether they still lie in the folder.
    seen: time.monotonic() when these files appeared.
    passed_over: a Rollback, or a Load of a lower version, decided not to serve these files.
    reason: why it FAILED. elsewhere: whether the reason is only that this server has no engine for it.
    content: sha256 of its manifest, which holds the tensors' sha256. Set, like all below, from VERIFIED on.
    copied, folder: whether the spool has a copy, and where.
    specs: its tasks by id.
    slots: vLLM's LoRARequest of each task; tasks without a bias of their own share one.
    activation: that of its adapter; see ServedTask.
    calibration: the temperature of the probabilities of a task's labels, for tasks that have one.
    lane: which engine holds it. heads: of its tasks, if they take images. projector: if its tasks take text and images.
    fewest: the fewest tokens that a typed task's answer takes, by task; None until an engine has compiled the types.
    holds: number of running requests that chose this version. leases: number of those that keep it resident.
    last_used: time.monotonic() of the last lease.
    """

    adapter: "AdapterRecord"
    found: Found
    present: bool = True
    seen: float = field(default_factory=time.monotonic)
    stage: Stage = Stage.FOUND
    passed_over: bool = False
    reason: str = ""
    elsewhere: bool = False
    content: str = ""
    copied: bool = False
    folder: Path = field(init=False)
    specs: Mapping[str, "TaskSpec"] = field(default_factory=dict)
    slots: Mapping[str, Any] = field(default_factory=dict)
    activation: Literal["all", "task"] = "all"
    calibration: Mapping[str, float] = field(default_factory=dict)
    lane: Lane = Lane.TEXT
    heads: Mapping[str, "Head"] = field(default_factory=dict)
    projector: "ServedProjector | None" = None
    fewest: Mapping[str, int] | None = None
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
        """Note that these files of the version lie in the folder now. They are not passed over."""
        self.found, self.present, self.passed_over, self.seen = files, True, False, time.monotonic()

    def enter(self, stage: Stage) -> None:
        """Move to another stage. Raises RuntimeError if `_MOVES` does not allow it."""
        self._check(self.stage, stage)
        self.stage = stage

    def move(self, place: Place) -> None:
        """Move to another place. Raises RuntimeError if `_MOVES` does not allow it."""
        self._check(self.place, place)
        self.place = place

    @property
    def leaving(self) -> bool:
        """Whether it will leave the engine and the spool after its last request."""
        return self.copied and self.stage in (Stage.DRAINING, Stage.FAILED)

    @property
    def resident(self) -> bool:
        """Whether requests can run on it."""
        return self.place in (Place.RESIDENT, Place.CLOSING)

    @property
    def pinned(self) -> bool:
        """Whether it is never evicted: a pin applies to the serving version, not to canaries."""
        return self.adapter.pinned and self.adapter.serving is self

    @property
    def distinct_slots(self) -> list[Any]:
        """Each slot once, by id."""
        return [slot for _, slot in sorted({slot.lora_int_id: slot for slot in self.slots.values()}.items())]

    def _check(self, before: Enum, after: Enum) -> None:
        if after not in _MOVES[before]:
            raise RuntimeError(f"{self}: {before.value} cannot become {after.value}")

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


def version_key(version: str) -> tuple[int, tuple[int, ...], str]:
    """Sort key: words by letter, then numbers by value, with or without a leading v: `beta` < `2` < `10` < `v10.1`."""
    if match := _NUMBERS.fullmatch(version):
        return 1, tuple(int(part) for part in match[1].split(".")), version
    return 0, (), version
