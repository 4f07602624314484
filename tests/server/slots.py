"""A fake backbone without files, slots without vLLM, versions without files, and an engine's memory without engine."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.format import AdapterManifest
from server.errors import AdapterError
from server.registry.record import AdapterRecord
from server.registry.source import Found
from server.registry.version import AdapterVersion, Stage

TINY = BackboneIdentity(architecture="Tiny", hidden_size=8, num_layers=2, weights_fingerprint="0" * 64)


@dataclass(frozen=True)
class Slot:
    lora_int_id: int
    lora_name: str


def make_slots(name: str, version: str, folder: Path, manifest: AdapterManifest, first_id: int) -> dict[str, Any]:
    shared = Slot(first_id, f"{name}/{version}")
    if not manifest.config.task_bias:
        return {task.id: shared for task in manifest.tasks}
    return {task.id: Slot(first_id + row, f"{name}/{version}#{task.id}") for row, task in enumerate(manifest.tasks)}


def serving_version(name: str, task: str = "task") -> AdapterVersion:
    """Version 1 of an adapter; its one slot has the adapter's name."""
    record = AdapterRecord(name)
    version = record.serving = AdapterVersion(record, Found(name, "1", Path(name), ()), stage=Stage.SERVING)
    version.copied, version.folder, version.slots = True, Path(name), {task: Slot(1, name)}
    return version


class Loads:
    """An engine's memory: what is in it, and loads that a test holds up or lets fail."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.most = 0
        self.gate: dict[str, asyncio.Event] = {}
        self.refuse: set[str] = set()

    async def load(self, folder: Path, slots: Sequence[Any]) -> None:
        name = slots[0].lora_name
        if name in self.gate:
            await self.gate[name].wait()
        await asyncio.sleep(0)
        if name in self.refuse:
            raise AdapterError("no")
        assert name not in self.held
        self.held.append(name)
        self.most = max(self.most, len(self.held))

    async def unload(self, slots: Sequence[Any]) -> None:
        self.held.remove(slots[0].lora_name)
