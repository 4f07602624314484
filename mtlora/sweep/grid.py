"""The grid of a sweep's runs, and how one run is trained and scored."""

import hashlib
import json
import os
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import fmean
from threading import Thread
from typing import Any

from pydantic import ValidationError

from mtlora.backbone import identify
from mtlora.errors import MtLoRAError
from mtlora.files import replace_file
from mtlora.suite import Example, SuitePart, load_suite, up_to
from mtlora.task import is_correct
from mtlora.train.config import DivergedError, TrainingConfig

RESULT = "result.json"


class SweepError(MtLoRAError):
    """A sweep that cannot be run as asked."""


@dataclass(frozen=True)
class Run:
    """One cell of the grid. `config` is complete: with its seed and its tasks."""

    name: str
    config: TrainingConfig
    folder: Path

    @property
    def num_tasks(self) -> int:
        """Number of tasks of the run."""
        return len(self.config.tasks or ())

    @property
    def result_file(self) -> Path:
        """The file with a finished run's result."""
        return self.folder / RESULT


def grid(
    configs: dict[str, TrainingConfig], out: Path, *, seeds: Sequence[int], task_counts: Sequence[int] | None
) -> list[Run]:
    """Every run: each configuration with each number of tasks and each seed.

    Smaller task counts are prefixes of larger ones: of the configuration's list, else of the suite's tasks in an order
    by hash, which mixes kinds of tasks. Raises SweepError for more tasks than a suite has.
    """
    runs = []
    for name, config in configs.items():
        order = list(config.tasks or task_order(config.suite))
        for count in task_counts or [len(order)]:
            if not 1 <= count <= len(order):
                raise SweepError(f"--task-counts: found {count}; allowed: 1 to {len(order)}, the tasks of {name}")
            for seed in seeds:
                changed = {"tasks": tuple(order[:count]), "seed": seed}
                runs.append(Run(name, config.model_copy(update=changed), run_folder(out, name, count, seed)))
    return runs


def run_folder(out: Path, name: str, num_tasks: int, seed: int) -> Path:
    """The folder of a configuration's run in a sweep."""
    return out / name / f"{num_tasks}-tasks" / f"seed-{seed}"


def task_order(suite: str | Sequence[SuitePart]) -> list[str]:
    """A suite's tasks in an order by hash, which mixes kinds of tasks."""
    return sorted((task.id for task in load_suite(suite).tasks), key=_drawn)


def _drawn(task_id: str) -> bytes:
    return hashlib.sha256(task_id.encode()).digest()


