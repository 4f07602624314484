"""Commands on checkpoints: `mtlora inspect`, `verify`, `convert` (from other trainers' formats) and `publish`."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlora.cli.backbone import add_backbone_argument
from mtlora.cli.connection import access_from, add_access_arguments
from mtlora.cli.output import print_fields, print_json, print_table
from mtlora.cli.scores import print_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtlora.task import TaskSpec


def add_parser(subparsers: Any) -> None:
    """Add the commands `inspect`, `verify`, `convert` and `publish`."""
    inspect = subparsers.add_parser("inspect", help="print a checkpoint's configuration, tasks and provenance")
    inspect.add_argument("folder", type=Path, metavar="DIR")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    verify = subparsers.add_parser("verify", help="check a whole checkpoint; exit 1 with the reason if it fails")
    verify.add_argument("folder", type=Path, metavar="DIR")
    add_backbone_argument(verify, default=None)
    verify.set_defaults(run=_verify)

    convert = subparsers.add_parser(
        "convert",
        help="convert a checkpoint of mtLoRA's authors, or of block-level HydraLoRA",
        description="Writes SRC to OUT in this project's format. Such files hold neither tasks nor alpha.",
    )
    convert.add_argument("source", type=Path, metavar="SRC", help="a torch or safetensors file of a state dict")
    convert.add_argument("out", type=Path, metavar="OUT", help="the checkpoint's folder")
    add_backbone_argument(convert)
    convert.add_argument(
        "--alpha", type=float, metavar="A", help="lora_alpha of the training; published: 64 at rank 16"
    )
    tasks = convert.add_mutually_exclusive_group(required=True)
    tasks.add_argument("--task", action="append", metavar="ID", help="a task with the default template; repeatable")
    tasks.add_argument(
        "--tasks", type=Path, metavar="FILE", help="JSON: a list of tasks (id, description, template, ...)"
    )
    tasks.add_argument("--suite", metavar="S", help="the tasks of a suite: 'builtin' or a folder of task files")
    convert.set_defaults(run=_convert)

    publish = subparsers.add_parser("publish", help="copy a checkpoint to the next version of a served adapter")
    publish.add_argument("checkpoint", type=Path, metavar="DIR", help="such as out/mine/adapter")
    publish.add_argument("adapter", metavar="ADAPTERS/NAME", help="such as adapters/mine; with --to: the name alone")
    publish.add_argument("--to", metavar="HOST:PORT", help="upload to a running server, as an admin")
    add_access_arguments(publish)
    publish.set_defaults(run=_publish)


def _inspect(args: argparse.Namespace) -> int:
    from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE
    from mtlora.checkpoint.read import read_manifest
    from mtlora.config import adapter_parameters

    manifest = read_manifest(args.folder)
    backbone, config = manifest.backbone, manifest.config
    parameters = adapter_parameters(config, backbone.hidden_size, backbone.num_layers, len(manifest.tasks))
    sizes = {name: math.prod(shape) for name, shape in manifest.tensor_shapes().items()}
    parts = {part: sum(n for name, n in sizes.items() if name.startswith(part)) for part in ("heads", "projector")}
    # Count only files that exist; `verify` reports missing or damaged ones.
    size = sum(path.stat().st_size for name in (MANIFEST_FILE, TENSORS_FILE) if (path := args.folder / name).is_file())
    if args.json:
        print_json({"parameters": parameters, "bytes": size, **manifest.model_dump(mode="json")})
        return 0
    print_fields(
        f"adapter {args.folder}",
        {
            "format version": manifest.format_version,
            "parameters": f"{parameters:,}" + "".join(f", and {n:,} of {part}" for part, n in parts.items() if n),
            "size": f"{size:,} bytes",
            "tensors sha256": manifest.tensors_sha256,
            "backbone": backbone.model_dump(),
            "config": config.model_dump(),
            **({"projector": manifest.projector.model_dump()} if manifest.projector else {}),
        },
    )
    cells: dict[str, Callable[[Any], object]] = {
        "task": lambda task: task.id,
        "bias index": lambda task: "–" if task.bias_index is None else task.bias_index,
        **(_IMAGE_CELLS if manifest.images else _TEXT_CELLS),
        "description": lambda task: task.description,
    }
    rows = [[cell(task) for cell in cells.values()] for task in manifest.tasks]
    print_table(f"{len(manifest.tasks)} tasks", list(cells), rows)
    if documents := {task.id: repr(task.document_template) for task in manifest.tasks if task.document_template}:
        print_fields("document parts", documents)
    if manifest.training:
        print_fields("training", manifest.training)
    try:
        print_scores(manifest.evaluation)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        # The manifest may hold any JSON here; only this project writes scores of this form.
        print_fields("evaluation", manifest.evaluation)
    return 0


def _answers(task: "TaskSpec") -> str:
    if task.labels:
        return f"{len(task.labels)} labels"
    return "any" if task.answer_type is None else task.answer_type.type


# Columns of the table of tasks, by their heading, for tasks of texts and of images.
_TEXT_CELLS: dict[str, Callable[[Any], object]] = {
    "max new tokens": lambda task: task.max_new_tokens,
    "stop": lambda task: " ".join(map(repr, task.stop)) or "–",
    "answers": _answers,
}
_IMAGE_CELLS: dict[str, Callable[[Any], object]] = {
    "size": lambda task: f"{task.image.size} px",
    "resize": lambda task: task.image.resize,
    "pooling": lambda task: task.image.pooling,
    "classes": lambda task: len(task.labels),
}


def _verify(args: argparse.Namespace) -> int:
    from mtlora.answer import AnswerError
    from mtlora.backbone import identify, resolve
    from mtlora.checkpoint.format import CheckpointError
    from mtlora.checkpoint.read import check_answers, read_checkpoint
    from mtlora.errors import BackboneError
    from mtlora.vision.families import read_config

    folder = None if args.backbone is None else resolve(args.backbone)
    backbone = None if folder is None else identify(folder)
    try:
        checkpoint = read_checkpoint(args.folder, backbone)
        check_answers(args.folder, checkpoint.manifest)
        if folder is not None and checkpoint.manifest.images:
            read_config(folder).check({task.id: task.image for task in checkpoint.manifest.tasks if task.image})
        if folder is not None:
            _check_masks(folder, checkpoint.manifest.tasks)
    except (CheckpointError, BackboneError, AnswerError) as error:
        print(f"mtlora: error: {error}", file=sys.stderr)
        return 1
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    beside = "no backbone compared" if args.backbone is None else f"backbone {args.backbone} matches"
    print(f"ok: {args.folder}: {len(checkpoint.manifest.tasks)} tasks, {parameters:,} parameters, {beside}")
    return 0


def _check_masks(backbone: Path, tasks: "Sequence[TaskSpec]") -> None:
    """Raise AnswerError if a type's answers do not fit or, where llguidance is installed, it cannot mask the type."""
    from importlib.util import find_spec

    constraints = {task.id: found for task in tasks if (found := task.constraint())}
    if not constraints or find_spec("llguidance") is None:
        return
    from transformers import AutoTokenizer

    from mtlora.answer import AnswerError
    from mtlora.vllm_plugin.closing import Closing
    from mtlora.vllm_plugin.lexer import Lexer
    from mtlora.vllm_plugin.vocabulary import Vocabulary

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    fewest: dict[str, int] = {}
    for task in tasks:
        if (constraint := constraints.get(task.id)) is None:
            continue
        if constraint.text not in fewest:
            try:
                Lexer(constraint.expression, vocabulary)
            except ValueError as error:
                raise AnswerError(f"task {task.id}: answer: {error}") from None
            automaton = constraint.compile()
            marker = vocabulary.encode(f" {constraint.marker}") if constraint.marker else []
            # Count the end-of-sequence token too.
            fewest[constraint.text] = Closing(automaton, vocabulary).needs(automaton.start) + len(marker) + 1
        if (least := fewest[constraint.text]) > task.max_new_tokens:
            raise AnswerError(
                f"task {task.id}: max_new_tokens: found {task.max_new_tokens}; its shortest answer takes {least}"
            )


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


def _publish(args: argparse.Namespace) -> int:
    from mtlora.checkpoint.publish import publish
    from mtlora.checkpoint.read import read_checkpoint
    from mtlora.client import Client, Retry, ServerError
    from mtlora.errors import MtLoRAError

    if args.to is None:
        print(publish(args.checkpoint, Path(args.adapter)))
        return 0
    # Report a bad checkpoint before anything is sent.
    read_checkpoint(args.checkpoint)
    try:
        with Client(args.to, access_from(args), Retry(attempts=6)) as client:
            version = client.upload_adapter(args.checkpoint, args.adapter)
    except (OSError, ValueError, ServerError) as error:
        raise MtLoRAError(f"{args.to}: {error}") from None
    print(f"{args.adapter}/{version}")
    return 0
