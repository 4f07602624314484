"""A folder of JSON files in the layout of BIG-Bench Hard as a suite: one task a file."""

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtlora.suite.base import SPLITS, Example, Split, SuiteError, split_of
from mtlora.task import TASK_ID_PATTERN, TaskSpec, normalise_answer

MAX_TARGET_CHARS = 256
_STOP = "\n"
_LAYOUT = '{"examples": [{"input": "...", "target": "..."}, ...]}'


class FolderSuite:
    """Reads every `*.json` of a folder at once, so a wrong file is found before any work is done.

    Other files and keys beyond the layout's are ignored. An input that occurs twice is in its split once, with its
    first target; where targets differ, a warning says so, for such files are in use and must be scorable whole.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.is_dir():
            raise SuiteError(f"{self._path}: not a folder; a suite is a folder of JSON files like {_LAYOUT}")
        files: dict[str, Path] = {}
        try:
            found = sorted(file for file in self._path.iterdir() if file.suffix.lower() == ".json")
        except OSError as error:
            raise SuiteError(f"{self._path}: cannot be listed: {error.strerror}") from None
        for file in found:
            task_id = file.stem.lower()
            if not re.fullmatch(TASK_ID_PATTERN, task_id):
                raise SuiteError(f"{file}: the file name gives task id {task_id!r}; ids must match {TASK_ID_PATTERN}")
            if task_id in files:
                raise SuiteError(f"{file}: task id {task_id!r} is taken by {files[task_id].name}; ids ignore case")
            files[task_id] = file
        if not files:
            raise SuiteError(f"{self._path}: no .json file in the folder; a suite needs at least one like {_LAYOUT}")
        self._examples = {task_id: _read_task(task_id, files[task_id]) for task_id in sorted(files)}
        self._tasks = tuple(
            TaskSpec(
                id=task_id,
                description=f"Task {task_id} of {self.name}.",
                template="{input}\nAnswer:",
                stop=(_STOP,),
                max_new_tokens=_max_new_tokens([example.target for example in examples]),
                allowed_answers=None,
            )
            for task_id, examples in self._examples.items()
        )

    @property
    def name(self) -> str:
        return self._path.resolve().name or "folder"

    @property
    def finite(self) -> bool:
        return True

    @property
    def tasks(self) -> Sequence[TaskSpec]:
        return self._tasks

    def all_examples(self, task_id: str) -> list[Example]:
        """Every example of the task's file, of all splits, in the file's order, repeated inputs included."""
        if task_id not in self._examples:
            raise SuiteError(f"suite {self.name} has no task {task_id!r}; it has {', '.join(self._examples)}")
        return list(self._examples[task_id])

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. A smaller `count` gives a prefix of what a larger one gives."""
        if split not in SPLITS:
            raise SuiteError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        first: dict[str, Example] = {}
        for example in self.all_examples(task_id):
            first.setdefault(example.input, example)
        examples = [e for e in first.values() if split_of(task_id, e.input) == split]

        # Ordered by hash: an example added to the file or taken out leaves the others' order alone.
        def key(example: Example) -> bytes:
            return hashlib.sha256(f"{task_id}\0{split}\0{seed}\0{example.input}".encode()).digest()

        examples.sort(key=key)
        if count is None:
            return examples
        if not 0 <= count <= len(examples):
            raise SuiteError(
                f"task {task_id} has {len(examples)} {split} inputs, {count} were asked for; "
                f"0 to {len(examples)} are allowed"
            )
        return examples[:count]


def _read_task(task_id: str, file: Path) -> tuple[Example, ...]:
    if not file.is_file():
        raise SuiteError(f"{file}: not a file; every .json of a suite's folder must be one")
    try:
        # The byte order mark that some editors write is let pass.
        document = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SuiteError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SuiteError(f"{file}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise SuiteError(f"{file}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise SuiteError(f"{file}: JSON that cannot be read: {error}") from None
    if not isinstance(document, dict) or "examples" not in document:
        what = _keys(document) if isinstance(document, dict) else _kind(document)
        raise SuiteError(f'{file}: expected an object with "examples", found {what}; the layout is {_LAYOUT}')
    entries = document["examples"]
    if not isinstance(entries, list):
        raise SuiteError(f'{file}: "examples" must be a list, found {_kind(entries)}')
    if not entries:
        raise SuiteError(f'{file}: "examples" is empty; a task needs at least one example')
    examples = tuple(_read_example(task_id, entry, f"{file}: example {i}") for i, entry in enumerate(entries))
    seen: dict[str, int] = {}
    for index, example in enumerate(examples):
        kept = examples[seen.setdefault(example.input, index)]
        if normalise_answer(kept.target) != normalise_answer(example.target):
            warnings.warn(
                f"{file}: example {index} has the input of example {seen[example.input]} but target "
                f"{example.target!r} instead of {kept.target!r}; only the first is trained on",
                stacklevel=2,
            )
    return examples


def _read_example(task_id: str, entry: Any, place: str) -> Example:
    if not isinstance(entry, dict):
        raise SuiteError(f'{place}: expected an object with "input" and "target", found {_kind(entry)}')
    for field in ("input", "target"):
        if field not in entry:
            raise SuiteError(f'{place}: no "{field}"; found {_keys(entry)}')
        value = entry[field]
        if not isinstance(value, str):
            raise SuiteError(f'{place}: "{field}" must be a string, found {_kind(value)}')
        if not value.strip():
            raise SuiteError(f'{place}: "{field}" is blank; it needs some text')
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SuiteError(f'{place}: "{field}" has half a surrogate pair at character {error.start}') from None
    target = entry["target"]
    if _STOP in target:
        raise SuiteError(f"{place}: target {target[:60]!r} contains the stop string {_STOP!r}; answers are one line")
    if len(target) > MAX_TARGET_CHARS:
        raise SuiteError(f"{place}: target has {len(target)} characters; at most {MAX_TARGET_CHARS} are allowed")
    return Example(task_id, entry["input"], target, source=place)


def _keys(document: dict[str, Any]) -> str:
    keys = sorted(document)
    return f"keys {', '.join(map(repr, keys[:8]))}{', ...' if len(keys) > 8 else ''}" if keys else "no keys"


def _kind(value: Any) -> str:
    """The name of a JSON value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _max_new_tokens(targets: Sequence[str]) -> int:
    """An estimate from above of the longest target's tokens, with room for answers the folder has no example of.

    No tokenizer is at hand here. Byte-level vocabularies give a digit or a mark one token, spell other scripts in at
    most a token a byte, and seldom cut letters finer than into twos.
    """

    def estimate(target: str) -> int:
        pieces = re.findall(r"[A-Za-z]+|\S", target)
        return sum((len(p) + 1) // 2 if p.isascii() and p.isalpha() else len(p.encode()) for p in pieces)

    return max(map(estimate, targets)) + 8