def read_result(
    run: Run, backbone: Path, settings: dict[str, Any], vision: Path | None = None, *, diverged: bool = False
) -> dict[str, Any] | None:
    """A finished run's result; None for a run that is not finished or failed.

    vision: of text tasks that take an image, their vision backbone. diverged: also return the error of a diverged run,
    because it would diverge again.

    Raises SweepError if the result is of another configuration or backbone, or was scored with other settings.
    """
    try:
        result: dict[str, Any] = json.loads(run.result_file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SweepError(f"{run.result_file}: {error}") from None
    if "error" in result and not (diverged and result.get("diverged")):
        return None
    found = {**result, "config": _completed(result.get("config"))}
    if other := [name for name, value in _about(run, backbone, settings, vision).items() if found.get(name) != value]:
        raise SweepError(
            f"{run.result_file}: of another configuration ({', '.join(other)}); choose another --out, or remove "
            f"{run.folder}"
        )
    return result


def _completed(config: Any) -> Any:
    """A stored configuration with the defaults of fields that came later."""
    try:
        return TrainingConfig.model_validate(config).model_dump(mode="json")
    except ValidationError:
        return config


def _about(run: Run, backbone: Path, settings: dict[str, Any], vision: Path | None) -> dict[str, Any]:
    """The values that a stored result must agree in."""
    of_images = {} if vision is None else {"vision_backbone": identify(vision).weights_fingerprint}
    return of_images | {
        "name": run.name,
        "seed": run.config.seed,
        "num_tasks": run.num_tasks,
        "config": run.config.model_dump(mode="json"),
        "settings": settings,
        "backbone": identify(backbone).weights_fingerprint,
    }


def do_all(
    runs: Sequence[Run], backbone: Path, settings: dict[str, Any], jobs: int, vision: Path | None = None
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Yield each run with the result of `do` once it has ended; `jobs` of them run at a time."""
    # A thread only waits: every run is a process.
    pool = ThreadPoolExecutor(jobs)
    try:
        going = {pool.submit(do, run, backbone, settings, vision): run for run in runs}
        for ended in as_completed(going):
            yield going[ended], ended.result()
    finally:
        pool.shutdown(cancel_futures=True)


def do(run: Run, backbone: Path, settings: dict[str, Any], vision: Path | None = None) -> dict[str, Any]:
    """Train, or resume training, and score on the test split, in a separate process; returns the result or the error.

    settings: `examples`, the scored examples of each task at most (of each part of a mix), and `split`, the test split
    unless given. vision: of text tasks that take an image, their vision backbone.
    """
    # One process per run, because peak memory is measured per process. It is forked from a process that has done the
    # slow imports.
    context = get_context("forkserver")
    # The trainer imports Transformers' models late, so they are named too.
    context.set_forkserver_preload(["mtlora.train.trainer", "transformers.modeling_utils"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_end_with_parent) as pool:
        result = pool.submit(_train_and_score, run, backbone, settings, vision).result()
    run.folder.mkdir(parents=True, exist_ok=True)
    replace_file(run.result_file, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _end_with_parent() -> None:
    """End this run when the sweep ends, so that the same command can resume it."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _train_and_score(run: Run, backbone: Path, settings: dict[str, Any], vision: Path | None) -> dict[str, Any]:
    from mtlora.train.trainer import Trainer

    about = _about(run, backbone, settings, vision)
    try:
        trainer = Trainer(run.config, backbone, run.folder, vision=vision, resume=True)
        trainer.fit()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        trainer.work.trained.eval()
        split = settings.get("split", "test")
        examples = [e for task in trainer.tasks for e in up_to(trainer.suite, task.id, split, settings["examples"])]
        answers = trainer.work.answerer()(examples)
    except DivergedError as error:
        return {**about, "error": str(error), "diverged": True}
    except MtLoRAError as error:
        return {**about, "error": str(error)}
    # Linear heads alone take no steps.
    log = trainer.folder.log_file.read_text() if trainer.batches else ""
    steps = [json.loads(line) for line in log.splitlines()]
    steps = [record for record in steps if "num_tokens" in record]
    seconds, tokens = sum(s["seconds"] for s in steps), sum(s["num_tokens"] for s in steps)
    losses = [s["loss"] for s in steps[len(steps) // 2 :]]
    return {
        **about,
        "parameters": trainer.num_parameters,
        "steps": len(trainer.batches),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1) if steps else 0.0,
        "loss": round(fmean(losses), 4) if steps else 0.0,
        "peak_memory_bytes": peak,
        **_scores(examples, answers),
    }


def _scores(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Any]:
    """Scores, and for each task a digest of its `examples` and whether each of them is `right`: "1" or "0"."""
    from mtlora.evaluation.scores import score

    found = score(examples, answers).as_dict()
    by_task: dict[str, list[tuple[str, str]]] = {}
    for example, answer in zip(examples, answers, strict=True):
        mark = "1" if is_correct(answer, example.target) else "0"
        by_task.setdefault(example.task_id, []).append((example.input, mark))
    for task_id, pairs in by_task.items():
        inputs = "\0".join(text for text, _ in pairs)
        digest = hashlib.sha256(inputs.encode()).hexdigest()[:16]
        found["tasks"][task_id] |= {"examples": digest, "right": "".join(mark for _, mark in pairs)}
    return found
