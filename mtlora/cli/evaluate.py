"""`mtlora eval`: accuracy of an adapter and of the backbone alone, per task and overall."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlora.cli.backbone import add_backbone_argument, add_vision_argument, backbone_for
from mtlora.cli.connection import add_access_arguments
from mtlora.cli.scores import print_calibration, print_scores, summary
from mtlora.cli.ways import answerers, scored, take_images

if TYPE_CHECKING:
    from mtlora.checkpoint.format import Checkpoint, TaskEntry
    from mtlora.evaluation.answerers import Labeller
    from mtlora.suite import Example, Suite


def add_parser(subparsers: Any) -> None:
    """Add the command `eval`."""
    parser = subparsers.add_parser(
        "eval",
        help="score an adapter on a suite by exact match",
        description="Scores every example of a folder, or EXAMPLES of each task of the built-in suite's split. "
        "The adapter's own task table says how a task's input becomes a prompt and when its answer ends. For images, "
        "the backbone alone means linear heads on its features, fitted to the images that the adapter was trained on.",
    )
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a checkpoint; without it, only the backbone is scored"
    )
    add_backbone_argument(parser, None)
    add_vision_argument(parser)
    parser.add_argument(
        "--suite", default="builtin", metavar="S",
        help="'builtin', 'bbh-generated', 'documents', 'builtin-vision', 'builtin-pictures', or a folder of BIG-Bench "
        "Hard's files, of MMLU's, or of images",
    )  # fmt: skip
    parser.add_argument("--split", choices=("train", "validation", "test"), help="built-in: test; folder: all it holds")
    parser.add_argument("--examples", type=int, metavar="N", help="of each task (built-in: 40; folder: all)")
    parser.add_argument(
        "--unreadable-images", choices=("error", "skip"), default="error",
        help="of images: skip: leave out files that cannot be decoded, and say of which classes they are",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="which examples, and which shots, are drawn")
    parser.add_argument(
        "--shots", type=int, default=0, metavar="K", help="solved training examples before each input (default: 0)"
    )
    parser.add_argument(
        "--scoring", choices=("generate", "likelihood"), default="generate",
        help="likelihood: answer a multiple choice by its likeliest option; other tasks still generate",
    )  # fmt: skip
    parser.add_argument(
        "--through", metavar="HOST:PORT", help="ask a running server instead of a model in this process"
    )
    add_access_arguments(parser)
    parser.add_argument("--adapter-only", action="store_true", help="do not score the backbone alone")
    parser.add_argument(
        "--another-image",
        action="store_true",
        help="of text and image: also score answers about other examples' images",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores and every answer as JSON")
    parser.add_argument("--gallery", type=Path, metavar="PNG", help="of images: draw one of each task with its answer")
    parser.add_argument("--record", action="store_true", help="keep the scores in the checkpoint's manifest")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from mtlora.backbone import identify, resolve
    from mtlora.checkpoint.read import read_checkpoint
    from mtlora.checkpoint.write import record_evaluation
    from mtlora.evaluation.scores import score

    _check_flags(args)
    _make_folder(args.json)
    suite = _suite(args)
    backbone = resolve(backbone_for(args.backbone, suite))
    checkpoint = read_checkpoint(args.adapter, identify(backbone)) if args.adapter else None
    tasks = checkpoint.manifest.tasks if checkpoint else _table(suite, backbone)
    examples = _examples(suite, tasks, args)
    _check_inputs(args, tasks, examples)
    found = answerers(args, backbone, checkpoint, tasks, suite)
    answers = {name: answer(examples) for name, answer in scored(found, args).items()}
    scores = {name: score(examples, given) for name, given in answers.items()}
    evaluation = {
        **_about(args, suite),
        **{name: each.as_dict() for name, each in scores.items()},
        **_by_length(backbone, tasks, examples, answers),
    }
    print_scores(evaluation)
    temperatures = _calibrate(args, checkpoint, found.labeller, examples, evaluation)
    if args.json:
        _write_json(args.json, evaluation, examples, answers)
    if args.gallery:
        from mtlora.plot.gallery import plot_gallery

        plot_gallery(examples, next(iter(answers.values())), args.gallery)
    if args.record:
        record_evaluation(args.adapter, evaluation, temperatures)
    print(summary(scores))
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything is read."""
    _refuse(
        (args.shots < 0, f"--shots: found {args.shots}; allowed: 0 or more"),
        (args.examples is not None and args.examples < 1, f"--examples: found {args.examples}; allowed: 1 or more"),
        (
            args.through and (args.shots or args.scoring != "generate" or not args.adapter),
            "--through: needs --adapter, without --shots and --scoring likelihood, as the server makes the prompts",
        ),
        (args.adapter_only and not args.adapter, "--adapter-only: needs --adapter"),
        (args.record and not args.adapter, "--record: needs --adapter"),
    )


