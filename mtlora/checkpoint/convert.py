"""Converts checkpoints of mtLoRA's authors, and of block-level HydraLoRA, to this project's format.

Both are torch files with a state dict. Under any prefix, layer l and block m (`mlp` or `self_attn`) have

    layers.{l}.{m}.block_adapter.lora_A.weight      [r, d]
    layers.{l}.{m}.block_adapter.lora_B.{i}.weight  [d, r]     expert i; HydraLoRA writes lora_B{i}
    layers.{l}.{m}.block_adapter.lora_route.weight  [g*N, d]   group-major, as here; absent if N is 1

`block_adapter.` may be missing. Softmax (over experts, float32) and scaling (alpha / r) are the same here, and the
router has no bias: tensors stay as they are, and all tasks share one slot. An image task also needs its head, under any
prefix: `heads.{task}.weight` [classes, F] and `heads.{task}.bias` [classes]. A path inside a block (such as under
`q_proj`, where HydraLoRA's own trainer puts it) has no equivalent at the block's output and is refused.
"""

import codecs
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError

from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.format import AdapterManifest, TaskEntry, and_more, head_names
from mtlora.checkpoint.write import write_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError, describe
from mtlora.families import BLOCK_MODULES
from mtlora.files import sha256
from mtlora.task import TaskSpec
from mtlora.vision.image_input import num_features

# The authors' published alpha at rank 16. Their files do not contain alpha.
PUBLISHED_ALPHA = 64.0

# A layer or expert number without leading zeros, so each number has one spelling.
_NUMBER = r"(?:0|[1-9]\d{0,5})"
_KEY = re.compile(
    rf"(?:.*\.)?layers\.(?P<layer>{_NUMBER})\.(?P<module>mlp|self_attn)\.(?:block_adapter\.)?"
    rf"(?P<name>lora_A|lora_route|lora_B\.?(?P<expert>{_NUMBER}))\.weight"
)
_COMPONENT = re.compile(
    r"(?:.*\.)?layers\.\d+\.(?:mlp|self_attn)\.(?P<component>(?!block_adapter\.|lora_)\w+)\.lora_.*"
)
_LAYOUT = "layers.L.{mlp,self_attn}.block_adapter.{lora_A,lora_B.I,lora_route}.weight"
# The dtype that each floating dtype becomes; a checkpoint cannot hold float64.
_DTYPES = {
    torch.float32: torch.float32, torch.float16: torch.float16, torch.bfloat16: torch.bfloat16,
    torch.float64: torch.float32,
}  # fmt: skip


_TASKS = TypeAdapter(Annotated[tuple[TaskSpec, ...], Field(min_length=1)])


class ConversionError(MtLoRAError):
    """A checkpoint that cannot be converted. Names the key, what was found and what is allowed."""


# Key in the file, and tensor.
_Part = tuple[str, torch.Tensor]
# A block's parts: `lora_A`, `lora_route`, and the experts by number.
_Block = dict[str | int, _Part]


def convert(
    source: Path,
    out: Path,
    *,
    backbone: BackboneIdentity,
    tasks: Sequence[TaskSpec],
    lora_alpha: float = PUBLISHED_ALPHA,
) -> AdapterManifest:
    """Write the checkpoint in `source` to `out` in this format, with these tasks.

    Raises ConversionError if the file's layout or the backbone's sizes do not fit; CheckpointError if `out` cannot be
    written.
    """
    if picture := next((task.id for task in tasks if task.picture), None):
        raise ConversionError(f"task {picture}: picture: found one; allowed: none, as such files have no projector")
    state = _read_state(source)
    config, tensors = convert_tensors(
        state,
        hidden_size=backbone.hidden_size,
        num_layers=backbone.num_layers,
        lora_alpha=lora_alpha,
    )
    return write_checkpoint(
        out,
        backbone=backbone,
        config=config,
        tasks=tuple(TaskEntry(**task.model_dump(), bias_index=None) for task in tasks),
        tensors=tensors | convert_heads(state, tasks, hidden_size=backbone.hidden_size),
        training={"converted_from": {"file": source.name, "sha256": sha256(source), "lora_alpha": lora_alpha}},
    )


