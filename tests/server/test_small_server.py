"""One real server with TLS and tenants, on the real engine, which fails at last. The tests run in this order."""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from benchmarks.harness.tenants import tenant, write_tenants
from benchmarks.harness.waiting import wait_until
from mtlora.client import Access, Client, ServerError
from mtlora.client.metrics_page import MetricsPage
from server.cli.process import ServerProcess
from tests.faults._certificates import authority, issue
from tests.server.helpers import LONG, run_cli


@dataclass
class Secured:
    server: ServerProcess
    ca: Path
    tenants: Path
    keys: dict[str, str]
    entries: dict[str, dict[str, Any]]

    def client(self, tenant_id: str) -> Client:
        return self.server.client(Access(api_key=self.keys[tenant_id], ca=self.ca))


@pytest.fixture(scope="module")
def secured(short_adapters: Path, short_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    keys, entries = {}, {}
    for name, fields in {"a": {"tasks": ["open", "e*"]}, "b": {}, "slow": {"requests_per_second": 0.1}}.items():
        keys[name], entries[name] = tenant(name, **fields)
    path = write_tenants(folder / "tenants.yaml", *entries.values())
    ca = authority(folder)
    certificate = issue(ca, folder, "server")
    with ServerProcess(
        adapters=short_adapters, backbone=short_backbone, tenants=path, tls_certificate=certificate.pem,
        tls_key=certificate.key, kv_cache_gib=0.25, max_num_seqs=8,
        # The last two tests make it fail three times, once more than it may.
        engine_hang_s=5, engine_max_failures=2, engine_failure_window_s=10_000,
    ) as server:  # fmt: skip
        yield Secured(server, ca.pem, path, keys, entries)


def test_each_tenant_has_its_tasks(secured: Secured) -> None:
    with secured.client("a") as a, secured.client("b") as b:
        assert [task.id for task in a.tasks()] == ["echo", "open"]
        assert [task.id for task in b.tasks()] == ["count_words", "echo", "open", "pair", "sort_words"]
        with pytest.raises(ServerError) as raised:
            a.generate("count_words", "a b")
        assert raised.value.code is grpc.StatusCode.NOT_FOUND
        assert "near" not in raised.value.message
        assert a.generate("open", "Once").text == b.generate("open", "Once").text


def test_without_tls_or_key_nobody_gets_in(secured: Secured) -> None:
    with secured.server.client() as client, pytest.raises(ServerError) as raised:
        client.generate("open", "x", timeout=5)
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    with secured.server.client(Access(ca=secured.ca)) as client:
        with pytest.raises(ServerError) as raised:
            client.generate("open", "x")
        assert raised.value.code is grpc.StatusCode.UNAUTHENTICATED
        # Health is open to everybody.
        assert client.is_serving("mtlora.v1.Inference")


def test_prompts_of_two_tenants_share_no_cached_block(secured: Secured) -> None:
    text = "All happy families are alike; each unhappy family is unhappy in its own way. " * 20

    def value() -> float:
        return MetricsPage.fetch(secured.server.metrics).value("mtlora_engine_prefix_cache_hits_total")

    def hits(tenant_id: str, at_least: float) -> float:
        """Hits of one more request, once there are so many: the engine's statistics come after its answer."""
        before = value()
        with secured.client(tenant_id) as client:
            client.generate("open", text, max_new_tokens=2)
        time.sleep(0.5)
        wait_until(lambda: value() - before >= at_least, 60)
        return value() - before

    assert hits("a", 0) == 0
    assert hits("a", 50)
    assert hits("b", 0) == 0
    assert hits("b", 50)


def test_refuses_a_request_above_its_quota(secured: Secured) -> None:
    with secured.client("slow") as slow:
        slow.generate("open", "x", max_new_tokens=1)
        with pytest.raises(ServerError) as raised:
            slow.generate("open", "x")
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.quotas == [("tenant:slow", "0.1 requests_per_second")]
    assert raised.value.retry_after_s == pytest.approx(10, abs=2)


def test_commands_take_keys_and_tls(secured: Secured, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(secured.keys["a"] + "\n")
    command = ("ask", "open", "Once", "--address", secured.server.address, "--tls-ca", str(secured.ca))
    with secured.client("b") as b:
        expected = b.generate("open", "Once").text
    assert run_cli(*command, "--api-key-file", str(file)).stdout.strip() == expected
    done = run_cli(*command, MTLORA_API_KEY="mtk_00000000_nonsense-nonsense")
    assert done.returncode == 1
    assert "UNAUTHENTICATED" in done.stderr


def test_a_revoked_key_is_refused_while_others_go_on(secured: Secured) -> None:
    with secured.client("a") as a, secured.client("b") as b:
        a.generate("open", "x", max_new_tokens=1)
        write_tenants(secured.tenants, secured.entries["b"])

        def refused() -> bool:
            b.generate("open", "x", max_new_tokens=1)
            try:
                a.generate("open", "x", max_new_tokens=1)
            except ServerError as error:
                return error.code is grpc.StatusCode.UNAUTHENTICATED
            return False

        wait_until(refused, 10)
        secured.tenants.write_text("tenants: nonsense")
        page = secured.server.metrics
        wait_until(lambda: MetricsPage.fetch(page).value("mtlora_tenants_reload_failures_total") == 1, 10)
        b.generate("open", "x", max_new_tokens=1)
    log = secured.server.log()
    assert "tenants file refused" in log
    assert not any(key[-30:] in log for key in secured.keys.values())


def test_an_engine_that_hangs_is_replaced(secured: Secured) -> None:
    with secured.client("b") as client:
        before = client.generate("open", "Once").text
        _fail(secured, client, signal.SIGSTOP, 18)
        client.wait_ready(150)
        assert client.generate("open", "Once").text == before
        assert _engine(secured).status() != psutil.STATUS_STOPPED


def test_an_engine_that_keeps_dying_ends_the_server(secured: Secured) -> None:
    with secured.client("b") as client:
        _fail(secured, client, signal.SIGKILL, 6)
    # The next one dies while it starts.
    wait_until(lambda: any("EngineCore" in child.name() for child in _children(secured)), 60)
    _engine(secured).kill()
    assert secured.server.process.wait(120) == 1
    assert "failed 3 times within 10000 s" in secured.server.log()


def _fail(secured: Secured, client: Client, number: signal.Signals, seconds: float) -> None:
    """Send the engine a signal while it answers; all must say so within some seconds: many, for a busy machine."""
    stream = client.stream("open", "Once", **LONG)
    next(stream)
    _engine(secured).send_signal(number)
    began = time.monotonic()
    with pytest.raises(ServerError) as raised:
        list(stream)
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    assert raised.value.retry_after_s
    wait_until(lambda: not client.is_serving("mtlora.v1.Inference"), 20)
    assert client.is_serving("live")
    assert time.monotonic() - began < seconds
    with pytest.raises(ServerError) as raised:
        client.generate("open", "x")
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE


def _children(secured: Secured) -> list[psutil.Process]:
    return psutil.Process(secured.server.process.pid).children(recursive=True)


def _engine(secured: Secured) -> psutil.Process:
    return next(child for child in _children(secured) if "EngineCore" in child.name())
