"""The `mtlora` command, as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mtlora.backbone import identify
from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE
from mtlora.cli import main
from mtlora.cli.output import printable
from mtlora.cli.settings import read_settings
from mtlora.errors import MtLoRAError
from tests.factories import CONFIG, IDENTITY, edit_manifest, random_tensors, task_table, write_random


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_random(tmp_path / "a", training={"steps": 7, "config": {"seed": 3}}, evaluation={"accuracy": 0.75})
    return tmp_path / "a"


def test_help_loads_nothing_heavy() -> None:
    script = """
import sys
from mtlora.cli import main
try:
    main(["--help"])
except SystemExit as error:
    assert error.code == 0
heavy = {"torch", "transformers", "numpy", "pydantic", "rich", "vllm"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("backbone", "tasks", "inspect", "verify"):
        assert f"    {command} " in done.stdout


@pytest.mark.parametrize(
    "argv", [[], ["nothing"], ["inspect"], ["backbone"], ["verify", "a", "b"], ["inspect", "--x", "a"]]
)
def test_usage_errors_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: mtlora" in capsys.readouterr().err


def test_verify_accepts_a_sound_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint)]) == 0
    parameters = sum(t.numel() for t in random_tensors().values())
    out, err = capsys.readouterr()
    assert out == f"ok: {checkpoint}: 3 tasks, {parameters} parameters, no backbone compared\n"
    assert err == ""


def test_verify_compares_the_backbone(tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = identify(backbone)
    write_random(tmp_path / "a", backbone=identity, tensors=random_tensors(identity=identity))
    assert main(["verify", str(tmp_path / "a"), "--backbone", str(backbone)]) == 0
    assert capsys.readouterr().out.endswith(f"backbone {backbone} matches\n")


def test_verify_refuses_another_backbone(checkpoint: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint), "--backbone", str(backbone)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"mtlora: error: {checkpoint}/{MANIFEST_FILE}: backbone.hidden_size: "
        "expected 576 (the backbone in use), found 8\n"
    )


