"""Batches: every example once per epoch, deterministic for a seed, with padding that changes nothing."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtlora.prompt import PromptEncoder
from mtlora.suite.base import Example, SuiteError
from mtlora.task import TaskSpec, TemplateError
from mtlora.train.data import Encoded, collate, encode, schedule

encoded = st.builds(
    Encoded,
    task_index=st.integers(0, 4),
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=30).map(tuple),
    answer=st.lists(st.integers(0, 99), min_size=1, max_size=5).map(tuple),
)


@given(st.lists(encoded, min_size=1, max_size=200), st.integers(1, 17), st.integers(1, 3), st.integers(0, 9))
def test_schedule_uses_every_example_once_an_epoch(examples, batch_size, epochs, seed) -> None:
    batches = schedule(examples, batch_size=batch_size, epochs=epochs, seed=seed)
    assert batches == schedule(examples, batch_size=batch_size, epochs=epochs, seed=seed)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert Counter(i for batch in batches for i in batch) == dict.fromkeys(range(len(examples)), epochs)


def test_schedule_depends_on_the_seed_and_buckets_by_length() -> None:
    examples = [Encoded(0, tuple(range(1 + i % 40)), (1,)) for i in range(640)]
    batches = schedule(examples, batch_size=8, epochs=1, seed=0)
    assert batches != schedule(examples, batch_size=8, epochs=1, seed=1)
    padded = sum(max(len(examples[i]) for i in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(len(example) for example in examples)


@given(st.lists(encoded, min_size=1, max_size=8))
def test_collate_marks_the_token_before_each_answer_token(examples) -> None:
    batch = collate(examples)
    flat = batch.tokens_BL.flatten()
    length = batch.tokens_BL.shape[1]
    assert batch.answer_targets_A.tolist() == [token for example in examples for token in example.answer]
    for row, target, owner in zip(batch.answer_rows_A, batch.answer_targets_A, batch.answer_owner_A, strict=True):
        assert row // length == owner
        # The last answer token of the longest sequence has no next column.
        if row % length + 1 < length:
            assert flat[row + 1] == target
    assert batch.task_index_E.tolist() == [example.task_index for example in examples]


class Characters:
    """A tokenizer with one token per character."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("x" * 100, "a", "task t: example of 111 tokens, expected at most 64"),
        ("x", "a" * 9, "takes 11 tokens with its end"),
    ],
)
def test_encode_refuses_an_example_that_is_too_long(text: str, target: str, message: str) -> None:
    task = TaskSpec(id="t", description="d", max_new_tokens=8)
    with pytest.raises(SuiteError, match=message):
        encode(PromptEncoder(Characters()), [task], [Example("t", text, target)], max_length=64)


def test_encode_keeps_room_for_the_longest_answer() -> None:
    task = TaskSpec(id="t", description="d", max_new_tokens=8)
    examples = [Example("t", "x" * size, "a") for size in (1, 2, 3)]
    whole = encode(PromptEncoder(Characters()), [task], examples, max_length=64)
    room, skipped = len(whole[1][1].prompt) + 8, Counter[str]()
    kept = encode(PromptEncoder(Characters()), [task], examples, max_length=64, room=room, skipped=skipped)
    assert (kept, skipped) == (whole[:2], {"t": 1})
    with pytest.raises(SuiteError, match=f"and max_new_tokens 8, expected at most {room} together"):
        encode(PromptEncoder(Characters()), [task], examples, max_length=64, room=room)


def test_encode_refuses_a_template_of_several_fields() -> None:
    task = TaskSpec(id="t", description="d", template="{input} {context}")
    with pytest.raises(TemplateError, match="task t takes fields input, context, not one text"):
        encode(PromptEncoder(Characters()), [task], [Example("t", "x", "y")], max_length=64)


def test_padding_does_not_change_logits(tiny_backbone) -> None:
    from mtlora.config import MtLoRAConfig
    from mtlora.model.language import new_adapted_model

    adapted = new_adapted_model(tiny_backbone, MtLoRAConfig(r=4, num_experts=2, num_groups=2), 3, torch.float32)
    for parameter in adapted.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    examples = [Encoded(0, (5, 6, 7), (8, 9)), Encoded(2, tuple(range(20)), (3,)), Encoded(1, (4,), (2, 2, 2))]
    batch = collate(examples)
    together = adapted.answer_logits(batch.tokens_BL, batch.task_index_E, batch.answer_rows_A)
    alone = []
    for example in examples:
        one = collate([example])
        alone.append(adapted.answer_logits(one.tokens_BL, one.task_index_E, one.answer_rows_A))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
