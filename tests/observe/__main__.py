"""`make observe`: Prometheus and Alertmanager on a real server under load; an hour of the rules takes a minute.

Provokes each alert that can be provoked on one machine, compares every recorded series with its expression under load,
and runs every query of the dashboard. The last line is for machines.
"""

import asyncio
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.ports import free_port
from benchmarks.harness.processes import process_tree
from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.client import Access, AsyncClient, Client, ServerError
from server.cli.process import ServerProcess
from tests.factories import write_tiny_backbone
from tests.faults._certificates import authority, issue
from tests.fleet._drills import load
from tests.fleet._placing import write_adapters
from tests.observe._monitoring import Monitoring, dashboard_queries, missing, rules

# Alerts that cannot be provoked on one machine, and why.
NOT_PROVOKED = {
    "MtloraStorageHangs": "needs a file system that hangs",
    "MtloraKvCacheFull": "the small backbone's sequences do not fill a cache",
}
# Counters that have no series before their first failure.
NEVER_COUNTED = ("mtlora_jwks_failures_total", "mtlora_background_ends_total")
# Waits of an alert whose cause lasts: its `for`, scaled, and some.
_PATIENCE_S = 100.0
_TENANTS: dict[str, dict[str, Any]] = {
    "busy": {}, "limited": {"requests_per_second": 1}, "slow": {"max_in_flight": 1}, "operator": {"admin": True},
}  # fmt: skip


class Observed:
    """A server that is watched, with its tenants' keys."""

    def __init__(self, folder: Path) -> None:
        backbone = write_tiny_backbone(folder / "backbone", hidden_size=64, heads=2)
        self.adapters = write_adapters(folder / "adapters", backbone, 30)
        ca = authority(folder)
        served = issue(ca, folder, "server")
        self._keys, self._entries = {}, []
        for name, fields in _TENANTS.items():
            self._keys[name], entry = tenant(name, **fields)
            self._entries.append(entry)
        self._tenants, self._ca = folder / "tenants.yaml", ca.pem
        self.write_tenants()
        metrics_port = free_port()
        self.metrics = f"127.0.0.1:{metrics_port}"
        self.process = ServerProcess(
            backbone=backbone, adapters=self.adapters, tenants=self._tenants, metrics_port=metrics_port,
            tls_certificate=served.pem, tls_key=served.key, audit_log="/dev/full", max_num_seqs=4, max_in_flight=16,
            adapter_slots=8, kv_cache_gib=0.1, engine_max_failures=100, routing_sample_steps=1, log_level="error",
            wait=False, timeout=300,
        )  # fmt: skip

    def write_tenants(self) -> None:
        write_tenants(self._tenants, *self._entries)

    def spoil_tenants(self) -> None:
        self._tenants.write_text("tenants: nobody")

    def access(self, name: str) -> Access:
        return Access(api_key=self._keys[name], ca=self._ca, server_name="server")

    def tasks(self) -> list[str]:
        with Client(self.process.address, self.access("busy"), retry=None) as client:
            return [task.id for task in client.tasks()]

    def kill_engine(self) -> None:
        for process in process_tree(self.process.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith("VLLM::"):
                    process.kill()

    def audited(self) -> None:
        """A call whose line cannot be written."""
        client = Client(self.process.address, self.access("operator"), retry=None)
        with client, contextlib.suppress(ServerError):
            client.unload_adapter("adapter-29")


def main() -> int:
    """0 if every provoked alert fired, every rule recorded its expression, and no query is empty."""
    if absent := missing():
        print(f"observe: {', '.join(absent)} not installed; on Debian: apt-get install {' '.join(absent)}")
        return 2
    with tempfile.TemporaryDirectory(prefix="observe-") as name:
        folder, since = Path(name), time.time()
        observed = Observed(folder)
        with Monitoring(folder, observed.metrics) as monitoring, observed.process as server:
            # No server serves while this one starts.
            server.wait_ready()
            records = {rule["record"] for rule in rules("record")}
            wrong = asyncio.run(_provoke(observed, monitoring, records))
            queries = [each for each in dashboard_queries() if not any(name in each for name in NEVER_COUNTED)]
            empty = [query for query in queries if not monitoring.ever(query, since)]
            wanted = {rule["alert"] for rule in rules("alert")} - NOT_PROVOKED.keys()
            quiet = {alert for alert in wanted if not monitoring.wait_for(alert, _PATIENCE_S)}
    for alert in sorted(monitoring.fired):
        print(f"fired after {monitoring.fired[alert] - since:5.0f} s: {alert}")
    for what, found in (("did not fire", quiet), ("is not as its rule says", wrong), ("is empty", empty)):
        for each in sorted(found):
            print(f"{what}: {each}")
    met = not (quiet or wrong or empty)
    print(
        f"observe: {len(wanted)} alerts provoked, {len(wanted) - len(quiet)} fired ({len(NOT_PROVOKED)} not provoked); "
        f"{len(records)} recorded names under load, {len(wrong)} wrong; {len(queries)} queries of the dashboard, "
        f"{len(empty)} empty: {'met' if met else 'MISSED'}"
    )
    return int(not met)


async def _provoke(observed: Observed, monitoring: Monitoring, records: Collection[str]) -> list[str]:
    """One load after the other, each until its alerts have come or their time is over; returns wrong records."""
    tasks = observed.tasks()
    observed.spoil_tenants()
    (observed.adapters / "broken" / "1").mkdir(parents=True)
    for file in ("adapter.json", "adapter.safetensors"):
        (observed.adapters / "broken" / "1" / file).write_bytes(b"{}")
    await asyncio.to_thread(observed.audited)
    long: dict[str, Any] = {"max_new_tokens": 64, "stop": []}
    async with _load(observed, "busy", tasks, 40, **long), _load(observed, "limited", tasks, 4, **long):
        for alert in ("MtloraTenantsFileRefused", "MtloraQueueGrows", "MtloraFirstTokenSlow", "MtloraRequestsShed",
                      "MtloraTenantOverQuota", "MtloraAdapterVersionsFail", "MtloraAccountingFails"):  # fmt: skip
            await asyncio.to_thread(monitoring.wait_for, alert, _PATIENCE_S)
        for _ in range(4):
            await asyncio.to_thread(observed.kill_engine)
            await _serving_again(observed)
        await asyncio.to_thread(monitoring.wait_for, "MtloraErrorBudgetBurnsFast", _PATIENCE_S)
    observed.write_tenants()
    short: dict[str, Any] = {"max_new_tokens": 1, "stop": []}
    async with _load(observed, "busy", tasks, 4, **short):
        await asyncio.to_thread(monitoring.wait_for, "MtloraAdaptersChurn", _PATIENCE_S)
        async with _load(observed, "slow", tasks[:1], 8, max_new_tokens=200, stop=[]):
            await asyncio.to_thread(monitoring.wait_for, "MtloraTenantFirstTokenSlow", _PATIENCE_S)
            return await asyncio.to_thread(monitoring.wrong_records, records, _PATIENCE_S)


@asynccontextmanager
async def _load(observed: Observed, name: str, tasks: list[str], in_flight: int, **asked: Any) -> AsyncIterator[None]:
    async with load(observed.process.address, observed.access(name), tasks, in_flight=in_flight, **asked):
        yield


async def _serving_again(observed: Observed) -> None:
    async with AsyncClient(observed.process.address, observed.access("operator"), retry=None) as client:
        for _ in itertools.count():
            await asyncio.sleep(1)
            with contextlib.suppress(ServerError):
                await client.generate("task-0", "x", max_new_tokens=1, timeout=5)
                return


if __name__ == "__main__":
    sys.exit(main())
