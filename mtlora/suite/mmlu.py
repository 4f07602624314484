"""MMLU's CSV files as a suite: one task a subject (Hendrycks et al., 2021).

    {dev,val,test}/SUBJECT_{dev,val,test}.csv

Rows are `question,choice0,choice1,choice2,choice3,answer` under such a header, with the answer's index, or, as the
authors publish them, without a header and with the answer's letter. Shots are the questions of `dev`, five a subject.
The published `dev` of one subject has a question twice: it stays twice, so that prompts equal those of other programs.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mtlora.answer import Label
from mtlora.suite.base import Example, Split, SuiteError, check_split, drawn, unknown_task
from mtlora.task import TaskSpec

_LETTERS: Final = ("A", "B", "C", "D")
_FOLDERS: Final[dict[Split, str]] = {"train": "dev", "validation": "val", "test": "test"}
_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


def is_mmlu_folder(folder: Path) -> bool:
    """Whether a folder has the layout of MMLU."""
    return any(folder.glob("test/*_test.csv"))


class MMLUSuite:
    """Reads every subject at once, to find a wrong file before any work starts."""

    finite = True

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        subjects = sorted(file.name.removesuffix("_test.csv") for file in self.folder.glob("test/*_test.csv"))
        self.tasks: Sequence[TaskSpec] = tuple(
            TaskSpec(
                id=subject.lower(),
                description=f"Multiple choice questions about {subject.replace('_', ' ')}.",
                answer=Label(labels=_LETTERS),
                max_new_tokens=4,
            )
            for subject in subjects
        )
        self._examples = {
            (subject.lower(), split): _read(
                self.folder / name / f"{subject}_{name}.csv", subject.lower(), once=split != "train"
            )
            for subject in subjects
            for split, name in _FOLDERS.items()
        }

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. Training examples, which are shots, are the file's first rows, a repeated one included.

        Other splits are in an order by hash.
        """
        if all(task.id != task_id for task in self.tasks):
            raise unknown_task(self, task_id)
        check_split(split)
        found = self._examples[task_id, split]
        if split == "train" and (count is None or 0 <= count <= len(found)):
            return found[:count]
        return drawn(found, task_id, split, count, seed)


def _read(file: Path, task_id: str, *, once: bool) -> list[Example]:
    """A subject's questions in the file's order; none for a split without a file. once: leave out repeated ones."""
    if not file.is_file():
        return []
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SuiteError(f"{file}: {error}") from None
    found: list[Example] = []
    for number, row in enumerate(rows, 1):
        if number == 1 and row == _HEADER:
            continue
        if len(row) != len(_HEADER):
            raise SuiteError(
                f"{file}: line {number}: expected {len(_HEADER)} columns ({', '.join(_HEADER)}), found {len(row)}"
            )
        question, *choices, answer = (cell.strip() for cell in row)
        if answer in ("0", "1", "2", "3"):
            answer = _LETTERS[int(answer)]
        if answer not in _LETTERS:
            raise SuiteError(f"{file}: line {number}: answer: expected 0 to 3 or A to D, found {answer!r}")
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))
        text = f"{question}\n{options}"
        found.append(Example(task_id, text, answer, source=f"{file}: line {number}"))
    if not once:
        return found
    first: dict[str, Example] = {}
    for example in found:
        first.setdefault(example.input, example)
    return list(first.values())
