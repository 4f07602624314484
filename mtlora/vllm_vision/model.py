"""A vision backbone as vLLM's model: `VisionEncoder.model` in vLLM's parallel layers and attention.

Shape suffixes: T positions of a step's images, D hidden size, N heads, K size of a head.
"""

from collections.abc import Iterable, Set
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.interfaces_base import attn_type, default_pooling_type
from vllm.sequence import IntermediateTensors

from mtlora.vision.encoder import ACTIVATIONS
from mtlora.vision.families import VisionConfig, encoder_tensors
from mtlora.vision.rotary import Rotation, image_lengths, rotate, rotation

# Linear layers that vLLM computes as one: name in the encoder, name here, part.
_MERGED = (
    ("self_attn.q_proj", "self_attn.qkv_proj", "q"),
    ("self_attn.k_proj", "self_attn.qkv_proj", "k"),
    ("self_attn.v_proj", "self_attn.qkv_proj", "v"),
    ("mlp.gate_proj", "mlp.gate_up_proj", 0),
    ("mlp.up_proj", "mlp.gate_up_proj", 1),
)


class SelfAttention(nn.Module):
    """Every position of an image attends to every position of it."""

    def __init__(self, config: VisionConfig, head_size: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        D, N, K = config.hidden_size, config.num_heads, head_size
        quantisation = vllm_config.quant_config
        self.head_size = K
        self.qkv_proj = QKVParallelLinear(D, K, N, bias=True, quant_config=quantisation, prefix=f"{prefix}.qkv_proj")
        self.o_proj = RowParallelLinear(N * K, D, bias=True, quant_config=quantisation, prefix=f"{prefix}.o_proj")
        self.attn = EncoderOnlyAttention(
            N // get_tensor_model_parallel_world_size(),
            K,
            # Padded dimensions are zero in queries and keys.
            (D // N) ** -0.5,
            cache_config=vllm_config.cache_config,
            quant_config=quantisation,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: torch.Tensor, rotary: Rotation | None) -> torch.Tensor:
        """Output [T, D] of the block for its normalised input [T, D]. rotary: [T, 1, H] each."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.chunk(3, dim=-1)
        if rotary is not None:
            q, k = (rotate(each.unflatten(-1, (-1, self.head_size)), *rotary).flatten(1) for each in (q, k))
        y_TD: torch.Tensor
        y_TD, _ = self.o_proj(self.attn(q, k, v))
        return y_TD


class MLP(nn.Module):
    """Two linear layers, or three with a gate."""

    def __init__(self, config: VisionConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        D, M, quantisation = config.hidden_size, config.intermediate_size, vllm_config.quant_config
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        if self.gated:
            self.gate_up_proj = MergedColumnParallelLinear(
                D, [M, M], bias=True, quant_config=quantisation, prefix=f"{prefix}.gate_up_proj"
            )
            self.down_proj = RowParallelLinear(M, D, bias=True, quant_config=quantisation, prefix=f"{prefix}.down_proj")
        else:
            self.fc1 = ColumnParallelLinear(D, M, bias=True, quant_config=quantisation, prefix=f"{prefix}.fc1")
            self.fc2 = RowParallelLinear(M, D, bias=True, quant_config=quantisation, prefix=f"{prefix}.fc2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output [T, D] of the block for its normalised input [T, D]."""
        y_TD: torch.Tensor
        if self.gated:
            gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
            y_TD, _ = self.down_proj(self.activation(gate) * up)
        else:
            y_TD, _ = self.fc2(self.activation(self.fc1(x)[0]))
        return y_TD


class Layer(nn.Module):
    """A layer before whose blocks the norms stand."""

    def __init__(self, config: VisionConfig, head_size: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.self_attn = SelfAttention(config, head_size, vllm_config, f"{prefix}.self_attn")
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.mlp = MLP(config, vllm_config, f"{prefix}.mlp")

    def forward(self, x_TD: torch.Tensor, rotary: Rotation | None) -> torch.Tensor:
        """The residual stream after the layer."""
        x_TD = x_TD + self.self_attn(self.norm1(x_TD), rotary)
        return x_TD + self.mlp(self.norm2(x_TD))


@support_torch_compile
class Stack(nn.Module):
    """The layers and the final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        config: VisionConfig = hf_config.backbone
        self.layers = nn.ModuleList(
            Layer(config, hf_config.head_dim, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.config = config

    def forward(self, positions: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """States [T, D] after the final norm. positions: int64 [T], each in its own image."""
        x_TD, rotary = inputs_embeds, None
        if self.config.rope_theta is not None:
            # In here, as graphs that vLLM captures in pieces read only its own buffers.
            cos_TH, sin_TH = rotation(self.config, positions, image_lengths(positions))
            rotary = cos_TH.to(x_TD.dtype).unsqueeze(1), sin_TH.to(x_TD.dtype).unsqueeze(1)
        for layer in self.layers:
            x_TD = layer(x_TD, rotary)
        states_TD: torch.Tensor = self.norm(x_TD)
        return states_TD


class ImagePooler(Pooler):
    """ "embed": an image's feature, class token and mean of patches [2 D] or, without a class token, the mean [D].

    "token_embed": all its states [T, D]. Both in float32.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_token, self.num_prefix = config.traits.class_token, config.num_prefix

    def get_supported_tasks(self) -> Set[Any]:
        """The names of vLLM's tasks."""
        return {"embed", "token_embed"}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor]:
        """One output an image, in the order of the step's requests."""
        outputs = []
        images = hidden_states.float().split(pooling_metadata.prompt_lens.tolist())
        for states_TD, task in zip(images, pooling_metadata.tasks, strict=True):
            if task == "token_embed":
                outputs.append(states_TD)
                continue
            mean_D = states_TD[self.num_prefix :].mean(0)
            outputs.append(torch.cat([states_TD[0], mean_D]) if self.class_token else mean_D)
        return outputs


@attn_type("encoder_only")
# vLLM then runs an image in one step and shares no prefixes between images.
@default_pooling_type(seq_pooling_type="CLS")
class VisionModel(nn.Module, SupportsLoRA):
    """The model in vLLM's registry. Its prompts are embeddings, made outside."""

    is_pooling_model = True
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.cache_config.enable_prefix_caching or vllm_config.scheduler_config.enable_chunked_prefill:
            raise ValueError(
                "a vision backbone: found enable_prefix_caching or enable_chunked_prefill; allowed: neither, as each "
                "position of an image attends to all others"
            )
        hf_config = vllm_config.model_config.hf_config
        self.config: VisionConfig = hf_config.backbone
        self.head_size: int = hf_config.head_dim
        self.model = Stack(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        self.pooler = ImagePooler(self.config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Zeros [T, D], because only warm-up runs have token ids."""
        dtype, device = self.model.norm.weight.dtype, self.model.norm.weight.device
        return torch.zeros(len(input_ids), self.config.hidden_size, dtype=dtype, device=device)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States [T, D] of the step's images, one behind the other."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        states_TD: torch.Tensor = self.model(positions, inputs_embeds)
        return states_TD

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a folder's weights; returns the names that they have here. Raises BackboneError."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in encoder_tensors(self.config, weights).items():
            if name.startswith("embeddings."):
                continue
            tensor = self._padded(name, tensor)
            part: tuple[Any, ...] = ()
            for source, target, shard in _MERGED:
                if f".{source}." in name:
                    name, part = name.replace(source, target), (shard,)
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *part)
            loaded.add(name)
        return loaded

    def _padded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the attention with heads of `head_size`: zeros behind each."""
        N, K = self.config.num_heads, self.config.hidden_size // self.config.num_heads
        if self.head_size == K or ".self_attn." not in name or name.endswith("o_proj.bias"):
            return tensor
        # Heads are the output's, or the last layer's input.
        heads = tensor.T if "o_proj" in name else tensor
        behind = [0, 0] * (heads.dim() - 1) + [0, self.head_size - K]
        padded = functional.pad(heads.unflatten(0, (N, K)), behind).flatten(0, 1)
        return padded.T if "o_proj" in name else padded
