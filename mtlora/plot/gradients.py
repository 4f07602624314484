"""A picture of how tasks' gradients agree."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mtlora.plot.figure import figure, label


def plot_gradients(found: Mapping[str, torch.Tensor], tasks: Sequence[str], out: Path) -> None:
    """A matrix of cosines [T, T] a panel, with its mean over pairs and the share of pairs that pull apart."""
    count = len(tasks)
    side = max(3.2, 0.17 * count)
    with figure(out, 1, len(found), size=(side * len(found) + 2.6, side + 0.9)) as (made, axes):
        for i, (panel, (name, matrix)) in enumerate(zip(axes[0], found.items(), strict=True)):
            values = matrix.numpy()
            image = panel.imshow(values, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
            pairs = values[~np.eye(count, dtype=bool)]
            told = f"mean {pairs.mean():.2f}, below zero {np.mean(pairs < 0):.0%}" if count > 1 else "one task"
            panel.set_title(f"{name}\n{told}", fontsize=9, loc="left")
            names = [label(task) for task in tasks] if i == 0 else []
            panel.set_yticks(range(len(names)), names, fontsize=6)
            panel.tick_params(length=0)
            panel.set_xticks([])
        made.colorbar(image, ax=axes, shrink=0.7, label="cosine between task gradients")
