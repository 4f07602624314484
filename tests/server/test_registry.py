"""The registry without an engine: real folders, real checks, an engine's memory that a test watches."""

import asyncio
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlora.client import AsyncClient, ServerError
from mtlora.vision.image_input import ImageInput
from server.errors import AdapterError
from server.registry.registry import NotPossibleError, UnknownAdapterError
from server.registry.version import NoRoomError, Stage, StageError, version_key
from server.registry.weights import choose
from tests.server.adapters import entry, write_adapter
from tests.server.fakes import Service
from tests.server.home import Home, write
from tests.server.slots import TINY
from tests.waiting import eventually

OTHER = TINY.model_copy(update={"weights_fingerprint": "1" * 64})


def test_versions_sort_by_number_else_by_letter() -> None:
    versions = ["2", "10", "v10.1", "1.9", "1.10", "beta", "alpha", "10.0.1"]
    assert sorted(versions, key=version_key) == ["alpha", "beta", "1.9", "1.10", "2", "10", "10.0.1", "v10.1"]


async def test_the_highest_version_serves(home: Home) -> None:
    for version in ("9", "10", "nightly"):
        write(home.root / "a" / version, "x")
    (home.root / "a" / ".10-unfinished").mkdir()
    (home.root / "a" / "notes.txt").write_text("not a version")
    await home.open()
    assert home.serving() == {"x": "a/10"}
    assert len(home.engine.held) == 1


async def test_bad_adapters_are_left_out_with_a_reason(home: Home, server_log: pytest.LogCaptureFixture) -> None:
    write(home.root / "good" / "1", "x")
    write(home.root / "bad" / "1", "y")
    (home.root / "bad" / "1" / "adapter.safetensors").write_bytes(b"garbage")
    write(home.root / "foreign" / "1", "z", backbone=OTHER)
    (home.root / "hollow").mkdir()
    write(home.root / "od d" / "1", "w")
    await home.open()
    assert home.serving() == {"x": "good/1"}
    reasons = {failure.name: failure.reason for failure in home.tables[-1].failures}
    assert set(reasons) == {"bad", "foreign", "hollow", "od d"}
    assert "weights_fingerprint" in reasons["foreign"]
    assert "NAME/VERSION" in reasons["hollow"]
    assert str(home.root / "bad" / "1") in reasons["bad"]
    assert len([record for record in server_log.records if record.levelno == logging.ERROR]) == 4
    assert home.metrics.get_sample_value("mtlora_adapter_failures_total", {"stage": "verified"}) == 2


