"""The list of seams: it says what the plugin replaces, holds in the installed vLLM, and is checked by sources alone."""

import importlib.util
import io
import logging
import tarfile
import zipfile
from pathlib import Path

import pytest

from mtlora.cli import main
from mtlora.vllm_plugin.seams import (
    ANY,
    SEAMS,
    Need,
    Parameter,
    Seam,
    accepts,
    available,
    find_imported,
    missing_points,
    require,
)
from mtlora.vllm_plugin.sources import Sources, SourcesError

every_seam = pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)

# A release whose files cannot even be imported.
RELEASE = {
    "vllm/__init__.py": "raise SystemExit('imported')",
    "vllm/config/__init__.py": "from .lora import LoRAConfig\nfrom vllm.config import lora as other",
    "vllm/config/lora.py": """
import absent
if True:
    class Base:
        field: int
        def inherited(self, one, two=2): ...
class LoRAConfig(Base):
    @staticmethod
    def plain(one): ...
    @classmethod
    def made(cls, one, *, two): ...
    async def anything(self, *args, **kwargs): ...
""",
}


@pytest.fixture(scope="module")
def installed() -> Sources:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Sources(Path(spec.origin).parent)


def test_the_table_in_the_docs_has_every_seam() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    table = text.partition("\n| seam | ")[2].partition("\n\n")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert sorted(rows) == sorted(seam.name for seam in SEAMS)


@every_seam
def test_installed_vllm_has_every_seam(seam: Seam, installed: Sources) -> None:
    assert list(missing_points(seam, find_imported)) == []
    assert list(missing_points(seam, installed.find)) == []


@every_seam
def test_every_seam_is_taken_in_a_module_that_exists(seam: Seam) -> None:
    assert importlib.util.find_spec(seam.taken_in)


def test_list_names_every_method_that_the_managers_override() -> None:
    from mtlora.vllm_plugin.model_manager import MtLoRAModelManager
    from mtlora.vllm_plugin.worker_manager import MtLoRAWorkerManager

    listed = {point.partition("(")[0].rpartition(".")[2] for seam in SEAMS for point in seam.points}
    for manager in (MtLoRAModelManager, MtLoRAWorkerManager):
        stock = manager.__mro__[1]
        overridden = {name for name, value in vars(manager).items() if callable(value) and hasattr(stock, name)}
        assert overridden
        assert overridden <= listed


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ([Parameter("a"), Parameter("b")], True),
        ([Parameter("a"), Parameter("b", True), Parameter("c", True)], True),
        (ANY, True),
        ([Parameter("a"), Parameter("b"), Parameter("c")], False),
        ([Parameter("b"), Parameter("a")], False),
        ([Parameter("a")], False),
    ],
)
def test_accepts_functions_that_take_the_expected_parameters(found: list[Parameter], fits: bool) -> None:
    assert accepts(found, ["a", "b"]) is fits


def test_missing_seam_for_speed_is_one_log_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("vllm.envs.enable_envs_cache")
    with caplog.at_level(logging.WARNING):
        assert not available("environment read once")
    (record,) = caplog.records
    assert "vllm.envs.enable_envs_cache" in record.getMessage()


def test_missing_seam_for_correctness_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("vllm.v1.worker.cpu_worker.CPUWorker._should_warm_up_model")
    with pytest.raises(RuntimeError, match=r"pipeline stages on CPUs.*CPUWorker\._should_warm_up_model"):
        require("pipeline stages on CPUs")


def test_changed_signature_is_an_error_that_shows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.config.lora.LoRAConfig.compute_hash", lambda self, factors: "")
    with pytest.raises(RuntimeError, match=r"compute_hash takes \(factors\), expected \(\)"):
        require("compile cache key")


def write_folder(path: Path) -> Path:
    for name, text in RELEASE.items():
        (path / "release" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "release" / name).write_text(text)
    return path / "release"


def write_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path / "vllm-9.0-py3-none-any.whl", "w") as wheel:
        for name, text in RELEASE.items():
            wheel.writestr(name, text)
    return path / "vllm-9.0-py3-none-any.whl"


def write_archive(path: Path) -> Path:
    with tarfile.open(path / "vllm-9.0.tar.gz", "w:gz") as archive:
        for name, text in RELEASE.items():
            member = tarfile.TarInfo(f"vllm-9.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path / "vllm-9.0.tar.gz"


@pytest.mark.parametrize("write", [write_folder, write_wheel, write_archive])
def test_sources_are_read_and_never_imported(write, tmp_path: Path) -> None:
    sources = Sources(write(tmp_path))
    home = "vllm.config"
    assert sources.find(home, "LoRAConfig") is None
    assert sources.find(home, "LoRAConfig.field") is None
    assert sources.find(home, "LoRAConfig.inherited") == [Parameter("one"), Parameter("two", True)]
    assert sources.find(home, "LoRAConfig.plain") == [Parameter("one")]
    assert sources.find(home, "LoRAConfig.made") == [Parameter("one"), Parameter("two")]
    assert sources.find(home, "LoRAConfig.anything") == ANY
    for module, attribute in ((home, "LoRAConfig.absent"), (home, "absent"), ("vllm.absent", "LoRAConfig")):
        with pytest.raises(LookupError):
            sources.find(module, attribute)


def test_rejects_a_folder_without_vllm(tmp_path: Path) -> None:
    with pytest.raises(SourcesError, match="no package vllm"):
        Sources(tmp_path)
    (tmp_path / "file.whl").write_text("no archive")
    with pytest.raises(SourcesError, match="neither a wheel"):
        Sources(tmp_path / "file.whl")


def test_command_fails_where_a_seam_for_correctness_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["seams", str(write_wheel(tmp_path))]) == 1
    output = capsys.readouterr().out
    assert "vllm-9.0: adapters: vLLM has no vllm.lora.worker_manager.LRUCacheWorkerLoRAManager" in output
    assert output.count("missing") == sum(bool(seam.points) for seam in SEAMS)


def test_command_passes_for_the_installed_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seams"]) == 0
    output = capsys.readouterr().out
    assert "missing" not in output
    assert all(seam.name in output for seam in SEAMS if seam.points)
    assert {seam.need for seam in SEAMS} == set(Need)
