"""An adapter version and the stages of its life."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import AdapterError

if TYPE_CHECKING:
    from mtlora.checkpoint.format import AdapterManifest, TaskEntry

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
_NUMBERS = re.compile(r"v?(\d+(?:\.\d+)*)", re.ASCII)


class Stage(Enum):
    """What has become of a version. Each is an event; a failure names the stage that was not reached."""

    FOUND = "found"
    VERIFIED = "verified"
    LOADED = "loaded"
    WARMED = "warmed"
    SERVING = "serving"
    DRAINED = "drained"
    FAILED = "failed"
    VANISHED = "vanished"
    UNLOADED = "unloaded"


class StageError(AdapterError):
    """A version that did not reach a stage; the message says why."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason


@dataclass(frozen=True, eq=False)
class AdapterVersion:
    """A version that passed verification.

    content: sha256 of its manifest, which holds that of its tensors. The same NAME/VERSION with other bytes is another
    AdapterVersion, in another folder, with other slots: nothing of the one, cached blocks neither, serves the other.
    folder: the verified copy.
    slots: vLLM's LoRARequest of every task; tasks without a bias of their own share one.
    """

    name: str
    version: str
    content: str
    folder: Path
    manifest: "AdapterManifest"
    slots: Mapping[str, Any]

    @cached_property
    def specs(self) -> Mapping[str, "TaskEntry"]:
        """Its tasks by id."""
        return {task.id: task for task in self.manifest.tasks}

    @property
    def distinct_slots(self) -> list[Any]:
        """One entry a slot, by id."""
        return [slot for _, slot in sorted({slot.lora_int_id: slot for slot in self.slots.values()}.items())]

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


def version_key(version: str) -> tuple[int, tuple[int, ...], str]:
    """Sorts versions: words by letter; above them numbers by value, a leading v or not: `2` < `10` < `v10.1`."""
    if match := _NUMBERS.fullmatch(version):
        return 1, tuple(int(part) for part in match[1].split(".")), version
    return 0, (), version
