"""`mtlora eval`: accuracy of an adapter and of the backbone alone, per task and overall."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlora.cli.backbone import add_backbone_argument, add_vision_argument, backbone_for, vision_for
from mtlora.cli.connection import access_from, add_access_arguments
from mtlora.cli.output import print_table

if TYPE_CHECKING:
    from mtlora.checkpoint.format import Checkpoint, TaskEntry
    from mtlora.evaluation.calibration import Labeller
    from mtlora.evaluation.evaluate import Answerer, Scores
    from mtlora.suite import Example, Suite
    from mtlora.task import TaskSpec

# Default number of examples per task of a generated suite.
_GENERATED_EXAMPLES = 40
# Answerers, in the order of the table's columns.
_SCORED = ("adapter", "another_image", "backbone_alone")
# Training images per task that linear heads are fitted to if there is no adapter.
_LINEAR_EXAMPLES = 500


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
    from transformers import AutoTokenizer

    from mtlora.backbone import identify, resolve
    from mtlora.checkpoint.format import TaskEntry
    from mtlora.checkpoint.read import read_checkpoint
    from mtlora.checkpoint.write import record_evaluation
    from mtlora.errors import MtLoRAError
    from mtlora.evaluation.evaluate import score
    from mtlora.evaluation.lengths import by_document_length
    from mtlora.prompt import PromptEncoder
    from mtlora.suite import FolderSuite, load_suite

    _check(args)
    if args.json:
        # Fail before the work, which takes minutes.
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MtLoRAError(f"--json {args.json}: {error.strerror}") from None
    suite = load_suite(args.suite)
    folder = resolve(backbone_for(args.backbone, suite))
    checkpoint = read_checkpoint(args.adapter, identify(folder)) if args.adapter else None
    if checkpoint:
        tasks = checkpoint.manifest.tasks
    else:
        tasks = tuple(TaskEntry(**task.model_dump()) for task in _fitted(suite, folder))
    examples = _examples(suite, tasks, args)
    if args.gallery and examples[0].image is None:
        raise MtLoRAError("--gallery: needs a suite of images")
    if sizes := {task.id: task.image.size for task in tasks if task.image}:
        from mtlora.suite.vision.pixels import check_readable

        check_readable((example, sizes[example.task_id]) for example in examples)
    answerers, labeller = _answerers(folder, checkpoint, tasks, suite, args)
    answers = {name: answer(examples) for name, answer in answerers.items()}
    scores = {name: score(examples, found) for name, found in answers.items()}
    evaluation: dict[str, Any] = {
        "suite": suite.name,
        "split": args.split or ("all" if isinstance(suite, FolderSuite) else "test"),
        "seed": args.seed,
        "shots": args.shots,
        "scoring": args.scoring,
        "through": args.through or "offline",
        **{name: found.as_dict() for name, found in scores.items()},
    }
    if any(task.document_template for task in tasks):
        prompts = PromptEncoder(AutoTokenizer.from_pretrained(folder))
        evaluation["by_document_length"] = by_document_length(prompts, tasks, examples, answers)
    print_scores(evaluation)
    calibration = dict(checkpoint.manifest.calibration) if checkpoint else {}
    if labeller is not None:
        fitted = _calibrate(labeller, tasks, examples, calibration, evaluation)
        if evaluation["split"] == "validation":
            calibration |= fitted
        elif args.record and fitted:
            print("the temperatures fitted on these examples are not recorded; only those of --split validation are")
    if args.json:
        records = [
            {"task_id": e.task_id, "input": e.input, "target": e.target, **{n: a[i] for n, a in answers.items()}}
            for i, e in enumerate(examples)
        ]
        args.json.write_text(json.dumps({**evaluation, "answers": records}, indent=1) + "\n")
    if args.gallery:
        from mtlora.plot.gallery import plot_gallery

        plot_gallery(examples, next(iter(answers.values())), args.gallery)
    if args.record:
        record_evaluation(args.adapter, evaluation, calibration)
    print(summary(scores))
    return 0


def _fitted(suite: "Suite", backbone: Path) -> "Sequence[TaskSpec]":
    """The suite's tasks, those of images as the backbone sees them."""
    if not any(task.image for task in suite.tasks):
        return suite.tasks
    from mtlora.model.vision import fitted_tasks
    from mtlora.vision.families import read_config

    return fitted_tasks(suite.tasks, read_config(backbone))