def test_verify_refuses_a_damaged_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((checkpoint / TENSORS_FILE).read_bytes())
    content[-1] ^= 1
    (checkpoint / TENSORS_FILE).write_bytes(content)
    assert main(["verify", str(checkpoint)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mtlora: error: {checkpoint}/{TENSORS_FILE}: sha256: expected ")
    assert err.count("\n") == 1


def test_verify_fails_without_the_named_backbone(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint), "--backbone", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("mtlora: error: /nowhere: no folder")


def test_inspect_prints_the_manifest(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line]
    for row in (
        ["size", f"{size:,} bytes"],
        ["parameters", f"{sum(t.numel() for t in random_tensors().values()):,}"],
        ["backbone.architecture", IDENTITY.architecture],
        ["backbone.weights_fingerprint", IDENTITY.weights_fingerprint],
        ["config.num_groups", str(CONFIG.num_groups)],
        ["task-0", "2", "32", r"'\n'", "any", "Task 0."],
        ["steps", "7"],
        ["config.seed", "3"],
        ["accuracy", "0.75"],
    ):
        assert row in cells, row


def test_inspect_prints_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("parameters") == sum(t.numel() for t in random_tensors().values())
    assert shown.pop("bytes") == sum(path.stat().st_size for path in checkpoint.iterdir())
    assert shown == json.loads((checkpoint / MANIFEST_FILE).read_text())


def test_inspect_refuses_a_missing_folder_and_another_format(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    edit_manifest(checkpoint, lambda manifest: manifest.update(format_version=2))
    assert main(["inspect", str(checkpoint)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith(f"mtlora: error: {tmp_path}/nothing: expected a folder")
    assert second == f"mtlora: error: {checkpoint}/{MANIFEST_FILE}: format_version: expected 1, found 2"


def test_inspect_escapes_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = (task_table(1)[0].model_copy(update={"description": "\x1b[2J[red]x[/red]\x07"}),)
    write_random(tmp_path / "a", tasks=tasks, tensors=random_tensors(num_tasks=1), training={"\x1b[31m": "\r"})
    assert main(["inspect", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2J[red]x[/red]\x07" in out
    assert not {"\x1b", "\x07", "\r"} & set(out)


def test_printable_keeps_readable_text() -> None:
    assert printable("naïve 日本 (A)\n– x") == "naïve 日本 (A)\n– x"
    assert printable("\ud800\u202e") == r"\ud800\u202e"


def test_backbone_show_prints_the_identity(backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbone", "show", "--backbone", str(backbone), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(backbone), **identify(backbone).model_dump()}
    assert main(["backbone", "show"]) == 0
    out = capsys.readouterr().out
    for value in ("LlamaForCausalLM", "576", "30", identify(backbone).weights_fingerprint):
        assert f"│ {value} " in out
    assert main(["backbone", "show", "--backbone", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("mtlora: error: nothing: no folder")


def test_backbone_prepare_keeps_a_complete_folder(backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbone", "prepare", "--out", str(backbone)]) == 0
    assert capsys.readouterr().out == f"{backbone}\n"


def test_backbone_prepare_refuses_a_folder_of_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["backbone", "prepare", "--force", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"mtlora: error: {tmp_path}: holds other files")
    assert (tmp_path / "mine").read_text() == "mine"


def test_tasks_lists_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    assert "suite builtin: 25 tasks" in out
    assert "web_of_lies" in out
    assert main(["tasks", "--suite", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("mtlora: error: suite: found '/nowhere'")


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(backbone: str) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtlora.backbone.resolve", interrupted)
    assert main(["backbone", "show"]) == 130


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(backbone: str) -> Path:
        raise ValueError("a defect")

    monkeypatch.setattr("mtlora.backbone.resolve", broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["backbone", "show"])


def test_a_closed_pipe_ends_quietly() -> None:
    script = "import sys; from mtlora.cli import main; sys.exit(main(['tasks']))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_later_settings_win(tmp_path: Path) -> None:
    base, over = tmp_path / "base.json", tmp_path / "over.json"
    base.write_text('{"adapter": {"r": 8}, "epochs": 1, "seed": 7}')
    over.write_text('{"epochs": 2, "suite": [{"suite": "builtin"}]}')
    flags = ["epochs=5", f"@{over}", "adapter.num_experts=4", "seed=8"]
    assert read_settings(base, flags) == {
        "adapter": {"r": 8, "num_experts": 4}, "epochs": 2, "seed": 8, "suite": [{"suite": "builtin"}],
    }  # fmt: skip
    assert read_settings(None, [f"@{over}", "epochs=5"])["epochs"] == 5


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[1]", "expected a JSON object, found list"),
    ],
)
def test_refuses_a_wrong_settings_file_by_name(tmp_path: Path, content: str | None, expected: str) -> None:
    file = tmp_path / "over.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(MtLoRAError, match=f"over.json.*{expected}"):
        read_settings(None, [f"@{file}"])


def test_tasks_saves_an_image_of_each_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / "leaf" / "train" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (3, 3), (i, ord(name), 0)).save(tmp_path / "leaf" / "train" / name / f"{i}.jpg")
    assert main(["tasks", "--suite", str(tmp_path), "--save", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "leaf.jpg") in capsys.readouterr().out.replace("\n", "")
    assert Image.open(tmp_path / "out" / "leaf.jpg").size == (3, 3)
    assert main(["tasks", "--save", str(tmp_path / "out")]) == 2
    assert "without an image; allowed: a suite of images" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    settings = ["--suite", str(tmp_path / "file" / "x"), "--out", str(tmp_path / "file" / "run")]
    assert main(["train", "--config", str(tmp_path), *settings]) == 2
    assert capsys.readouterr().err.startswith("mtlora: error: ")
    assert main(["tasks", "--suite", "builtin-vision", "--save", str(tmp_path / "file" / "x")]) == 2
    assert "Not a directory" in capsys.readouterr().err
