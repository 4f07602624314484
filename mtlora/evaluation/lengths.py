"""Accuracy by document length."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mtlora.prompt import PromptEncoder
from mtlora.suite.base import Example
from mtlora.task import TaskSpec, is_correct

# The longest document, in tokens, of each row but the last.
_BOUNDS = (300, 450, 700, 1000)


def by_document_length(
    prompts: PromptEncoder,
    tasks: Sequence[TaskSpec],
    examples: Sequence[Example],
    answers: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """For each range of lengths that occurs: `tokens`, `examples`, and each answerer's accuracy over them, 0 to 1.

    Leaves out examples of tasks without a document part.
    """
    by_id = {task.id: task for task in tasks}
    lengths: dict[str, int] = {}
    rows: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        if part := by_id[example.task_id].parts(example.input).document:
            if part not in lengths:
                lengths[part] = len(prompts.prompt(part))
            rows.setdefault(sum(lengths[part] > bound for bound in _BOUNDS), []).append(i)
    names = [f"to {_BOUNDS[0]}", *(f"{a + 1} to {b}" for a, b in pairwise(_BOUNDS))]
    names.append(f"above {_BOUNDS[-1]}")
    return [
        {
            "tokens": names[row],
            "examples": len(chosen),
            **{
                name: round(sum(is_correct(found[i], examples[i].target) for i in chosen) / len(chosen), 4)
                for name, found in answers.items()
            },
        }
        for row, chosen in sorted(rows.items())
    ]
