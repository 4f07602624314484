"""Storage that hangs: its calls are given up and counted, the server serves on and ends in time."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.registry.mirror import Mirror
from server.registry.source import scan
from server.registry.storage import Beat, Storage
from tests.server.home import Home, write


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Hung calls wait for it."""
    event = threading.Event()
    yield event
    event.set()


async def test_a_hung_call_is_given_up_and_counted(released: threading.Event) -> None:
    timeouts: list[None] = []
    storage = Storage(0.05, lambda: timeouts.append(None))
    for _ in range(6):
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.05 s"):
            await storage.call(lambda _: released.wait())
    assert len(timeouts) == 6
    # Calls that hang keep few threads, and give them back.
    assert sum(thread.name == "adapters-storage" for thread in threading.enumerate()) == 4
    released.set()
    assert await storage.call(lambda _: "answer") == "answer"


@pytest.mark.slow
async def test_a_call_that_gets_on_may_take_long() -> None:
    storage = Storage(0.5)

    def slow(beat: Beat) -> str:
        for _ in range(10):
            time.sleep(0.1)
            beat()
        return "whole"

    assert await storage.call(slow) == "whole"


async def test_what_a_call_raises_is_raised() -> None:
    def fail(_: object) -> None:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        await Storage().call(fail)


async def test_a_server_whose_storage_hangs_serves_on(
    home: Home, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.registry._folder._storage = Storage(0.1)
    home.follow()
    with monkeypatch.context() as hanging:
        hanging.setattr("server.registry.folder.scan", lambda *_: released.wait())
        async with asyncio.timeout(5):
            # What it knows already can be loaded, unloaded and served.
            assert (await home.registry.load("a", "1")).version == "1"
            await home.registry.unload("a")
            await home.registry.load("a")
    assert home.serving() == {"x": "a/1"}
    write(home.root / "a" / "2", "x", seed=2)
    await home.until_serving("x", "a/2")


async def test_files_that_hang_are_not_settled(
    home: Home, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.registry._folder._storage = Storage(0.1)
    monkeypatch.setattr("server.registry.folder.signature_of", lambda *_: released.wait())
    async with asyncio.timeout(5):
        assert not await home.registry._folder.settled(home.registry.records["a"].found["1"])


def test_listings_and_fetches_report_their_progress(tmp_path: Path) -> None:
    for version in "12":
        write(tmp_path / "from" / "a" / version, "x")
    beats: list[None] = []
    scan(tmp_path / "from", lambda: beats.append(None))
    assert len(beats) == 3
    beats.clear()
    Mirror(f"file://{tmp_path}/from", tmp_path / "to", 1 << 20).sync(lambda: beats.append(None))
    assert len(beats) >= 4


_HANGING = """
import asyncio, sys, threading
from pathlib import Path
from server.registry import folder
from server.registry.events import Events

folder.scan = lambda *_: threading.Event().wait()

async def main():
    watched = folder.Folder(Path(sys.argv[1]), Events())

    async def follow():
        async for _ in watched.changes(0.05):
            print("looks", flush=True)
            await watched.look()

    following = asyncio.create_task(follow())
    await asyncio.sleep(0.5)
    following.cancel()

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_process_whose_storage_hangs_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANGING, str(tmp_path)], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "looks\n"
