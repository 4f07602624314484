"""`mtlora-server adapters`: what an operator does to the adapters of a running server."""

import argparse
from collections.abc import Callable
from typing import Any


def add_adapters(parser: argparse.ArgumentParser, address: str, run: Callable[[argparse.Namespace], int]) -> None:
    """Give a parser the actions and their arguments; `run` is called with what was given."""
    parser.add_argument("--address", default=address, metavar="HOST:PORT", help="default: %(default)s")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="every adapter and its versions")
    load = actions.add_parser("load", help="let a version serve")
    load.add_argument("adapter")
    load.add_argument("version", nargs="?", default="", help="default: the highest")
    for action, text in (
        ("unload", "stop serving an adapter"),
        ("rollback", "let the version serve that served before"),
        ("pin", "keep an adapter in the engine's memory"),
        ("unpin", "let an adapter make room for others again"),
    ):
        actions.add_parser(action, help=text).add_argument("adapter")
    weights = actions.add_parser("weights", help="split requests among versions, such as: weights mine 3=90 4=10")
    weights.add_argument("adapter", help="or, with --task, a task")
    weights.add_argument("weights", nargs="*", metavar="VERSION=WEIGHT", help="none end the split")
    weights.add_argument("--task", action="store_true", help="split the requests of one task alone")
    watch = actions.add_parser("watch", help="print what happens to adapters, until interrupted")
    watch.add_argument("adapter", nargs="?", default="", help="default: all")
    parser.set_defaults(run=run)


def run_action(client: Any, options: argparse.Namespace) -> None:
    """Do what was asked. Raises ServerError, and ValueError for weights that are none."""
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


def _print_table(adapters: Any) -> None:
    from rich.console import Console
    from rich.table import Table

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


def _print_events(events: Any) -> None:
    try:
        for event in events:
            failed = f" (not {_stage(event.failed_stage)}: {event.reason})" if event.failed_stage else ""
            time = event.time.ToDatetime().isoformat(timespec="milliseconds")
            print(f"{time}Z {event.adapter}/{event.version} {_stage(event.stage)}{failed}", flush=True)
    except KeyboardInterrupt:
        pass


def _stage(stage: int) -> str:
    from mtlora_pb.v1 import adapters_pb2

    return adapters_pb2.AdapterStage.Name(stage).removeprefix("ADAPTER_STAGE_").lower()
