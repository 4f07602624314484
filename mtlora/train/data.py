"""From suites to batches: encoded examples, and a deterministic schedule of length-bucketed batches.

Shape suffixes: B sequences, L positions, A answer tokens.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mtlora.prompt import PromptEncoder
from mtlora.suite.base import Example, SuiteError
from mtlora.task import TaskSpec

# Batches sorted together by length: large enough to waste little on padding, small enough to keep batches mixed.
_BUCKET_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids; `task_index` is the row of its task in the task table.

    document_length: how many of the prompt's first tokens are the document's part.
    """

    task_index: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    document_length: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """A right-padded batch. With a causal mask, padding changes nothing before it, so padding needs no mask.

    All are int64. answer_rows_A: flat positions b*L + l whose next token is an answer token; answer_targets_A: that
    token; answer_owner_A: its sequence b.
    """

    tokens_BL: torch.Tensor
    task_index_B: torch.Tensor
    answer_rows_A: torch.Tensor
    answer_targets_A: torch.Tensor
    answer_owner_A: torch.Tensor


def encode(
    prompts: PromptEncoder,
    tasks: Sequence[TaskSpec],
    examples: Iterable[Example],
    *,
    max_length: int,
    skipped: Counter[str] | None = None,
) -> list[Encoded]:
    """Encode examples, with their working where they have it.

    An example longer than `max_length` tokens is counted in `skipped` under its task, or raises SuiteError if `skipped`
    is None. An answer longer than its task's max_new_tokens always raises SuiteError.
    """
    index = {task.id: i for i, task in enumerate(tasks)}
    encoded = []
    for example in examples:
        task = tasks[index[example.task_id]]
        prompt, document_length, answer = prompts.example(task, example.input, example.target, example.working)
        if len(prompt) + len(answer) > max_length:
            if skipped is not None:
                skipped[task.id] += 1
                continue
            raise SuiteError(
                f"{_where(example)}: example of {len(prompt) + len(answer)} tokens, expected at most "
                f"{max_length} (max_length): {example.input[:80]!r}"
            )
        if len(answer) > task.max_new_tokens:
            raise SuiteError(
                f"{_where(example)}: target {example.target[:80]!r} takes {len(answer)} tokens with its end, "
                f"expected at most max_new_tokens {task.max_new_tokens}"
            )
        encoded.append(Encoded(index[task.id], tuple(prompt), tuple(answer), document_length))
    return encoded


def _where(example: Example) -> str:
    task = f"task {example.task_id}"
    return f"{example.source}: {task}" if example.source else task


def schedule(
    examples: Sequence[Encoded], *, batch_size: int, epochs: int, seed: int, batch_tokens: int | None = None
) -> list[list[int]]:
    """The examples' indices of every batch of a run: each example once per epoch, similar lengths together.

    A batch has at most `batch_size` examples and, with padding, `batch_tokens` tokens, but at least one example.
    """
    batches: list[list[int]] = []
    lengths = list(map(len, examples))
    for epoch in range(epochs):
        rng = random.Random(f"{seed}/{epoch}")
        order = list(range(len(examples)))
        rng.shuffle(order)
        window = batch_size * _BUCKET_BATCHES
        epoch_batches = []
        for start in range(0, len(order), window):
            bucket = sorted(order[start : start + window], key=lengths.__getitem__)
            epoch_batches += cut(bucket, lengths, batch_size, batch_tokens)
        rng.shuffle(epoch_batches)
        batches += epoch_batches
    return batches


def cut(
    order: Iterable[int], lengths: Sequence[int], batch_size: int, batch_tokens: int | None = None
) -> list[list[int]]:
    """Cut indices into batches of at most `batch_size` and, padded to their longest, `batch_tokens`; at least one each.

    lengths: tokens of each index.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if (
            not batches or len(batches[-1]) >= batch_size
            or (batch_tokens is not None and (len(batches[-1]) + 1) * longest > batch_tokens)
        ):  # fmt: skip
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def collate(examples: Sequence[Encoded], length: int | None = None) -> Batch:
    """Pad one batch, to its longest example or to `length` tokens, and mark its answer tokens."""
    length = length or max(len(example) for example in examples)
    tokens_BL = torch.zeros(len(examples), length, dtype=torch.int64)
    rows: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for b, example in enumerate(examples):
        tokens_BL[b, : len(example)] = torch.tensor(example.prompt + example.answer)
        start = b * length + len(example.prompt) - 1
        rows += range(start, start + len(example.answer))
        targets += example.answer
        owner += [b] * len(example.answer)
    return Batch(
        tokens_BL,
        torch.tensor([example.task_index for example in examples]),
        torch.tensor(rows),
        torch.tensor(targets),
        torch.tensor(owner),
    )
