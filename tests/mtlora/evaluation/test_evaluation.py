"""`mtlora eval` and its parts, on a tiny backbone: batches, shots, likelihood, scores."""

import io
import json
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tqdm import tqdm

from benchmarks.harness.ports import free_port
from mtlora.answer.labels import LabelTree
from mtlora.checkpoint.format import TENSORS_FILE, TaskEntry
from mtlora.checkpoint.read import read_manifest
from mtlora.checkpoint.write import write_checkpoint
from mtlora.cli import main
from mtlora.cli.scores import summary
from mtlora.config import MtLoRAConfig
from mtlora.evaluation.generate import Prompt, greedy_answers, greedy_tokens
from mtlora.evaluation.likelihood import label_probabilities, likeliest, options_of
from mtlora.evaluation.offline import PromptError, likelihood_answerer, offline_answerer
from mtlora.evaluation.scores import score
from mtlora.evaluation.server import server_answerer
from mtlora.evaluation.shots import few_shot_prompt, plain_prompt
from mtlora.model.language import AdaptedModel, adapter_tensors
from mtlora.suite import Example, FolderSuite
from tests.factories import random_adapted

CONFIG = MtLoRAConfig(r=4, num_experts=2, num_groups=2)
TASKS = (
    TaskEntry(id="letters", description="d", max_new_tokens=6, bias_index=0),
    TaskEntry(id="words", description="d", max_new_tokens=9, bias_index=1),
)
CHOICE = "Which?\nOptions:\n(A) one\n(B) two\n(C) three"


