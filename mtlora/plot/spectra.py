"""A picture of the experts' singular values."""

from pathlib import Path

import numpy as np

from mtlora.evaluation.diagnosis import Spectra
from mtlora.plot.figure import COLOURS, HEAT, clean, figure


def plot_spectra(found: Spectra, out: Path) -> None:
    """Singular values a block, effective ranks, and how much the experts overlap."""
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
        first.set_xlabel("component")
        first.set_title("singular values ÷ the largest, mean over experts", loc="left", fontsize=10)
        second.fill_between(range(M), rank.amin(1), rank.amax(1), color=COLOURS[4], alpha=0.4, label="least to most")
        second.plot(range(M), rank.mean(1), marker=".", color=COLOURS[0], label=f"mean: {float(rank.mean()):.1f}")
        second.axhline(r, color="#8d979f", linestyle=":", linewidth=1)
        second.set_ylim(0, r * 1.05)
        second.set_title(f"effective rank of an expert, of {r}", loc="left", fontsize=10)
        second.legend(frameon=False, fontsize=9)
        third.plot(range(M), found.overlap_M, marker=".", color=COLOURS[0])
        third.set_ylim(0, 1)
        third.set_title(f"overlap of the {N} experts' ranges (1: the same)", loc="left", fontsize=10)
        for panel in (second, third):
            panel.set_xlabel("block")
        for panel in (first, second, third):
            clean(panel)
