"""The built-in suite: determinism, disjoint splits, one right answer, balance, lengths."""

import hashlib
import itertools
import random
import subprocess
import sys
from collections import Counter
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlora.suite import SPLITS, BuiltinSuite, Example, Split, SuiteError, load_suite, split_of
from mtlora.suite.builtin.task import split_sum, task
from mtlora.suite.builtin.words import KINDS, WORDS
from mtlora.task import TaskSpec
from tests.mtlora.suite.builtin_solvers import SOLVERS

SUITE = BuiltinSuite()
SPECS = {spec.id: spec for spec in SUITE.tasks}
PINNED = "01c0c61520f3566d22a935e68f3e52671ae6d7b38c9967a25ca3cf5f52653bdc"


@cache
def _examples(task_id: str, split: Split) -> tuple[Example, ...]:
    return tuple(SUITE.examples(task_id, split, 4000 if split == "train" else 300))


each_task = pytest.mark.parametrize("task_id", SPECS)
some_task = st.sampled_from(sorted(SPECS))


def test_there_are_25_tasks() -> None:
    assert len(SUITE.tasks) == len(SPECS) == 25
    assert set(SPECS) == set(SOLVERS)
    assert load_suite("builtin").tasks == SUITE.tasks
    assert load_suite("builtin").name == SUITE.name == "builtin"


@each_task
def test_splits_are_large_enough_and_disjoint(task_id: str) -> None:
    inputs = {split: [e.input for e in _examples(task_id, split)] for split in SPLITS}
    for split, texts in inputs.items():
        assert len(set(texts)) == len(texts) == (4000 if split == "train" else 300)
        assert {split_of(task_id, text) for text in texts} == {split}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(inputs[one]) & set(inputs[other])


@each_task
def test_answers_equal_an_independent_solvers(task_id: str) -> None:
    for split in SPLITS:
        for example in _examples(task_id, split)[:1000]:
            assert SOLVERS[task_id](example.input) == example.target, example


@each_task
def test_answers_are_balanced(task_id: str) -> None:
    spec = SPECS[task_id]
    slacks: tuple[tuple[Split, float], ...] = (("train", 0.03), ("test", 0.08))
    for split, slack in slacks:
        targets = Counter(e.target for e in _examples(task_id, split))
        majority = max(targets.values()) / targets.total()
        if spec.allowed_answers is None:
            assert majority <= 0.12
        else:
            assert set(targets) == set(spec.allowed_answers)
            assert majority <= 1 / len(spec.allowed_answers) + slack


@each_task
def test_texts_are_short(task_id: str) -> None:
    spec = SPECS[task_id]
    assert spec.stop == ("\n",)
    for example in _examples(task_id, "train"):
        assert len(spec.render(example.input)) <= 240
        assert example.target == example.target.strip()
        assert "\n" not in example.target
        assert 0 < len(example.target) <= 48


@pytest.mark.slow
def test_prompts_and_answers_are_short_in_tokens(tokenizer: Any) -> None:
    for task_id, spec in SPECS.items():
        examples = _examples(task_id, "test")
        prompts = [len(e.ids) for e in tokenizer.encode_batch([spec.render(e.input) for e in examples])]
        texts = [f" {spec.worked_answer(e.working, e.target)}" for e in examples]
        answers = [len(e.ids) for e in tokenizer.encode_batch(texts)]
        assert sum(prompts) / len(prompts) <= 60, task_id
        assert max(prompts) <= 110, task_id
        # One token for the stop string, and one spare.
        assert max(answers) + 2 <= spec.max_new_tokens <= 48, (task_id, max(answers))


def test_examples_are_pinned() -> None:
    """A seed's examples are part of the interface: adapters are compared on them."""
    digest = hashlib.sha256()
    for task_id, split in itertools.product(SPECS, SPLITS):
        for example in SUITE.examples(task_id, split, 20, seed=7):
            digest.update(f"{example.task_id}\0{example.input}\0{example.target}\0".encode())
    assert digest.hexdigest() == PINNED


@pytest.mark.slow
@given(task_id=some_task, split=st.sampled_from(SPLITS), seed=st.integers(), count=st.integers(0, 30))
def test_any_seed_gives_right_answers_and_stable_prefixes(task_id: str, split: Split, seed: int, count: int) -> None:
    examples = SUITE.examples(task_id, split, count, seed)
    assert examples == BuiltinSuite().examples(task_id, split, 30, seed)[:count]
    for example in examples:
        assert SOLVERS[task_id](example.input) == example.target


def test_seeds_differ() -> None:
    for task_id in SPECS:
        assert SUITE.examples(task_id, "test", 20, 0) != SUITE.examples(task_id, "test", 20, 1)


@given(data=st.data(), parts=st.integers(1, 5), largest=st.integers(1, 9), seed=st.integers())
def test_split_sum_gives_parts_in_range_with_the_total(
    data: st.DataObject, parts: int, largest: int, seed: int
) -> None:
    total = data.draw(st.integers(parts, parts * largest))
    numbers = split_sum(random.Random(seed), total, parts, largest)
    assert len(numbers) == parts
    assert sum(numbers) == total
    assert 1 <= min(numbers) <= max(numbers) <= largest


def test_word_lists_hold_no_word_twice() -> None:
    assert len(set(WORDS)) == len(WORDS)
    words = [word for kind in KINDS.values() for pair in kind for word in pair]
    assert len(set(words)) == len(words)


def test_refuses_an_unknown_task_split_or_count() -> None:
    with pytest.raises(SuiteError, match=r"no task 'nonesuch'; it has boolean_expressions, "):
        SUITE.examples("nonesuch", "train", 1)
    with pytest.raises(SuiteError, match="no split 'dev'; there are train, validation, test"):
        SUITE.examples("navigate", "dev", 1)  # type: ignore[arg-type]
    for count in (None, -1):
        with pytest.raises(SuiteError, match=f"count of task navigate is {count}"):
            SUITE.examples("navigate", "train", count)


def test_an_exhausted_task_raises() -> None:
    digits = task(
        "digits", lambda rng: (str(rng.randrange(100)), "x"), description="d", instruction="i", max_new_tokens=1
    )
    suite = BuiltinSuite([digits], max_misses=5000)
    sizes = []
    for split in SPLITS:
        size = sum(split_of("digits", str(n)) == split for n in range(100))
        assert len(suite.examples("digits", split, size)) == size
        with pytest.raises(SuiteError, match=f"digits has only {size} distinct {split} inputs, {size + 1} were asked"):
            suite.examples("digits", split, size + 1)
        sizes.append(size)
    assert sum(sizes) == 100


def test_loading_needs_no_torch() -> None:
    code = (
        "import sys; from mtlora.suite import load_suite; load_suite('builtin').examples('navigate', 'test', 3);"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_specs_are_valid() -> None:
    for spec in SUITE.tasks:
        assert TaskSpec.model_validate_json(spec.model_dump_json()) == spec
        assert spec.template.count("\n") == 2
        assert spec.template.endswith("\n{input}\nAnswer:")
