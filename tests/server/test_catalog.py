"""The task table: versions, bad adapters, contested tasks."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from mtlora.backbone import BackboneIdentity
from server.catalog import Catalog, read_catalog, version_key
from tests.server.adapters import entry, write_adapter
from tests.server.slots import TINY, make_slots

OTHER = TINY.model_copy(update={"weights_fingerprint": "1" * 64})


def write(folder: Path, *task_ids: str, backbone: BackboneIdentity = TINY, task_bias: bool = True) -> None:
    write_adapter(folder, [entry(task_id) for task_id in task_ids], backbone=backbone, task_bias=task_bias)


def read(folder: Path) -> Catalog:
    return read_catalog(folder, TINY, make_slots)


@pytest.fixture(autouse=True)
def _logs_reach_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("mtlora.server"), "propagate", True)


def test_the_highest_version_is_served(tmp_path: Path) -> None:
    for version in ("9", "10", "nightly"):
        write(tmp_path / "a" / version, "x")
    (tmp_path / "a" / ".10-unfinished").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("not a version")
    (served,) = read(tmp_path).tasks.values()
    assert (served.adapter_name, served.adapter_version) == ("a", "10")


def test_versions_sort_by_number_else_by_letter() -> None:
    versions = ["2", "10", "v10.1", "1.9", "1.10", "beta", "alpha", "10.0.1"]
    assert sorted(versions, key=version_key) == ["alpha", "beta", "1.9", "1.10", "2", "10", "10.0.1", "v10.1"]


def test_tasks_are_sorted_and_slots_are_numbered_across_adapters(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1", "z", "b")
    write(tmp_path / "c" / "1", "m", "n", task_bias=False)
    write(tmp_path / "d" / "1", "k")
    catalog = read(tmp_path)
    assert list(catalog.tasks) == ["b", "k", "m", "n", "z"]
    ids = {task_id: served.slot.lora_int_id for task_id, served in catalog.tasks.items()}
    assert ids == {"z": 1, "b": 2, "m": 3, "n": 3, "k": 4}
    assert [len(adapter.slots) for adapter in catalog.adapters] == [2, 1, 1]


def test_a_bad_adapter_is_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "good" / "1", "x")
    write(tmp_path / "bad" / "1", "y")
    (tmp_path / "bad" / "1" / "adapter.safetensors").write_bytes(b"garbage")
    write(tmp_path / "foreign" / "1", "z", backbone=OTHER)
    (tmp_path / "hollow").mkdir()
    write(tmp_path / "od d" / "1", "w")
    catalog = read(tmp_path)
    assert list(catalog.tasks) == ["x"]
    reasons = {failure.name: failure.reason for failure in catalog.failures}
    assert set(reasons) == {"bad", "foreign", "hollow", "od d"}
    assert "weights_fingerprint" in reasons["foreign"]
    assert "NAME/VERSION" in reasons["hollow"]
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 4


def test_where_the_highest_version_is_bad_the_next_is_served(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1", "x")
    shutil.copytree(tmp_path / "a" / "1", tmp_path / "a" / "2")
    manifest = tmp_path / "a" / "2" / "adapter.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 2}))
    catalog = read(tmp_path)
    assert catalog.tasks["x"].adapter_version == "1"
    assert [(failure.name, failure.version) for failure in catalog.failures] == [("a", "2")]


def test_of_two_claims_to_a_task_the_first_adapter_by_name_wins(tmp_path: Path) -> None:
    write(tmp_path / "b" / "1", "x", "y")
    write(tmp_path / "a" / "1", "x")
    catalog = read(tmp_path)
    assert {task_id: served.adapter_name for task_id, served in catalog.tasks.items()} == {"x": "a", "y": "b"}
    (failure,) = catalog.failures
    assert failure.name == "b"
    assert "task x is a's already" in failure.reason


def test_an_adapter_that_the_engine_refuses_leaves_the_table(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1", "x")
    write(tmp_path / "b" / "1", "y")
    catalog = read(tmp_path)
    smaller = catalog.without(catalog.adapters[0], "no room")
    assert list(smaller.tasks) == ["y"]
    assert [adapter.name for adapter in smaller.adapters] == ["b"]
    assert smaller.failures[-1].reason == "no room"
    assert list(catalog.tasks) == ["x", "y"]


def test_pages_cover_every_task_once(tmp_path: Path) -> None:
    ids = [f"t{number:02}" for number in range(7)]
    write(tmp_path / "a" / "1", *ids)
    catalog = read(tmp_path)
    for size in range(1, 9):
        seen: list[str] = []
        after = ""
        while True:
            page, after = catalog.page(after, size)
            seen += [served.spec.id for served in page]
            if not after:
                break
        assert seen == ids


def test_an_empty_folder_is_an_empty_table(tmp_path: Path) -> None:
    assert not read(tmp_path).tasks
