"""The report's pictures, as SVG text."""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from loadtest.histogram import Latency
from loadtest.recorder import OTHER

matplotlib.use("Agg")
matplotlib.rcParams |= {
    "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e8eb",
    "axes.axisbelow": True, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip

BLUE, ORANGE, GREY, RED, GREEN = "#1f6f8b", "#d9822b", "#9aa1a8", "#b3261e", "#3a7d44"
_BY_QUANTILE = (("p50", "half of the requests (p50)", GREEN), ("p95", "p95", BLUE), ("p99", "p99", ORANGE))
# The most rows of one picture.
TOP = 25


def throughput(steps: Sequence[Mapping[str, Any]], knee: float | None) -> str:
    """Answered and good requests a second against the offered load."""
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = sorted(steps, key=lambda step: step["offered"])
    offered = [step["offered"] for step in steps]
    highest = max(offered)
    axes.plot([0, highest], [0, highest], "--", color=GREY, lw=1, label="everything offered is answered at once")
    axes.plot(offered, [s["throughput"] for s in steps], "o-", color=BLUE, label="throughput: answered")
    axes.plot(offered, [s["goodput"] for s in steps], "s-", color=ORANGE, label="goodput: within the service level")
    if knee is not None:
        axes.axvline(knee, color=GREEN, lw=1.5)
        axes.annotate(
            f"knee: {knee:.1f}/s", (knee, highest * 0.04), xytext=(5, 0), textcoords="offset points", color=GREEN
        )
    axes.set(xlabel="offered load, requests a second", ylabel="requests a second", xlim=(0, None), ylim=(0, None))
    axes.legend(loc="upper left")
    return _svg(figure)


def latency_by_load(phases: Sequence[Mapping[str, Any]], objective: Mapping[str, float], knee: float | None) -> str:
    """TTFT, inter-token and end-to-end latency against the offered load; log scale."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    phases = sorted(phases, key=lambda phase: phase["offered_per_second"])
    panels = figure.subplots(1, 3)
    for axes, (key, title, limit) in zip(panels, _latencies(objective), strict=True):
        for quantile, name, colour in _BY_QUANTILE:
            points = [(p["offered_per_second"], p["total"][key][quantile]) for p in phases if p["total"][key]["count"]]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, label=name) if points else None
        if limit:
            axes.axhline(limit, color=RED, ls="--", lw=1, label="service level, for p95")
        if knee is not None:
            axes.axvline(knee, color=GREEN, lw=1.5, alpha=0.6, label="knee")
        axes.set(title=title, xlabel="offered load, requests a second", xlim=(0, None))
        _log_seconds(axes.set_yscale, axes.yaxis)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return _svg(figure)


def distribution(phase: Mapping[str, Any]) -> str:
    """The share of requests that were at least as fast as a time."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axes = figure.subplots()
    fastest = []
    for (key, title, _), colour in zip(_latencies({}), (BLUE, GREY, ORANGE), strict=True):
        points = Latency.decode(phase["total"][key]["hdr"]).points()
        if not points:
            continue
        whole = sum(count for _, count in points)
        seen, shares = 0, []
        for _, count in points:
            seen += count
            shares.append(100 * seen / whole)
        axes.step([seconds for seconds, _ in points], shares, where="post", color=colour, label=title)
        # Messages that arrive together have gaps near 0, which would fill most of a logarithmic axis.
        fastest.append(next(seconds for (seconds, _), share in zip(points, shares, strict=True) if share >= 2))
    for share in (50, 95, 99):
        axes.axhline(share, color=GREY, lw=0.6)
        axes.annotate(f"p{share}", (1, share), xycoords=("axes fraction", "data"), color=GREY, fontsize=8, va="bottom")
    axes.set(xlabel="latency", ylabel="requests at least as fast, %", ylim=(0, 101))
    _log_seconds(axes.set_xscale, axes.xaxis)
    if fastest:
        axes.set_xlim(left=min(fastest) / 1.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1.06, 1.0), frameon=False)
    return _svg(figure)