def convert_tensors(
    state: Mapping[str, Any], *, hidden_size: int, num_layers: int, lora_alpha: float
) -> tuple[MtLoRAConfig, dict[str, torch.Tensor]]:
    """(config, tensors under their names in this format) of a state dict; ignores keys that belong to no path.

    Raises ConversionError naming the key.
    """
    blocks = _sort(state)
    first_layer, first_module = min(blocks)
    modules = {module for _, module in blocks}
    for module in sorted(modules):
        if missing := [layer for layer in range(num_layers) if (layer, module) not in blocks]:
            raise ConversionError(
                f"layers.{missing[0]}.{module}: no path, but other layers have one; "
                f"the backbone's {num_layers} layers each need one{and_more(missing)}"
            )
        if beyond := sorted(layer for layer, m in blocks if m == module and layer >= num_layers):
            raise ConversionError(
                f"layers.{beyond[0]}.{module}: found, but the backbone has layers 0 to {num_layers - 1}"
                f"{and_more(beyond)}"
            )
    whole = {place: _whole("layers.{}.{}".format(*place), block) for place, block in blocks.items()}
    r, num_experts, num_groups = _sizes(whole[first_layer, first_module], hidden_size)
    tensors: dict[str, torch.Tensor] = {}
    for (layer, module), (down, experts, route) in sorted(whole.items()):
        expected = [(down, (r, hidden_size)), *((expert, (hidden_size, r)) for expert in experts)]
        if route is not None:
            expected.append((route, (num_groups * num_experts, hidden_size)))
        for (key, tensor), shape in expected:
            if tuple(tensor.shape) != shape:
                raise ConversionError(
                    f"{key}: expected {list(shape)}, as r {r}, {num_experts} experts and {num_groups} groups of "
                    f"layers.{first_layer}.{first_module} and the backbone's hidden size {hidden_size} give, "
                    f"found {list(tensor.shape)}"
                )
        if len(experts) != num_experts:
            raise ConversionError(
                f"layers.{layer}.{module}: {len(experts)} experts, layers.{first_layer}.{first_module} has "
                f"{num_experts}; every block must have as many"
            )
        name = f"layers.{layer}.{module}"
        tensors[f"{name}.lora_A"] = down[1]
        tensors[f"{name}.lora_B"] = torch.stack([tensor for _, tensor in experts])
        tensors[f"{name}.lora_route"] = down[1].new_zeros(num_groups, hidden_size) if route is None else route[1]
    try:
        config = MtLoRAConfig(
            r=r, lora_alpha=lora_alpha, num_experts=num_experts, num_groups=num_groups,
            blocks=next(blocks for blocks, names in BLOCK_MODULES.items() if set(names) == modules), task_bias=False,
        )  # fmt: skip
    except ValidationError as error:
        raise ConversionError(f"config: {describe(error)}") from None
    return config, tensors


def convert_heads(state: Mapping[str, Any], tasks: Sequence[TaskSpec], *, hidden_size: int) -> dict[str, torch.Tensor]:
    """The heads of image tasks, under their names in this format. Raises ConversionError naming the key."""
    tensors = {}
    for row, task in enumerate(tasks):
        if task.image is None:
            continue
        classes, F = len(task.labels or ()), num_features(task.image.pooling, hidden_size)
        for name, part, shape in zip(head_names(row), ("weight", "bias"), ((classes, F), (classes,)), strict=True):
            key = f"heads.{task.id}.{part}"
            found = [each for each in state if each == key or each.endswith(f".{key}")]
            if len(found) != 1:
                raise ConversionError(f"{key}: found {len(found)}; task {task.id} of images needs one {list(shape)}")
            tensor = tensors[name] = _tensor(found[0], state[found[0]], len(shape))
            if tuple(tensor.shape) != shape:
                raise ConversionError(
                    f"{found[0]}: expected {list(shape)}, as {classes} labels and pooling {task.image.pooling!r} give, "
                    f"found {list(tensor.shape)}"
                )
    return tensors


def read_tasks(path: Path) -> tuple[TaskSpec, ...]:
    """Tasks from a JSON file: a list of objects with the fields of `TaskSpec`; `id` and `description` are required.

    Raises ConversionError naming file and line, or file, task and field.
    """
    try:
        return _TASKS.validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise ConversionError(f"{path}: expected a list of tasks: {describe(error)}") from None


def _read_state(source: Path) -> Mapping[str, Any]:
    try:
        if source.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(source)
        else:
            # weights_only prevents a malicious file from running code.
            state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConversionError(f"{source}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # torch may raise any exception for a file that it did not write.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{source}: cannot be read as a torch file of tensors: {cause}") from None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ConversionError(f"{source}: expected a dict of tensors by name, found {reprlib.repr(type(state))}")
    return state


