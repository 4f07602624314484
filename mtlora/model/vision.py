"""A frozen vision encoder with an adapter beside it.

Shape suffixes: B images, C channels, H rows and W columns of pixels, F length of a feature.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from mtlora.adapter import AdapterSet, Attachment
from mtlora.backbone import BackboneIdentity, identify
from mtlora.checkpoint.format import Checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.methods import BaselineConfig, attach_baseline
from mtlora.task import TaskSpec
from mtlora.vision.encoder import VisionEncoder, load_encoder
from mtlora.vision.families import VisionConfig, read_normalisation
from mtlora.vision.image_input import Pooling

Channels = tuple[float, float, float]


@dataclass
class AdaptedEncoder:
    """An encoder with an adapter or a baseline, and the pixel mean and standard deviation that it was trained with."""

    encoder: VisionEncoder
    adapters: Attachment
    backbone: BackboneIdentity
    mean: Channels
    std: Channels

    @property
    def model(self) -> VisionEncoder:
        """The encoder."""
        return self.encoder

    @property
    def device(self) -> torch.device:
        """The encoder's device."""
        return next(self.encoder.parameters()).device

    def features(self, pixels_BCHW: torch.Tensor, bias_index_B: torch.Tensor | None, pooling: Pooling) -> torch.Tensor:
        """Features [B, F] in float32, with the adapter. The inputs may be on any device.

        bias_index_B: the task of each image; None if the adapter does not get the task.
        """
        bias_index_B = None if bias_index_B is None else bias_index_B.to(self.device)
        with self.adapters.context.use(bias_index_B):
            return self.encoder.features(pixels_BCHW.to(self.device), pooling).float()


def fitted_tasks(tasks: Iterable[TaskSpec], config: VisionConfig) -> list[TaskSpec]:
    """Tasks of images with a size and a pooling that the backbone allows, where the tasks leave these open."""
    return [
        task if task.image is None else task.model_copy(update={"image": config.fitted(task.image)}) for task in tasks
    ]


def new_adapted_encoder(
    folder: Path, config: MtLoRAConfig | BaselineConfig, num_tasks: int, dtype: torch.dtype
) -> AdaptedEncoder:
    """A backbone with a new adapter or baseline, initialised as in `language.new_adapted_model`. Raises MtLoRAError."""
    encoder, backbone = load_encoder(folder, dtype), identify(folder)
    if isinstance(config, MtLoRAConfig):
        adapters = AdapterSet(config, backbone.hidden_size, backbone.num_layers, num_tasks)
        adapters.attach(encoder)
        return AdaptedEncoder(encoder, adapters, backbone, *read_normalisation(folder))
    return AdaptedEncoder(encoder, attach_baseline(config, encoder), backbone, *read_normalisation(folder))


def load_adapted_encoder(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> AdaptedEncoder:
    """A backbone with a checkpoint's adapter, in evaluation mode. The adapter computes in float32."""
    adapted = new_adapted_encoder(folder, checkpoint.manifest.config, len(checkpoint.manifest.tasks), dtype)
    adapted.adapters.load_state_dict({name: tensor.float() for name, tensor in checkpoint.paths.items()})
    adapted.adapters.eval()
    return adapted
