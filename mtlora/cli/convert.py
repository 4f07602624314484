"""`mtlora convert`: convert a checkpoint of mtLoRA's authors, or of block-level HydraLoRA."""

import argparse
from pathlib import Path
from typing import Any

from mtlora.cli.backbone import add_backbone_argument


def add_parser(subparsers: Any) -> None:
    """Contribute `convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint of mtLoRA's authors, or of block-level HydraLoRA",
        description="Writes SRC to OUT in this project's format. Such files hold neither tasks nor alpha.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a torch or safetensors file of a state dict")
    parser.add_argument("out", type=Path, metavar="OUT", help="the checkpoint's folder")
    add_backbone_argument(parser)
    parser.add_argument("--alpha", type=float, metavar="A", help="lora_alpha of the training; published: 64 at rank 16")
    tasks = parser.add_mutually_exclusive_group(required=True)
    tasks.add_argument("--task", action="append", metavar="ID", help="a task with the default template; repeatable")
    tasks.add_argument(
        "--tasks", type=Path, metavar="FILE", help="JSON: a list of tasks (id, description, template, ...)"
    )
    tasks.add_argument("--suite", metavar="S", help="the tasks of a suite: 'builtin' or a folder of task files")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from mtlora.backbone import identify, resolve
    from mtlora.checkpoint.convert import PUBLISHED_ALPHA, convert, read_tasks
    from mtlora.suite import load_suite
    from mtlora.task import TaskSpec

    if args.task:
        tasks = [TaskSpec(id=task_id, description=f"Task {task_id}.") for task_id in args.task]
    elif args.tasks:
        tasks = list(read_tasks(args.tasks))
    else:
        tasks = list(load_suite(args.suite).tasks)
    alpha = PUBLISHED_ALPHA if args.alpha is None else args.alpha
    manifest = convert(args.source, args.out, backbone=identify(resolve(args.backbone)), tasks=tasks, lora_alpha=alpha)
    config = manifest.config
    published = "" if args.alpha else " (published; --alpha sets it)"
    print(
        f"{args.out}: {len(manifest.tasks)} tasks, blocks {config.blocks}, r {config.r}, {config.num_experts} experts, "
        f"{config.num_groups} groups, alpha {config.lora_alpha:g}{published}"
    )
    return 0