def _calibrate(
    labeller: "Labeller",
    tasks: "tuple[TaskEntry, ...]",
    examples: "list[Example]",
    stored: "Mapping[str, float]",
    evaluation: dict[str, Any],
) -> dict[str, float]:
    """Print the labels' calibration errors and add them to the result; returns fitted temperatures."""
    from mtlora.evaluation.calibration import (
        error_by_chance,
        expected_calibration_error,
        fitted_temperatures,
        label_outcomes,
    )

    labelled = {task.id for task in tasks if task.labels}
    chosen = [example for example in examples if example.task_id in labelled]
    if not chosen:
        return {}
    found = labeller(chosen)
    fitted = fitted_temperatures(chosen, found)
    errors, by_chance = {}, {}
    for name, temperatures in (("uncalibrated", {}), ("stored", stored), ("fitted", fitted)):
        outcomes = label_outcomes(chosen, found, temperatures)
        errors[name] = round(expected_calibration_error(outcomes), 4)
        by_chance[name] = round(error_by_chance([confidence for confidence, _ in outcomes]), 4)
    evaluation["calibration_error"], evaluation["calibration_error_by_chance"] = errors, by_chance
    print(
        f"expected calibration error of {len(chosen)} labels: {errors['uncalibrated']:.3f}, {errors['stored']:.3f} at "
        f"the checkpoint's temperatures, {errors['fitted']:.3f} at temperatures fitted on these examples; perfect "
        f"probabilities would show {by_chance['uncalibrated']:.3f}, {by_chance['stored']:.3f} and "
        f"{by_chance['fitted']:.3f} on this many labels"
    )
    return fitted


def _check(args: argparse.Namespace) -> None:
    from mtlora.errors import MtLoRAError

    if args.shots < 0:
        raise MtLoRAError(f"--shots: found {args.shots}; allowed: 0 or more")
    if args.examples is not None and args.examples < 1:
        raise MtLoRAError(f"--examples: found {args.examples}; allowed: 1 or more")
    if args.through and (args.shots or args.scoring != "generate" or not args.adapter):
        raise MtLoRAError(
            "--through: needs --adapter, without --shots and --scoring likelihood, as the server makes the prompts"
        )
    for flag in ("adapter_only", "record"):
        if getattr(args, flag) and not args.adapter:
            raise MtLoRAError(f"--{flag.replace('_', '-')}: needs --adapter")


