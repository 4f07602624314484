"""Families of vision backbones: the one place where a new family is added.

A family is a `model_type` of transformers. Its configuration becomes a `VisionConfig`, and its weights get the names of
`encoder.VisionEncoder`, whichever release of transformers saved them. To add one:

1. Add an entry to `FAMILIES`.
2. Add the names of its tensors to `_NAMES`, and the prefix of these names in its models to `_PREFIX`.
3. If its configuration names fields differently, read them in `vision_config`.
4. Add a model to `MODELS` of `tests/mtlora/vision/models.py`. `pytest tests/mtlora/vision` then compares its states
   with those of transformers.

Shape suffixes: D hidden size, P pixels of a patch's side, G patches of the position grid's side.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mtlora.errors import BackboneError
from mtlora.vision.image_input import ImageInput, ImagePreparation


@dataclass(frozen=True)
class Family:
    """Traits of a family that its configurations do not contain.

    nested: the `model_type` of image-text models whose `vision_config` is of this family.
    class_token: whether sequences begin with one. input_norm: a norm between embeddings and layers.
    layer_scale: factors on the blocks' outputs. rotary: positions turn queries and keys (`rotary.py`); none are stored.
    interpolation, antialias: of stored positions to another size.
    normalisation: that of a folder without `preprocessor_config.json`.
    """

    nested: str | None = None
    class_token: bool = True
    input_norm: bool = False
    layer_scale: bool = False
    rotary: bool = False
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = False
    patch_bias: bool = True
    normalisation: "Normalisation" = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# Mean and spread of red, green and blue, of values from 0 to 1, which a backbone's pixels are normalised by.
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: Normalisation = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

FAMILIES = {
    "vit": Family(),
    "dinov2": Family(layer_scale=True, normalisation=IMAGENET),
    "dinov2_with_registers": Family(layer_scale=True, antialias=True, normalisation=IMAGENET),
    "dinov3_vit": Family(layer_scale=True, rotary=True, normalisation=IMAGENET),
    "clip_vision_model": Family(nested="clip", input_norm=True, patch_bias=False, normalisation=_CLIP),
    "siglip_vision_model": Family(nested="siglip", class_token=False),
    "siglip2_vision_model": Family(nested="siglip2", class_token=False, interpolation="bilinear", antialias=True),
}
# Patches of a side of an image whose task leaves its size open.
_PATCHES = 8
# Fields of configurations that switch biases off, and the linear layers that lose theirs.
_BIASES = {
    "qkv_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "query_bias": ("self_attn.q_proj",),
    "key_bias": ("self_attn.k_proj",),
    "value_bias": ("self_attn.v_proj",),
    "proj_bias": ("self_attn.o_proj",),
    "mlp_bias": ("mlp.fc1", "mlp.fc2", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
_FAMILY_OF = {family.nested: name for name, family in FAMILIES.items() if family.nested}
# Of vision backbones, and of models of image and text that have one.
MODEL_TYPES = (*FAMILIES, *_FAMILY_OF)


@dataclass(frozen=True)
class VisionConfig:
    """The architecture of a vision backbone.

    patch_size: P. grid_size: G, of the images that the backbone was trained with, and of stored positions.
    gated: whether an MLP is down(activation(gate x) * up x). without_bias: names of a layer's linear layers.
    rope_theta: the base of rotary positions' angles; None for stored positions.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    grid_size: int
    activation: str
    eps: float
    gated: bool = False
    num_registers: int = 0
    without_bias: tuple[str, ...] = ()
    rope_theta: float | None = None

    @property
    def traits(self) -> Family:
        """Its family's traits."""
        return FAMILIES[self.family]

    @property
    def num_prefix(self) -> int:
        """Positions before the patches: class token and registers."""
        return int(self.traits.class_token) + self.num_registers

    def num_positions(self, size: int) -> int:
        """Positions of an image of size x size pixels. Raises BackboneError if patches do not divide it."""
        if size % self.patch_size or not size:
            raise BackboneError(
                f"an image of {size} x {size} pixels: expected a multiple of the backbone's patch, {self.patch_size}"
            )
        return self.num_prefix + (size // self.patch_size) ** 2

    def num_soft_tokens(self, size: int, merge: int) -> int:
        """Squares of merge x merge patches in an image. Raises BackboneError if they do not divide it."""
        self.num_positions(size)
        squares, rest = divmod(size // self.patch_size, merge)
        if rest:
            raise BackboneError(
                f"an image of {size} x {size} pixels: expected a multiple of {merge} x {merge} patches of "
                f"{self.patch_size}, {merge * self.patch_size}"
            )
        return squares**2

    def fitted(self, image: ImageInput) -> ImageInput:
        """An input whose size and pooling this backbone allows, where the task leaves them open.

        size: see `fitted_size`.
        """
        found: dict[str, object] = {}
        if (size := self.fitted_size(image)) != image.size:
            found["size"] = size
        if "pooling" not in image.model_fields_set and not self.traits.class_token:
            found["pooling"] = "mean"
        return image.model_copy(update=found) if found else image

    def fitted_size(self, image: ImagePreparation, merge: int = 1) -> int:
        """The size of a task's images, in pixels of a side; merge: patches of a side of a soft token's square.

        If the task leaves it open: the default where such squares divide it, else as many squares as fit into 8 patches
        a side, or into those that the backbone was trained with.
        """
        square = merge * self.patch_size
        if "size" in image.model_fields_set or not image.size % square:
            return image.size
        return max(1, min(_PATCHES, self.grid_size) // merge) * square

    def check(self, inputs: Mapping[str, ImageInput]) -> None:
        """Raise BackboneError for a task of images, by its id, whose size or pooling this backbone does not allow."""
        for task, image in inputs.items():
            try:
                self.num_positions(image.size)
            except BackboneError as error:
                raise BackboneError(f"task {task}: {error}") from None
            if image.pooling != "mean" and not self.traits.class_token:
                raise BackboneError(
                    f"task {task}: pooling: found {image.pooling!r}; "
                    f"allowed: 'mean', as {self.family} has no class token"
                )


def is_vision(model_type: str | None) -> bool:
    """Whether a `model_type` is that of a vision backbone, or of a model of image and text that has one."""
    return model_type in MODEL_TYPES


def read_config(folder: Path) -> VisionConfig:
    """The architecture in a folder's `config.json`. Raises BackboneError."""
    try:
        found = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BackboneError(f"{folder}: no readable config.json ({type(error).__name__}: {error})") from error
    if not is_vision(found):
        raise BackboneError(f"{folder}: model_type: found {found!r}; allowed for images: {', '.join(MODEL_TYPES)}")
    # transformers fills in what the file leaves out.
    from transformers import AutoConfig

    try:
        return vision_config(AutoConfig.from_pretrained(folder))
    except BackboneError as error:
        raise BackboneError(f"{folder}: {error}") from None
    except Exception as error:
        raise BackboneError(f"{folder}: config.json: {type(error).__name__}: {error}") from error


def read_normalisation(folder: Path) -> Normalisation:
    """How the backbone's pixels are normalised. Raises BackboneError."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return read_config(folder).traits.normalisation
    try:
        found = json.loads(path.read_text())
        if not found.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean, std = (tuple(map(float, found[name])) for name in ("image_mean", "image_std"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BackboneError(f"{path}: no image_mean and image_std ({type(error).__name__}: {error})") from error
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean)) and all(0 < each < math.inf for each in std)):
        raise BackboneError(f"{path}: image_mean, image_std: expected 3 numbers each, std above 0, found {mean}, {std}")
    return mean, std


def vision_config(config: Any) -> VisionConfig:
    """The architecture of a configuration of transformers. Raises BackboneError."""
    name = _FAMILY_OF.get(config.model_type, config.model_type)
    if name != config.model_type:
        config = config.vision_config
    patch, image = _side("patch_size", config.patch_size), _side("image_size", getattr(config, "image_size", None))
    # siglip2 names the number of its positions.
    grid = math.isqrt(config.num_patches) if image is None else image // (patch or 1)
    if patch is None or config.num_channels != 3:
        raise BackboneError(f"expected patches of 3 channels, found {config.num_channels}, {config.patch_size}")
    if FAMILIES[name].rotary and config.hidden_size % (4 * config.num_attention_heads):
        found = f"found {config.num_attention_heads} heads of {config.hidden_size} dimensions in all"
        raise BackboneError(f"{found}; allowed with rotary positions: heads of a multiple of 4 dimensions")
    swiglu = getattr(config, "use_swiglu_ffn", False)
    middle = getattr(config, "intermediate_size", None) or int(config.hidden_size * config.mlp_ratio)
    return VisionConfig(
        family=name,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        # Like DINOv2: two thirds, rounded up to a multiple of 8.
        intermediate_size=(int(middle * 2 / 3) + 7) // 8 * 8 if swiglu else middle,
        patch_size=patch,
        grid_size=grid,
        activation="silu" if swiglu else config.hidden_act,
        eps=config.layer_norm_eps,
        gated=swiglu or getattr(config, "use_gated_mlp", False),
        num_registers=getattr(config, "num_register_tokens", 0),
        without_bias=tuple(n for field, names in _BIASES.items() if not getattr(config, field, True) for n in names),
        rope_theta=config.rope_theta if FAMILIES[name].rotary else None,
    )


def _side(name: str, value: Any) -> int | None:
    """The side of a square. Raises BackboneError for another shape."""
    if isinstance(value, Iterable):
        sides = set(value)
        if len(sides) != 1:
            raise BackboneError(f"{name}: expected a square, found {list(value)}")
        return int(sides.pop())
    return value


# Prefixes of the vision tower's tensor names in models with a head, or of image and text.
_PREFIX = r"(?:(?:vit|dinov2|dinov2_with_registers|vision_model)\.)?"
_LAYER = r"(?:(?:encoder|model)\.)?layers?\.(\d+)\."
_END = r"\.(weight|bias)"
# Tensor names in files of all families, and in the encoder. No name has different meanings in two families.
_NAMES = [
    (re.compile(_PREFIX + source), target)
    for source, target in (
        (r"embeddings\.(?:cls_token|class_embedding)", "embeddings.class_token"),
        (r"embeddings\.register_tokens", "embeddings.registers"),
        (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "embeddings.positions"),
        (r"embeddings\.patch_embeddings?(?:\.projection)?" + _END, r"embeddings.patches.\1"),
        (r"pre_layrnorm" + _END, r"embeddings.norm.\1"),
        (r"(?:layernorm|post_layernorm|norm)" + _END, r"model.norm.\1"),
        (_LAYER + r"(?:norm1|layernorm_before|layer_norm1)" + _END, r"model.layers.\1.norm1.\2"),
        (_LAYER + r"(?:norm2|layernorm_after|layer_norm2)" + _END, r"model.layers.\1.norm2.\2"),
        (_LAYER + r"(?:attention|self_attn)\.([qkv])_proj" + _END, r"model.layers.\1.self_attn.\2_proj.\3"),
        (_LAYER + r"attention\.attention\.([qkv])(?:uery|ey|alue)" + _END, r"model.layers.\1.self_attn.\2_proj.\3"),
        (
            _LAYER + r"(?:attention\.o_proj|self_attn\.out_proj|attention\.output\.dense)" + _END,
            r"model.layers.\1.self_attn.o_proj.\2",
        ),
        (_LAYER + r"(?:mlp\.fc1|intermediate\.dense)" + _END, r"model.layers.\1.mlp.fc1.\2"),
        (_LAYER + r"(?:mlp\.fc2|output\.dense)" + _END, r"model.layers.\1.mlp.fc2.\2"),
        (_LAYER + r"mlp\.(gate_proj|up_proj|down_proj|weights_in)" + _END, r"model.layers.\1.mlp.\2.\3"),
        (_LAYER + r"mlp\.weights_out" + _END, r"model.layers.\1.mlp.down_proj.\2"),
        (_LAYER + r"layer_scale1\.lambda1", r"model.layers.\1.self_attn.o_proj.scale"),
        (_LAYER + r"layer_scale2\.lambda1", r"model.layers.\1.mlp.scale"),
    )
]


def encoder_name(name: str) -> str | None:
    """The encoder's name of a file's tensor; None for one that is no part of the encoder, such as a head's."""
    for source, target in _NAMES:
        if match := source.fullmatch(name):
            return match.expand(target)
    return None


def encoder_tensors(config: VisionConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The encoder's state of a file's tensors.

    LayerScale is folded into the last linear layer of its block, so that a block's output is F(x); a missing bias
    becomes zero. Raises BackboneError for missing tensors or wrong shapes.
    """
    found = {name: tensor for source, tensor in tensors if (name := encoder_name(source))}
    for name in [name for name in found if ".weights_in." in name]:
        gate, up = found.pop(name).chunk(2)
        found |= {name.replace("weights_in", "gate_proj"): gate, name.replace("weights_in", "up_proj"): up}
    if not any(".mlp.gate_proj." in name for name in found):
        # Without a gate, DINOv3 keeps the names of the other two layers.
        renamed = (name.replace("mlp.up_proj", "mlp.fc1").replace("mlp.down_proj", "mlp.fc2") for name in found)
        found = dict(zip(renamed, found.values(), strict=True))
    shapes = dict(_shapes(config))
    for name in _without_bias(config):
        if name in shapes:
            found.setdefault(name, torch.zeros(shapes[name]))
    state = {}
    for name, shape in shapes.items():
        if name not in found:
            raise BackboneError(f"tensor {name}: expected in a {config.family} backbone, found none")
        tensor = _laid_out(name, found[name], config)
        if tuple(tensor.shape) != shape:
            raise BackboneError(f"tensor {name}: expected shape {list(shape)}, found {list(tensor.shape)}")
        state[name] = tensor
    last = "down_proj" if config.gated else "fc2"
    for name in [name for name in state if name.endswith(".scale")]:
        scale_D = state.pop(name).float()
        linear = name.removesuffix(".scale").replace(".mlp", f".mlp.{last}")
        weight, bias = state[f"{linear}.weight"], state[f"{linear}.bias"]
        state[f"{linear}.weight"] = (weight.float() * scale_D.unsqueeze(1)).to(weight.dtype)
        state[f"{linear}.bias"] = (bias.float() * scale_D).to(bias.dtype)
    return state


def _laid_out(name: str, tensor: torch.Tensor, config: VisionConfig) -> torch.Tensor:
    """A tensor in the encoder's layout."""
    if name == "embeddings.patches.weight" and tensor.dim() == 2:
        # siglip2 multiplies patches of [rows, columns, channels].
        P = config.patch_size
        if tensor.shape[1] == 3 * P * P:
            return tensor.view(-1, P, P, 3).permute(0, 3, 1, 2)
    if name in ("embeddings.class_token", "embeddings.registers", "embeddings.positions"):
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor
        return rows[0] if name == "embeddings.class_token" and len(rows) == 1 else rows
    return tensor


def _without_bias(config: VisionConfig) -> Iterator[str]:
    """Biases that the family, or the configuration, leaves out."""
    if not config.traits.patch_bias:
        yield "embeddings.patches.bias"
    for layer in range(config.num_layers):
        yield from (f"model.layers.{layer}.{name}.bias" for name in config.without_bias)


def _shapes(config: VisionConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the encoder, and of the scales that are folded into it."""
    D, M, P = config.hidden_size, config.intermediate_size, config.patch_size
    if config.traits.class_token:
        yield "embeddings.class_token", (D,)
    if config.num_registers:
        yield "embeddings.registers", (config.num_registers, D)
    if config.rope_theta is None:
        yield "embeddings.positions", (int(config.traits.class_token) + config.grid_size**2, D)
    yield "embeddings.patches.weight", (D, 3, P, P)
    yield "embeddings.patches.bias", (D,)
    norms = ["embeddings.norm"] if config.traits.input_norm else []
    linears = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D), "self_attn.v_proj": (D, D)}
    linears |= {"self_attn.o_proj": (D, D)}
    if config.gated:
        linears |= {"mlp.gate_proj": (M, D), "mlp.up_proj": (M, D), "mlp.down_proj": (D, M)}
    else:
        linears |= {"mlp.fc1": (M, D), "mlp.fc2": (D, M)}
    for layer in range(config.num_layers):
        norms += [f"model.layers.{layer}.norm1", f"model.layers.{layer}.norm2"]
        if config.traits.layer_scale:
            yield f"model.layers.{layer}.self_attn.o_proj.scale", (D,)
            yield f"model.layers.{layer}.mlp.scale", (D,)
        for name, shape in linears.items():
            yield f"model.layers.{layer}.{name}.weight", shape
            yield f"model.layers.{layer}.{name}.bias", shape[:1]
    for name in (*norms, "model.norm"):
        yield f"{name}.weight", (D,)
        yield f"{name}.bias", (D,)
