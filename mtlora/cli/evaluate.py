"""`mtlora eval`: accuracy of an adapter, a task and overall, with the backbone alone beside it."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtlora.cli.backbone import add_backbone_argument
from mtlora.cli.output import print_table


def add_parser(subparsers: Any) -> None:
    """Contribute `eval`."""
    parser = subparsers.add_parser(
        "eval",
        help="score an adapter on a suite by exact match",
        description="Scores every example of a folder, or EXAMPLES of each task of the built-in suite's split.",
    )
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="a checkpoint")
    add_backbone_argument(parser)
    parser.add_argument("--suite", default="builtin", metavar="S", help="'builtin' or a folder of task files")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="built-in: test; folder: all it holds")
    parser.add_argument("--examples", type=int, metavar="N", help="of each task (built-in: 40; folder: all)")
    parser.add_argument("--seed", type=int, default=0, help="which examples are drawn")
    parser.add_argument(
        "--through", metavar="HOST:PORT", help="ask a running server instead of a model in this process"
    )
    parser.add_argument("--adapter-only", action="store_true", help="leave the backbone alone out")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores, and every answer, as JSON")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from mtlora.backbone import identify, resolve
    from mtlora.checkpoint import read_checkpoint
    from mtlora.evaluate import Answerer, score
    from mtlora.suite import load_suite

    if args.json:
        # Now, not after minutes of work.
        args.json.parent.mkdir(parents=True, exist_ok=True)
    folder = resolve(args.backbone)
    checkpoint = read_checkpoint(args.adapter, identify(folder))
    suite = load_suite(args.suite)
    examples = _examples(suite, checkpoint.manifest, args)
    answerers: dict[str, Answerer] = {}
    if args.through:
        from mtlora.evaluate import server_answerer

        answerers["adapter"] = server_answerer(args.through)
        answerers["backbone_alone"] = server_answerer(args.through, without_adapter=True)
    else:
        import torch

        from mtlora.evaluate import offline_answerer
        from mtlora.model import load_adapted_model

        adapted = load_adapted_model(folder, checkpoint, getattr(torch, args.dtype))
        answerers["adapter"] = offline_answerer(adapted, checkpoint.manifest.tasks)
        answerers["backbone_alone"] = offline_answerer(adapted, checkpoint.manifest.tasks, with_adapter=False)
    if args.adapter_only:
        del answerers["backbone_alone"]
    answers = {name: answer(examples) for name, answer in answerers.items()}
    evaluation: dict[str, Any] = {
        "suite": suite.name,
        "split": args.split or ("test" if suite.name == "builtin" else "all"),
        "seed": args.seed,
        "through": args.through or "offline",
        **{name: score(examples, found).as_dict() for name, found in answers.items()},
    }
    print_scores(evaluation)
    if args.json:
        records = [
            {"task_id": e.task_id, "input": e.input, "target": e.target, **{n: a[i] for n, a in answers.items()}}
            for i, e in enumerate(examples)
        ]
        args.json.write_text(json.dumps({**evaluation, "answers": records}, indent=1) + "\n")
    return 0


def _examples(suite: Any, manifest: Any, args: argparse.Namespace) -> list[Any]:
    from mtlora.errors import MtLoRAError

    known = {task.id for task in manifest.tasks}
    if unknown := [task.id for task in suite.tasks if task.id not in known]:
        raise MtLoRAError(
            f"{args.adapter}: the adapter has no task {', '.join(unknown)} of suite {suite.name}; "
            f"it has {', '.join(sorted(known))}"
        )
    whole = suite.name != "builtin" and not args.split
    found = []
    for task in suite.tasks:
        if whole:
            found += suite.all_examples(task.id)[: args.examples]
        else:
            count = args.examples or (40 if suite.name == "builtin" else None)
            found += suite.examples(task.id, args.split or "test", count, args.seed)
    return found


def print_scores(evaluation: Mapping[str, Any]) -> None:
    """Print a row a task: adapter, backbone alone, most frequent answer; and the means. An empty evaluation: nothing.

    Raises KeyError, TypeError and the like for what `Scores.as_dict` did not make.
    """
    if not evaluation:
        return
    adapter, alone = evaluation["adapter"], evaluation.get("backbone_alone")
    rows = [
        (
            task_id,
            found["total"],
            f"{found['accuracy']:.2f}",
            f"{alone['tasks'][task_id]['accuracy']:.2f}" if alone else "",
            f"{found['majority'] / found['total']:.2f}",
        )
        for task_id, found in adapter["tasks"].items()
    ]
    total = sum(found["total"] for found in adapter["tasks"].values())
    mean = (f"{adapter['mean_accuracy']:.2f}", f"{alone['mean_accuracy']:.2f}" if alone else "", "")
    rows.append(("mean over tasks", total, *mean))
    print_table("accuracy, exact match", ("task", "examples", "adapter", "backbone alone", "most frequent"), rows)
