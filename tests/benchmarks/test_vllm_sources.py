"""The trial of vLLM's Python sources, as far as it can be tested without a GPU."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import vllm_sources
from benchmarks.gpu.vllm_sources import AbsentModules, Trial, import_with_absent, unpack, zip_sources


@pytest.fixture(autouse=True)
def path_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


def test_archives_hold_sources_and_metadata_and_nothing_compiled(tmp_path: Path) -> None:
    package = tmp_path / "pretended"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/data.json", "_C.abi3.so", "inner/old.pyc"):
        (package / name).write_text("")
    packed = tmp_path / "packed"
    packed.mkdir()
    zip_sources(package, packed / "vllm.zip", "9.9.9")
    assert sorted(zipfile.ZipFile(packed / "vllm.zip").namelist()) == [
        "vllm-9.9.9.dist-info/METADATA", "vllm-9.9.9.dist-info/entry_points.txt", "vllm/__init__.py",
        "vllm/inner/data.json",
    ]  # fmt: skip
    assert unpack(packed, tmp_path / "sources") == "1 archives"
    found = [d for d in importlib.metadata.distributions(path=[str(tmp_path / "sources")]) if d.name == "vllm"]
    assert [d.version for d in found] == ["9.9.9"]
    assert [e.value for d in found for e in d.entry_points] == ["mtlora.vllm_plugin:register"]


def test_missing_packages_are_replaced_and_named(tmp_path: Path) -> None:
    (tmp_path / "needs_much.py").write_text(
        "import not_there.deep\nfrom not_there_either import Thing\nclass Mine(Thing): pass\nMine(1, a=2)\n"
    )
    sys.path.append(str(tmp_path))
    absent = AbsentModules()
    sys.meta_path.append(absent)
    assert import_with_absent(["needs_much"], absent) == "without not_there, not_there_either"
    with pytest.raises(ModuleNotFoundError):
        import_with_absent(["benchmarks.not_there"], absent)


def test_a_trial_without_a_card_says_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not Trial("eager", tmp_path / "nothing", tmp_path).run()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("vllm eager: archives unpacked: stopped: FileNotFoundError: ")
    assert "vllm_sources.py:" in second


def test_a_run_ends_in_one_line_whatever_happens(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.vllm_sources", "run", "--from", str(tmp_path)], capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "vllm-sources: eager: nothing, adapters: nothing, graphs: nothing"
    assert "Traceback" not in done.stdout + done.stderr


OPERATORS = """
import torch
from benchmarks.gpu import vllm_sources
vllm_sources.provide_extensions()
vllm_sources.provide_operators()
x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
out = torch.empty(3, 4)
torch.ops._C.silu_and_mul(out, x)
torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :4]) * x[:, 4:])
normed, added = torch.empty_like(x), x + residual
torch.ops._C.rms_norm(normed, x, weight, 1e-5)
torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))
torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-5)
torch.testing.assert_close(residual, added)
torch.testing.assert_close(x, torch.nn.functional.rms_norm(added, (8,), weight, 1e-5))
import vllm._C_stable_libtorch
"""


@pytest.mark.slow
def test_operators_in_place_of_the_extension_compute_the_same() -> None:
    script = f"import sys, types; sys.modules['vllm'] = types.ModuleType('vllm')\n{OPERATORS}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_carried_is_what_vllm_needs_here() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("no vLLM here")
    missing = [
        name for name in vllm_sources.CARRIED if importlib.util.find_spec(name) is None and not _installed(name)
    ]  # fmt: skip
    assert not missing


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False
