"""The ways to answer that `mtlora eval` compares, by its flags and the kind of the tasks."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mtlora.cli.backbone import vision_for
from mtlora.cli.connection import access_from

if TYPE_CHECKING:
    from mtlora.checkpoint.format import Checkpoint, TaskEntry
    from mtlora.evaluation.answerers import Answerer, Answerers
    from mtlora.suite import Suite
    from mtlora.task import TaskSpec


def take_images(tasks: "Iterable[TaskSpec]") -> bool:
    """Whether text tasks take an image."""
    return any(task.picture for task in tasks)


def answerers(
    args: argparse.Namespace,
    backbone: Path,
    checkpoint: "Checkpoint | None",
    tasks: "tuple[TaskEntry, ...]",
    suite: "Suite",
) -> "Answerers":
    """Those of the tasks' kind: of images, of texts through a server, of texts in this process."""
    if args.through:
        return _through(args, tasks)
    import torch

    from mtlora.evaluation.images import image_answerers
    from mtlora.evaluation.offline import text_answerers
    from mtlora.evaluation.shots import few_shot_prompt, plain_prompt

    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if any(task.image for task in tasks):
        return image_answerers(backbone, checkpoint, tasks, suite, dtype)
    return text_answerers(
        backbone, checkpoint, tasks, dtype,
        vision=vision_for(args.vision_backbone, tasks) if checkpoint else None,
        prompt_of=few_shot_prompt(suite, args.shots, args.seed) if args.shots else plain_prompt,
        likelihood=args.scoring == "likelihood",
    )  # fmt: skip


def _through(args: argparse.Namespace, tasks: "Iterable[TaskSpec]") -> "Answerers":
    from mtlora.errors import MtLoRAError
    from mtlora.evaluation.server import server_answerers

    try:
        access = access_from(args)
    except (OSError, ValueError) as error:
        raise MtLoRAError(str(error)) from None
    return server_answerers(args.through, access, labels=not take_images(tasks))


def scored(found: "Answerers", args: argparse.Namespace) -> "dict[str, Answerer]":
    """The answerers that the flags ask for, by their names in the results."""
    from mtlora.evaluation.answerers import with_other_images

    chosen: dict[str, Answerer] = {}
    if found.adapter:
        chosen["adapter"] = found.adapter
    if not args.adapter_only:
        chosen["backbone_alone"] = found.backbone_alone
    if found.adapter and args.another_image:
        chosen["another_image"] = with_other_images(found.adapter)
    return chosen
