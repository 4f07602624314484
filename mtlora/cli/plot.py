"""`mtlora plot`: charts of a checkpoint."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlora.cli.backbone import add_backbone_argument
from mtlora.cli.settings import read_json

if TYPE_CHECKING:
    from mtlora.checkpoint.format import Checkpoint, TaskEntry
    from mtlora.model.language import AdaptedModel
    from mtlora.suite import Example

# Functions that draw to a file, by the file's name without suffix.
Drawings = dict[str, Callable[[Path], None]]


def add_parser(subparsers: Any) -> None:
    """Add the command `plot`."""
    parser = subparsers.add_parser(
        "plot",
        help="draw what a checkpoint's tasks, experts and groups do",
        description="Draws into the folder OUT: accuracy per task; curves (of the log.jsonl beside the checkpoint); "
        "spectra of the experts; routing (a heat map per block and per group, the effective number of experts); and "
        "the cosine between task gradients, block level against component level. If OUT is a file: accuracy alone.",
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a checkpoint, a training run, or a file that eval --json wrote"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("plots"), metavar="OUT", help="a folder, or a PNG, SVG or PDF file"
    )
    parser.add_argument("--only", nargs="+", choices=list(_PICTURES), metavar="NAME", help=f"of {', '.join(_PICTURES)}")
    add_backbone_argument(parser)
    parser.add_argument("--suite", metavar="S", help="where inputs come from (default: what it was trained on)")
    parser.add_argument("--examples", type=int, default=8, metavar="N", help="inputs of each task (default: 8)")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="a trained HydraLoRA or LoRA to compare gradients with"
    )
    parser.set_defaults(run=_plot)


def _plot(args: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mtlora.errors import MtLoRAError

    if args.examples < 1:
        raise MtLoRAError(f"--examples: found {args.examples}; allowed: 1 or more")
    source = args.source / "adapter" if (args.source / "training.json").is_file() else args.source
    if args.out.suffix or not source.is_dir():
        return _plot_accuracy_alone(source, args.out if args.out.suffix else args.out / "accuracy.png")
    shown = _read(args, source)
    for name in args.only or _PICTURES:
        drawings = _PICTURES[name](shown)
        if args.only and not drawings:
            raise MtLoRAError(f"{source}: nothing to draw {name} from")
        for file, draw in drawings.items():
            draw(args.out / f"{file}.png")
            print(args.out / f"{file}.png")
    return 0


def _plot_accuracy_alone(source: Path, out: Path) -> int:
    """Draw the scores in a checkpoint, or in a file of `eval --json`."""
    from mtlora.checkpoint.read import read_manifest
    from mtlora.errors import MtLoRAError
    from mtlora.plot.accuracy import plot_accuracy

    evaluation = read_manifest(source).evaluation if source.is_dir() else read_json(source)
    if "adapter" not in evaluation:
        raise MtLoRAError(f"{source}: no evaluation in it; mtlora eval --record adds one")
    plot_accuracy(evaluation, out)
    print(out)
    return 0


@dataclass(frozen=True)
class _Shown:
    """What is drawn: a checkpoint beside its backbone, with the command's flags."""

    args: argparse.Namespace
    source: Path
    backbone: Path
    checkpoint: "Checkpoint"

    @property
    def tasks(self) -> "list[TaskEntry]":
        """The tasks in the order of their bias rows."""
        tasks = self.checkpoint.manifest.tasks
        return sorted(tasks, key=lambda task: -1 if task.bias_index is None else task.bias_index)

    def adapted(self) -> "AdaptedModel":
        """The backbone with the adapter."""
        import torch

        from mtlora.model.language import load_adapted_model

        return load_adapted_model(self.backbone, self.checkpoint, torch.bfloat16)

    @cached_property
    def examples(self) -> "dict[str, list[Example]]":
        """Inputs of each task. Raises MtLoRAError without a suite that has all tasks."""
        from mtlora.errors import MtLoRAError
        from mtlora.suite import load_suite, up_to
        from mtlora.train.config import TrainingConfig

        args, manifest = self.args, self.checkpoint.manifest
        if args.suite:
            suite = load_suite(args.suite)
        elif "config" in manifest.training:
            suite = load_suite(TrainingConfig.model_validate(manifest.training["config"]).suite)
        else:
            raise MtLoRAError(f"{args.source}: its training suite is not recorded: name it with --suite")
        known = {task.id for task in suite.tasks}
        if missing := [task.id for task in manifest.tasks if task.id not in known]:
            raise MtLoRAError(
                f"suite {suite.name} lacks the adapter's task {', '.join(missing)}: name another with --suite"
            )
        return {
            task.id: up_to(suite, task.id, "validation", args.examples) or up_to(suite, task.id, "train", args.examples)
            for task in manifest.tasks
        }