async def test_the_next_version_serves_if_the_highest_is_bad(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    shutil.copytree(home.root / "a" / "1", home.root / "a" / "2")
    manifest = home.root / "a" / "2" / "adapter.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 2}))
    await home.open()
    assert home.serving() == {"x": "a/1"}
    assert [(failure.name, failure.version) for failure in home.tables[-1].failures] == [("a", "2")]


async def test_the_first_adapter_by_name_gets_a_contested_task_and_keeps_it(home: Home) -> None:
    write(home.root / "b" / "1", "x", "y")
    write(home.root / "c" / "1", "x")
    await home.open()
    assert home.serving() == {"x": "b/1", "y": "b/1"}
    (failure,) = home.tables[-1].failures
    assert failure.name == "c"
    assert "task x is served by adapter b already" in failure.reason
    home.follow()
    write(home.root / "a" / "1", "x", "z")
    await home.until_serving("z", "a/1")
    assert home.serving()["x"] == "b/1"


async def test_a_new_version_takes_over_and_the_old_one_leaves_with_its_last_request(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    old = home.tables[-1].tasks["x"]
    assert old.version is not None
    async with home.residency.lease(old.version):
        write(home.root / "a" / "2", "x", seed=2)
        await home.until_serving("x", "a/2")
        assert len(home.engine.held) == 2
        assert Stage.DRAINED not in home.stages("1")
    await eventually(lambda: len(home.engine.held) == 1)
    expected = [Stage.FOUND, Stage.VERIFIED, Stage.LOADED, Stage.WARMED, Stage.SERVING]
    assert home.stages("2") == expected
    assert home.stages("1")[-1] is Stage.DRAINED


async def test_other_bytes_under_the_same_name_are_another_version(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    before = home.tables[-1].tasks["x"]
    write(home.root / "a" / "1", "x", seed=7)
    await eventually(lambda: home.tables[-1].tasks["x"].slot is not before.slot)
    after = home.tables[-1].tasks["x"]
    assert after.adapter_version == "1"
    # vLLM keys cached blocks and slots by these.
    assert after.slot.lora_name != before.slot.lora_name
    assert after.slot.lora_int_id != before.slot.lora_int_id
    assert before.version is not None
    assert after.version is not None
    assert after.version.folder != before.version.folder


async def test_the_same_bytes_again_change_nothing(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    slot = home.tables[-1].tasks["x"].slot
    (home.root / "a" / "1" / "adapter.json").touch()
    await home.looked()
    assert home.tables[-1].tasks["x"].slot is slot
    assert len(home.engine.held) == 1


@pytest.fixture
def short_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad version is refused sooner."""
    monkeypatch.setattr("server.registry.folder._WRITING_S", 0.2)


async def test_a_version_for_an_engine_that_is_not_here_is_no_failure(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    image = entry("sight", allowed_answers=("a", "b"), image=ImageInput(size=28, pooling="cls"))
    write_adapter(home.root / "b" / "1", [image], backbone=OTHER)
    await home.open()
    (passed,) = (event for event in home.events if event.stage is Stage.FAILED)
    assert "expected a server with a backbone for them (vision_backbone)" in passed.reason
    assert passed.failed_stage is None
    assert home.serving() == {"x": "a/1"}
    assert home.tables[-1].failures == ()
    assert home.metrics.get_sample_value("mtlora_adapter_failures_total", {"stage": "verified"}) in (None, 0)
    with pytest.raises(StageError, match="vision_backbone"):
        await home.registry.load("b")


@pytest.mark.slow
@pytest.mark.usefixtures("short_writing")
@pytest.mark.parametrize("stage", [Stage.VERIFIED, Stage.LOADED, Stage.WARMED])
async def test_a_failure_at_any_stage_leaves_the_old_version_serving(home: Home, stage: Stage) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    if stage is Stage.VERIFIED:
        write(home.root / "a" / "2", "x", seed=2, backbone=OTHER)
    else:
        home.cold_sequence = RuntimeError("no") if stage is Stage.WARMED else None
        if stage is Stage.LOADED:
            home.engine.load = refuse  # type: ignore[method-assign]
        write(home.root / "a" / "2", "x", seed=2)
    await eventually(lambda: Stage.FAILED in home.stages("2"))
    (failed,) = (event for event in home.events if event.stage is Stage.FAILED)
    assert failed.failed_stage is stage
    assert failed.reason
    assert home.serving() == {"x": "a/1"}
    await eventually(lambda: len(home.engine.held) == 1)
    assert home.metrics.get_sample_value("mtlora_adapter_failures_total", {"stage": stage.value}) == 1
    # It fails once.
    await home.looked()
    assert home.stages("2").count(Stage.FAILED) == 1


async def refuse(*_: Any) -> None:
    raise AdapterError("no room")


@pytest.mark.slow
async def test_waits_for_a_version_that_is_being_copied(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    write(home.root.parent / "made", "x", seed=2)
    target = home.root / "a" / "2"
    target.mkdir()
    shutil.copy(home.root.parent / "made" / "adapter.json", target)
    content = (home.root.parent / "made" / "adapter.safetensors").read_bytes()
    with (target / "adapter.safetensors").open("wb") as file:
        for begin in range(0, len(content), len(content) // 5):
            file.write(content[begin : begin + len(content) // 5])
            file.flush()
            await asyncio.sleep(0.15)
    await home.until_serving("x", "a/2")
    assert Stage.FAILED not in home.stages("2")


@pytest.mark.usefixtures("short_writing")
async def test_a_bad_version_serves_once_it_is_repaired(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    write(home.root / "a" / "2", "x", seed=2)
    whole = (home.root / "a" / "2" / "adapter.safetensors").read_bytes()
    (home.root / "a" / "2" / "adapter.safetensors").write_bytes(whole[:100])
    await eventually(lambda: Stage.FAILED in home.stages("2"))
    (home.root / "a" / "2" / "adapter.safetensors").write_bytes(whole)
    await home.until_serving("x", "a/2")


async def test_a_flipped_link_is_noticed(home: Home, tmp_path: Path) -> None:
    for number in (1, 2):
        write(home.root / f".data-{number}" / str(number), "x", seed=number)
    link = home.root / "a"
    link.symlink_to(".data-1", target_is_directory=True)
    await home.open()
    home.follow()
    fresh = home.root / ".fresh"
    fresh.symlink_to(".data-2", target_is_directory=True)
    fresh.rename(link)
    await home.until_serving("x", "a/2")


async def test_a_version_that_vanishes_serves_on(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    write(home.root / "a" / "2", "x", seed=2)
    await home.open()
    home.follow()
    shutil.rmtree(home.root / "a")
    await eventually(lambda: Stage.VANISHED in home.stages("2"))
    await home.looked()
    assert home.serving() == {"x": "a/2"}
    # A new engine loads it from its copy.
    home.engine.held.clear()
    await home.registry.load_all()
    assert len(home.engine.held) == 1


async def test_rollback_serves_what_served_before_and_stays(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    write(home.root / "a" / "2", "x", seed=2)
    await home.until_serving("x", "a/2")
    assert (await home.registry.rollback("a")).version == "1"
    assert home.serving() == {"x": "a/1"}
    await home.looked()
    assert home.serving() == {"x": "a/1"}
    with pytest.raises(NotPossibleError, match="nothing served before"):
        await home.registry.rollback("a")
    write(home.root / "a" / "3", "x", seed=3)
    await home.until_serving("x", "a/3")
    await eventually(lambda: len(home.engine.held) == 1)


async def test_a_version_loaded_by_name_stays_and_an_unloaded_adapter_stays_away(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    write(home.root / "a" / "2", "x", seed=2)
    await home.open()
    home.follow()
    await home.registry.load("a", "1")
    await home.looked()
    assert home.serving() == {"x": "a/1"}
    await home.registry.unload("a")
    assert home.serving() == {}
    await eventually(lambda: home.engine.held == [])
    await home.looked()
    assert home.serving() == {}
    assert (await home.registry.load("a")).version == "2"
    assert home.serving() == {"x": "a/2"}
    with pytest.raises(UnknownAdapterError, match="there are 1, 2"):
        await home.registry.load("a", "9")
    with pytest.raises(UnknownAdapterError, match="allowed: a"):
        await home.registry.load("b")


async def test_weights_split_requests_and_hold_new_versions_back(home: Home) -> None:
    for number in (1, 2):
        write(home.root / "a" / str(number), "x", "y", seed=number)
    await home.open()
    home.follow()
    await home.registry.set_weights("a", {"1": 30, "2": 70}, "x")
    table = home.tables[-1]
    chosen = [table.choose(table.tasks["x"], f"user-{n}".encode()).adapter_version for n in range(1000)]
    assert 220 < chosen.count("1") < 380
    assert chosen == [table.choose(table.tasks["x"], f"user-{n}".encode()).adapter_version for n in range(1000)]
    assert {table.choose(table.tasks["y"], bytes([n])).adapter_version for n in range(50)} == {"2"}
    write(home.root / "a" / "3", "x", "y", seed=3)
    await home.looked()
    assert home.serving() == {"x": "a/2", "y": "a/2"}
    with pytest.raises(UnknownAdapterError):
        await home.registry.set_weights("a", {"7": 1})
    await home.registry.set_weights("a", {}, "x")
    await home.until_serving("x", "a/3")
    await eventually(lambda: len(home.engine.held) == 1)
    assert not home.tables[-1].splits


async def test_pins_leave_room_for_one_other_version(home: Home) -> None:
    for name in "abcdefgh":
        write(home.root / name / "1", name)
    await home.open()
    for name in "abcdefg":
        home.registry.pin(name)
    with pytest.raises(NotPossibleError, match="7 adapters are pinned"):
        home.registry.pin("h")
    home.registry.unpin("a")
    home.registry.pin("h")


async def test_canaries_of_pinned_adapters_make_room(home: Home) -> None:
    for name in "abcdefgh":
        write(home.root / name / "1", name)
    for name in "abcdefg":
        write(home.root / name / "2", name, seed=2)
    await home.open()
    for name in "abcdefg":
        home.registry.pin(name)
        await home.registry.set_weights(name, {"1": 1, "2": 99})
    cold = home.version_of("h")
    async with asyncio.timeout(5), home.residency.lease(cold):
        pinned = [home.tables[-1].tasks[name].version for name in "abcdefg"]
        assert all(version is not None and version.resident for version in pinned)


async def test_a_chosen_version_keeps_its_copy_through_rollbacks_and_publishes(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    chosen = home.version_of("x")
    with home.residency.hold(chosen):
        for number in range(2, 6):
            write(home.root / "a" / str(number), "x", seed=number)
            await home.until_serving("x", f"a/{number}")
        await home.registry.rollback("a")
        home.residency.reset()
        home.engine.held.clear()
        async with home.residency.lease(chosen):
            assert chosen.resident
    await eventually(lambda: chosen.stage is Stage.FOUND)
    assert not chosen.copied


@pytest.mark.parametrize("stream", [False, True])
async def test_a_queued_request_keeps_the_version_chosen_at_its_receipt(home: Home, stream: bool) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    service = Service(turns=1)
    service.use(service.engine, residency=home.residency)
    service.servicer.catalog = home.tables[-1]
    service.engine.hold = asyncio.Event()

    async def ask(client: AsyncClient) -> str:
        if stream:
            return [piece async for piece in client.stream("x", "input")][-1].summary.adapter_version
        return (await client.generate("x", "input")).summary.adapter_version

    async with service.running(), AsyncClient(service.address) as client:
        # This request has the only turn and needs no version.
        first = asyncio.create_task(client.generate("x", "input", without_adapter=True))
        await eventually(lambda: service.engine.running == 1)
        queued = asyncio.create_task(ask(client))
        await eventually(lambda: service.value("mtlora_requests_queued") == 1)
        chosen = home.version_of("x")
        for number in range(2, 6):
            write(home.root / "a" / str(number), "x", seed=number)
            await home.until_serving("x", f"a/{number}")
        await home.registry.rollback("a")
        assert (chosen.holds, chosen.leases) == (1, 0)
        service.engine.hold.set()
        await first
        assert await queued == "1"
    await eventually(lambda: not chosen.copied)


async def test_a_request_that_ends_before_its_turn_gives_up_its_version(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    service = Service()
    service.use(service.engine, residency=home.residency)
    service.servicer.catalog = home.tables[-1]
    async with service.running(), AsyncClient(service.address) as client:
        with pytest.raises(ServerError, match="max_new_tokens"):
            await client.generate("x", "input", max_new_tokens=10_000)
    version = home.version_of("x")
    assert version.holds == 0


async def test_a_version_that_finds_no_room_has_not_failed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home.residency, "capacity", 1)
    monkeypatch.setattr(home.residency, "_room_s", 0.1)
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    busy = home.version_of("x")
    with home.residency.hold(busy):
        async with home.residency.lease(busy):
            write(home.root / "a" / "2", "x", seed=2)
            with pytest.raises(NoRoomError, match=r"of its 1 places \(adapter_slots\), 0 are pinned and 1 busy"):
                await home.registry.load("a", "2")
            await eventually(lambda: home.stages("2").count(Stage.VERIFIED) > 1)
            assert Stage.FAILED not in home.stages("2")
            assert home.serving() == {"x": "a/1"}
    await home.until_serving("x", "a/2")


async def test_copies_are_kept_as_long_as_they_can_serve(home: Home) -> None:
    write(home.root / "a" / "1", "x", seed=1)
    await home.open()
    home.follow()
    for number in range(2, 7):
        write(home.root / "a" / str(number), "x", seed=number)
        await home.until_serving("x", f"a/{number}")
    # The serving version, and two for rollbacks.
    await eventually(lambda: len(list(home.spool.root.iterdir())) == 3)
    assert len(home.engine.held) == 1


def pick(weights: dict[str, int]) -> Callable[[bytes], str]:
    split = tuple((weight, name) for name, weight in weights.items())
    return lambda key: choose(split, "salt", key)


@given(st.binary(max_size=40), st.dictionaries(st.sampled_from("abcd"), st.integers(1, 100), min_size=1))
def test_a_key_gets_one_version(key: bytes, weights: dict[str, int]) -> None:
    assert pick(weights)(key) == pick(weights)(key)
    assert pick(weights)(key) in weights


@given(st.binary(max_size=40), st.integers(1, 99), st.integers(1, 99))
def test_a_growing_share_only_gains_keys(key: bytes, one: int, other: int) -> None:
    low, high = sorted((one, other))
    if pick({"new": low, "old": 100 - low})(key) == "new":
        assert pick({"new": high, "old": 100 - high})(key) == "new"


async def test_forgets_an_unloaded_adapter_without_files(home: Home) -> None:
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    await home.registry.unload("a")
    shutil.rmtree(home.root / "a")
    await eventually(lambda: not home.registry.records)
    await eventually(lambda: not list(home.spool.root.iterdir()))


async def test_an_adapter_that_comes_back_finds_the_versions_that_still_run(home: Home) -> None:
    """The engine cannot have two versions of one name, version and content."""
    write(home.root / "a" / "1", "x")
    await home.open()
    home.follow()
    version = home.version_of("x")
    with home.residency.hold(version):
        await home.registry.unload("a")
        shutil.rmtree(home.root / "a")
        await eventually(lambda: not home.registry.records["a"].found)
        await home.looked()
        write(home.root / "a" / "1", "x")
        await home.registry.load("a")
        assert home.tables[-1].tasks["x"].version is version
