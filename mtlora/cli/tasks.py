"""`mtlora tasks`: list a suite's tasks with one example each."""

import argparse
from typing import Any

from mtlora.cli.output import print_table


def add_parser(subparsers: Any) -> None:
    """Contribute `tasks`."""
    parser = subparsers.add_parser("tasks", help="list a suite's tasks with one example each")
    parser.add_argument("--suite", default="builtin", metavar="S", help="'builtin' or a folder of task files")
    parser.set_defaults(run=_tasks)


def _tasks(args: argparse.Namespace) -> int:
    from mtlora.suite import load_suite

    suite = load_suite(args.suite)
    rows = []
    for task in suite.tasks:
        example = suite.examples(task.id, "train", 1)[0]
        rows.append((task.id, task.description, example.input, example.target))
    print_table(f"suite {suite.name}: {len(rows)} tasks", ("task", "description", "example input", "answer"), rows)
    return 0
