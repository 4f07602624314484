"""HAProxy and nginx, with their configurations of deploy/balancers, in front of three servers without an engine."""

import asyncio
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.tenants import tenant, write_tenants
from deploy.balancers.health_check import SERVICE, health_check
from mtlora.client import AsyncClient, Retry, ServerError
from tests.fleet._drills import IN_FLIGHT, FleetCalls, kill_one, load, only_what_ran_failed, rolling_restart
from tests.fleet._fleet import BALANCERS, Balancer, Fleet, StandIn, installed, running_fleet
from tests.fleet._placing import MOST_OF_ROUND_ROBIN, compare


@dataclass
class Balanced:
    """Servers behind a balancer, and the keys of tenants."""

    fleet: Fleet
    balancer: Balancer
    keys: list[str]

    def load(self, **asked: Any) -> AbstractAsyncContextManager[FleetCalls]:
        """Calls of the first tenant."""
        named = {"tasks": ["task-0", "task-1"], "max_new_tokens": 20, **asked}
        return load(self.balancer.address, self.balancer.access(self.keys[0]), **named)


# Seconds that servers answer on while their health says not serving: HAProxy sees that, nginx does not look.
DRAIN_DELAY_S = {"haproxy": 5, "nginx": 0.5}


@pytest.fixture(scope="module", params=DRAIN_DELAY_S)
def balanced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balanced]:
    if not installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp("fleet")
    keys, entries = [], []
    # So many that a balancer that hashes keys over two servers or more sends all to one in 1 of 2,000 runs at most.
    for number in range(12):
        key, entry = tenant(f"t{number}", admin=not number)
        keys.append(key)
        entries.append(entry)
    tenants = write_tenants(folder / "tenants.yaml", *entries)
    adapters = folder / "adapters"
    adapters.mkdir()
    settings: dict[str, Any] = {
        "tenants": tenants,
        "adapters": str(adapters),
        "drain_delay_s": DRAIN_DELAY_S[request.param],
    }
    with (
        running_fleet(StandIn, folder, **settings) as fleet,
        Balancer(request.param, fleet) as balancer,
    ):
        yield Balanced(fleet, balancer, keys)


@pytest.fixture(scope="module")
def open_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Servers of 40 slots, without a tenants file: they ask for no key."""
    with running_fleet(StandIn, tmp_path_factory.mktemp("open"), adapter_slots=40) as fleet:
        yield fleet


def test_haproxy_sends_the_health_check_that_the_protocol_asks_for() -> None:
    sent = re.search(r"send-binary (\w+)", (BALANCERS / "haproxy.cfg").read_text())
    assert sent is not None
    assert bytes.fromhex(sent[1]) == health_check(SERVICE)


async def test_placed_calls_load_a_fifth_of_the_adapters_at_most(open_fleet: Fleet) -> None:
    """100 adapters on three servers of 40 slots."""
    in_turn, placed = await compare(open_fleet, [f"task-{number}" for number in range(100)], rounds=10)
    assert placed >= 100
    assert placed <= MOST_OF_ROUND_ROBIN * in_turn


async def test_no_call_fails_while_servers_restart_in_turn(balanced: Balanced) -> None:
    async with balanced.load() as found:
        await rolling_restart(balanced.fleet, found, calls_between=32)
    assert found.failed == {}
    assert found.calls > 4 * 32


async def test_a_killed_server_fails_what_ran_there_and_the_client_repeats_it(balanced: Balanced) -> None:
    half = IN_FLIGHT // 2
    # Calls that last: some still run when the server is killed, on a machine of any speed.
    lasting: dict[str, Any] = {"in_flight": half, "max_new_tokens": 32}
    async with balanced.load(**lasting) as once, balanced.load(**lasting, retry=Retry()) as repeated:
        ran = await kill_one(balanced.fleet, [once], calls_between=32)
    assert only_what_ran_failed([once], ran), (ran, once.failed)
    assert repeated.failed == {}
    # The other servers failed no call.
    for member in balanced.fleet.members:
        assert member.page().value("mtlora_requests_total") == member.answered()


async def test_calls_about_a_document_stay_with_the_server_that_read_it(balanced: Balanced) -> None:
    """Another server would answer NOT_FOUND."""
    address, access = balanced.balancer.address, balanced.balancer.access
    for key in balanced.keys:
        async with AsyncClient(address, access(key), retry=None) as client:
            (first,) = await client.analyze_all(["who"], "a document", timeout=30)
            for _ in range(3):
                (answer,) = await client.analyze_all(["who"], document_id=first.document_id, timeout=30)
                assert answer.document_id == first.document_id
    pages = [member.page() for member in balanced.fleet.members]
    asked = [page.value("mtlora_requests_total", method="Analyze", status="OK") for page in pages]
    assert sum(count > 0 for count in asked) > 1


@pytest.mark.parametrize("name", DRAIN_DELAY_S)
async def test_documents_of_callers_without_a_key_stay_with_a_server_too(open_fleet: Fleet, name: str) -> None:
    """By the client's address."""
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    with Balancer(name, open_fleet) as balancer:
        async with AsyncClient(balancer.address, balancer.access(), retry=None) as client:
            (first,) = await client.analyze_all(["who"], "a document", timeout=30)
            for _ in range(6):
                (answer,) = await client.analyze_all(["who"], document_id=first.document_id, timeout=30)
                assert answer.document_id == first.document_id


async def test_messages_of_two_megabytes_reach_the_servers(balanced: Balanced) -> None:
    """nginx alone refuses them; the servers' own limit is a setting."""
    access = balanced.balancer.access(balanced.keys[0])
    async with AsyncClient(balanced.balancer.address, access, retry=None) as client:
        with pytest.raises(ServerError, match="larger than max"):
            await client.generate("task-0", "x" * (2 << 20), timeout=30)


async def test_administration_stays_inside(balanced: Balanced, tmp_path: Path) -> None:
    """The first tenant is an administrator: a server itself takes its adapter."""
    (tmp_path / "adapter.json").write_text("{}")
    (tmp_path / "adapter.safetensors").write_bytes(bytes(1000))
    access, key = balanced.balancer.access, balanced.keys[0]
    async with AsyncClient(balanced.balancer.address, access(key), retry=None) as client:
        with pytest.raises(ServerError, match="UNIMPLEMENTED: not served here"):
            await client.upload_adapter(tmp_path, "mine", timeout=60)
    member = balanced.fleet.members[0].address
    async with AsyncClient(member, balanced.fleet.access(key), retry=None) as client:
        assert await client.upload_adapter(tmp_path, "mine", timeout=60) == "1"


async def test_haproxy_passes_over_a_server_whose_health_says_so(balanced: Balanced) -> None:
    if balanced.balancer.name != "haproxy":
        pytest.skip("nginx looks at no health")
    ill = balanced.fleet.members[1]
    ill.signal(signal.SIGUSR2)
    async with balanced.load() as found:
        # HAProxy needs a few checks to see it.
        calls, had = 0, -1.0
        while found.calls < calls + IN_FLIGHT or ill.answered() > had:
            if found.calls >= calls + IN_FLIGHT:
                calls, had = found.calls, ill.answered()
            assert found.calls < 100 * IN_FLIGHT
            await asyncio.sleep(0.05)
    assert found.failed == {}
