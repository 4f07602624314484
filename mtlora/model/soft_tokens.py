"""Images in text prompts: a frozen encoder's patch states, a trained projector, soft tokens among token embeddings.

Shape suffixes: B images, T positions of an image, D_v hidden size of the vision backbone, D of the language backbone,
S soft tokens, K = merge² * D_v numbers of a soft token's patches, P soft tokens of several images, L positions.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from mtlora.backbone import BackboneIdentity, identify
from mtlora.checkpoint.format import Checkpoint, ProjectorConfig
from mtlora.errors import MtLoRAError, differences
from mtlora.suite.base import Example
from mtlora.suite.vision.pixels import read_pixels
from mtlora.task import TaskSpec
from mtlora.vision.encoder import load_encoder
from mtlora.vision.families import read_config, read_normalisation
from mtlora.vision.image_input import ImagePreparation, merged
from mtlora.vision.images import prepare

if TYPE_CHECKING:
    from mtlora.model.language import Placed

_BATCH = 16
_LEAST = 1e-6
# Ridge penalty, relative to the sum of squares of one standardised input.
_RIDGE = 0.1


class Projector(nn.Module):
    """Standardises patches' states, then maps them to input embeddings of the language backbone by a linear layer."""

    mean_K: torch.Tensor
    std_K: torch.Tensor

    def __init__(self, K: int, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D, K))
        self.bias = nn.Parameter(torch.zeros(D))
        self.register_buffer("mean_K", torch.zeros(K))
        self.register_buffer("std_K", torch.ones(K))

    def forward(self, states_PK: torch.Tensor) -> torch.Tensor:
        """Soft tokens [P, D] in float32."""
        return nn.functional.linear((states_PK - self.mean_K) / self.std_K, self.weight, self.bias)

    @torch.no_grad()
    def fit(self, states_PK: torch.Tensor, words_PD: torch.Tensor, embeddings_VD: torch.Tensor) -> None:
        """Initialise by ridge regression: patches map near the words of the answers about such images.

        words_PD: for each soft token, the mean embedding of its image's answers. Soft tokens get the embeddings' mean
        and standard deviation.
        """
        self.mean_K.copy_(states_PK.mean(0))
        # The deviation of one soft token is 0.
        self.std_K.copy_(states_PK.std(0, correction=min(1, len(states_PK) - 1)).clamp_min(_LEAST))
        standard_PK = (states_PK - self.mean_K) / self.std_K
        P, K = standard_PK.shape
        gram_KK = standard_PK.T @ standard_PK + _RIDGE * P * torch.eye(K, device=standard_PK.device)
        weight_KD = torch.linalg.solve(gram_KK, standard_PK.T @ (words_PD - words_PD.mean(0)))
        mean_D = embeddings_VD.float().mean(0)
        spread = (embeddings_VD.float() - mean_D).std() / (standard_PK @ weight_KD).std().clamp_min(_LEAST)
        self.weight.copy_(spread * weight_KD.T)
        self.bias.copy_(mean_D)

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight [D, K], bias [D]) that apply to states directly, with the standardisation included."""
        weight_DK = self.weight.detach() / self.std_K
        return weight_DK, self.bias.detach() - weight_DK @ self.mean_K

    @torch.no_grad()
    def unfold(self, weight_DK: torch.Tensor, bias_D: torch.Tensor) -> None:
        """Set weight and bias from the form that `folded` returns."""
        weight_DK, bias_D = weight_DK.float(), bias_D.float()
        self.weight.copy_(weight_DK * self.std_K)
        self.bias.copy_(bias_D + weight_DK @ self.mean_K)


class ImageReader:
    """Turns images into soft tokens. Encodes each image once and caches its states in float16.

    Raises BackboneError for a folder without a vision backbone.
    """

    def __init__(self, folder: Path, merge: int, hidden_size: int) -> None:
        self.backbone: BackboneIdentity = identify(folder)
        self.config = read_config(folder)
        self.merge = merge
        self.projector = Projector(merge**2 * self.config.hidden_size, hidden_size)
        self._mean, self._std = read_normalisation(folder)
        self._encoder = load_encoder(folder)
        self._states: dict[str, torch.Tensor] = {}

    @property
    def projector_config(self) -> ProjectorConfig:
        """The projector's entry in a checkpoint's manifest."""
        return ProjectorConfig(backbone=self.backbone, merge=self.merge)

    def fitted_tasks(self, tasks: Iterable[TaskSpec]) -> list[TaskSpec]:
        """Tasks whose images have a size that the squares of patches divide, where the tasks leave it open."""
        fitted = []
        for task in tasks:
            if task.picture is not None:
                size = self.config.fitted_size(task.picture, self.merge)
                task = task.model_copy(update={"picture": task.picture.model_copy(update={"size": size})})
            fitted.append(task)
        return fitted

    def num_soft_tokens(self, preparation: ImagePreparation) -> int:
        """S for an image of a task. Raises BackboneError if squares of merge x merge patches do not divide its size."""
        return self.config.num_soft_tokens(preparation.size, self.merge)

    def read(self, tasks: Iterable[TaskSpec], examples: Sequence[Example]) -> list[str | None]:
        """The key of each example's image, None for tasks without image. Encodes new images.

        Raises ImageError naming the example, SuiteError for an example without an image.
        """
        by_id = {task.id: task.picture for task in tasks}
        keys: list[str | None] = []
        new: dict[str, tuple[Example, ImagePreparation]] = {}
        for example in examples:
            if (preparation := by_id[example.task_id]) is None:
                keys.append(None)
                continue
            self.num_soft_tokens(preparation)
            digest = hashlib.sha256(example.encoded_image() + preparation.model_dump_json().encode()).hexdigest()
            keys.append(digest)
            if digest not in self._states:
                new.setdefault(digest, (example, preparation))
        self._look(new)
        return keys

    @torch.inference_mode()
    def _look(self, new: dict[str, tuple[Example, ImagePreparation]]) -> None:
        # All images of a batch have one size.
        order = sorted(new, key=lambda key: new[key][1].size)
        device = self.projector.weight.device
        self._encoder.to(device)
        with tqdm(total=len(order), desc="look at images", unit="image", leave=False, disable=None) as bar:
            for start in range(0, len(order), _BATCH):
                sizes: dict[int, list[str]] = {}
                for key in order[start : start + _BATCH]:
                    sizes.setdefault(new[key][1].size, []).append(key)
                for keys in sizes.values():
                    pixels_BCSS = torch.stack([self._pixels(*new[key]) for key in keys]).to(device)
                    states_BTD = self._encoder(self._encoder.embed(pixels_BCSS))
                    for key, states_TD in zip(keys, states_BTD, strict=True):
                        found_SK = merged(states_TD, self.config.num_prefix, self.merge)
                        self._states[key] = found_SK.to(torch.float16).cpu()
                    bar.update(len(keys))

    def _pixels(self, example: Example, preparation: ImagePreparation) -> torch.Tensor:
        return torch.from_numpy(prepare(read_pixels(example, preparation.size), preparation, self._mean, self._std))

    def states(self, keys: Iterable[str]) -> torch.Tensor:
        """States [P, K] of read images, concatenated, in float32."""
        return torch.cat([self._states[key] for key in keys]).float()

    def embedded(self, embeds_BLD: torch.Tensor, images: "Sequence[Placed]") -> torch.Tensor:
        """Embeddings [B, L, D] with the images' soft tokens at their flat positions in the batch."""
        device = embeds_BLD.device
        rows_P = torch.cat([image.at + torch.arange(len(self._states[image.key])) for image in images])
        soft_PD = self.projector(self.states([image.key for image in images]).to(device)).to(embeds_BLD.dtype)
        return embeds_BLD.flatten(0, 1).index_copy(0, rows_P.to(device), soft_PD).view_as(embeds_BLD)


def load_reader(folder: Path, checkpoint: Checkpoint) -> ImageReader:
    """The reader of a checkpoint with a projector. Raises MtLoRAError for a different vision backbone."""
    config = checkpoint.manifest.projector
    assert config is not None
    for field, (expected, found) in differences(config.backbone, identify(folder)).items():
        raise MtLoRAError(f"{folder}: {field}: expected {expected!r}, as the adapter's projector, found {found!r}")
    reader = ImageReader(folder, config.merge, checkpoint.manifest.backbone.hidden_size)
    reader.projector.unfold(*checkpoint.projector)
    return reader
