"""The trainer on a tiny backbone: it learns, resumes bit-identically after a kill, and refuses invalid input."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mtlora.backbone import identify
from mtlora.checkpoint.read import read_checkpoint
from mtlora.cli import main
from mtlora.config import MtLoRAConfig
from mtlora.suite import SuiteError, SuitePart
from mtlora.train.config import TrainingConfig, TrainingError
from mtlora.train.optimizer import learning_rate
from mtlora.train.state import RunError, RunFolder
from mtlora.train.trainer import Trainer
from tests.mtlora.train.runs import same_adapters

SMALL = TrainingConfig(
    adapter=MtLoRAConfig(r=4, num_experts=3, num_groups=2, lora_dropout=0.1),
    tasks=("boolean_expressions", "object_counting", "list_operations"),
    examples_per_task=40, validation_per_task=4, batch_size=4, save_every=3, validate_every=10, threads=1,
)  # fmt: skip


def test_training_learns_and_leaves_a_valid_checkpoint(tiny_backbone: Path, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"epochs": 6, "learning_rate": 2e-2})
    trainer = Trainer(config, tiny_backbone, tmp_path / "run")
    manifest = trainer.fit()
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in steps if "loss" in record]
    assert len(losses) == 180
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert all({"tokens_per_second", "grad_norm", "learning_rate"} <= set(r) for r in steps if "loss" in r)
    checkpoint = read_checkpoint(trainer.folder.checkpoint, identify(tiny_backbone))
    assert [task.id for task in checkpoint.manifest.tasks] == list(config.tasks or ())
    assert [task.bias_index for task in checkpoint.manifest.tasks] == [0, 1, 2]
    assert manifest.training["config"]["seed"] == 0
    assert set(manifest.evaluation["adapter"]["tasks"]) == set(config.tasks or ())
    assert 0 <= manifest.evaluation["backbone_alone"]["mean_accuracy"] <= 1
    assert any(checkpoint.tensors[name].abs().max() > 0 for name in checkpoint.tensors if name.endswith("task_bias"))


def test_the_backbone_is_frozen_and_spectral_readings_differ(tiny_backbone: Path, tmp_path: Path) -> None:
    finals = {}
    for spectral in ("off", "pairwise", "gram"):
        config = SMALL.model_copy(update={"spectral": spectral, "spectral_weight": 10.0, "max_steps": 8})
        trainer = Trainer(config, tiny_backbone, tmp_path / spectral)
        before = {name: value.clone() for name, value in trainer.adapted.model.state_dict().items()}
        for _ in range(8):
            trainer.train_step()
        assert all(torch.equal(before[name], value) for name, value in trainer.adapted.model.state_dict().items())
        finals[spectral] = trainer.adapted.adapters.state_dict()["layers.0.mlp.lora_B"].clone()
    assert not torch.equal(finals["off"], finals["pairwise"])
    assert not torch.equal(finals["pairwise"], finals["gram"])


# Each line of stdin is a command of `mtlora`. A process forked after the imports runs it; its pid and its exit status
# are printed.
FORKER = """
import json, os, sys
import mtlora.train.trainer
import transformers.models.llama.modeling_llama
from mtlora.cli import main
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        os._exit(main(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runs:
    """Training runs, one after another, each in a process forked after the slow imports."""

    def __init__(self, backbone: Path, config: Path) -> None:
        self._command = ["train", "--backbone", str(backbone), "--config", str(config), "--resume", "--out"]
        self._forker = subprocess.Popen(
            [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip

    def start(self, out: Path) -> int:
        """Start a run, or resume it; returns the process."""
        assert self._forker.stdin is not None
        self._forker.stdin.write(json.dumps([*self._command, str(out)]) + "\n")
        self._forker.stdin.flush()
        return self._read()

    def wait(self) -> int:
        """The exit status of the run that was started last."""
        return self._read()

    def close(self) -> None:
        self._forker.kill()
        self._forker.communicate()

    def _read(self) -> int:
        assert self._forker.stdout is not None
        return int(self._forker.stdout.readline())


def logged_steps(run: Path) -> list[int]:
    """The steps in a run's log, whose last line may be half written."""
    lines = (run / "log.jsonl").read_text().split("\n")[:-1] if (run / "log.jsonl").exists() else []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line]


def test_kill_at_any_moment_then_resume_gives_the_same_bits(tiny_backbone: Path, tmp_path: Path) -> None:
    """MTLORA_TEST_KILLS sets the number of kills; the default keeps the suite fast."""
    config = tmp_path / "config.json"
    config.write_text(SMALL.model_copy(update={"epochs": 2, "validation_per_task": 2}).model_dump_json())
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rng = random.Random(int(os.environ.get("MTLORA_TEST_SEED", "0")))
    kills = int(os.environ.get("MTLORA_TEST_KILLS", "3"))
    with contextlib.closing(Runs(tiny_backbone, config)) as runs:
        runs.start(whole)
        assert runs.wait() == 0
        steps, struck = logged_steps(whole)[-1], 0
        # The last kill comes when every step is done, while the run is evaluated.
        for least in sorted([*(rng.randrange(1, steps) for _ in range(kills - 1)), steps]):
            pid = runs.start(broken)
            while max(logged_steps(broken), default=0) < least:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            struck += runs.wait() == -signal.SIGKILL
        assert struck, "every run had ended before its kill"
        runs.start(broken)
        assert runs.wait() == 0
    assert same_adapters(whole, broken)
    assert logged_steps(broken) == sorted(logged_steps(broken))


def test_refuses_the_folder_of_another_run(tiny_backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    Trainer(SMALL, tiny_backbone, out)
    with pytest.raises(RunError, match="holds a run already"):
        Trainer(SMALL, tiny_backbone, out)
    with pytest.raises(RunError, match=r"learning_rate: was 0\.002, now 0\.5"):
        Trainer(SMALL.model_copy(update={"learning_rate": 0.5}), tiny_backbone, out, resume=True)


def test_resumes_beside_the_same_backbone_and_examples_alone(tiny_backbone: Path, tmp_path: Path) -> None:
    suite, backbone, out = tmp_path / "suite", tmp_path / "backbone", tmp_path / "run"
    suite.mkdir()
    shutil.copytree(tiny_backbone, backbone)

    def write(names: str) -> None:
        examples = [{"input": f"{name}{i}", "target": name} for name in names for i in range(20)]
        (suite / "t.json").write_text(json.dumps({"examples": examples}))

    write("ab")
    config = SMALL.model_copy(
        update={"suite": str(suite), "tasks": None, "examples_per_task": None, "validation_per_task": 0}
    )
    Trainer(config, backbone, out).save()
    refused = "--resume needs the same backbone and examples; {}: was .*, now .*"
    write("abc")
    with pytest.raises(RunError, match=refused.format("examples")):
        Trainer(config, backbone, out, resume=True)
    write("ab")
    weights = backbone / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(RunError, match=refused.format("backbone")):
        Trainer(config, backbone, out, resume=True)


@pytest.mark.parametrize("left", ["state.pt", "log.jsonl", "adapter"])
def test_a_new_run_takes_up_no_parts_of_an_old_one(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir()
    for resume in (False, True):
        with pytest.raises(RunError, match=rf"holds {left} of a run without its training\.json"):
            RunFolder(tmp_path).open(TrainingConfig(), resume=resume)
    assert not (tmp_path / "training.json").exists()


HOLDER = """
import sys, time
from pathlib import Path
from mtlora.train.config import TrainingConfig
from mtlora.train.state import RunFolder

folder = RunFolder(Path(sys.argv[1]))
folder.open(TrainingConfig(), resume=True)
print("holds", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path, resume: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
            with pytest.raises(RunError, match=rf"run: process {holder.pid} on \S+ trains there; wait for its end"):
                RunFolder(tmp_path / "run").open(TrainingConfig(), resume=resume)
            assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
        finally:
            holder.kill()
    # The lock ends with its process.
    assert RunFolder(tmp_path / "run").open(TrainingConfig(), resume=True) is None


def test_a_file_system_without_locks_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    RunFolder(tmp_path / "run").open(TrainingConfig(), resume=False)
    assert "cannot be locked" in capsys.readouterr().err


def test_nan_gradients_stop_training_before_the_step(tiny_backbone: Path, tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tiny_backbone, tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.adapted.adapters.state_dict().items()}
    next(trainer.adapted.adapters.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="step 1: the gradients' norm is nan"):
        trainer.fit()
    assert all(torch.equal(before[name], value) for name, value in trainer.adapted.adapters.state_dict().items())


def test_a_failed_run_keeps_checkpoint_and_state(tiny_backbone: Path, tmp_path: Path) -> None:
    """The saved state and an older checkpoint stay as they are."""
    trainer = Trainer(SMALL, tiny_backbone, tmp_path / "run")
    good = Trainer(SMALL.model_copy(update={"max_steps": 2}), tiny_backbone, tmp_path / "good")
    good.fit()
    (tmp_path / "good" / "adapter").rename(trainer.folder.checkpoint)
    files = {path: path.read_bytes() for path in trainer.folder.checkpoint.iterdir()}
    for _ in range(2):
        trainer.train_step()
    trainer.save()
    state = trainer.folder.state_file.read_bytes()
    trainer.adapted.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="step 3: loss is nan"):
        trainer.fit()
    assert {path: path.read_bytes() for path in trainer.folder.checkpoint.iterdir()} == files
    assert trainer.folder.state_file.read_bytes() == state
    assert sorted(path.name for path in trainer.folder.path.iterdir()) == [
        "adapter", "lock", "state.pt", "training.json",
    ]  # fmt: skip


def test_refuses_a_damaged_state_by_name(tiny_backbone: Path, tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tiny_backbone, tmp_path / "run")
    trainer.save()
    whole = trainer.folder.state_file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello"):
        trainer.folder.state_file.write_bytes(content)
        with pytest.raises(RunError, match=r"state\.pt: not a saved state"):
            Trainer(SMALL, tiny_backbone, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({"a": [("x", "y" * 300)]}, [], r"a.json: examples\.0\.target: String should have at most 256 characters"),
        ({"a": [("x", "y"), ("z " * 99, "y")]}, ["max_length=40"],
         "a.json: example 1: task a: example of .* tokens, expected at most 40"),
        ({"a": [("x", "y")], "A": [("x", "y")]}, [], "a.json: task id 'a' is taken by A.json"),
        ({"a": []}, [], "a.json: examples: List should have at least 1 item"),
        ({"a": [("x", "y")], "b": [("v", None)]}, [], r"b.json: examples\.0\.target: Field required"),
        ({"a": [("x", "y")], "b": [("z " * 99, "y")]}, ["max_length=40", "longer_examples=skip"],
         r"task b has no training example \(all 1 are longer than max_length 40\)"),
        ({"a": [("x", "y")]}, ['tasks=["a","a"]'], "each task is named once; a more than once"),
        ({"a": [("x", "y")]}, ["tasks=[]"], "at least one task"),
    ],
    ids=["long target", "long example", "duplicate id", "empty task", "missing field", "all too long", "twice", "none"],
)  # fmt: skip
def test_refuses_wrong_task_files_before_writing_anything(
    tiny_backbone: Path, tmp_path: Path, capsys, files: dict, flags: list[str], message: str
) -> None:
    suite, out = tmp_path / "suite", tmp_path / "run"
    suite.mkdir()
    for name, pairs in files.items():
        entries = [{"input": text} | ({"target": target} if target else {}) for text, target in pairs]
        (suite / f"{name}.json").write_text(json.dumps({"examples": entries}))
    sets = [word for flag in ("examples_per_task=null", "validation_per_task=0", *flags) for word in ("--set", flag)]
    status = main(["train", "--backbone", str(tiny_backbone), "--out", str(out), "--suite", str(suite), *sets])
    error = capsys.readouterr().err
    assert status == 2
    assert re.search(message, error), error
    assert not out.exists()


def test_a_nan_loss_stops_training_before_the_step(tiny_backbone: Path, tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tiny_backbone, tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.adapted.adapters.state_dict().items()}
    trainer.adapted.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="step 1: loss is nan"):
        trainer.fit()
    assert all(torch.equal(before[name], value) for name, value in trainer.adapted.adapters.state_dict().items())
    assert not trainer.folder.checkpoint.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "/nowhere"], "/nowhere"),
        (["--set", 'tasks=["no_such_task"]'], "no task no_such_task"),
        (["--set", "adapter.num_groups=5"], "num_groups 5 does not divide"),
        (["--set", "adapter.r=0"], "adapter.r"),
        (["--learning-rate", "fast"], "learning_rate"),
        (["--set", "colour=red"], "colour"),
        (["--config", "/nowhere.json"], "/nowhere.json"),
        (["--suite", "builtin", "--set", "suite.x=1"], "suite is 'builtin', which has no x"),
        (["--profile", "0"], "one of --out DIR and --profile STEPS"),
    ],
)
def test_refuses_wrong_settings_by_name(
    tiny_backbone: Path, tmp_path: Path, capsys, flags: list[str], message: str
) -> None:
    status = main(["train", "--backbone", str(tiny_backbone), "--out", str(tmp_path / "run"), *flags])
    assert status == 2
    assert message in capsys.readouterr().err


MIX = (
    SuitePart(suite="builtin", examples_per_task={"navigate": 6, "object_counting": 6}),
    SuitePart(
        suite="bbh-generated", examples_per_task={"navigate": 5, "dyck_languages": 7}, train_only=True,
        joins=("boolean_expressions", "hyperbaton", "navigate", "object_counting", "temporal_sequences",
               "web_of_lies", "word_sorting"),
    ),
)  # fmt: skip


def test_a_mix_starts_from_a_checkpoint_by_task_id(tiny_backbone: Path, tmp_path: Path) -> None:
    first = Trainer(SMALL.model_copy(update={"max_steps": 4}), tiny_backbone, tmp_path / "first")
    first.fit()
    config = SMALL.model_copy(
        update={
            "init_from": str(first.folder.checkpoint), "suite": MIX, "examples_per_task": None,
            "tasks": ("navigate", "object_counting", "dyck_languages"), "validation_per_task": 1,
            "batch_size": 8, "batch_tokens": 300,
        }
    )  # fmt: skip
    second = Trainer(config, tiny_backbone, tmp_path / "second")
    found, made = second.adapted.adapters.state_dict(), read_checkpoint(first.folder.checkpoint).tensors
    name = "layers.1.mlp"
    assert torch.equal(found[f"{name}.lora_B"], made[f"{name}.lora_B"].float())
    assert made[f"{name}.task_bias"].count_nonzero()
    # object_counting is row 1 in both; the other two are new.
    assert torch.equal(found[f"{name}.task_bias"][1], made[f"{name}.task_bias"][1].float())
    assert not found[f"{name}.task_bias"][[0, 2]].count_nonzero()
    manifest = second.fit()
    assert manifest.training["tokens_by_task"].keys() == {"navigate", "object_counting", "dyck_languages"}
    assert manifest.training["examples"] == 24
    assert manifest.task("navigate").answer_marker == "=>"
    assert manifest.task("navigate").template.startswith("Do these moves")
    # Only the built-in part is validated, and it has no dyck_languages.
    assert set(manifest.evaluation["adapter"]["tasks"]) == {"navigate", "object_counting"}


def test_refuses_to_start_from_a_checkpoint_of_another_shape(tiny_backbone: Path, tmp_path: Path) -> None:
    first = Trainer(SMALL.model_copy(update={"max_steps": 1}), tiny_backbone, tmp_path / "first")
    first.fit()
    other = SMALL.model_copy(
        update={"init_from": str(first.folder.checkpoint), "adapter": MtLoRAConfig(r=8, num_experts=3, num_groups=2)}
    )
    with pytest.raises(TrainingError, match=r"expected the same adapter config; r: 4 there, 8 here"):
        Trainer(other, tiny_backbone, tmp_path / "second")


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 0.99, allow_nan=False), st.floats(0, 1, allow_nan=False))
def test_the_learning_rate_only_falls_after_its_warm_up(steps: int, spanned: int, warmup: float, last: float) -> None:
    """Whether the schedule spans more steps than the run, as many or fewer."""
    config = SMALL.model_copy(update={"warmup_fraction": warmup, "final_learning_rate_fraction": last})
    rates = [learning_rate(config, step, spanned) for step in range(steps)]
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert peak <= max(1, round(spanned * warmup))
    # A warm-up that fills the schedule has its peak one step later.
    if steps > spanned + 1:
        assert rates[-1] == pytest.approx(last * config.learning_rate)


@pytest.mark.parametrize("longer", ["error", "skip"])
def test_no_run_ends_with_an_evaluation_that_is_refused(tiny_backbone: Path, tmp_path: Path, longer: str) -> None:
    """One long answer gives its task more new tokens than the backbone has positions."""
    lines = [
        {"instruction": f"{category} {i}", "response": "yes", "category": category}
        for category in ("short", "long") for i in range(40)
    ]  # fmt: skip
    lines.append({"instruction": "Go on.", "response": "no " * 4000, "category": "long"})
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = SMALL.model_copy(
        update={
            "suite": str(tmp_path / "lines.jsonl"), "tasks": None, "examples_per_task": None, "longer_examples": longer,
            "validation_per_task": 1, "max_steps": 1,
        }
    )  # fmt: skip
    if longer == "error":
        config = config.model_copy(update={"max_length": 8192})
        with pytest.raises(
            SuiteError, match=r"task long: prompt of .* and max_new_tokens 4008, expected at most 2048 together"
        ):
            Trainer(config, tiny_backbone, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    manifest = Trainer(config, tiny_backbone, tmp_path / "run").fit()
    assert manifest.evaluation["adapter"]["tasks"].keys() == {"short"}


def test_longer_examples_are_counted_or_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    short = SMALL.model_copy(update={"max_length": 45, "validation_per_task": 0, "max_steps": 1})
    with pytest.raises(SuiteError, match="expected at most 45"):
        Trainer(short, tiny_backbone, tmp_path / "error")
    trainer = Trainer(short.model_copy(update={"longer_examples": "skip"}), tiny_backbone, tmp_path / "skip")
    assert 0 < sum(trainer.work.examples.skipped.values()) == 120 - len(trainer.work.examples.train)
    assert max(map(len, trainer.work.examples.train)) <= 45
