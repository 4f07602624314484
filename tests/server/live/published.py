"""An adapter that comes to the session's server, and goes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.waiting import wait_until
from mtlora.checkpoint.format import TaskEntry
from mtlora.client import Client
from tests.server.adapters import write_adapter


@contextmanager
def published(folder: Path, client: Client, tasks: list[TaskEntry], **fields: Any) -> Iterator[Path]:
    """An adapter's folder, with version 1 serving; unloaded and removed afterwards."""
    write_adapter(folder / "1", tasks, seed=1, **fields)
    client.load_adapter(folder.name)
    yield folder
    client.unload_adapter(folder.name)
    shutil.rmtree(folder)
    wait_until(lambda: folder.name not in {adapter.name for adapter in client.adapters()}, 60)
