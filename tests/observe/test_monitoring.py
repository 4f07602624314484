"""Debian's Prometheus and Alertmanager with the shipped rules, on a server without an engine."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.fleet._drills import load
from tests.fleet._fleet import StandIn, running_fleet
from tests.observe._monitoring import ALERTMANAGER, Monitoring, dashboard_queries, missing, rules, scaled

# Ends what hangs; alerts and records come within seconds.
_PATIENCE_S = 300.0
# No failure occurs here.
_NEVER = {"mtlora:errors:rate5m"}

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"{', '.join(missing())} not installed (Debian packages)")


def test_windows_are_divided_and_nothing_else() -> None:
    before = "rate(x[5m]) > 7 * 86400 and increase(y[1h])"
    assert scaled(before) == "rate(x[5000ms]) > 7 * 86400 and increase(y[60000ms])"


def test_a_program_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / ALERTMANAGER
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no templates\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    with pytest.raises(RuntimeError, match=f"{ALERTMANAGER} does not start: no templates"), Monitoring(tmp_path, ""):
        pass


async def test_rules_record_and_alerts_arrive(tmp_path: Path) -> None:
    since, every = time.time(), {rule["record"] for rule in rules("record")}
    with running_fleet(StandIn, tmp_path, number=1) as fleet:
        (server,) = fleet.members
        with Monitoring(tmp_path, f"127.0.0.1:{server.settings['metrics_port']}") as monitoring:
            async with load(fleet.address, fleet.access(), ["task-0"], in_flight=8, max_new_tokens=20):
                # A server without an engine does not say that it serves.
                assert await asyncio.to_thread(monitoring.wait_for, "MtloraNoReplicaServes", _PATIENCE_S)
                wrong = await asyncio.to_thread(monitoring.wrong_records, every - _NEVER, _PATIENCE_S)
            shown = [query for query in dashboard_queries() if monitoring.ever(query, since)]
    assert wrong == []
    assert len(shown) > 20
    assert monitoring.fired.keys() <= {"MtloraNoReplicaServes", "MtloraReplicaDoesNotServe"}
