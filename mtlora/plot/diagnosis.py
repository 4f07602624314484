"""Charts of the results of `mtlora.train.diagnosis`: routing, the experts' singular values, task gradients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtlora.plot.figure import COLOURS, HEAT, clean, figure, label
from mtlora.train.diagnosis import Routing, Spectra

_COLUMNS = 6
_LAYERS, _GROUPS = 5, 8


def plot_routing(routing: Routing, out: Path) -> None:
    """A heat map per block: the mean weight of each expert (columns) on each task's tokens (rows), over all groups."""
    maps = routing.weights_TMGN.mean(2)
    blocks, tasks = len(routing.blocks), len(routing.tasks)
    rows = -(-blocks // _COLUMNS)
    columns = min(_COLUMNS, blocks)
    high = max(0.2 + 0.075 * tasks, 0.9)
    with figure(out, rows, columns, size=(1.9 * columns + 1.6, high * rows + 0.9)) as (made, axes):
        for i, panel in enumerate(axes.flat):
            if i >= blocks:
                panel.axis("off")
                continue
            image = _heat(panel, maps[:, i], float(maps.max()))
            panel.set_title(routing.blocks[i], fontsize=8, pad=2)
            _name_tasks(panel, routing.tasks if i % columns == 0 else (), 4.5)
        made.colorbar(image, ax=axes, shrink=0.4, label="mean routing weight ÷ an even share")
        made.suptitle(f"Which of {maps.shape[-1]} experts each task uses, a block a panel", x=0.01, ha="left")


def plot_groups(routing: Routing, out: Path) -> None:
    """The same for single groups: rows of panels are blocks, columns groups; a few of them, evenly picked."""
    _, M, G, N = routing.weights_TMGN.shape
    blocks, groups = _picked(M, _LAYERS), _picked(G, _GROUPS)
    tasks = len(routing.tasks)
    high = max(0.25 + 0.085 * tasks, 0.9)
    size = (1.9 * len(groups) + 2.0, high * len(blocks) + 0.9)
    with figure(out, len(blocks), len(groups), size=size) as (made, axes):
        for i, block in enumerate(blocks):
            for j, group in enumerate(groups):
                panel = axes[i][j]
                image = _heat(panel, routing.weights_TMGN[:, block, group], float(routing.weights_TMGN.max()))
                panel.set_title(f"{routing.blocks[block]}, group {group}", fontsize=8, pad=2)
                _name_tasks(panel, routing.tasks if j == 0 else (), 5)
        made.colorbar(image, ax=axes, shrink=0.4, label="mean routing weight ÷ an even share")
        made.suptitle(f"Experts (columns, {N}) by task, in {len(groups)} of {G} groups", x=0.01, ha="left")


def plot_use(routing: Routing, out: Path) -> None:
    """Effective numbers of experts per block, and how differently tasks and groups route."""
    N = routing.weights_TMGN.shape[-1]
    layers = range(len(routing.blocks))
    with figure(out, 1, 2, size=(11, 3.8)) as (_, axes):
        left, right = axes[0]
        for name, values, colour in (
            ("all tasks together", routing.experts_of_all(), COLOURS[0]),
            ("one task", routing.experts_of_a_task(), COLOURS[1]),
            ("one token", routing.experts_of_a_token(), COLOURS[2]),
        ):
            left.plot(layers, values, marker=".", color=colour, label=f"{name}: {float(values.mean()):.1f}")
        left.axhline(N, color="#8d979f", linestyle=":", linewidth=1)
        left.set_ylim(0.9, N * 1.05)
        for name, values, colour in (
            ("between tasks", routing.between_tasks(), COLOURS[0]),
            ("between groups", routing.between_groups(), COLOURS[1]),
        ):
            right.plot(layers, values, marker=".", color=colour, label=f"{name}: {float(values.mean()):.2f}")
        right.set_ylim(bottom=0)
        clean(left, f"experts in use, exp(routing entropy), of {N}", "block")
        clean(right, "how far routing differs (Jensen–Shannon, share of maximum)", "block")
        for panel in (left, right):
            panel.legend(frameon=False, fontsize=9)


def _heat(panel: Any, weights: Any, top: float) -> Any:
    """Draw weights [rows, N] as multiples of 1/N, with different colours above and below 1."""
    from matplotlib.colors import TwoSlopeNorm

    N = weights.shape[-1]
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(top * N, 1.01))
    return panel.imshow(np.asarray(weights) * N, aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest")


def _name_tasks(panel: Any, tasks: Sequence[str], size: float) -> None:
    panel.set_yticks(range(len(tasks)), [label(task) for task in tasks], fontsize=size)
    panel.tick_params(length=0)
    panel.set_xticks([])


def _picked(total: int, most: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, total - 1, min(total, most))})


def plot_spectra(found: Spectra, out: Path) -> None:
    """Singular values per block, effective ranks, and how much the experts overlap."""
    import matplotlib

    M, N, r = found.sigma_MNr.shape
    strongest = found.sigma_MNr[..., :1].clamp_min(1e-12)
    relative = (found.sigma_MNr / strongest).mean(1)
    rank = found.effective_rank()
    with figure(out, 1, 3, size=(14, 3.8)) as (made, axes):
        first, second, third = axes[0]
        colours = matplotlib.colormaps[HEAT](np.linspace(0, 1, M))
        for values, colour in zip(relative, colours, strict=True):
            first.plot(range(1, r + 1), values, color=colour, linewidth=1)
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, max(1, M - 1)), HEAT)
        made.colorbar(scale, ax=first, label="block")
        first.set_yscale("log")
        clean(first, "singular values ÷ the largest, mean over experts", "component")
        second.fill_between(range(M), rank.amin(1), rank.amax(1), color=COLOURS[4], alpha=0.4, label="least to most")
        second.plot(range(M), rank.mean(1), marker=".", color=COLOURS[0], label=f"mean: {float(rank.mean()):.1f}")
        second.axhline(r, color="#8d979f", linestyle=":", linewidth=1)
        second.set_ylim(0, r * 1.05)
        clean(second, f"effective rank of an expert, of {r}", "block")
        second.legend(frameon=False, fontsize=9)
        third.plot(range(M), found.overlap_M, marker=".", color=COLOURS[0])
        third.set_ylim(0, 1)
        clean(third, f"overlap of the {N} experts' ranges (1: the same)", "block")


def plot_gradients(found: Mapping[str, torch.Tensor], tasks: Sequence[str], out: Path) -> None:
    """Draw a panel for each matrix of cosines [T, T], with its mean over pairs and the share of negative pairs."""
    count = len(tasks)
    side = max(3.2, 0.17 * count)
    with figure(out, 1, len(found), size=(side * len(found) + 2.6, side + 0.9)) as (made, axes):
        for i, (panel, (name, matrix)) in enumerate(zip(axes[0], found.items(), strict=True)):
            values = matrix.numpy()
            image = panel.imshow(values, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
            pairs = values[~np.eye(count, dtype=bool)]
            told = f"mean {pairs.mean():.2f}, below zero {np.mean(pairs < 0):.0%}" if count > 1 else "one task"
            panel.set_title(f"{name}\n{told}", fontsize=9, loc="left")
            _name_tasks(panel, tasks if i == 0 else (), 6)
        made.colorbar(image, ax=axes, shrink=0.7, label="cosine between task gradients")