@pytest.fixture(scope="module")
def adapted(tiny_backbone: Path) -> AdaptedModel:
    return random_adapted(tiny_backbone, CONFIG, len(TASKS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "suite"
    path.mkdir()
    for name, ask, answers in (("letters", CHOICE, ("(A)", "(A)", "(B)")), ("words", "Say it.", ("a", "b", "c"))):
        examples = [{"input": f"{n} {ask}", "target": answers[n % 3]} for n in range(15)]
        (path / f"{name}.json").write_text(json.dumps({"examples": examples}))
    return path


def test_a_batch_gives_each_sequence_its_own_answer(adapted: AdaptedModel) -> None:
    """Sequences end at different lengths, so the batch shrinks on the way."""
    texts = ["a", "the quick brown fox", "1 2 3", "if you follow these", "x y", "Question: who?", "So", "In a row"]
    tasks = [TASKS[i % 2].model_copy(update={"max_new_tokens": 1 + 3 * (i % 4)}) for i in range(len(texts))]
    prompts = [Prompt(adapted.prompts.prompt(text)) for text in texts]
    together = greedy_tokens(adapted, tasks, prompts)
    alone = [greedy_tokens(adapted, [t], [p])[0] for t, p in zip(tasks, prompts, strict=True)]
    assert together == alone
    assert len({len(ids) for ids in together}) > 1
    bare = greedy_tokens(adapted, tasks, prompts, with_adapter=False)
    assert bare != together


def test_answers_leave_out_working_except_from_the_backbone_alone(adapted: AdaptedModel) -> None:
    prompts = [Prompt(adapted.prompts.prompt("the quick brown fox"))]
    plain = TaskEntry(id="t", description="d", max_new_tokens=12, stop=("never",), bias_index=1)
    (text,) = greedy_answers(adapted, [plain], prompts)
    marker = text.split()[1]
    task = plain.model_copy(update={"answer_marker": marker})
    assert greedy_answers(adapted, [task], prompts) == [text.partition(marker)[2].strip()]
    (alone,) = greedy_answers(adapted, [plain], prompts, with_adapter=False)
    assert greedy_answers(adapted, [task], prompts, with_adapter=False) == [alone]


def test_answers_keep_the_order_of_examples(adapted: AdaptedModel) -> None:
    examples = [Example(TASKS[n % 2].id, "word " * (n % 5 + 1), "x") for n in range(5)]
    answers = offline_answerer(adapted, TASKS)(examples)
    assert answers == offline_answerer(adapted, TASKS, batch_size=2)(examples)
    assert answers == offline_answerer(adapted, TASKS, batch_tokens=1)(examples)


def test_options_come_from_the_input_or_the_task() -> None:
    task = TASKS[0]
    assert options_of(task, CHOICE) == ("(A)", "(B)", "(C)")
    assert options_of(task, "Is it?\nOptions:\n- Yes \n- No") == ("Yes", "No")
    assert options_of(task, "Say (A) or (B)") == ()
    closed = task.model_copy(update={"allowed_answers": ("True", "False")})
    assert options_of(closed, "not True") == ("True", "False")


@pytest.mark.parametrize("with_adapter", [True, False])
def test_likeliest_equals_scoring_each_option(adapted: AdaptedModel, with_adapter: bool) -> None:
    """Compares with one plain forward pass per option; options have different lengths."""
    tokenizer, options = adapted.tokenizer, ("Yes", "a longer one", "(B)", "No")
    for text in ("first", "the second prompt", "and a third"):
        prompt = adapted.prompts.prompt(text)
        sums = []
        for option in options:
            ids = tokenizer(f" {option}", add_special_tokens=False)["input_ids"]
            enabled = adapted.adapters.context.enabled
            adapted.adapters.context.enabled = with_adapter
            with torch.inference_mode(), adapted.adapters.context.use(torch.tensor([1])):
                logits = adapted.model(input_ids=torch.tensor([prompt + ids])).logits[0]
            adapted.adapters.context.enabled = enabled
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            sums.append(sum(float(row[token]) for row, token in zip(logprobs, ids, strict=True)))
        found = likeliest(adapted, TASKS[1], Prompt(prompt), options, with_adapter=with_adapter)
        assert found == options[sums.index(max(sums))]


def test_likelihood_is_measured_after_the_adapters_working(adapted: AdaptedModel) -> None:
    prompt = adapted.prompts.prompt("the quick brown fox")
    plain = TASKS[1].model_copy(update={"max_new_tokens": 12, "stop": ("never",)})
    (generated,) = greedy_tokens(adapted, [plain], [Prompt(prompt)])
    marker = adapted.tokenizer.decode(generated[5:6]).strip()
    end = next(e for e in range(1, 13) if marker in adapted.tokenizer.decode(generated[:e]))
    task = plain.model_copy(update={"answer_marker": marker})
    options = ("Yes", "No", "(A)", "(B)", "maybe", "seven")
    expected = likeliest(adapted, plain, Prompt(prompt + generated[:end]), options)
    assert likeliest(adapted, task, Prompt(prompt), options) == expected


def test_likelihood_generates_only_open_questions(adapted: AdaptedModel) -> None:
    examples = [Example("letters", CHOICE, "(A)"), Example("words", "Say it.", "a")]
    chosen, said = likelihood_answerer(adapted, TASKS)(examples)
    assert chosen in ("(A)", "(B)", "(C)")
    assert said == offline_answerer(adapted, TASKS)(examples[1:])[0]


def test_shots_come_from_training_and_never_hold_the_input(folder: Path) -> None:
    suite = FolderSuite(folder)
    prompt_of = few_shot_prompt(suite, 2, seed=3)
    train = suite.examples("words", "train", 3, 3)
    test = suite.examples("words", "test", 1)[0] if suite.examples("words", "test", None) else train[2]
    first, second = (f"{TASKS[1].render(shot.input)} {shot.target}" for shot in train[:2])
    assert prompt_of(TASKS[1], test).task == f"{first}\n\n{second}\n\n{TASKS[1].render(test.input)}"
    third = f"{TASKS[1].render(train[2].input)} {train[2].target}"
    assert prompt_of(TASKS[1], train[0]) == ("", f"{second}\n\n{third}\n\n{TASKS[1].render(train[0].input)}")


def test_refuses_a_prompt_without_room_for_an_answer(adapted: AdaptedModel) -> None:
    room = adapted.model.config.max_position_embeddings
    with pytest.raises(PromptError, match=f"task letters: prompt of .* the backbone takes {room}: 'word word"):
        offline_answerer(adapted, TASKS)([Example("letters", "word " * room, "x")])
    assert plain_prompt(TASKS[0], Example("letters", "x", "y")) == ("", "x\nAnswer:")


def test_the_floor_is_the_majority_and_a_margin() -> None:
    examples = [Example("a", str(n), "yes" if n < 6 else "no") for n in range(10)]
    examples += [Example("b", str(n), str(n)) for n in range(10)]
    right = [example.target for example in examples]
    assert score(examples, right).below_floor == ()
    # The floor is 0.7 for the first task, 0.2 for the second.
    wrong = ["x"] * 3 + right[3:10] + ["x"] * 9 + right[19:]
    found = score(examples, wrong)
    assert [task.task_id for task in found.below_floor] == ["b"]
    assert summary({"adapter": found, "backbone_alone": score(examples, ["x"] * 20)}) == (
        "accuracy: 2 tasks, mean 0.40, backbone alone 0.00, tasks below floor 1"
    )
    assert summary({"adapter": found}) == "accuracy: 2 tasks, mean 0.40, tasks below floor 1"
    assert summary({"backbone_alone": found}) == "accuracy: 2 tasks, backbone alone 0.40"


@pytest.fixture
def checkpoint(adapted: AdaptedModel, tmp_path: Path) -> Path:
    write_checkpoint(
        tmp_path / "adapter", backbone=adapted.backbone, config=CONFIG, tasks=TASKS,
        tensors=adapter_tensors(adapted.adapters, torch.float32),
    )  # fmt: skip
    return tmp_path / "adapter"


@pytest.mark.parametrize("flags", [[], ["--scoring", "likelihood", "--shots", "1"], ["--adapter-only"]])
def test_every_example_of_a_folder_is_scored(
    tiny_backbone: Path, checkpoint: Path, folder: Path, tmp_path: Path, capsys, flags: list[str]
) -> None:
    out = tmp_path / "new" / "out.json"
    command = ["eval", "--backbone", str(tiny_backbone), "--adapter", str(checkpoint), "--suite", str(folder)]
    assert main([*command, "--json", str(out), *flags]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    written = json.loads(out.read_text())
    assert {name: task["total"] for name, task in written["adapter"]["tasks"].items()} == {"letters": 15, "words": 15}
    assert len(written["answers"]) == 30
    assert written["split"] == "all"
    accuracy = [task["accuracy"] for task in written["adapter"]["tasks"].values()]
    assert written["adapter"]["mean_accuracy"] == pytest.approx(sum(accuracy) / 2, abs=1e-4)
    for name in ("letters", "words"):
        answers = [a["adapter"] == a["target"] for a in written["answers"] if a["task_id"] == name]
        assert written["adapter"]["tasks"][name]["correct"] == sum(answers)
    assert last.startswith(f"accuracy: 2 tasks, mean {written['adapter']['mean_accuracy']:.2f}, ")
    assert ("backbone alone" in last) == ("--adapter-only" not in flags) == ("backbone_alone" in written)


def test_recorded_scores_are_in_the_manifest_and_the_tensors_stay(
    tiny_backbone: Path, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    before, tensors = read_manifest(checkpoint), (checkpoint / TENSORS_FILE).read_bytes()
    out = tmp_path / "out.json"
    assert main(["eval", "--backbone", str(tiny_backbone), "--adapter", str(checkpoint), "--suite", str(folder),
                 "--examples", "3", "--record", "--json", str(out)]) == 0  # fmt: skip
    written = json.loads(out.read_text())
    del written["answers"]
    assert read_manifest(checkpoint) == before.model_copy(update={"evaluation": written})
    assert (checkpoint / TENSORS_FILE).read_bytes() == tensors


def test_labels_are_scored_and_their_temperature_recorded(
    tiny_backbone: Path, adapted: AdaptedModel, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ("(A)", "(B)", "(C)")
    letters = TaskEntry.model_validate({**TASKS[0].model_dump(), "answer": {"type": "label", "labels": labels}})
    write_checkpoint(
        tmp_path / "typed", backbone=adapted.backbone, config=CONFIG, tasks=(letters, TASKS[1]),
        tensors=adapter_tensors(adapted.adapters, torch.float32),
    )  # fmt: skip
    prompt = Prompt(adapted.prompts.prompt("which?"))
    found = label_probabilities(adapted, letters, prompt)
    ids = {label: adapted.prompts.answer(label) for label in labels}
    ((before, after),) = LabelTree(ids).branches
    with torch.inference_mode(), adapted.adapters.context.use(torch.tensor([0])):
        logits_V = adapted.model(input_ids=torch.tensor([[*prompt.ids, *before]])).logits[0, -1]
    expected = logits_V[list(after)].softmax(-1).tolist()
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)
    # Enough for each split.
    examples = [{"input": f"{n} {CHOICE}", "target": "(A)"} for n in range(60)]
    (folder / "letters.json").write_text(json.dumps({"examples": examples}))
    arguments = ["eval", "--backbone", str(tiny_backbone), "--adapter", str(tmp_path / "typed"), "--suite", str(folder)]
    assert main([*arguments, "--examples", "6", "--record", "--adapter-only"]) == 0
    printed = capsys.readouterr().out
    assert "expected calibration error of 6 labels: " in printed
    # With all examples, most are in the training split.
    assert "not recorded" in printed
    # A temperature fitted on the test split would flatter the calibration error there.
    assert main([*arguments, "--split", "test", "--record", "--adapter-only"]) == 0
    assert "not recorded" in capsys.readouterr().out
    assert not read_manifest(tmp_path / "typed").calibration
    assert main([*arguments, "--split", "validation", "--record", "--adapter-only"]) == 0
    assert "not recorded" not in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "typed")
    assert list(manifest.calibration) == ["letters"]
    for name in ("calibration_error", "calibration_error_by_chance"):
        assert set(manifest.evaluation[name]) == {"uncalibrated", "stored", "fitted"}


def test_the_bar_moves_while_the_first_answer_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example("words", str(i), "x") for i in range(8)]
    bar = tqdm(total=8, file=io.StringIO(), disable=False)

    class Client:
        def generate(self, task_id: str, text: str, *, image: None, without_adapter: bool) -> Any:
            until = time.monotonic() + 30
            while text == "0" and bar.n < 7:
                assert time.monotonic() < until
                time.sleep(0.01)
            return SimpleNamespace(text=f"answer {text}")

    monkeypatch.setattr("mtlora.evaluation.server.answer_bar", lambda *arguments: bar)
    monkeypatch.setattr("mtlora.evaluation.server.Client", lambda address, access: nullcontext(Client()))
    assert server_answerer("nowhere", concurrency=2)(examples) == [f"answer {i}" for i in range(8)]
    assert bar.n == 8


def test_the_backbone_alone_needs_no_adapter(tiny_backbone: Path, folder: Path, capsys) -> None:
    flags = ["--suite", str(folder), "--shots", "2", "--examples", "4"]
    assert main(["eval", "--backbone", str(tiny_backbone), *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("accuracy: 2 tasks, backbone alone ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shots", "-1"], "--shots: found -1; allowed: 0 or more"),
        (["--examples", "0"], "--examples: found 0; allowed: 1 or more"),
        (["--through", "127.0.0.1:1", "--shots", "1"], "--through: needs --adapter, without --shots"),
        (["--suite", "bbh-generated"], "the adapter has no task boolean_expressions"),
    ],
)
def test_eval_refuses_wrong_flags(
    tiny_backbone: Path, checkpoint: Path, capsys, flags: list[str], message: str
) -> None:
    assert main(["eval", "--backbone", str(tiny_backbone), "--adapter", str(checkpoint), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_named_in_one_line(
    tiny_backbone: Path, checkpoint: Path, folder: Path, capsys
) -> None:
    address = f"127.0.0.1:{free_port()}"
    flags = ["--adapter", str(checkpoint), "--suite", str(folder), "--examples", "2", "--through", address]
    assert main(["eval", "--backbone", str(tiny_backbone), *flags]) == 2
    assert f"mtlora: error: {address}: UNAVAILABLE: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--adapter-only", "--record"])
def test_flags_of_an_adapter_need_one(tiny_backbone: Path, capsys, flag: str) -> None:
    assert main(["eval", "--backbone", str(tiny_backbone), flag]) == 2
    assert f"{flag}: needs --adapter" in capsys.readouterr().err
