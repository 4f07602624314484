"""`mtlora-server adapters`: list and change the adapters of a running server."""

import argparse
from collections.abc import Iterable, Iterator

from mtlora_pb.v1 import adapters_pb2 as pb
from rich.console import Console
from rich.table import Table

from mtlora.client import Client
from server.cli import CommandError
from server.cli.connection import add_address, connect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their arguments."""
    add_address(parser)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="every adapter and its versions")
    load = actions.add_parser("load", help="let a version serve")
    load.add_argument("adapter")
    load.add_argument("version", nargs="?", default="", help="default: the highest")
    for action, text in (
        ("unload", "stop serving an adapter"),
        ("rollback", "let the previous version serve again"),
        ("pin", "keep an adapter in the engine's memory"),
        ("unpin", "let an adapter make room for others again"),
    ):
        actions.add_parser(action, help=text).add_argument("adapter")
    weights = actions.add_parser("weights", help="split requests among versions, such as: weights mine 3=90 4=10")
    weights.add_argument("adapter", help="or, with --task, a task")
    weights.add_argument("weights", nargs="*", metavar="VERSION=WEIGHT", help="none: end the split")
    weights.add_argument("--task", action="store_true", help="split the requests of one task alone")
    manifest = actions.add_parser("manifest", help="print the manifest of a version")
    manifest.add_argument("adapter")
    manifest.add_argument("version", nargs="?", default="", help="default: the serving one")
    watch = actions.add_parser("watch", help="print what happens to adapters, until interrupted")
    watch.add_argument("adapter", nargs="?", default="", help="default: all")


def run(options: argparse.Namespace) -> int:
    """Execute the action; returns 0."""
    try:
        with connect(options) as client:
            _act(client, options)
    except ValueError as error:
        raise CommandError(str(error), 2) from None
    return 0


def _act(client: Client, options: argparse.Namespace) -> None:
    match options.action:
        case "list":
            _print_table(client.adapters())
        case "load":
            print(f"{options.adapter}/{client.load_adapter(options.adapter, options.version).version} serves")
        case "rollback":
            print(f"{options.adapter}/{client.rollback_adapter(options.adapter).version} serves")
        case "unload":
            client.unload_adapter(options.adapter)
        case "pin" | "unpin":
            client.pin_adapter(options.adapter, options.action == "pin")
        case "weights":
            target = {"task" if options.task else "adapter": options.adapter}
            client.set_adapter_weights(parse_weights(options.weights), **target)
        case "manifest":
            print(client.download_manifest(options.adapter, options.version).manifest.decode())
        case "watch":
            _print_events(client.watch_adapters(options.adapter))


def parse_weights(pairs: list[str]) -> dict[str, int]:
    """Weights by version, from VERSION=WEIGHT each. Raises ValueError."""
    weights = {}
    for pair in pairs:
        version, separator, weight = pair.rpartition("=")
        if not separator or not version or not weight.isdecimal():
            raise ValueError(f"weights: found {pair!r}; allowed: VERSION=WEIGHT, such as 3=90")
        weights[version] = int(weight)
    return weights


def _print_table(adapters: Iterable[pb.Adapter]) -> None:
    table = Table("adapter", "version", "state", "in engine", "requests", "tasks", "why")
    for adapter in adapters:
        for version in adapter.versions:
            table.add_row(
                adapter.name + (" (pinned)" if adapter.pinned else ""),
                version.version,
                _stage(version.stage),
                "yes" if version.resident else "",
                str(version.requests),
                str(version.tasks or ""),
                version.reason,
            )
        for split in adapter.splits:
            shares = ", ".join(f"{version}={weight}" for version, weight in sorted(split.weights.items()))
            table.add_row(adapter.name, shares, "split", "", "", split.task, "")
    Console().print(table)


def _print_events(events: Iterator[pb.AdapterEvent]) -> None:
    try:
        for event in events:
            failed = f" (not {_stage(event.failed_stage)}: {event.reason})" if event.failed_stage else ""
            time = event.time.ToDatetime().isoformat(timespec="milliseconds")
            print(f"{time}Z {event.adapter}/{event.version} {_stage(event.stage)}{failed}", flush=True)
    except KeyboardInterrupt:
        pass


def _stage(stage: int) -> str:
    return pb.AdapterStage.Name(stage).removeprefix("ADAPTER_STAGE_").lower()
