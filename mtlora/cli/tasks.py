"""`mtlora tasks`: list a suite's tasks: of text with an example each, of images with their numbers."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlora.cli.output import print_table

if TYPE_CHECKING:
    from mtlora.suite import Example


def add_parser(subparsers: Any) -> None:
    """Contribute `tasks`."""
    parser = subparsers.add_parser("tasks", help="list a suite's tasks")
    parser.add_argument("--suite", default="builtin", metavar="S", help="a built-in suite, a folder or a file")
    parser.add_argument("--save", type=Path, metavar="DIR", help="of images: write each task's example to DIR/TASK.png")
    parser.set_defaults(run=_tasks)


def _tasks(args: argparse.Namespace) -> int:
    from mtlora.suite import SPLITS, load_suite

    suite = load_suite(args.suite)
    title = f"suite {suite.name}: {len(suite.tasks)} tasks"
    rows: list[tuple[object, ...]] = []
    if not args.save and all(task.image for task in suite.tasks):
        for task in suite.tasks:
            counts = [len(suite.examples(task.id, split, None)) if suite.finite else "any" for split in SPLITS]
            rows.append((task.id, task.description, len(task.labels or ()), *counts))
        print_table(title, ("task", "description", "classes", *SPLITS), rows)
        return 0
    for task in suite.tasks:
        example = suite.examples(task.id, "train", 1)[0]
        shown = _save(example, args.save) if args.save else example.input
        rows.append((task.id, task.description, shown, example.target))
    print_table(title, ("task", "description", "example input", "answer"), rows)
    return 0


def _save(example: "Example", folder: Path) -> Path:
    """Write an example's image, as it is encoded; returns its file."""
    from mtlora.errors import MtLoRAError
    from mtlora.vision.images import read_header

    if example.image is None:
        raise MtLoRAError(f"--save: found task {example.task_id} without an image; allowed: a suite of images")
    data = example.encoded_image()
    suffix = example.image.suffix if isinstance(example.image, Path) else f".{read_header(data).format.lower()}"
    file = folder / f"{example.task_id}{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except OSError as error:
        raise MtLoRAError(f"--save: {file}: {error.strerror}") from None
    return file
