"""A picture of a throughput run: a bar for each row, with its spread, its ratio to the backbone, and its goals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OURS, _BACKBONE, _FIELD, _GOAL, _INK = "#1f6f8b", "#8d979f", "#c98b53", "#a3262a", "#222222"
_COLOURS = {"backbone": _BACKBONE, "vllm-backbone": _FIELD, "vllm-multi-lora": _FIELD, "peft-mixed-batches": _FIELD}


def draw(report: Mapping[str, Any], out: Path) -> None:
    """Draw what `benchmarks.throughput.make_report` made. The format follows `out`'s suffix.

    A goal is a ratio to another row. Its mark stands where this row's bar must end to reach it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    names = list(rows)[::-1]
    rates = {name: rows[name]["requests_per_second"] for name in names}
    widest = max(rate["max"] for rate in rates.values())
    figure, axes = plt.subplots(figsize=(8.5, 0.5 * len(names) + 1.3), layout="constrained")
    for y, name in enumerate(names):
        rate = rates[name]
        axes.barh(y, rate["median"], height=0.62, color=_COLOURS.get(name, _OURS), zorder=2)
        axes.errorbar(
            rate["median"], y, xerr=[[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]], color=_INK,
            capsize=3, linewidth=1, zorder=3,
        )  # fmt: skip
        text = f"{rate['median']:.2f}"
        if "backbone" in rates and name != "backbone":
            # The median of the rounds' ratios, as in the printed lines; without one, the ratio of the medians.
            ratio = report["ratios"].get(f"{name}/backbone", {"median": rate["median"] / rates["backbone"]["median"]})
            text += f"   {ratio['median']:.2f} of backbone"
        axes.text(widest * 1.03, y, text, va="center", fontsize=9)
    goals = [
        (names.index(ratio["over"]), ratio["goal"] * rates[ratio["under"]]["median"])
        for ratio in report["ratios"].values()
        if ratio["goal"]
    ]
    for i, (y, goal) in enumerate(goals):
        label = "goal, from the row that it is a ratio to" if i == 0 else None
        axes.plot([goal, goal], [y - 0.42, y + 0.42], color=_GOAL, linewidth=2, zorder=4, label=label)
    axes.set_yticks(range(len(names)), [name.replace("-", " ") for name in names], fontsize=9)
    axes.set_xlim(0, widest * 1.34)
    axes.set_xlabel("requests a second: median of rounds, whiskers from least to most", fontsize=9)
    axes.grid(axis="x", color="#e5e7ea", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    load = report["load"]
    low, high = load["prompt_tokens"]
    axes.set_title(
        f"{load['requests']} requests of {low} to {high} prompt tokens and {load['new_tokens']} new, "
        f"{report['cores']} cores",
        loc="left", fontsize=11,
    )  # fmt: skip
    if goals:
        figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)
