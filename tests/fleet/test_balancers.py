"""HAProxy and nginx, with their configurations of deploy/balancers, in front of three servers without an engine."""

import asyncio
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.balancers.health_check import SERVICE, health_check
from mtlora.client import AsyncClient, Retry
from tests.faults._tenants import tenant, write_tenants
from tests.fleet._drills import IN_FLIGHT, kill_one, load, rolling_restart
from tests.fleet._fleet import BALANCERS, Balancer, Fleet, StandIn, installed, running_fleet

KEYS: dict[str, str] = {}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    entries = []
    for name in (f"t{number}" for number in range(6)):
        KEYS[name], entry = tenant(name)
        entries.append(entry)
    tenants = write_tenants(folder / "tenants.yaml", *entries)
    with running_fleet(StandIn, folder, tenants=tenants, drain_delay_s=3) as fleet:
        yield fleet


@pytest.fixture(params=["haproxy", "nginx"])
def balancer(request: pytest.FixtureRequest, fleet: Fleet) -> Iterator[Balancer]:
    if not installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    with Balancer(request.param, fleet) as balancer:
        yield balancer


def test_haproxy_sends_the_health_check_that_the_protocol_asks_for() -> None:
    sent = re.search(r"send-binary (\w+)", (BALANCERS / "haproxy.cfg").read_text())
    assert sent is not None
    assert bytes.fromhex(sent[1]) == health_check(SERVICE)


async def test_no_call_fails_while_servers_restart_in_turn(fleet: Fleet, balancer: Balancer) -> None:
    async with load(balancer.address, balancer.access(KEYS["t0"]), ["one", "two"]) as found:
        await rolling_restart(fleet, found, calls_between=32)
    assert found.failed == {}
    assert found.calls > 4 * 32


async def test_a_killed_server_fails_what_ran_there_and_the_client_repeats_it(fleet: Fleet, balancer: Balancer) -> None:
    asked: dict[str, Any] = {"tasks": ["one", "two"], "in_flight": IN_FLIGHT // 2}
    async with (
        load(balancer.address, balancer.access(KEYS["t0"]), **asked) as once,
        load(balancer.address, balancer.access(KEYS["t1"]), retry=Retry(), **asked) as repeated,
    ):
        ran = await kill_one(fleet, once, calls_between=32)
    assert ran > 0
    assert once.codes == {"UNAVAILABLE"}
    assert sum(once.failed.values()) <= IN_FLIGHT // 2
    assert repeated.failed == {}
    # The others failed none.
    for member in fleet.members:
        assert member.page().value("mtlora_requests_total") == member.answered()


async def test_calls_about_a_document_stay_with_the_server_that_read_it(fleet: Fleet, balancer: Balancer) -> None:
    """Servers forget no document meanwhile, so one that does not know it would answer NOT_FOUND."""
    for key in KEYS.values():
        async with AsyncClient(balancer.address, balancer.access(key), retry=None) as client:
            (first,) = await client.analyze_all(["who"], "a document", timeout=30)
            for _ in range(4):
                (answer,) = await client.analyze_all(["who"], document_id=first.document_id, timeout=30)
                assert answer.document_id == first.document_id
    asked = [member.page().value("mtlora_requests_total", method="Analyze", status="OK") for member in fleet.members]
    assert sum(count > 0 for count in asked) > 1


async def test_haproxy_passes_over_a_server_whose_health_says_so(fleet: Fleet) -> None:
    if not installed("haproxy"):
        pytest.skip("haproxy is not installed")
    ill = fleet.members[1]
    with Balancer("haproxy", fleet) as balancer:
        ill.signal(signal.SIGUSR2)
        try:
            async with load(balancer.address, balancer.access(KEYS["t0"]), ["one"]) as found:
                # HAProxy needs a few checks to see it.
                calls, had = 0, -1.0
                while found.calls < calls + IN_FLIGHT or ill.answered() > had:
                    if found.calls >= calls + IN_FLIGHT:
                        calls, had = found.calls, ill.answered()
                    assert found.calls < 100 * IN_FLIGHT
                    await asyncio.sleep(0.05)
            assert found.failed == {}
        finally:
            ill.signal(signal.SIGUSR1)
