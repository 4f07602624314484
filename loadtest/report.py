"""A result as one self-contained HTML page, for readers who know neither the program nor its words."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from loadtest import charts

_WARM_UP = "warm-up"
_MOST_FLAWS = 20
_LATENCIES = {"ttft": "TTFT", "itl": "ITL", "e2e": "E2E"}


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(result))


def render(result: Mapping[str, Any]) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "seconds": _seconds,
        "thousands": "{:,}".format,
        "percent": "{:.0%}".format,
        "quantile": lambda q: f"p{100 * q:g}",
    }
    phases = [phase for phase in result["phases"] if phase["name"] != _WARM_UP]
    shown = {key: result[key] for key in ("command", "settings", "versions", "machine", "server")}
    return environment.get_template("report.html.jinja").render(
        result=result,
        phases=phases,
        main=_main_phase(result, phases),
        charts=charts,
        sent=sum(sum(phase["statuses"].values()) for phase in phases),
        agreement=list(_agreement(phases)),
        statuses=sorted({status for phase in result["phases"] for status in phase["statuses"]}),
        messages={status: message for phase in result["phases"] for status, message in phase["errors"].items()},
        flaws=[flaw for phase in result["phases"] for flaw in phase["flaws"]][:_MOST_FLAWS],
        told=json.dumps(shown, indent=1, ensure_ascii=False),
    )


def _main_phase(result: Mapping[str, Any], phases: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The phase shown in detail: the one at the knee, or else the last one with answers."""
    answered = [phase for phase in phases if phase["total"]["ok"]]
    knee = result["knee"] and result["knee"]["phase"]
    at_knee = [phase for phase in answered if phase["name"] == knee]
    return (at_knee or answered)[-1] if answered else None


def _agreement(phases: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every quantile that both generator and server measured, with whether they agree."""
    for phase in phases:
        for key, found in (phase["server"] or {}).get("agreement", {}).items():
            for quantile, row in found["quantiles"].items():
                named = {"phase": phase["name"], "latency": _LATENCIES[key], "quantile": quantile}
                yield {**named, **row, "agree": row["buckets_apart"] <= 1}


def _seconds(value: float) -> str:
    """Three digits, in seconds or milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
