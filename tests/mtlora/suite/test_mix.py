"""Mixes: one table of tasks from several suites, with each part's examples."""

import json
from pathlib import Path

import pytest

from mtlora.suite import SPLITS, SuiteError, SuitePart, load_suite, up_to

SHARED = ("boolean_expressions", "hyperbaton", "navigate", "object_counting", "temporal_sequences", "web_of_lies",
          "word_sorting")  # fmt: skip
TEXT = (
    "If you follow these instructions, do you return to the starting point? Take 1 step. Take {n} steps.\n"
    "Options:\n- Yes\n- No"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    navigate = [{"input": TEXT.format(n=n), "target": "No"} for n in range(2, 62)]
    jokes = [{"input": f"joke {n}", "target": "(A)"} for n in range(60)]
    for name, examples in (("navigate", navigate), ("snarks", jokes)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"examples": examples}))
    return tmp_path


def part(suite: object, counts: object = None, **more: object) -> SuitePart:
    return SuitePart.model_validate({"suite": str(suite), "examples_per_task": counts, **more})


def test_a_mix_joins_the_tasks_of_its_parts(folder: Path) -> None:
    mix = load_suite([
        part("builtin", {"*": 3, "navigate": 5}),
        part("bbh-generated", {"navigate": 4}, joins=SHARED, train_only=True),
        part(folder, None, joins=("navigate",), worked=True),
    ])  # fmt: skip
    ids = [task.id for task in mix.tasks]
    builtin, generated = load_suite("builtin"), load_suite("bbh-generated")
    assert ids[:25] == [task.id for task in builtin.tasks]
    assert len(ids) == len(set(ids)) == 25 + len(generated.tasks) - len(SHARED) + 1
    tasks = {task.id: task for task in mix.tasks}
    navigate = tasks["navigate"]
    assert navigate.template == builtin.tasks[ids.index("navigate")].template
    assert (navigate.answer_marker, navigate.allowed_answers) == ("=>", None)
    assert navigate.max_new_tokens == 96
    assert tasks["snarks"].answer_marker is None

    whole = load_suite(str(folder))
    trained = mix.examples("navigate", "train", None, 3)
    expected = len(whole.examples("navigate", "train", None))
    assert len(trained) == 5 + 4 + expected
    assert all(example.working for example in trained)
    assert [e.input for e in trained[:5]] == [e.input for e in builtin.examples("navigate", "train", 5, 3)]
    assert [e.input for e in trained[5:9]] == [e.input for e in generated.examples("navigate", "train", 4, 3)]
    assert len(mix.examples("navigate", "train", 2)) == 6
    assert len(mix.examples("object_counting", "train", None)) == 3
    assert mix.examples("dyck_languages", "train", None) == []
    # Two of the built-in part, up to two of the folder, none generated.
    validation = [e.input for e in mix.examples("navigate", "validation", 2)]
    assert sum(text.startswith("If you") for text in validation) == min(
        2, len(whole.examples("navigate", "validation", None))
    )
    assert len(validation) - sum(text.startswith("If you") for text in validation) == 2


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part("builtin", 1), part("bbh-generated", 1)], "task boolean_expressions is in an earlier part already"),
        ([part("builtin", 1, joins=("navigate",))], "joins names navigate, which no earlier part has"),
        ([part("builtin", {"nonesuch": 1})], "examples_per_task of part builtin: it has no task nonesuch"),
        ([part("builtin", 1), part("bbh-generated", 1, joins=("snarks",))], "joins of part bbh-generated: it has no"),
        ([part("/nowhere", 1)], "suite: found '/nowhere'"),
        ([], "at least one part"),
    ],
)
def test_refuses_wrong_mixes(parts: list[SuitePart], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        load_suite(parts)


def test_one_input_of_two_parts_is_taken_once(folder: Path) -> None:
    mix = load_suite([part(folder, None), part(folder, None, joins=("navigate", "snarks"))])
    assert len(mix.examples("snarks", "train", None)) == len(load_suite(str(folder)).examples("snarks", "train", None))


@pytest.mark.filterwarnings("ignore:.*the same image as")
def test_finite_parts_fill_no_others_place_and_hold_out_for_all(tmp_path: Path) -> None:
    """One part has its own splits, the other splits the same images by their content, and has more of them."""
    for i in range(60):
        label = ("oak", "elm")[i % 2]
        files = [tmp_path / "hashed" / "leaves" / label / f"{i}.png"]
        if i < 40:
            files.append(tmp_path / "split" / "leaves" / ("test" if i < 20 else "train") / label / f"{i}.png")
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"image {i}".encode())
    parts = [part(tmp_path / "split"), part(tmp_path / "hashed", joins=["leaves"])]
    mix, alone = load_suite(parts), load_suite(str(tmp_path / "split"))
    inputs = {split: {e.input for e in mix.examples("leaves", split, None)} for split in SPLITS}
    assert not inputs["train"] & inputs["test"]
    assert not inputs["train"] & inputs["validation"]
    assert not inputs["validation"] & inputs["test"]
    assert len(set.union(*inputs.values())) == 60
    assert {e.input for e in alone.examples("leaves", "test", None)} <= inputs["test"]
    # Each part provides its own number: the first does not fill in for the second.
    sources = [str(e.source) for e in up_to(mix, "leaves", "train", 8)]
    assert sum("split" in source for source in sources) == 8
    assert any("hashed" in source for source in sources)


def test_up_to_takes_all_of_a_finite_suite_that_has_fewer(folder: Path) -> None:
    files, generated = load_suite(str(folder)), load_suite("builtin")
    mixed = load_suite([part("builtin", 3), part(folder, joins=["navigate"])])
    assert (files.finite, generated.finite, mixed.finite) == (True, False, False)
    assert load_suite([part(folder)]).finite
    assert up_to(files, "snarks", "train", 10_000) == files.examples("snarks", "train", None)
    assert up_to(files, "snarks", "train", 2, seed=1) == files.examples("snarks", "train", 2, seed=1)
    assert up_to(files, "snarks", "train", None) == files.examples("snarks", "train", None)
    assert len(up_to(generated, "navigate", "test", 5)) == 5
    assert up_to(mixed, "snarks", "test", 10_000) == files.examples("snarks", "test", None)
    with pytest.raises(SuiteError, match="no task 'films'"):
        up_to(files, "films", "train", 1)
