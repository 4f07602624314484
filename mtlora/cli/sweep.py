"""`mtlora sweep`: many configurations, task counts and seeds, compared in one table."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlora.cli.backbone import add_backbone_argument, add_vision_argument, backbone_for, vision_for
from mtlora.cli.settings import add_set_argument, read_settings

if TYPE_CHECKING:
    from mtlora.suite import Suite
    from mtlora.train.config import TrainingConfig

# A small budget, for a first table within an hour; --set changes it.
_EXAMPLES_PER_TASK = 100


def add_parser(subparsers: Any) -> None:
    """Add the command `sweep`."""
    parser = subparsers.add_parser(
        "sweep",
        help="train and score many configurations, task counts and seeds; one results table",
        description="Trains every configuration with every number of tasks and every seed, scores each on the test "
        "split, and writes results.md, .json and .png, losses.png and, with several task counts, scaling.png to DIR. "
        "The same command resumes a stopped sweep.",
    )
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG", help="JSON files of training configurations")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder for each run, and the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--task-counts", type=int, nargs="+", metavar="N", help="such as 5 10 15 20 25; default: all")
    parser.add_argument(
        "--examples-per-task", type=int, default=_EXAMPLES_PER_TASK, metavar="N",
        help="training examples of each task, in every run (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--test-examples", type=int, default=20, metavar="N", help="scored of each task (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="runs at a time (default: %(default)s); on CPUs, N runs of one thread (--set threads=1) are faster",
    )  # fmt: skip
    add_backbone_argument(parser, None)
    add_vision_argument(parser)
    add_set_argument(parser)
    parser.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tqdm import tqdm

    from mtlora.sweep.grid import SweepError, do_all, grid, read_result
    from mtlora.sweep.report import markdown, summarise, write_report

    names = [file.stem for file in args.configs]
    if len(set(names)) != len(names):
        raise SweepError(f"configurations need distinct file names: {', '.join(names)}")
    if args.test_examples < 1:
        raise SweepError(f"--test-examples: found {args.test_examples}; allowed: 1 or more")
    if args.jobs < 1:
        raise SweepError(f"--jobs: found {args.jobs}; allowed: 1 or more")
    configs, folder, vision = _configurations(args)
    runs = grid(configs, args.out, seeds=list(dict.fromkeys(args.seeds)), task_counts=args.task_counts)
    settings = {"examples": args.test_examples}
    # Read all results first, so that an error about an old result comes before any training.
    done = {run.folder: read_result(run, folder, settings, vision) for run in runs}
    todo = [run for run in runs if not done[run.folder]]
    failed = []
    with tqdm(total=len(runs), initial=len(runs) - len(todo), desc="sweep", unit="run") as bar:
        for run, result in do_all(todo, folder, settings, args.jobs, vision):
            bar.update()
            if "error" in result:
                failed.append(f"{run.folder}: {result['error']}")
                continue
            done[run.folder] = result
            # Write the report after each run, so that a long sweep shows results early. Rows keep the command's order.
            write_report([result for result in done.values() if result], args.out)
    results = [result for result in done.values() if result]
    if results:
        files = write_report(results, args.out)
        print(markdown(summarise(results)), end="")
        print(*files, sep="\n")
    if failed:
        raise SweepError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")
    return 0


def _configurations(args: argparse.Namespace) -> "tuple[dict[str, TrainingConfig], Path, Path | None]":
    """Each file's configuration, with the defaults of its suite's kind, and two backbones.

    They are that of the first file's suite, and, if text tasks take an image, the vision backbone.
    """
    from mtlora.backbone import resolve
    from mtlora.suite import load_suite
    from mtlora.train.config import TrainingConfig
    from mtlora.train.defaults import training_config

    configs: dict[str, TrainingConfig] = {}
    suites: dict[str, Suite] = {}
    backbone = None
    for file in args.configs:
        flags = [f"examples_per_task={args.examples_per_task}"]
        name = TrainingConfig.model_validate(read_settings(file, flags + args.set)).suite
        # Load a suite once: a folder of images is read whole.
        suite = suites[repr(name)] = suites.get(repr(name)) or load_suite(name)
        texts = not any(task.image for task in suite.tasks)
        if texts:
            # Validation of texts generates; a run on images ends with its best state by validation.
            flags.append("validation_per_task=0")
        settings = read_settings(file, flags + args.set)
        if texts:
            # In a first epoch, the loss is that of unseen examples.
            settings.setdefault("epochs", 1)
        backbone = backbone or resolve(backbone_for(args.backbone, suite))
        configs[file.stem] = training_config(settings, suite)
    assert backbone is not None
    tasks = [task for suite in suites.values() for task in suite.tasks]
    return configs, backbone, vision_for(args.vision_backbone, tasks)
