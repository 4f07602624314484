"""`mtlora plot`: charts of a checkpoint."""

import argparse
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlora.cli.backbone import add_backbone_argument
from mtlora.cli.settings import read_json

if TYPE_CHECKING:
    from mtlora.checkpoint.format import Checkpoint
    from mtlora.suite import Example

# Functions that draw to a file, by the file's name without suffix.
Pictures = dict[str, Callable[[Path], None]]

_PICTURES = ("accuracy", "curves", "spectra", "routing", "gradients")


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
    parser.add_argument("--only", nargs="+", choices=_PICTURES, metavar="NAME", help=f"of {', '.join(_PICTURES)}")
    add_backbone_argument(parser)
    parser.add_argument("--suite", metavar="S", help="where inputs come from (default: what it was trained on)")
    parser.add_argument("--examples", type=int, default=8, metavar="N", help="inputs of each task (default: 8)")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="a trained HydraLoRA or LoRA to compare gradients with"
    )
    parser.set_defaults(run=_plot)


def _plot(args: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mtlora.checkpoint.read import read_manifest
    from mtlora.errors import MtLoRAError

    if args.examples < 1:
        raise MtLoRAError(f"--examples: found {args.examples}; allowed: 1 or more")
    source = args.source / "adapter" if (args.source / "training.json").is_file() else args.source
    if args.out.suffix or not source.is_dir():
        out = args.out if args.out.suffix else args.out / "accuracy.png"
        _accuracy(read_manifest(source).evaluation if source.is_dir() else read_json(source), source, out)
        print(out)
        return 0
    draw = _checkpoint_pictures(args, source)
    for name in args.only or draw:
        if name not in draw:
            raise MtLoRAError(f"{source}: nothing to draw {name} from")
        for file, plot in draw[name]().items():
            plot(args.out / f"{file}.png")
            print(args.out / f"{file}.png")
    return 0


def _accuracy(evaluation: Mapping[str, Any], source: Path, out: Path) -> None:
    from mtlora.errors import MtLoRAError
    from mtlora.plot.accuracy import plot_accuracy

    if "adapter" not in evaluation:
        raise MtLoRAError(f"{source}: no evaluation in it; mtlora eval --record adds one")
    plot_accuracy(evaluation, out)


def _checkpoint_pictures(args: argparse.Namespace, source: Path) -> dict[str, Callable[[], Pictures]]:
    """The charts of this checkpoint by name. Each function measures, then returns a drawing function per file."""
    import torch

    from mtlora.backbone import identify, resolve
    from mtlora.checkpoint.read import read_checkpoint
    from mtlora.model.language import load_adapted_model
    from mtlora.plot.curves import plot_curves, read_log
    from mtlora.plot.diagnosis import plot_gradients, plot_groups, plot_routing, plot_spectra, plot_use
    from mtlora.train.diagnosis import routing_by_task, spectra
    from mtlora.train.state import LOG

    folder = resolve(args.backbone)
    checkpoint = read_checkpoint(source, identify(folder))
    manifest, tasks = checkpoint.manifest, _in_order_of_bias(checkpoint)
    log = source.parent / LOG

    def routing() -> Pictures:
        found = routing_by_task(
            load_adapted_model(folder, checkpoint, torch.bfloat16), tasks, _examples(args, checkpoint)
        )
        plots = {"routing": plot_routing, "routing-groups": plot_groups, "experts-in-use": plot_use}
        return {file: partial(plot, found) for file, plot in plots.items()}

    def gradients() -> Pictures:
        cosines = _gradient_cosines(args, folder, checkpoint)
        return {"gradients": partial(plot_gradients, cosines, [task.id for task in tasks])}

    experts = [tensor.float() for name, tensor in checkpoint.tensors.items() if name.endswith("lora_B")]
    found: dict[str, Callable[[], Pictures]] = {
        "accuracy": lambda: {"accuracy": partial(_accuracy, manifest.evaluation, source)},
        "curves": lambda: {"curves": partial(plot_curves, read_log(log))},
        "spectra": lambda: {"spectra": partial(plot_spectra, spectra(torch.stack(experts)))},
        "routing": routing,
        "gradients": gradients,
    }
    lacking = {
        "accuracy": not manifest.evaluation.get("adapter"), "curves": not log.is_file(),
        "routing": manifest.config.num_experts == 1,
    }  # fmt: skip
    return {name: draw for name, draw in found.items() if not lacking.get(name)}


def _in_order_of_bias(checkpoint: "Checkpoint") -> list[Any]:
    """The tasks in the order of their bias rows."""
    return sorted(checkpoint.manifest.tasks, key=lambda task: -1 if task.bias_index is None else task.bias_index)


def _examples(args: argparse.Namespace, checkpoint: "Checkpoint") -> "dict[str, list[Example]]":
    from mtlora.errors import MtLoRAError
    from mtlora.suite import load_suite, up_to
    from mtlora.train.config import TrainingConfig

    if args.suite:
        suite = load_suite(args.suite)
    elif "config" in checkpoint.manifest.training:
        suite = load_suite(TrainingConfig.model_validate(checkpoint.manifest.training["config"]).suite)
    else:
        raise MtLoRAError(f"{args.source}: its training suite is not recorded: name it with --suite")
    known = {task.id for task in suite.tasks}
    if missing := [task.id for task in checkpoint.manifest.tasks if task.id not in known]:
        raise MtLoRAError(
            f"suite {suite.name} lacks the adapter's task {', '.join(missing)}: name another with --suite"
        )
    return {
        task.id: up_to(suite, task.id, "validation", args.examples) or up_to(suite, task.id, "train", args.examples)
        for task in checkpoint.manifest.tasks
    }


def _gradient_cosines(args: argparse.Namespace, folder: Path, checkpoint: "Checkpoint") -> dict[str, Any]:
    """Gradient cosines of this checkpoint, and of a trained baseline or else of both levels before training."""
    import torch

    from mtlora.methods import HydraLoRAConfig
    from mtlora.model.baseline import load_baseline
    from mtlora.model.language import load_adapted_model, new_adapted_model
    from mtlora.train.diagnosis import cosines, task_gradients

    config, tasks = checkpoint.manifest.config, _in_order_of_bias(checkpoint)
    examples = _examples(args, checkpoint)

    def measured(adapted: Any) -> Any:
        adapted.adapters.eval()
        return cosines(task_gradients(adapted, tasks, examples))

    found = {"block level, trained": measured(load_adapted_model(folder, checkpoint, torch.bfloat16))}
    if args.against:
        baseline, manifest = load_baseline(folder, args.against, torch.bfloat16)
        return {**found, f"component level, trained ({manifest.config.method})": measured(baseline)}
    torch.manual_seed(0)
    found["block level, untrained"] = measured(new_adapted_model(folder, config, len(tasks), torch.bfloat16))
    component = HydraLoRAConfig(r=config.r, lora_alpha=config.lora_alpha, num_experts=max(2, config.num_experts))
    found["component level (q, v), untrained"] = measured(new_adapted_model(folder, component, 1, torch.bfloat16))
    return found