def by_name(groups: Mapping[str, Mapping[str, Any]], what: str) -> str:
    """TTFT, inter-token and end-to-end latency of each task or tenant: a line from p50 to p99."""
    rows = top_rows(groups)
    figure = Figure(figsize=(11, 0.27 * len(rows) + 1.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (key, title, _) in zip(panels, _latencies({}), strict=True):
        seen = [(y, group[key]) for y, (_, group) in enumerate(rows) if group[key]["count"]]
        places = [y for y, _ in seen]
        axes.hlines(
            places, [at["p50"] for _, at in seen], [at["p99"] for _, at in seen], color="#c7ccd1", lw=2, zorder=1
        )
        for quantile, _, colour in _BY_QUANTILE:
            axes.scatter([at[quantile] for _, at in seen], places, color=colour, s=18, zorder=2)
        axes.set(title=title, xlabel="seconds", xlim=(0, None), ylim=(len(rows) - 0.4, -0.6))
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(left=False)
    panels[0].set_yticks(range(len(rows)), [name.replace("_", " ") for name, _ in rows])
    panels[0].set_ylabel(what)
    handles = [panels[0].scatter([], [], color=colour, s=18, label=name) for _, name, colour in _BY_QUANTILE]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return _svg(figure)


def top_rows(groups: Mapping[str, Mapping[str, Any]], count: int = TOP) -> list[tuple[str, Mapping[str, Any]]]:
    """The `count` groups with the most requests, sorted by name; a last row sums all others."""
    ranked = sorted(
        ((name, group) for name, group in groups.items() if name != OTHER), key=lambda row: (-row[1]["offered"], row[0])
    )
    rest = [group for _, group in ranked[count:]] + ([groups[OTHER]] if OTHER in groups else [])
    shown = sorted(ranked[:count])
    return [*shown, (OTHER, _together(rest))] if rest else shown


def over_time(phases: Sequence[Mapping[str, Any]]) -> str | None:
    """The server's own metrics from the first phase to the last; None without metrics."""
    panels = [
        ("requests in the server", [("mtlora_requests_in_flight", "admitted", GREY),
                                    ("mtlora_engine_running_sequences", "running in the engine", BLUE),
                                    ("mtlora_engine_waiting_sequences", "waiting in the engine", ORANGE)]),
        ("tokens a second", [("mtlora_prompt_tokens_per_second", "read (prompts)", BLUE),
                             ("mtlora_completion_tokens_per_second", "written (answers)", ORANGE)]),
        ("KV cache in use", [("mtlora_engine_kv_cache_usage_ratio", "share", BLUE)]),
    ]  # fmt: skip
    watched = [phase for phase in phases if phase["server"] and phase["server"]["seconds"]]
    names = {name for phase in watched for name in phase["server"]["values"]}
    panels = [(title, [line for line in lines if line[0] in names]) for title, lines in panels]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    figure = Figure(figsize=(11, 1.9 * len(panels) + 0.6), layout="constrained")
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(every, panels, strict=True):
        for number, phase in enumerate(watched):
            seconds = [phase["began_s"] + each for each in phase["server"]["seconds"]]
            axes.axvspan(seconds[0], seconds[-1], color="#f1f3f5" if number % 2 else "#e9eef1", zorder=0, lw=0)
            for name, label, colour in lines:
                values = phase["server"]["values"].get(name, [])
                points = [(s, v) for s, v in zip(seconds, values, strict=False) if v is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, lw=1.4, label=None if number else label)
        axes.set(title=title, ylim=(0, None))
        if len(lines) > 1:
            handles = [axes.plot([], [], color=colour, label=label)[0] for _, label, colour in lines]
            axes.legend(handles=handles, loc="upper left", ncols=3, fontsize=8)
    every[-1].set_xlabel("seconds since the start of the test; each band is one phase")
    return _svg(figure)


def _together(groups: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Several groups as one."""
    groups = list(groups)
    whole: dict[str, Any] = {}
    for key in ("offered", "ok", "good", "exact", "scored", "completion_tokens"):
        whole[key] = sum(group[key] for group in groups)
    for key in ("ttft", "itl", "e2e"):
        latency = Latency()
        for group in groups:
            latency.merge(Latency.decode(group[key]["hdr"]))
        whole[key] = latency.to_json()
    return whole


def _latencies(objective: Mapping[str, float]) -> tuple[tuple[str, str, float | None], ...]:
    return (
        ("ttft", "time to first token", objective.get("ttft_s")),
        ("itl", "between tokens", None),
        ("e2e", "end to end", objective.get("e2e_s")),
    )


def _log_seconds(set_scale: Callable[[str], None], axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0), numticks=9))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"))


def _svg(figure: Figure) -> str:
    """The figure as an element of a page: without XML header, scaled to the page's width."""
    written = io.StringIO()
    # Keep text as text: it can be searched, and the file stays small.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mtlora"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'^<svg([^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', r'<svg\1 style="max-width:\2pt"', text)
