"""`mtlora-server demo`: start a server, send examples of all built-in tasks concurrently, print its accuracy."""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtlora.client import Answer, AsyncClient, ServerError
from mtlora.suite import load_suite
from mtlora.suite.base import Example
from mtlora.task import is_correct
from server.cli import CommandError
from server.cli.analyze import print_answers, shared_tasks
from server.cli.process import ServerFailedError, ServerProcess, exit_on_sigterm

# Requests in flight: enough to mix all tasks in the engine's batches.
_CONCURRENCY = 64


@dataclass(frozen=True)
class DemoAnswer:
    """One example and its answer, or the error."""

    example: Example
    answer: Answer | None
    error: str
    seconds: float

    @property
    def correct(self) -> bool:
        return self.answer is not None and is_correct(self.answer.text, self.example.target)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the adapters to serve and the questions to ask."""
    parser.add_argument("--backbone", default="default", help="default: %(default)s")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--per-task", type=int, default=10, help="questions a task; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="which questions; default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Print a row per task and the summary line; returns 1 if a request failed, else 0."""
    exit_on_sigterm()
    try:
        return _demonstrate(options.backbone, options.adapters, options.per_task, options.seed)
    except ServerFailedError as error:
        raise CommandError(str(error), 1) from None


def _demonstrate(backbone: str, adapters: Path, per_task: int, seed: int) -> int:
    console = Console()
    suite = load_suite("builtin")
    console.print(f"Starting one server: backbone {backbone}, adapters {adapters} ...")
    # Documents may be longer than the default context.
    with ServerProcess(backbone=backbone, adapters=adapters, max_model_len=2048) as server:
        console.print(f"Serving on {server.address} after {server.start_seconds:.0f} s.")
        with server.client() as client:
            served = {task.id for task in client.tasks()}
        examples = [
            example
            for task in suite.tasks
            if task.id in served
            for example in suite.examples(task.id, "test", per_task, seed)
        ]
        if not examples:
            console.print("The server has no task of the built-in suite.")
            return 1
        # Shuffle, so that every batch mixes tasks.
        random.Random(seed).shuffle(examples)
        with console.status(
            f"Asking {len(examples)} questions of {len({e.task_id for e in examples})} tasks at once ..."
        ):
            began = time.monotonic()
            asked = asyncio.run(ask_all(server.address, examples))
            seconds = time.monotonic() - began
        failed_tasks = _show_document(server, seed)
        with console.status("The same questions to the backbone alone ..."):
            alone = asyncio.run(ask_all(server.address, examples, without_adapter=True))
    _print_table(asked, alone)
    failed = [each for each in (*asked, *alone) if each.answer is None]
    for each in failed[:5]:
        console.print(f"failed: {each.example.task_id}: {each.error}", markup=False)
    console.print(f"{len(asked) / seconds:.1f} requests/s through one backbone, {_CONCURRENCY} in flight.")
    tasks = len({each.example.task_id for each in asked})
    ok = sum(each.answer is not None for each in asked)
    print(
        f"demo: {tasks} tasks, {len(asked)} requests, {ok} ok, accuracy {_accuracy(asked):.2f}, "
        f"backbone alone {_accuracy(alone):.2f}"
    )
    return 1 if failed or failed_tasks else 0


def _show_document(server: ServerProcess, seed: int) -> int:
    """Ask all tasks that share a document about one document; returns how many failed."""
    with server.client() as client:
        if not (tasks := shared_tasks(client)):
            return 0
        suite = load_suite("documents")
        (example,) = suite.examples(suite.tasks[0].id, "test", 1, seed)
        return print_answers(client, tasks, str(example.input), timeout=300)


async def ask_all(address: str, examples: Sequence[Example], *, without_adapter: bool = False) -> list[DemoAnswer]:
    """Send all examples, `_CONCURRENCY` at a time; returns results in order."""
    room = asyncio.Semaphore(_CONCURRENCY)

    async def ask(client: AsyncClient, example: Example) -> DemoAnswer:
        async with room:
            began = time.monotonic()
            try:
                answer = await client.generate(
                    example.task_id, example.input, timeout=300, without_adapter=without_adapter
                )
            except ServerError as error:
                return DemoAnswer(example, None, str(error), time.monotonic() - began)
            return DemoAnswer(example, answer, "", time.monotonic() - began)

    async with AsyncClient(address, retry=None) as client:
        return await asyncio.gather(*(ask(client, example) for example in examples))


def _accuracy(asked: Sequence[DemoAnswer]) -> float:
    return sum(each.correct for each in asked) / len(asked)


def _shortened(text: str, width: int) -> str:
    """One line of at most `width` characters: the end of a longer text, as most inputs end with their question."""
    line = " ".join(text.split())
    return line if len(line) <= width else "…" + line[-(width - 1) :]


def results_table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table with columns of texts, then of numbers."""
    table = Table(title=title, title_justify="left")
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_whole(table: Table) -> None:
    """Print a table without truncation: at its full width if the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def _print_table(asked: Sequence[DemoAnswer], alone: Sequence[DemoAnswer]) -> None:
    title = "One backbone, one adapter, every task in the same batches"
    table = results_table(title, ("task", "an input", "answer", ""), ("accuracy", "backbone\nalone", "median\nlatency"))
    for task_id in sorted({each.example.task_id for each in asked}):
        mine = [each for each in asked if each.example.task_id == task_id]
        theirs = [each for each in alone if each.example.task_id == task_id]
        first = mine[0]
        table.add_row(
            task_id,
            Text(_shortened(first.example.input, 48)),
            Text(_shortened(first.answer.text if first.answer else first.error, 20)),
            Text("right", "green") if first.correct else Text("wrong", "red"),
            f"{_accuracy(mine):.2f}",
            f"{_accuracy(theirs):.2f}",
            f"{statistics.median(each.seconds for each in mine):.1f} s",
        )
    print_whole(table)
