"""How an image becomes a task's input, for trainer, evaluation and server."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Pooling = Literal["cls", "mean", "cls_mean"]
Resize = Literal["crop", "squash", "pad"]
Augmentation = Literal["flip", "rotate", "crop", "colour"]

_Channels = tuple[float, float, float]
_Spread = Annotated[float, Field(gt=0)]


def num_features(pooling: Pooling, hidden_size: int) -> int:
    """F, the length of an image's feature."""
    return 2 * hidden_size if pooling == "cls_mean" else hidden_size


def task_feature(feature: Any, pooling: Pooling, F: int) -> Any:
    """A task's part [F] of an engine's feature: class token [D] and mean of patches [D], or the mean alone."""
    return feature[:F] if pooling == "cls" else feature[-F:]


def merged(states: Any, num_prefix: int, merge: int) -> Any:
    """The patches' states of one image [S, K], of all its states [T, D]; tensors or numpy arrays.

    num_prefix: states before the patches. merge: patches of a side of the square that becomes one soft token, S in all;
    K = merge² D. Patches lie row by row; so do soft tokens, and a soft token's patches.
    """
    patches = states[num_prefix:]
    side, hidden = round(len(patches) ** 0.5), states.shape[1]
    squares = patches.reshape(side // merge, merge, side // merge, merge, hidden)
    return squares.swapaxes(1, 2).reshape((side // merge) ** 2, merge * merge * hidden)


class ImagePreparation(BaseModel):
    """How an image is prepared for a vision backbone. The backbone's patches must divide `size` evenly."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int = Field(112, ge=8, le=1024, description="width and height in pixels that the backbone sees")
    resize: Resize = Field(
        "squash",
        description="crop: the image's middle square; squash: all of it, made square; pad: all of it, in its shape",
    )
    mean: _Channels | None = Field(None, description="red, green, blue, of values from 0 to 1; null: the backbone's")
    std: tuple[_Spread, _Spread, _Spread] | None = Field(None, description="as mean; null: the backbone's own")


class ImageInput(ImagePreparation):
    """The input of an image task."""

    pooling: Pooling = Field(
        "cls_mean",
        description="the image's feature: the class token's last state, the patches' mean, or both, in this order",
    )
    augment: tuple[Augmentation, ...] = Field(
        ("crop", "colour"), description="what training may do to its images: a digit must not be flipped"
    )
