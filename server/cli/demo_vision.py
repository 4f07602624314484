"""`mtlora-server demo-vision`: start a server of images, ask it every task of the built-in suite of images at once, and
print its accuracy beside that of linear heads on the backbone alone.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from mtlora.backbone import resolve
from mtlora.client import AsyncClient, Classification, ServerError
from mtlora.suite import Suite, load_suite, up_to
from mtlora.suite.base import Example
from server.cli import CommandError
from server.cli.demo import print_whole, results_table
from server.cli.process import ServerFailedError, ServerProcess, exit_on_sigterm

if TYPE_CHECKING:
    from mtlora.task import TaskSpec

# Calls in flight, and images per call.
_CONCURRENCY = 16
_IMAGES = 8


@dataclass(frozen=True)
class ImageAnswer:
    """One image, its answer or error, and the label that a linear head on the backbone alone gives."""

    example: Example
    label: str
    probability: float
    error: str
    seconds: float
    alone: str = ""

    @property
    def correct(self) -> bool:
        return self.label == self.example.target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the adapters to serve and the images to classify."""
    parser.add_argument("--backbone", default="vision", help="vision backbone; default: %(default)s")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--suite", default="builtin-vision", help="of images; default: %(default)s")
    parser.add_argument("--per-task", type=int, default=10, help="images a task; default: %(default)s")
    parser.add_argument(
        "--probe-images", type=int, default=100, help="of a task, to fit a linear head to; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="which images; default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Print a row per task and the summary line; returns 1 if an image has no answer, else 0."""
    exit_on_sigterm()
    try:
        return _demonstrate(options)
    except ServerFailedError as error:
        raise CommandError(str(error), 1) from None


def _demonstrate(options: argparse.Namespace) -> int:
    console, suite = Console(), load_suite(options.suite)
    console.print(f"Starting one server: vision backbone {options.backbone}, adapters {options.adapters} ...")
    with ServerProcess(backbone="none", vision_backbone=options.backbone, adapters=options.adapters) as server:
        console.print(f"Serving on {server.address} after {server.start_seconds:.0f} s.")
        with server.client() as client:
            served = {task.id for task in client.tasks()}
        tasks = [task for task in suite.tasks if task.id in served]
        examples = [each for task in tasks for each in up_to(suite, task.id, "test", options.per_task, options.seed)]
        if not examples:
            console.print("The server has no task of the suite.")
            return 1
        # Shuffle, so that every batch mixes tasks.
        random.Random(options.seed).shuffle(examples)
        with console.status(f"Asking {len(examples)} images of {len(tasks)} tasks at once ..."):
            began = time.monotonic()
            asked = asyncio.run(ask_all(server.address, examples))
            seconds = time.monotonic() - began
    with console.status("The same images to linear heads on the backbone alone ..."):
        alone = linear_heads_alone(options.backbone, suite, tasks, examples, options.probe_images, options.seed)
    _print_table(asked, alone)
    failed = [each for each in asked if each.error]
    for each in failed[:5]:
        console.print(f"failed: {each.example.task_id}: {each.error}", markup=False)
    console.print(f"{len(asked) / seconds:.1f} images/s through one backbone, {_CONCURRENCY * _IMAGES} in flight.")
    accuracy = statistics.fmean(each.correct for each in asked)
    accuracy_alone = statistics.fmean(map(_is_target, examples, alone))
    ok = len(asked) - len(failed)
    print(
        f"demo-vision: {len(tasks)} tasks, {len(asked)} images, {ok} ok, accuracy {accuracy:.2f}, "
        f"linear heads alone {accuracy_alone:.2f}"
    )
    return 1 if failed else 0


async def ask_all(address: str, examples: Sequence[Example]) -> list[ImageAnswer]:
    """Classify all images, `_CONCURRENCY` calls at a time, each for one task; returns results in order."""
    room = asyncio.Semaphore(_CONCURRENCY)
    by_task: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        by_task.setdefault(example.task_id, []).append(place)
    calls = [places[i : i + _IMAGES] for places in by_task.values() for i in range(0, len(places), _IMAGES)]
    answers: dict[int, ImageAnswer] = {}

    async def ask(client: AsyncClient, places: Sequence[int]) -> None:
        asked = [examples[place] for place in places]
        async with room:
            began = time.monotonic()
            try:
                found = await client.classify(asked[0].task_id, [each.encoded_image() for each in asked], timeout=300)
            except ServerError as error:
                found = [Classification(i, asked[i].task_id, error=error) for i in range(len(asked))]
            seconds = time.monotonic() - began
        for place, example, each in zip(places, asked, found, strict=True):
            probability = each.probabilities.get(each.label, 0.0)
            answers[place] = ImageAnswer(example, each.label, probability, str(each.error or ""), seconds)

    async with AsyncClient(address, retry=None) as client:
        await asyncio.gather(*(ask(client, places) for places in calls))
    return [answers[place] for place in range(len(examples))]


def linear_heads_alone(
    backbone: str, suite: Suite, tasks: Sequence["TaskSpec"], examples: Sequence[Example], per_task: int, seed: int
) -> list[str]:
    """The label of each example by its task's linear probe of the backbone, fitted to `per_task` training images."""
    import torch

    from mtlora.evaluation.images import answers_of, image_labeller, linear_heads
    from mtlora.methods import HeadsConfig
    from mtlora.model.vision import new_adapted_encoder

    adapted = new_adapted_encoder(resolve(backbone), HeadsConfig(), len(tasks), torch.float32)
    train = [each for task in tasks for each in up_to(suite, task.id, "train", per_task, seed)]
    return list(answers_of(image_labeller(adapted, tasks, linear_heads(adapted, tasks, train), None))(examples))


def _is_target(example: Example, label: str) -> bool:
    return label == example.target


def _print_table(asked: Sequence[ImageAnswer], alone: Sequence[str]) -> None:
    table = results_table(
        "One vision backbone, one adapter, every task in the same batches",
        ("task", "an image of", "answer", "most errors"),
        ("accuracy", "linear\nheads alone", "median\nlatency"),
    )
    for task_id in sorted({each.example.task_id for each in asked}):
        mine = [(each, label) for each, label in zip(asked, alone, strict=True) if each.example.task_id == task_id]
        first = mine[0][0]
        errors = Counter(f"{each.example.target} as {each.label}" for each, _ in mine if not each.correct)
        table.add_row(
            task_id,
            first.example.target,
            Text(f"{first.label} ({first.probability:.2f})", "green" if first.correct else "red"),
            errors.most_common(1)[0][0] if errors else "",
            f"{statistics.fmean(each.correct for each, _ in mine):.2f}",
            f"{statistics.fmean(_is_target(each.example, label) for each, label in mine):.2f}",
            f"{statistics.median(each.seconds for each, _ in mine):.1f} s",
        )
    print_whole(table)