def _answerers(
    folder: Path, checkpoint: "Checkpoint | None", tasks: "tuple[TaskEntry, ...]", suite: "Suite", args: Any
) -> "tuple[dict[str, Answerer], Labeller | None]":
    """The answerers to score (`adapter`, `backbone_alone` or both), and the labeller for the adapter's labels."""
    from mtlora.errors import MtLoRAError
    from mtlora.evaluation import evaluate

    pictures = any(task.picture for task in tasks)
    if args.another_image and not (pictures and checkpoint):
        raise MtLoRAError("--another-image: needs --adapter, and tasks of text that take an image")
    if pictures and args.shots:
        raise MtLoRAError("--shots: not for tasks that take an image")
    if any(task.image for task in tasks):
        return _image_answerers(folder, checkpoint, tasks, suite, args)
    names = ["adapter"] * bool(checkpoint) + ["backbone_alone"] * (not args.adapter_only)
    if args.through:
        try:
            access = access_from(args)
        except (OSError, ValueError) as error:
            raise MtLoRAError(str(error)) from None
        answerers = {
            name: evaluate.server_answerer(args.through, access, without_adapter=name != "adapter") for name in names
        }
        if args.another_image:
            answerers["another_image"] = evaluate.with_other_images(answerers["adapter"])
        return answerers, None if pictures else evaluate.server_labeller(args.through, access)

    import torch

    from mtlora.config import MtLoRAConfig
    from mtlora.model.language import load_adapted_model, new_adapted_model

    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if checkpoint:
        adapted = load_adapted_model(folder, checkpoint, dtype, vision_for(args.vision_backbone, tasks))
    else:
        # The smallest possible adapter; its paths are never used. Activation `task` lets a document be read once.
        activation = "task" if all(task.document_template for task in tasks) else "all"
        config = MtLoRAConfig(r=1, num_experts=1, num_groups=1, task_bias=False, activation=activation)
        adapted = new_adapted_model(folder, config, 1, dtype)
    make = evaluate.likelihood_answerer if args.scoring == "likelihood" else evaluate.offline_answerer
    prompt_of = evaluate.few_shot_prompt(suite, args.shots, args.seed) if args.shots else evaluate.plain_prompt
    answerers = {name: make(adapted, tasks, with_adapter=name == "adapter", prompt_of=prompt_of) for name in names}
    if args.another_image:
        answerers["another_image"] = evaluate.with_other_images(answerers["adapter"])
    return answerers, evaluate.offline_labeller(adapted, tasks) if checkpoint and not args.shots else None


def _image_answerers(
    folder: Path, checkpoint: "Checkpoint | None", tasks: "tuple[TaskEntry, ...]", suite: "Suite", args: Any
) -> "tuple[dict[str, Answerer], Labeller | None]":
    """Like `_answerers`, for images."""
    import torch

    from mtlora.errors import MtLoRAError
    from mtlora.evaluation.images import answers_of, checkpoint_labeller, image_labeller, linear_heads
    from mtlora.methods import HeadsConfig
    from mtlora.model.vision import load_adapted_encoder, new_adapted_encoder
    from mtlora.suite import up_to
    from mtlora.suite.mix import count_for

    if args.shots or args.through or args.scoring != "generate":
        raise MtLoRAError("--shots, --scoring and --through are for text; this suite is of images")
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    answerers: dict[str, Answerer] = {}
    labeller = None
    if checkpoint:
        adapted = load_adapted_encoder(folder, checkpoint, dtype)
        labeller = checkpoint_labeller(adapted, checkpoint)
        answerers["adapter"] = answers_of(labeller)
    else:
        adapted = new_adapted_encoder(folder, HeadsConfig(), len(tasks), dtype)
    if not args.adapter_only:
        asked = [task for task in tasks if task.id in {each.id for each in suite.tasks}]
        trained = checkpoint.manifest.training.get("config", {}) if checkpoint else {}
        counts, seed = trained.get("examples_per_task", _LINEAR_EXAMPLES), trained.get("seed", 0)

        def alone(examples: "Sequence[Example]") -> list[str]:
            train = [e for t in asked for e in up_to(suite, t.id, "train", count_for(counts, t.id), seed)]
            heads = linear_heads(adapted, asked, train)
            return answers_of(image_labeller(adapted, asked, heads, None))(examples)

        answerers["backbone_alone"] = alone
    return answerers, labeller


