"""Adapters in object storage, by way of fsspec's storage in memory."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from server.registry.mirror import Mirror, MirrorError
from server.registry.source import scan


@pytest.fixture
def storage() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True)


def put(storage: fsspec.AbstractFileSystem, version: str, content: str) -> None:
    for name in ("adapter.json", "adapter.safetensors"):
        storage.pipe_file(f"/bucket/adapters/{version}/{name}", f"{name} {content}".encode())


def mirrored(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_versions_come_change_and_go(storage: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    mirror = Mirror("memory://bucket/adapters", tmp_path, 1 << 20)
    put(storage, "a/1", "one")
    storage.pipe_file("/bucket/adapters/a/notes.txt", b"no part of a version")
    storage.pipe_file("/bucket/adapters/a/.2/adapter.json", b"unfinished")
    mirror.sync()
    assert mirrored(tmp_path) == {
        "a/1/adapter.json": "adapter.json one",
        "a/1/adapter.safetensors": "adapter.safetensors one",
    }
    before = [version.signature for version in scan(tmp_path)[0]]
    mirror.sync()
    assert [version.signature for version in scan(tmp_path)[0]] == before
    put(storage, "a/1", "other")
    put(storage, "a/2", "two")
    mirror.sync()
    assert mirrored(tmp_path)["a/1/adapter.json"] == "adapter.json other"
    assert {version.version for version in scan(tmp_path)[0]} == {"1", "2"}
    storage.rm("/bucket/adapters/a/1", recursive=True)
    mirror.sync()
    assert {version.version for version in scan(tmp_path)[0]} == {"2"}


def test_waits_for_the_rest_of_an_upload(storage: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    mirror = Mirror("memory://bucket/adapters", tmp_path, 1 << 20)
    storage.pipe_file("/bucket/adapters/a/1/adapter.json", b"first")
    mirror.sync()
    assert not mirrored(tmp_path)
    put(storage, "a/1", "whole")
    mirror.sync()
    assert len(mirrored(tmp_path)) == 2


def test_skips_a_version_that_is_too_large(storage: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    put(storage, "a/1", "x" * 1000)
    put(storage, "b/1", "small")
    Mirror("memory://bucket/adapters", tmp_path, 500).sync()
    assert {version.name for version in scan(tmp_path)[0]} == {"b"}


def test_unreadable_storage_removes_nothing(
    storage: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror("memory://bucket/adapters", tmp_path, 1 << 20)
    put(storage, "a/1", "one")
    mirror.sync()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(type(mirror._files), "find", fail)
    with pytest.raises(MirrorError, match="no route"):
        mirror.sync()
    assert len(mirrored(tmp_path)) == 2
