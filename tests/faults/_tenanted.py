"""The server with tenants that scenarios share. Each scenario writes its own tenants into the file."""

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.native_server import native_server
from benchmarks.harness.tenants import tenant, write_tenants
from benchmarks.harness.waiting import wait_until
from mtlora.client import Access, Client, ServerError
from tests.faults._pace import Pace, measure_pace
from tests.faults._shared import Shared
from tests.faults.scenario import Options

# Without the prefix cache, the same greedy requests are the same work each time.
SETTINGS: Mapping[str, Any] = {
    "kv_cache_gib": 0.5,
    "max_num_seqs": 16,
    "max_in_flight": 256,
    "enable_prefix_caching": False,
    "max_message_bytes": 65536,
    # Enough samples for a 99.9th percentile in half a minute.
    "loop_delay_interval_s": 0.01,
    "log_level": "warning",
}
# Ends a wait for a watcher of the file that has ended itself.
_TIMEOUT_S = 30.0


class Tenanted:
    """root: the server's folder of adapters. file: its tenants file."""

    def __init__(self, options: Options) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="faults-tenanted-"))
        self.root, self.file = self._home / "adapters", self._home / "tenants.yaml"
        shutil.copytree(options.adapters, self.root)
        key, entry = tenant("first")
        write_tenants(self.file, entry)
        self._access = Access(api_key=key)
        self._running = contextlib.ExitStack()
        self.server = self._running.enter_context(
            native_server(backbone=options.backbone, adapters=self.root, tenants=self.file, **SETTINGS)
        )
        atexit.register(self.close)

    @property
    def address(self) -> str:
        return self.server.address

    @functools.cached_property
    def pace(self) -> Pace:
        with self.server.client(self._access) as client:
            return measure_pace(client, self.address, self._access)

    def set_tenants(self, tenants: Mapping[str, Mapping[str, Any]]) -> dict[str, Access]:
        """Replace all tenants but the one that measures (id -> fields of its entry); returns the access of each."""
        self.pace  # noqa: B018
        made = {tenant_id: tenant(tenant_id, **fields) for tenant_id, fields in tenants.items()}
        write_tenants(self.file, *(entry for _, entry in made.values()))
        access = {tenant_id: Access(api_key=key) for tenant_id, (key, _) in made.items()}
        self.wait_accepted(next(iter(access.values())))
        return access

    def wait_accepted(self, access: Access) -> None:
        """Wait until the server has read a tenants file with this key. Raises TimeoutError."""
        with Client(self.address, access) as client:
            wait_until(lambda: accepted(client), _TIMEOUT_S, every_s=0.1)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._running.close()
        shutil.rmtree(self._home, ignore_errors=True)


def accepted(client: Client) -> bool:
    """Whether a server takes a client's key."""
    try:
        client.task("")
    except ServerError as error:
        return error.code.name not in ("UNAUTHENTICATED", "PERMISSION_DENIED")
    return True


def has_task(client: Client, task_id: str) -> bool:
    """Whether a server serves a task."""
    try:
        client.task(task_id)
    except ServerError as error:
        if error.code.name in ("NOT_FOUND", "RESOURCE_EXHAUSTED"):
            return False
        raise
    return True


tenanted = Shared(Tenanted)