def _examples(suite: "Suite", tasks: "tuple[TaskEntry, ...]", args: argparse.Namespace) -> "list[Example]":
    from mtlora.errors import MtLoRAError
    from mtlora.suite import SPLITS, FolderSuite

    known = {task.id for task in tasks}
    asked = [task for task in suite.tasks if task.id in known]
    unknown = ", ".join(task.id for task in suite.tasks if task.id not in known)
    # Score only the tasks that the adapter has: it may be trained on a part of a generated suite.
    if unknown and (suite.finite or not asked or not asked[0].image):
        raise MtLoRAError(
            f"{args.adapter}: the adapter has no task {unknown} of suite {suite.name}; "
            f"it has {', '.join(sorted(known))}"
        )
    if unknown:
        print(f"not scored, as the adapter lacks them: {unknown}")
    if args.adapter:
        _check_labels(suite, asked, tasks)
    found: list[Example] = []
    without: list[str] = []
    for task in asked:
        if isinstance(suite, FolderSuite) and not args.split:
            examples = suite.all_examples(task.id)[: args.examples]
        else:
            count = args.examples or (None if suite.finite else _GENERATED_EXAMPLES)
            examples = suite.examples(task.id, args.split or "test", count, args.seed)
        found += examples
        without += [] if examples else [task.id]
    split = args.split or "test"
    if not found:
        others = " or ".join(f"--split {each}" for each in SPLITS if each != split)
        raise MtLoRAError(f"suite {suite.name}: found no {split} examples; allowed: {others}")
    if without:
        print(f"not scored, as they have no {split} examples: {', '.join(without)}")
    return found


def _check_labels(suite: "Suite", asked: "Sequence[TaskSpec]", tasks: "tuple[TaskEntry, ...]") -> None:
    """Refuse a suite of images with labels that the adapter's heads lack."""
    from mtlora.errors import MtLoRAError

    known = {task.id: task.labels or () for task in tasks}
    for task in asked:
        if not task.image:
            continue
        if lacking := [label for label in task.labels or () if label not in known[task.id]]:
            raise MtLoRAError(
                f"task {task.id}: suite {suite.name} has labels {', '.join(lacking)}; allowed: the adapter's, "
                f"{', '.join(known[task.id])}"
            )


def summary(scores: "Mapping[str, Scores]") -> str:
    """One line of summary, without values that were not measured."""
    labels = dict(zip(_SCORED, ("mean", "another image", "backbone alone"), strict=True))
    parts = [f"{len(next(iter(scores.values())).tasks)} tasks"]
    parts += [f"{label} {scores[name].mean:.2f}" for name, label in labels.items() if name in scores]
    if "adapter" in scores:
        parts.append(f"tasks below floor {len(scores['adapter'].below_floor)}")
    return f"accuracy: {', '.join(parts)}"


def print_scores(evaluation: Mapping[str, Any]) -> None:
    """Print a row per task (adapter, backbone alone, most frequent answer) and the means; nothing for no evaluation.

    Raises KeyError, TypeError or similar if `evaluation` does not come from `Scores.as_dict`.
    """
    if not evaluation:
        return
    names = [name for name in _SCORED if name in evaluation]
    first = evaluation[names[0] if names else "adapter"]
    rows: list[tuple[object, ...]] = [
        (
            task_id,
            found["total"],
            *(f"{evaluation[name]['tasks'][task_id]['accuracy']:.2f}" for name in names),
            f"{found['majority'] / found['total']:.2f}",
        )
        for task_id, found in first["tasks"].items()
    ]
    total = sum(found["total"] for found in first["tasks"].values())
    majority = sum(found["majority"] / found["total"] for found in first["tasks"].values()) / len(first["tasks"])
    means = (f"{evaluation[name]['mean_accuracy']:.2f}" for name in names)
    rows.append(("mean over tasks", total, *means, f"{majority:.2f}"))
    headings = (name.replace("_", " ") for name in names)
    print_table("accuracy, exact match", ("task", "examples", *headings, "most frequent"), rows)
    if lengths := evaluation.get("by_document_length"):
        print_table(
            "accuracy by length of the document",
            ("tokens", "examples", *(name.replace("_", " ") for name in names)),
            [(row["tokens"], row["examples"], *(f"{row[name]:.2f}" for name in names)) for row in lengths],
        )
