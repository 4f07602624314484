"""`mtlora-server analyze`: ask a running server many tasks about one file, and print each answer when it arrives."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mtlora.client import Client, DocumentAnswer
from server.cli import CommandError
from server.cli.connection import add_address, connect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the document and the tasks."""
    parser.add_argument("file", help="the document, text in UTF-8; - reads stdin")
    parser.add_argument(
        "--task", action="append", metavar="ID", help="may be given several times; default: all that share a document"
    )
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="default: %(default)s")
    add_address(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table and a summary line; returns 1 if a task failed, else 0."""
    try:
        document = sys.stdin.read() if options.file == "-" else Path(options.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{options.file}: not readable as UTF-8: {error}", 2) from None
    with connect(options) as client:
        tasks = options.task or shared_tasks(client)
        if not tasks:
            raise CommandError("the server has no task that shares a document with others", 1)
        return 1 if print_answers(client, tasks, document, timeout=options.timeout) else 0


def shared_tasks(client: Client) -> list[str]:
    """Tasks that share the most common document template and need no other fields."""
    tasks = [task for task in client.tasks() if task.activation == "task" and len(task.fields) == 1]
    templates = [task.document_template for task in tasks]
    return [task.id for task in tasks if task.document_template == max(templates, key=templates.count)]


def print_answers(client: Client, tasks: list[str], document: str, *, timeout: float) -> int:
    """Print a row for each answer when it arrives, and a summary line; returns how many tasks failed."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table("task", "answer", title_justify="left")
    for name in ("prompt", "cached", "first token", "whole"):
        table.add_column(name, justify="right")
    answers: list[DocumentAnswer] = []
    began = time.monotonic()
    with Live(table, console=console, auto_refresh=False) as live:
        for answer in _kept(client.analyze(tasks, document, timeout=timeout), answers):
            table.add_row(tasks[answer.index], *_cells(answer))
            live.refresh()
    seconds = time.monotonic() - began
    if not console.is_terminal:
        # `Live` does not end its last line if the output is not a terminal.
        console.print()
    got = [each.answer.summary for each in answers if each.answer]
    prompts, cached = (sum(getattr(each, name) for each in got) for name in ("prompt_tokens", "cached_tokens"))
    console.print(
        f"{len(answers)} tasks about one document in {seconds:.1f} s: of {prompts} prompt tokens, {prompts - cached} "
        f"were computed; document_id {answers[0].document_id[:16]}…"
    )
    return len(answers) - len(got)


def _kept(stream: Iterable[DocumentAnswer], answers: list[DocumentAnswer]) -> Iterator[DocumentAnswer]:
    for answer in stream:
        answers.append(answer)
        yield answer


def _cells(answer: DocumentAnswer) -> tuple[str | Text, ...]:
    if answer.answer is None:
        return Text(str(answer.error), "red"), "", "", "", ""
    summary = answer.answer.summary
    first, whole = (
        f"{each.ToNanoseconds() / 1e9:.2f} s" for each in (summary.timings.time_to_first_token, summary.timings.total)
    )
    return (
        Text(" ".join(answer.answer.text.split())), str(summary.prompt_tokens), str(summary.cached_tokens), first, whole
    )  # fmt: skip
