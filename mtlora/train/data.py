"""From suites to batches: encoded examples, and a deterministic schedule of length-bucketed batches.

Shape suffixes: B sequences, E examples, L positions, S positions of documents, C = S + L, P tokens with a path,
A answer tokens.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mtlora.evaluation.batches import cut
from mtlora.model.language import Documents, Placed
from mtlora.prompt import PromptEncoder
from mtlora.suite.base import Example, SuiteError
from mtlora.task import TaskSpec

if TYPE_CHECKING:
    from mtlora.model.soft_tokens import ImageReader

# Number of batches that are sorted by length together. More of them reduce padding; fewer keep batches mixed.
_BUCKET_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids; `task_index` is the row of its task in the task table.

    document_length: how many of the prompt's first tokens are the document's part. image: the prompt's image, if any;
    its soft tokens have placeholder ids in `prompt`.
    """

    task_index: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    document_length: int = 0
    image: Placed | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def document(self) -> tuple[int, ...]:
        """The prompt's first tokens, which belong to the document."""
        return self.prompt[: self.document_length]


@dataclass(frozen=True)
class Batch:
    """A right-padded batch. With a causal mask, padding changes nothing before it, so padding needs no mask.

    Tensors are int64. task_index_E: task index of each example. answer_rows_A: flat positions b*L + l whose next token
    is an answer token; answer_targets_A: that token; answer_owner_A: its example. A row is an example; with
    `documents`, it holds all examples of a document one after the other, without it, and task_index_BL is that of each
    token. images: the batch's images, at flat positions.
    """

    tokens_BL: torch.Tensor
    task_index_E: torch.Tensor
    answer_rows_A: torch.Tensor
    answer_targets_A: torch.Tensor
    answer_owner_A: torch.Tensor
    task_index_BL: torch.Tensor | None = None
    documents: Documents | None = None
    images: Sequence[Placed] = ()

    @property
    def bias_index(self) -> torch.Tensor:
        """The task's index of each row, or of each token where a row has several."""
        return self.task_index_E if self.task_index_BL is None else self.task_index_BL


def encode(
    prompts: PromptEncoder,
    tasks: Sequence[TaskSpec],
    examples: Sequence[Example],
    *,
    max_length: int,
    room: float = math.inf,
    skipped: Counter[str] | None = None,
    reader: "ImageReader | None" = None,
) -> list[tuple[Example, Encoded]]:
    """Pairs of each example and its encoding, with its working if it has one.

    An example longer than `max_length` tokens, or whose prompt and its task's max_new_tokens are more than `room`, is
    counted in `skipped` under its task, or raises SuiteError if `skipped` is None. An answer longer than its task's
    max_new_tokens always raises SuiteError. reader: reads the images, if a task takes any.
    """
    index = {task.id: i for i, task in enumerate(tasks)}
    encoded = []
    # Cache documents' tokens, which all tasks of a document share.
    document_ids: dict[str, list[int]] = {}
    keys = reader.read(tasks, examples) if reader else [None] * len(examples)
    for example, key in zip(examples, keys, strict=True):
        task, image = tasks[index[example.task_id]], None
        prompt, document_length, answer = prompts.example(
            task, example.input, example.target, example.working, document_ids=document_ids
        )
        if key and reader and task.picture:
            soft_tokens = reader.num_soft_tokens(task.picture)
            prompt, at = prompts.around_image(task.around_image(example.input), soft_tokens)
            image = Placed(at, key)
        cause = ""
        if len(prompt) + len(answer) > max_length:
            cause = f"example of {len(prompt) + len(answer)} tokens, expected at most {max_length} (max_length)"
        elif len(prompt) + task.max_new_tokens > room:
            cause = (
                f"prompt of {len(prompt)} tokens and max_new_tokens {task.max_new_tokens}, expected at most {room} "
                "together, the backbone's positions"
            )
        if cause and skipped is not None:
            skipped[task.id] += 1
            continue
        if cause:
            raise SuiteError(f"{_where(example)}: {cause}: {example.input[:80]!r}")
        if len(answer) > task.max_new_tokens:
            raise SuiteError(
                f"{_where(example)}: target {example.target[:80]!r} takes {len(answer)} tokens with its end, "
                f"expected at most max_new_tokens {task.max_new_tokens}"
            )
        encoded.append((example, Encoded(index[task.id], tuple(prompt), tuple(answer), document_length, image)))
    return encoded


def _where(example: Example) -> str:
    task = f"task {example.task_id}"
    return f"{example.source}: {task}" if example.source else task


