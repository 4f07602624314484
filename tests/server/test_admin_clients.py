"""Every client of the Adapters service on a server with TLS, client certificates and keys, over a real registry."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from mtlora.client import Access, AsyncClient, Client, ServerError
from mtlora.evaluation.server import server_answerer
from mtlora.suite.base import Example
from server import cli
from tests.faults._certificates import Issued, authority, issue
from tests.server.fakes import Service
from tests.server.home import Home, write


@dataclass
class Secured:
    """A server with an admin and a tenant `other`. The certificate is for `server`, not for an address."""

    service: Service
    ca: Issued
    own: Issued

    def access(self, tenant_id: str = "admin") -> Access:
        return Access(self.service.keys[tenant_id], self.ca.pem, self.own.pem, self.own.key, "server")


@pytest.fixture
async def secured(home: Home, tmp_path: Path) -> AsyncIterator[Secured]:
    for number in (1, 2):
        write(home.root / "a" / str(number), "x", "y", seed=number)
    await home.open()
    home.follow()
    ca = authority(tmp_path)
    server, own = issue(ca, tmp_path, "server"), issue(ca, tmp_path, "client")
    service = Service.with_tenants(
        tmp_path,
        {"admin": {"admin": True}, "other": {}},
        tls_certificate=server.pem,
        tls_key=server.key,
        tls_client_ca=ca.pem,
    )
    service.adapters.registry = home.registry
    async with service.running():
        yield Secured(service, ca, own)


async def test_the_asynchronous_client_administers_adapters(secured: Secured, home: Home) -> None:
    async with AsyncClient(secured.service.address, secured.access()) as client:
        events = await client.watch_adapters("a")
        assert (await client.load_adapter("a", "1")).version == "1"
        assert home.serving() == {"x": "a/1", "y": "a/1"}
        async with aclosing(events):
            assert (await anext(events)).version == "1"
        await client.pin_adapter("a")
        (listed,) = await client.adapters()
        assert listed.pinned
        await client.pin_adapter("a", pinned=False)
        await client.set_adapter_weights({"1": 1, "2": 1}, task="x")
        (listed,) = await client.adapters()
        assert {split.task: dict(split.weights) for split in listed.splits} == {"x": {"1": 1, "2": 1}}
        await client.set_adapter_weights({}, task="x")
        await client.unload_adapter("a")
        assert home.serving() == {}
        assert (await client.load_adapter("a")).version == "2"
        assert (await client.rollback_adapter("a")).version == "1"
        with pytest.raises(ServerError, match="NOT_FOUND"):
            await client.load_adapter("b")
        assert [task.id for task in await client.tasks()] == ["one", "two"]
        assert (await client.task("one")).id == "one"


async def test_the_blocking_client_administers_adapters(secured: Secured, home: Home) -> None:
    def administer() -> None:
        with Client(secured.service.address, secured.access()) as client:
            events = client.watch_adapters()
            client.load_adapter("a", "1")
            assert next(events).version == "1"
            client.pin_adapter("a")
            assert client.adapters()[0].pinned

    await asyncio.to_thread(administer)
    assert home.serving() == {"x": "a/1", "y": "a/1"}


async def test_only_an_admin_does(secured: Secured) -> None:
    async with AsyncClient(secured.service.address, secured.access("other")) as client:
        for call in (client.adapters(), client.load_adapter("a"), client.watch_adapters()):
            with pytest.raises(ServerError) as raised:
                await call
            assert raised.value.code is grpc.StatusCode.PERMISSION_DENIED


async def test_the_commands_administer_adapters(
    secured: Secured, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--address", secured.service.address, "--tls-ca", secured.ca.pem, "--tls-certificate", secured.own.pem]
    flags += ["--tls-key", secured.own.key, "--tls-server-name", "server"]
    (tmp_path / "key").write_text(secured.service.keys["admin"] + "\n")

    async def run(*command: object) -> str:
        assert await asyncio.to_thread(cli.main, [str(part) for part in command]) == 0
        return capsys.readouterr().out

    assert await run("adapters", *flags, "--api-key-file", tmp_path / "key", "load", "a", "1") == "a/1 serves\n"
    monkeypatch.setenv("MTLORA_API_KEY", secured.service.keys["admin"])
    assert "serving" in await run("adapters", *flags, "list")
    assert "one" in await run("tasks", *flags)
    assert await run("ask", "one", "x", *flags) == "ab\n"
    monkeypatch.delenv("MTLORA_API_KEY")
    assert await asyncio.to_thread(cli.main, ["adapters", *map(str, flags), "list"]) == 1
    assert "UNAUTHENTICATED" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tls-certificate", "x", "--tls-key", "x"], "--tls-certificate: found without --tls-ca"),
        (["--tls-ca", "x", "--tls-key", "x"], "--tls-certificate, --tls-key: found one alone"),
        (["--tls-server-name", "x"], "--tls-server-name: found without --tls-ca"),
        (["--api-key-file", "/nowhere"], "No such file"),
    ],
)
def test_rejects_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", *flags]) == 2
    assert message in capsys.readouterr().err


async def test_an_evaluation_asks_a_secured_server(secured: Secured) -> None:
    answer = server_answerer(secured.service.address, secured.access("other"), concurrency=2)
    assert await asyncio.to_thread(answer, [Example("one", "x", "ab")]) == ["ab"]
