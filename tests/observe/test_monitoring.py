"""Debian's Prometheus and Alertmanager with the shipped rules, on a server without an engine."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.fleet._drills import load
from tests.fleet._fleet import StandIn, running_fleet
from tests.observe._monitoring import Monitoring, dashboard_queries, missing, scaled

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"{', '.join(missing())} not installed (Debian packages)")


def test_windows_are_divided_and_nothing_else() -> None:
    before = "rate(x[5m]) > 7 * 86400 and increase(y[1h])"
    assert scaled(before) == "rate(x[5000ms]) > 7 * 86400 and increase(y[60000ms])"


async def test_rules_record_and_alerts_arrive(tmp_path: Path) -> None:
    since = time.time()
    with running_fleet(StandIn, tmp_path, number=1) as fleet:
        (server,) = fleet.members
        with Monitoring(tmp_path, f"127.0.0.1:{server.settings['metrics_port']}") as monitoring:
            async with load(fleet.address, fleet.access(), ["one", "two"], in_flight=8):
                # A server without an engine does not say that it serves.
                assert await asyncio.to_thread(monitoring.wait_for, "MtloraNoReplicaServes", 60)
                unequal, recorded = await asyncio.to_thread(monitoring.compare_recorded)
            shown = [query for query in dashboard_queries() if monitoring.ever(query, since)]
    assert unequal == []
    assert recorded >= 6
    assert len(shown) > 20
    assert monitoring.fired.keys() <= {"MtloraNoReplicaServes", "MtloraReplicaDoesNotServe"}