def _check_inputs(args: argparse.Namespace, tasks: "Sequence[TaskEntry]", examples: "Sequence[Example]") -> None:
    """Refuse flags that the kind of the tasks has no use for, and images that cannot be read."""
    pictures, sizes = take_images(tasks), {task.id: task.image.size for task in tasks if task.image}
    _refuse(
        (args.gallery and examples[0].image is None, "--gallery: needs a suite of images"),
        (
            args.another_image and not (pictures and args.adapter),
            "--another-image: needs --adapter, and tasks of text that take an image",
        ),
        (pictures and args.shots, "--shots: not for tasks that take an image"),
        (
            sizes and (args.shots or args.through or args.scoring != "generate"),
            "--shots, --scoring and --through are for text; this suite is of images",
        ),
    )
    if sizes and args.unreadable_images == "error":
        from mtlora.suite.vision.pixels import check_readable

        check_readable((example, sizes[example.task_id]) for example in examples)


def _refuse(*rules: tuple[object, str]) -> None:
    """Raise MtLoRAError with the message of the first rule that holds."""
    from mtlora.errors import MtLoRAError

    for holds, message in rules:
        if holds:
            raise MtLoRAError(message)


def _make_folder(file: Path | None) -> None:
    """Make a result's folder: fail before the work, which takes minutes."""
    from mtlora.errors import MtLoRAError

    try:
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MtLoRAError(f"--json {file}: {error.strerror}") from None


def _suite(args: argparse.Namespace) -> "Suite":
    from mtlora.suite import load_suite

    suite = load_suite(args.suite)
    if args.unreadable_images == "error":
        return suite
    from mtlora.suite.vision.pixels import readable

    return readable(suite)


def _table(suite: "Suite", backbone: Path) -> "tuple[TaskEntry, ...]":
    """The suite's tasks without an adapter; those of images as the backbone sees them."""
    from mtlora.checkpoint.format import TaskEntry

    tasks = suite.tasks
    if any(task.image for task in tasks):
        from mtlora.model.vision import fitted_tasks
        from mtlora.vision.families import read_config

        tasks = fitted_tasks(tasks, read_config(backbone))
    return tuple(TaskEntry(**task.model_dump()) for task in tasks)


def _examples(suite: "Suite", tasks: "Sequence[TaskEntry]", args: argparse.Namespace) -> "list[Example]":
    """The examples to score; tells which tasks have none."""
    from mtlora.evaluation.examples import scored_examples

    found = scored_examples(suite, tasks, args.adapter, split=args.split, count=args.examples, seed=args.seed)
    if found.lacking:
        print(f"not scored, as the adapter lacks them: {', '.join(found.lacking)}")
    if found.empty:
        print(f"not scored, as they have no {args.split or 'test'} examples: {', '.join(found.empty)}")
    return found.examples


def _about(args: argparse.Namespace, suite: "Suite") -> dict[str, Any]:
    """What was scored, and how."""
    from mtlora.suite import FolderSuite

    return {
        "suite": suite.name,
        "split": args.split or ("all" if isinstance(suite, FolderSuite) else "test"),
        "seed": args.seed,
        "shots": args.shots,
        "scoring": args.scoring,
        "through": args.through or "offline",
    }


def _by_length(
    backbone: Path, tasks: "Sequence[TaskEntry]", examples: "Sequence[Example]", answers: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Accuracy by the documents' length, of tasks with documents."""
    if not any(task.document_template for task in tasks):
        return {}
    from transformers import AutoTokenizer

    from mtlora.evaluation.lengths import by_document_length
    from mtlora.prompt import PromptEncoder

    prompts = PromptEncoder(AutoTokenizer.from_pretrained(backbone))
    return {"by_document_length": by_document_length(prompts, tasks, examples, answers)}


def _calibrate(
    args: argparse.Namespace,
    checkpoint: "Checkpoint | None",
    labeller: "Labeller | None",
    examples: "Sequence[Example]",
    evaluation: dict[str, Any],
) -> dict[str, float]:
    """The temperatures to keep. Prints the labels' calibration errors and adds them to `evaluation`."""
    from mtlora.evaluation.calibration import calibrate

    stored = dict(checkpoint.manifest.calibration) if checkpoint else {}
    if checkpoint is None or labeller is None:
        return stored
    found = calibrate(labeller, checkpoint.manifest.tasks, examples, stored)
    if found is None:
        return stored
    evaluation |= {"calibration_error": found.errors, "calibration_error_by_chance": found.by_chance}
    print_calibration(found)
    if args.split == "validation":
        return {**stored, **found.temperatures}
    if args.record and found.temperatures:
        print("the temperatures fitted on these examples are not recorded; only those of --split validation are")
    return stored


def _write_json(
    file: Path, evaluation: Mapping[str, Any], examples: "Sequence[Example]", answers: Mapping[str, Sequence[str]]
) -> None:
    records = [
        {"task_id": e.task_id, "input": e.input, "target": e.target, **{n: a[i] for n, a in answers.items()}}
        for i, e in enumerate(examples)
    ]
    file.write_text(json.dumps({**evaluation, "answers": records}, indent=1) + "\n")
