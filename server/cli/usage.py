"""`mtlora-server usage`: print the usage of a running server's tenants, one JSON object per line."""

import argparse
import json
import sys
from datetime import UTC, datetime

from server.cli.connection import add_address, connect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the server's address and the query."""
    add_address(parser)
    parser.add_argument("--since", type=_time, metavar="TIME", help="UTC, such as 2026-11-01; default: all there is")
    parser.add_argument("--until", type=_time, metavar="TIME", help="hours that begin before it; default: now")
    parser.add_argument("--tenant", default="", help="default: every tenant")
    parser.add_argument("--task", default="", help="default: every task")
    parser.add_argument("--by", choices=("hour", "day", "month", "total"), default="day", help="default: day")


def run(options: argparse.Namespace) -> int:
    """Print the sums on stdout, and what they do not include on stderr; returns 0."""
    with connect(options) as client:
        usage = client.usage(
            since=options.since, until=options.until, tenant=options.tenant, task=options.task, by=options.by
        )
        for each in usage:
            line = {
                **({"begins": _shown(each.begins.ToDatetime(UTC))} if each.HasField("begins") else {}),
                "tenant": each.tenant,
                "task": each.task,
                "requests": each.requests,
                "prompt_tokens": each.prompt_tokens,
                "cached_tokens": each.cached_tokens,
                "completion_tokens": each.completion_tokens,
            }
            print(json.dumps(line))
    if options.since is None or usage.counted_since > options.since:
        print(f"mtlora-server: usage before {_shown(usage.counted_since)} was not counted", file=sys.stderr)
    return 0


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _shown(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
