"""Parts of an adapter that the server applies itself: heads (feature to logits) and projectors (states to soft tokens).

Shape suffixes: C classes, D hidden size, F size of a task's feature, T positions of an image, S soft tokens, K length
of a soft token's patch states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mtlora.vision.image_input import Pooling, merged, task_feature
from server.registry.source import TENSORS_FILE

if TYPE_CHECKING:
    from mtlora.checkpoint.format import AdapterManifest


@dataclass(frozen=True, eq=False)
class Head:
    """A task's head."""

    weight_CF: NDArray[np.float32]
    bias_C: NDArray[np.float32]
    pooling: Pooling

    def logits(self, feature: NDArray[np.float32]) -> Sequence[float]:
        """The logits for a feature that the engine returned."""
        feature_F = task_feature(feature, self.pooling, self.weight_CF.shape[1])
        logits: list[float] = (self.weight_CF @ feature_F + self.bias_C).tolist()
        return logits


@dataclass(frozen=True, eq=False)
class ServedProjector:
    """Turns an image's states into soft tokens of the language backbone."""

    weight_DK: NDArray[np.float32]
    bias_D: NDArray[np.float32]
    merge: int

    def soft_tokens(self, states_TD: NDArray[np.float32], num_prefix: int) -> NDArray[np.float32]:
        """Soft tokens [S, D] from the engine's states; see `merged`."""
        rows_SD: NDArray[np.float32] = merged(states_TD, num_prefix, self.merge) @ self.weight_DK.T + self.bias_D
        return rows_SD


def read_projector(folder: Path, manifest: "AdapterManifest") -> ServedProjector | None:
    """The projector of a verified adapter, if it has one."""
    from safetensors import safe_open

    from mtlora.checkpoint.format import PROJECTOR_NAMES

    if manifest.projector is None:
        return None
    with safe_open(folder / TENSORS_FILE, framework="pt") as tensors:
        weight_DK, bias_D = (tensors.get_tensor(name).float().numpy() for name in PROJECTOR_NAMES)
    return ServedProjector(weight_DK, bias_D, manifest.projector.merge)


def read_heads(folder: Path, manifest: "AdapterManifest") -> Mapping[str, Head]:
    """The head of each task of a verified adapter of images, by task."""
    from safetensors import safe_open

    from mtlora.checkpoint.format import head_names

    heads = {}
    with safe_open(folder / TENSORS_FILE, framework="pt") as tensors:
        for row, task in enumerate(manifest.tasks):
            if task.image is not None:
                weight_CF, bias_C = (tensors.get_tensor(name).float().numpy() for name in head_names(row))
                heads[task.id] = Head(weight_CF, bias_C, task.image.pooling)
    return heads
