"""`mtlora backbone`: prepare a packaged backbone, show a backbone's identity."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlora.cli.output import print_fields, print_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mtlora.suite import Suite
    from mtlora.task import TaskSpec


def add_parser(subparsers: Any) -> None:
    """Add the commands `backbone prepare` and `backbone show`."""
    parser = subparsers.add_parser("backbone", help="prepare or show the frozen backbone")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    prepare = commands.add_parser("prepare", help="make a default backbone's folder from the embedded weights")
    prepare.add_argument(
        "name", nargs="?", choices=("default", "vision"), default="default", help="of language (default) or of vision"
    )
    prepare.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: $MTLORA_BACKBONE_DIR or $MTLORA_VISION_BACKBONE_DIR, or a cache",
    )
    prepare.add_argument("--force", action="store_true", help="make it again even if it is complete")
    prepare.set_defaults(run=_prepare)

    show = commands.add_parser("show", help="print a backbone's identity, as adapters store it")
    add_backbone_argument(show)
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)


def add_backbone_argument(parser: argparse.ArgumentParser, default: str | None = "default") -> None:
    """Add `--backbone B`, the same in every command."""
    names = "'default', 'vision', a Hugging Face folder, or a hub id OWNER/NAME"
    if default is None:
        names += " (default: that of the suite's kind of input)"
    parser.add_argument("--backbone", default=default, metavar="B", help=names)


def add_vision_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--vision-backbone B`, for text tasks that take an image."""
    parser.add_argument(
        "--vision-backbone", default="vision", metavar="B",
        help="of the images of text tasks that take one: 'vision' (the default), a folder or a hub id",
    )  # fmt: skip


def vision_for(vision: str, tasks: "Iterable[TaskSpec]") -> Path | None:
    """The vision backbone's folder if a text task takes an image, else None. Raises BackboneError."""
    from mtlora.backbone import resolve

    return resolve(vision) if any(task.picture for task in tasks) else None


def backbone_for(backbone: str | None, suite: "Suite") -> str:
    """The backbone given by a flag, or else the built-in one for the suite's kind of input."""
    return backbone or ("vision" if any(task.image for task in suite.tasks) else "default")


def _prepare(args: argparse.Namespace) -> int:
    from mtlora.backbone import packaged, prepare

    source = packaged(args.name)
    assert source is not None
    print(prepare(args.out or source.folder(), source, force=args.force))
    return 0


def _show(args: argparse.Namespace) -> int:
    from mtlora.backbone import identify, resolve

    folder = resolve(args.backbone)
    identity = identify(folder).model_dump()
    if args.json:
        print_json({"folder": str(folder), **identity})
    else:
        print_fields(f"backbone {folder}", identity)
    return 0