def _read(args: argparse.Namespace, source: Path) -> _Shown:
    from mtlora.backbone import identify, resolve
    from mtlora.checkpoint.read import read_checkpoint

    backbone = resolve(args.backbone)
    return _Shown(args, source, backbone, read_checkpoint(source, identify(backbone)))


def _accuracy(shown: _Shown) -> Drawings:
    from mtlora.plot.accuracy import plot_accuracy

    evaluation = shown.checkpoint.manifest.evaluation
    return {"accuracy": partial(plot_accuracy, evaluation)} if evaluation.get("adapter") else {}


def _curves(shown: _Shown) -> Drawings:
    from mtlora.plot.curves import plot_curves, read_log
    from mtlora.train.state import LOG

    log = shown.source.parent / LOG
    return {"curves": partial(plot_curves, read_log(log))} if log.is_file() else {}


def _spectra(shown: _Shown) -> Drawings:
    import torch

    from mtlora.plot.diagnosis import plot_spectra
    from mtlora.train.diagnosis import spectra

    experts = [tensor.float() for name, tensor in shown.checkpoint.tensors.items() if name.endswith("lora_B")]
    return {"spectra": partial(plot_spectra, spectra(torch.stack(experts)))}


def _routing(shown: _Shown) -> Drawings:
    from mtlora.plot.diagnosis import plot_groups, plot_routing, plot_use
    from mtlora.train.diagnosis import routing_by_task

    if shown.checkpoint.manifest.config.num_experts == 1:
        return {}
    found = routing_by_task(shown.adapted(), shown.tasks, shown.examples)
    plots = {"routing": plot_routing, "routing-groups": plot_groups, "experts-in-use": plot_use}
    return {file: partial(plot, found) for file, plot in plots.items()}


def _gradients(shown: _Shown) -> Drawings:
    from mtlora.plot.diagnosis import plot_gradients

    return {"gradients": partial(plot_gradients, _gradient_cosines(shown), [task.id for task in shown.tasks])}


def _gradient_cosines(shown: _Shown) -> dict[str, Any]:
    """Gradient cosines of this checkpoint, and of a trained baseline or else of both levels before training."""
    import torch

    from mtlora.methods import HydraLoRAConfig
    from mtlora.model.baseline import load_baseline
    from mtlora.model.language import new_adapted_model
    from mtlora.train.diagnosis import cosines, task_gradients

    config, tasks, backbone = shown.checkpoint.manifest.config, shown.tasks, shown.backbone

    def measured(adapted: "AdaptedModel") -> Any:
        adapted.adapters.eval()
        return cosines(task_gradients(adapted, tasks, shown.examples))

    found = {"block level, trained": measured(shown.adapted())}
    if shown.args.against:
        baseline, manifest = load_baseline(backbone, shown.args.against, torch.bfloat16)
        return {**found, f"component level, trained ({manifest.config.method})": measured(baseline)}
    torch.manual_seed(0)
    found["block level, untrained"] = measured(new_adapted_model(backbone, config, len(tasks), torch.bfloat16))
    component = HydraLoRAConfig(r=config.r, lora_alpha=config.lora_alpha, num_experts=max(2, config.num_experts))
    found["component level (q, v), untrained"] = measured(new_adapted_model(backbone, component, 1, torch.bfloat16))
    return found


# Each measures, then returns a function that draws for each file; none if the checkpoint has nothing to draw.
_PICTURES: dict[str, Callable[[_Shown], Drawings]] = {
    "accuracy": _accuracy,
    "curves": _curves,
    "spectra": _spectra,
    "routing": _routing,
    "gradients": _gradients,
}
