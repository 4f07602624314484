"""A file of JSON lines in the layout of databricks-dolly-15k as a suite: one task a category.

{"instruction": "...", "context": "...", "response": "...", "category": "closed_qa"}
"""

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, field_validator

from mtlora.errors import describe
from mtlora.suite.base import Example, Split, SuiteError, drawn, split_of, unknown_task
from mtlora.suite.folder import estimated_tokens
from mtlora.task import TaskSpec

_MAX_NEW_TOKENS = 4096


class _Line(BaseModel):
    instruction: str
    context: str = ""
    response: str
    category: str = Field(min_length=1)

    @field_validator("instruction", "response")
    @classmethod
    def _has_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("blank; it needs some text")
        return text.strip()


class InstructionSuite:
    """Reads the whole file at once. Ignores keys that are not in the layout; a repeated input counts once."""

    finite = True

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.name = self.file.stem
        found: dict[str, dict[str, Example]] = {}
        try:
            lines = self.file.read_bytes().splitlines()
        except OSError as error:
            raise SuiteError(f"{file}: cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                example = self._example(number, line)
                found.setdefault(example.task_id, {}).setdefault(example.input, example)
        if not found:
            raise SuiteError(f"{file}: no line in it; a line has instruction, context, response and category")
        self._examples = found
        self.tasks: Sequence[TaskSpec] = tuple(
            TaskSpec(
                id=task_id,
                description=f"Instructions of category {task_id}.",
                # An answer may have several lines, so only the backbone's end-of-sequence token ends it.
                stop=(),
                max_new_tokens=min(_MAX_NEW_TOKENS, estimated_tokens([e.target for e in found[task_id].values()])),
            )
            for task_id in sorted(found)
        )

    def _example(self, number: int, text: bytes) -> Example:
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            raise SuiteError(f"{self.file}: line {number}: {describe(error)}") from None
        task_id = re.sub(r"[^a-z0-9_.\-]+", "-", line.category.lower()).strip("-_.")
        if not task_id:
            raise SuiteError(
                f"{self.file}: line {number}: category {line.category!r} gives no task id: letters are needed"
            )
        question = f"{line.instruction}\n\n{line.context.strip()}" if line.context.strip() else line.instruction
        return Example(task_id, question, line.response, source=f"{self.file}: line {number}")

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. A smaller `count` gives a prefix of what a larger one gives."""
        if task_id not in self._examples:
            raise unknown_task(self, task_id)
        found = (e for e in self._examples[task_id].values() if split_of(task_id, e.input) == split)
        return drawn(found, task_id, split, count, seed)
