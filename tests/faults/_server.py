"""The server that scenarios about adapters and the engine share, and the versions that they publish to it."""

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.native_server import native_server
from benchmarks.harness.processes import process_tree
from benchmarks.harness.versions import newest_version
from mtlora.checkpoint.read import read_checkpoint
from mtlora.checkpoint.write import write_checkpoint
from tests.faults._load import Question, References
from tests.faults._pace import Pace, measure_pace
from tests.faults._shared import Shared
from tests.faults.scenario import Options

# In float32 an answer does not depend on the other sequences in its batches.
SETTINGS: Mapping[str, Any] = {
    "dtype": "float32",
    "kv_cache_gib": 0.5,
    "max_num_seqs": 16,
    "max_adapter_mib": 64,
    "engine_max_failures": 1000,
    "engine_hang_s": 20,
    "log_level": "warning",
}


class Target:
    """A server with one adapter, to which scenarios publish new versions, made of two contents in turn.

    root: the server's folder of adapters.
    """

    def __init__(self, options: Options) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="faults-server-"))
        self.root = self._home / "adapters"
        source = _highest_version(options.adapters)
        self.name = source.parent.name
        self.contents = [self._home / "content" / "0", self._home / "content" / "1"]
        shutil.copytree(source, self.contents[0])
        _write_halved(source, self.contents[1])
        self.version = 1
        # The answers of both contents, once a scenario has asked for them.
        self.known: tuple[list[Question], References] | None = None
        shutil.copytree(self.contents[1], self.root / self.name / "1")
        self._running = contextlib.ExitStack()
        self.server = self._running.enter_context(
            native_server(backbone=options.backbone, adapters=self.root, **SETTINGS)
        )
        atexit.register(self.close)

    @property
    def address(self) -> str:
        return self.server.address

    @functools.cached_property
    def pace(self) -> Pace:
        with self.server.client() as client:
            return measure_pace(client, self.address)

    def content_of(self, version: str) -> int:
        """Index of the content that a version is made of."""
        return int(version) % 2

    def next_version(self) -> tuple[str, Path]:
        """Name and content of the next version."""
        self.version += 1
        return str(self.version), self.contents[self.version % 2]

    def publish(self) -> str:
        """Put the next version in place by one rename."""
        version, content = self.next_version()
        hidden = self.root / self.name / f".{version}"
        shutil.copytree(content, hidden)
        hidden.rename(self.root / self.name / version)
        self.forget_below(self.version - 3)
        return version

    def forget_below(self, version: int) -> None:
        """Remove the folders of older versions."""
        for folder in (self.root / self.name).iterdir():
            if folder.name.isdigit() and int(folder.name) < version:
                shutil.rmtree(folder)

    def engine_processes(self) -> list[psutil.Process]:
        """The engine's core and its workers, found by name."""
        return [process for process in process_tree(self.server.process.pid) if process.name().startswith("VLLM::")]

    def close(self) -> None:
        atexit.unregister(self.close)
        self._running.close()
        shutil.rmtree(self._home, ignore_errors=True)


shared = Shared(Target)


def _highest_version(adapters: Path) -> Path:
    """The highest version of the first adapter in a folder. Raises ValueError if there is none."""
    for adapter in sorted(path for path in adapters.iterdir() if path.is_dir()):
        if any(adapter.glob("*/adapter.json")):
            return newest_version(adapter)
    raise ValueError(f"{adapters}: holds no adapter, NAME/VERSION/")


def _write_halved(source: Path, folder: Path) -> None:
    """Write a copy of an adapter with half its output, which gives other answers to most inputs."""
    checkpoint = read_checkpoint(source)
    manifest = checkpoint.manifest
    write_checkpoint(
        folder,
        backbone=manifest.backbone,
        config=manifest.config,
        tasks=manifest.tasks,
        tensors={n: t * 0.5 if n.endswith("lora_B") else t for n, t in checkpoint.tensors.items()},
    )
