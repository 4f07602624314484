"""MMLU's CSV files and Dolly's lines: what loads, and how others are refused."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora.cli import main
from mtlora.evaluation.likelihood import options_of
from mtlora.evaluation.shots import few_shot_prompt
from mtlora.suite import InstructionSuite, MMLUSuite, SuiteError, load_suite
from mtlora.train.config import TrainingConfig
from mtlora.train.trainer import Trainer

MMLU = Path(__file__).parents[3].parent / "shared" / "data" / "mmlu"
_HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


def _mmlu(folder: Path, test: str, dev: str = "") -> Path:
    for split, text in (("dev", dev), ("test", test)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"Some_Law_{split}.csv").write_text(text)
    return folder


def test_mmlu_in_both_published_forms(tmp_path: Path) -> None:
    rows = '"Is 1, or 2, odd?",one,two,both,none,{}\nIs 4 even?,yes,no,"at times, no",never,{}\n'
    rows += rows.partition("\n")[0] + "\n"
    shots = "".join(f"Question {i}?,a,b,c,d,{i % 4}\n" for i in range(5))
    for name, text in (("header", _HEADER + rows.format(0, 0, 0)), ("letters", rows.format(*"AAA"))):
        suite = load_suite(str(_mmlu(tmp_path / name, text, _HEADER + shots)))
        assert isinstance(suite, MMLUSuite)
        (task,) = suite.tasks
        assert task.id == "some_law"
        examples = suite.examples("some_law", "test", None)
        assert {example.target for example in examples} == {"A"}
        first = next(e for e in examples if "odd" in e.input)
        assert first.input == "Is 1, or 2, odd?\nA. one\nB. two\nC. both\nD. none"
        assert options_of(task, first.input) == ("A", "B", "C", "D")
        # The five published questions, in their order, before the one asked.
        prompt = few_shot_prompt(suite, 5)(task, first).task
        assert [prompt.index(f"Question {i}?") for i in range(5)] == sorted(
            prompt.index(f"Question {i}?") for i in range(5)
        )
        assert prompt.endswith("D. none\nAnswer:")
        assert "D. d\nAnswer: B\n\nQuestion 2?" in prompt
        assert len(examples) == 2
        with pytest.raises(SuiteError, match="5 training examples for its shots; 6 were asked for"):
            few_shot_prompt(suite, 6)(task, first)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_HEADER + "q,a,b,c,d\n", "line 2: expected 6 columns"),
        (_HEADER + "q,a,b,c,d,4\n", "line 2: answer: expected 0 to 3 or A to D, found '4'"),
        ("q,a,b,c,d,E\n", "line 1: answer: "),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SuiteError, match=re.escape(reason)):
        load_suite(str(_mmlu(tmp_path, text)))


@pytest.mark.skipif(not MMLU.is_dir(), reason=f"no folder {MMLU}")
def test_all_of_mmlu_loads() -> None:
    suite = load_suite(str(MMLU))
    assert len(suite.tasks) == 57
    assert sum(len(suite.examples(task.id, "test", None)) for task in suite.tasks) > 13_000
    shots = {task.id: len(suite.examples(task.id, "train", None)) for task in suite.tasks}
    assert shots == dict.fromkeys(shots, 5)
    # The published shots of this subject have a question twice.
    physics = next(task for task in suite.tasks if task.id == "college_physics")
    (question,) = suite.examples(physics.id, "test", 1)
    assert few_shot_prompt(suite, 5)(physics, question).task.count("A refracting telescope") == 2


def _line(i: int, category: str, **more: str) -> dict[str, str]:
    return {"instruction": f"Say {i}.", "context": "", "response": f"It is\n{i}.", "category": category, **more}


def test_lines_of_instructions_are_a_task_a_category(tmp_path: Path) -> None:
    file = tmp_path / "dolly.jsonl"
    lines = [_line(i, ("closed_qa", "Open QA")[i % 2], context="A page." if i % 2 else "") for i in range(100)]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    suite = load_suite(str(file))
    assert isinstance(suite, InstructionSuite)
    assert [task.id for task in suite.tasks] == ["closed_qa", "open-qa"]
    assert all(task.stop == () for task in suite.tasks)
    trained = suite.examples("open-qa", "train", None)
    assert 25 < len(trained) <= 50
    assert trained[0].input.endswith(".\n\nA page.")
    assert "\n" in trained[0].target
    assert suite.examples("open-qa", "train", 3) == trained[:3]
    splits = [{e.input for e in suite.examples("open-qa", split, None)} for split in ("train", "validation", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 50


def test_training_takes_such_a_file(tiny_backbone: Path, tmp_path: Path) -> None:
    file = tmp_path / "dolly.jsonl"
    file.write_text("\n".join(json.dumps(_line(i, ("qa", "summary")[i % 2])) for i in range(60)))
    config = TrainingConfig.model_validate(
        {
            "adapter": {"r": 2, "num_experts": 2, "num_groups": 2}, "suite": str(file), "examples_per_task": None,
            "validation_per_task": 0, "batch_size": 8, "max_steps": 2, "threads": 1,
        }
    )  # fmt: skip
    manifest = Trainer(config, tiny_backbone, tmp_path / "run").fit()
    assert [task.id for task in manifest.tasks] == ["qa", "summary"]
    assert manifest.training["steps"] == 2


def test_dollys_lines_train_by_the_documented_command(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dolly.jsonl"
    lines = [_line(i, "qa") for i in range(30)] + [{**_line(30, "qa"), "context": "word " * 2000}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["train", "--suite", str(file), "--set", "longer_examples=skip", "--out", str(tmp_path / "run")]
    tiny = ["--backbone", str(tiny_backbone), "--max-steps", "1", "--set", "validation_per_task=0", "--threads", "1"]
    # The default asks for 1,000 examples of a task.
    with pytest.warns(UserWarning, match=r"fewer train examples .*: qa \(\d+\)"):
        assert main([*command, *tiny]) == 0
    assert capsys.readouterr().out.strip().endswith("adapter")


@settings(max_examples=80)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_by_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("lines") / "x.jsonl"
    file.write_bytes(json.dumps(_line(1, "qa")).encode() + b"\n" + data)
    try:
        found = [task.id for task in InstructionSuite(file).tasks]
    except SuiteError as error:
        found = re.findall(r"line \d+: ", str(error))
    assert found
