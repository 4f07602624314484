"""Adapters, a registry, a clock and a log of several modules, and connections to servers that come and go."""

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtlora.backbone import BackboneIdentity, identify
from mtlora.client import Access, AsyncClient
from tests.server.adapters import entry, write_adapter
from tests.server.front import Clock
from tests.server.home import Home


@pytest.fixture(scope="session", autouse=True)
def connections_of_their_own() -> None:
    """Clients share no connection: one to a port whose last server has ended waits before its next try."""
    channel = Access.channel

    def apart(self: Access, kind: Any, address: str, options: list[tuple[str, Any]]) -> Any:
        return channel(self, kind, address, [*options, ("grpc.use_local_subchannel_pool", 1)])

    Access.channel = apart  # type: ignore[method-assign]


@pytest.fixture
async def client(service: Any) -> AsyncIterator[AsyncClient]:
    """A client of the test's own `service` that repeats no call."""
    async with AsyncClient(service.address, retry=None) as client:
        yield client


@pytest.fixture
def server_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What the server logs, from level info."""
    monkeypatch.setattr(logging.getLogger("mtlora.server"), "propagate", True)
    with caplog.at_level(logging.INFO, "mtlora.server"):
        yield caplog


@pytest.fixture
def clock() -> Clock:
    """A clock that the test moves."""
    return Clock()


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    """A registry over an empty folder."""
    (tmp_path / "adapters").mkdir()
    made = Home(tmp_path / "adapters", tmp_path / "scratch")
    yield made
    await made.close()


@pytest.fixture(scope="session")
def adapters(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_adapters`."""
    return write_adapters(tmp_path_factory.mktemp("adapters"), identify(backbone))


@pytest.fixture(scope="session")
def short_adapters(short_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the short backbone."""
    return write_adapters(tmp_path_factory.mktemp("short-adapters"), identify(short_backbone))


def write_adapters(folder: Path, backbone: BackboneIdentity) -> Path:
    """alpha: tasks with a bias each; beta: tasks without, in two versions; broken: cannot be read."""
    alpha = [
        entry("sort_words", allowed_answers=("yes", "no")),
        entry("count_words", stop=(), max_new_tokens=8),
        entry("pair", template="First: {first}\nSecond: {second}\nAnswer:", max_new_tokens=8),
    ]
    beta = [entry("echo"), entry("open", stop=(), max_new_tokens=16)]
    write_adapter(folder / "alpha" / "1", alpha, backbone=backbone)
    write_adapter(folder / "beta" / "9", [entry("old")], task_bias=False, backbone=backbone)
    write_adapter(folder / "beta" / "10", beta, task_bias=False, backbone=backbone)
    write_adapter(folder / "broken" / "1", [entry("lost")], backbone=backbone)
    (folder / "broken" / "1" / "adapter.safetensors").write_bytes(b"not tensors")
    return folder