def _sort(state: Mapping[str, Any]) -> dict[tuple[int, str], _Block]:
    """The file's tensors by (layer, module); checks each tensor alone."""
    blocks: dict[tuple[int, str], _Block] = {}
    for key, value in state.items():
        found = _KEY.fullmatch(key)
        if found is None:
            if part := _COMPONENT.fullmatch(key):
                raise ConversionError(
                    f"{key}: a path inside a block, at the linear layer {part['component']!r}: component-level LoRA or "
                    f"HydraLoRA; only a path beside a whole block ({_LAYOUT}) can be converted"
                )
            if "lora_" in key or "block_adapter." in key:
                raise ConversionError(f"{key}: no part of a block-level adapter; allowed: {_LAYOUT}, any prefix")
            continue
        tensor = _tensor(key, value)
        block = blocks.setdefault((int(found["layer"]), found["module"]), {})
        name = found["name"] if found["expert"] is None else int(found["expert"])
        if (other := block.setdefault(name, (key, tensor)))[0] != key:
            raise ConversionError(f"{key}: the same part as {other[0]}; each must be in the file once")
    if not blocks:
        some = ", ".join(map(repr, list(state)[:3])) or "nothing"
        raise ConversionError(f"no key of the form {_LAYOUT}; found {some}")
    return blocks


def _tensor(key: str, value: Any, dimensions: int = 2) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ConversionError(f"{key}: expected a tensor, found {type(value).__name__}")
    if value.dtype not in _DTYPES or value.layout != torch.strided or value.device.type == "meta":
        raise ConversionError(
            f"{key}: expected a dense tensor of {', '.join(str(dtype) for dtype in _DTYPES)}, "
            f"found {value.layout} of {value.dtype} on {value.device}"
        )
    if (size := value.numel() * value.element_size()) > value.untyped_storage().nbytes():
        raise ConversionError(
            f"{key}: expected a tensor whose values are all stored, found {list(value.shape)}, {size} bytes, of "
            f"{value.untyped_storage().nbytes()} stored"
        )
    if value.dim() != dimensions:
        raise ConversionError(f"{key}: expected {('one', 'two')[dimensions - 1]} dimensions, found {list(value.shape)}")
    tensor = value.detach().to(_DTYPES[value.dtype])
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise ConversionError(f"{key}: expected finite values, found {bad} NaN or infinite (as {tensor.dtype})")
    return tensor


def _whole(name: str, block: _Block) -> tuple[_Part, list[_Part], _Part | None]:
    """(A, experts in order, router or None) of a block. Raises ConversionError if a part is missing."""
    numbers = sorted(part for part in block if isinstance(part, int))
    experts, route = [block[number] for number in numbers], block.get("lora_route")
    if "lora_A" not in block:
        raise ConversionError(f"{name}: no lora_A.weight; a block needs one [r, d]")
    if not experts:
        raise ConversionError(f"{name}: no lora_B.0.weight; a block needs experts numbered from 0")
    if missing := set(range(numbers[-1])) - set(numbers):
        raise ConversionError(
            f"{name}: expert {min(missing)} of 0 to {numbers[-1]} is missing; experts must be numbered from 0 without "
            "a gap"
        )
    if route is None and len(experts) > 1:
        raise ConversionError(f"{name}: no lora_route.weight; {len(experts)} experts need one [g*{len(experts)}, d]")
    kinds = sorted({str(tensor.dtype) for _, tensor in experts})
    if len(kinds) > 1:
        raise ConversionError(f"{name}: experts of several dtypes, {', '.join(kinds)}; one is allowed")
    return block["lora_A"], experts, route


def _sizes(block: tuple[_Part, list[_Part], _Part | None], hidden_size: int) -> tuple[int, int, int]:
    """(r, N, g) of one block."""
    (key, down), experts, route = block
    if down.shape[1] != hidden_size:
        raise ConversionError(f"{key}: expected [r, {hidden_size}], the backbone's hidden size, found {[*down.shape]}")
    if down.shape[0] == 0:
        raise ConversionError(f"{key}: expected a rank of at least 1, found 0")
    if route is None:
        return down.shape[0], len(experts), 1
    key, rows = route[0], route[1].shape[0]
    num_groups, rest = divmod(rows, len(experts))
    if rest or num_groups == 0:
        raise ConversionError(f"{key}: expected rows in a multiple of the {len(experts)} experts, found {rows}")
    if hidden_size % num_groups:
        raise ConversionError(
            f"{key}: {rows} rows of {len(experts)} experts are {num_groups} groups, which do not divide the backbone's "
            f"hidden size {hidden_size}"
        )
    return down.shape[0], len(experts), num_groups