def schedule(
    examples: Sequence[Encoded],
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    batch_tokens: int | None = None,
    document_tasks: int | None = None,
) -> list[list[int]]:
    """The examples' indices of every batch of a run: each example once per epoch, similar lengths together.

    A batch has at most `batch_size` examples and, with padding, `batch_tokens` tokens, but at least one example.
    document_tasks: up to this many examples of a document are put together, and their document's tokens count once.
    """
    batches: list[list[int]] = []
    for epoch in range(epochs):
        rng = random.Random(f"{seed}/{epoch}")
        units = [[i] for i in range(len(examples))]
        at_once = batch_size
        if document_tasks is not None:
            units = _units(examples, min(document_tasks, batch_size), rng)
            at_once = max(1, batch_size // document_tasks)
        lengths = [row_length([examples[i] for i in unit]) for unit in units]
        order = list(range(len(units)))
        rng.shuffle(order)
        window = at_once * _BUCKET_BATCHES
        epoch_batches: list[list[list[int]]] = []
        for start in range(0, len(order), window):
            bucket = sorted(order[start : start + window], key=lengths.__getitem__)
            for batch in cut(bucket, lengths, at_once, batch_tokens):
                chosen = [units[i] for i in batch]
                if document_tasks is None or batch_tokens is None or _fits(examples, chosen, batch_tokens):
                    epoch_batches.append(chosen)
                else:
                    epoch_batches += _apart(examples, chosen)
        rng.shuffle(epoch_batches)
        batches += [[i for unit in batch for i in unit] for batch in epoch_batches]
    return batches


def by_document(examples: Sequence[Encoded]) -> list[list[int]]:
    """The examples' indices, grouped by document."""
    found: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        found.setdefault(example.document, []).append(index)
    return list(found.values())


def _units(examples: Sequence[Encoded], size: int, rng: random.Random) -> list[list[int]]:
    """The examples of each document in random order, cut evenly into units of at most `size`."""
    units = []
    for indices in by_document(examples):
        rng.shuffle(indices)
        parts = -(-len(indices) // size)
        units += [indices[part::parts] for part in range(parts)]
    return units


def _fits(examples: Sequence[Encoded], units: Sequence[Sequence[int]], batch_tokens: int) -> bool:
    """Whether a batch of these units has at most `batch_tokens` tokens: units of one document share a row."""
    chosen = [examples[i] for unit in units for i in unit]
    rows = [[chosen[i] for i in row] for row in by_document(chosen)]
    return len(units) == 1 or len(rows) * max(map(row_length, rows)) <= batch_tokens


def _apart(examples: Sequence[Encoded], units: Sequence[list[int]]) -> list[list[list[int]]]:
    """Batches of these units, never two units of one document in a batch."""
    batches: list[list[list[int]]] = []
    seen: Counter[tuple[int, ...]] = Counter()
    for unit in units:
        document = examples[unit[0]].document
        if seen[document] == len(batches):
            batches.append([])
        batches[seen[document]].append(unit)
        seen[document] += 1
    return batches


def row_length(examples: Sequence[Encoded]) -> int:
    """Tokens of examples that share a document; the document counts once."""
    shared = examples[0].document_length
    return shared + sum(len(example) - shared for example in examples)


def batches(examples: Sequence[Encoded], size: int, *, documents: bool) -> Iterator[Batch]:
    """The examples once, shortest first, up to `size` at a time.

    documents: examples of a document share its pass; the shortest document comes first.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    if documents:
        units = sorted(by_document(examples), key=lambda unit: examples[unit[0]].document_length)
        order = [i for unit in units for i in unit]
    for start in range(0, len(order), size):
        chosen = [examples[i] for i in order[start : start + size]]
        yield collate_documents(chosen) if documents else collate(chosen)


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
        images=[each.image._replace(at=b * length + each.image.at) for b, each in enumerate(examples) if each.image],
    )


def collate_documents(examples: Sequence[Encoded]) -> Batch:
    """Like `collate`, but the examples of a document share a row, and the backbone alone reads it once.

    A token attends to its document and to the tokens before it of its own example.
    """
    units = by_document(examples)
    rows = [
        [(i, examples[i].prompt[examples[i].document_length :] + examples[i].answer) for i in unit] for unit in units
    ]
    B, L = len(rows), max(sum(len(tokens) for _, tokens in row) for row in rows)
    S = max(examples[unit[0]].document_length for unit in units)
    tokens_BL, positions_BL, task_index_BL = (torch.zeros(B, L, dtype=torch.int64) for _ in range(3))
    documents_BS = torch.zeros(B, S, dtype=torch.int64)
    # Treat padding as an own example, because every token must attend to at least one.
    owner_BL = torch.full((B, L), -1)
    answer_rows: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for b, row in enumerate(rows):
        document = examples[row[0][0]].document
        documents_BS[b, : len(document)] = torch.tensor(document)
        start = 0
        for i, tokens in row:
            end = start + len(tokens)
            tokens_BL[b, start:end] = torch.tensor(tokens)
            positions_BL[b, start:end] = torch.arange(len(tokens)) + len(document)
            task_index_BL[b, start:end] = examples[i].task_index
            owner_BL[b, start:end] = i
            answer = examples[i].answer
            first = b * L + end - len(answer) - 1
            answer_rows += range(first, first + len(answer))
            targets += answer
            owner += [i] * len(answer)
            start = end
    lengths_B = torch.tensor([examples[unit[0]].document_length for unit in units])
    in_document_BS = torch.arange(S) < lengths_B.unsqueeze(1)
    own_BLL = (owner_BL.unsqueeze(2) == owner_BL.unsqueeze(1)).tril()
    mask_BLC = torch.cat([in_document_BS.unsqueeze(1).expand(B, L, S), own_BLL], dim=2)
    path_P = (owner_BL >= 0).flatten().nonzero().squeeze(1)
    return Batch(
        tokens_BL,
        torch.tensor([example.task_index for example in examples]),
        torch.tensor(answer_rows),
        torch.tensor(targets),
        torch.tensor(owner),
        task_index_BL,
        Documents(documents_BS, positions_BL, mask_BLC, None if len(path_P) == B * L else path_P),
    )
