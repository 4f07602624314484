"""Three operations of a frozen backbone whose gradients torch computes slowly on a CPU, replaced for training.

- Attention: torch's fused CPU attention took 14 % of a step with short sequences, most of it in the backward pass. With
  images, a step took 1.3 times as long with torch's plain one, which widens bfloat16 to float32.
- RMSNorm: the eager one's backward pass is a dozen small operations, of which four are needed, and it keeps more than
  its input.
- Gated MLP: it keeps the activated gate, which is cheap to compute again.

The originals run without gradients, on a GPU, and for layers of other forms (see `mtlora.families`).

Shape suffixes: B sequences, L positions, H query heads, K key heads, d head size; C = B*K, Q = H/K*L queries that share
a key head; R rows (all leading dimensions), D their size; I size of the gate; M = B*H.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from mtlora.families import FAMILIES
from mtlora.ops import cpu_elementwise
from mtlora.vision.encoder import SelfAttention, VisionEncoder

# Above this length, the scores [B, H, L, L] kept for the backward pass cost more than they save.
MAX_ATTENTION_LENGTH = 320
_ATTENTION = "mtlora_grouped"
_RMS_NORMS = {family.rms_norm for family in FAMILIES.values()}
_GATED_MLPS = {family.gated_mlp for family in FAMILIES.values()}


def speed_up_training(model: Any) -> None:
    """Make a transformers causal language model use these operations for tensors on a CPU that need gradients."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    # With sdpa's mask rule, no plain causal mask is built: attention_mask is None.
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
    for module in model.modules():
        if type(module).__name__ in _RMS_NORMS:
            module.forward = MethodType(_rms_norm, module)
        elif type(module).__name__ in _GATED_MLPS and module.config.hidden_act == "silu":
            module.forward = MethodType(_gated_mlp, module)


def speed_up_image_training(encoder: VisionEncoder) -> None:
    """Make an encoder use this attention for tensors on a CPU that need gradients."""
    for module in encoder.modules():
        if isinstance(module, SelfAttention):
            module.attend = _attend_all


def _attend_all(q_BHLd: torch.Tensor, k_BHLd: torch.Tensor, v_BHLd: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and q_BHLd.is_cpu and q_BHLd.shape[2] <= MAX_ATTENTION_LENGTH:
        out_BHLd: torch.Tensor = PlainAttention.apply(q_BHLd, k_BHLd, v_BHLd, q_BHLd.shape[-1] ** -0.5, False)
        return out_BHLd
    return scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, L, d] to output [B, L, H, d]."""
    length = query.shape[2]
    if (
        attention_mask is None and not dropout and torch.is_grad_enabled() and query.device.type == "cpu"
        and is_causal is not False and length == key.shape[2] and 1 < length <= MAX_ATTENTION_LENGTH
    ):  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return PlainAttention.apply(query, key, value, scale, True).transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


class PlainAttention(torch.autograd.Function):
    """softmax(scaling q k^T) v, [B, H, L, d], causal or not, by plain matrix products; does not repeat key heads.

    Keeps the weights [B, H, L, L] for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHLd: torch.Tensor, k_BKLd: torch.Tensor, v_BKLd: torch.Tensor, scaling: float, causal: bool
    ) -> Any:
        (B, H, L, d), K = q_BHLd.shape, k_BKLd.shape[1]
        q_CQd, k_CLd, v_CLd = q_BHLd.reshape(B * K, -1, d), k_BKLd.reshape(B * K, L, d), v_BKLd.reshape(B * K, L, -1)
        scores_CQL = torch.bmm(q_CQd, k_CLd.transpose(1, 2))
        if causal:
            weights_CQL = _causal_softmax_(scores_CQL.view(B * H, L, L), scaling).view(scores_CQL.shape)
        else:
            weights_CQL = torch.softmax(scores_CQL.mul_(scaling), dim=-1)
        ctx.save_for_backward(q_CQd, k_CLd, v_CLd, weights_CQL)
        ctx.scaling = scaling
        return torch.bmm(weights_CQL, v_CLd).view(B, H, L, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q_CQd, k_CLd, v_CLd, weights_CQL = ctx.saved_tensors
        (B, H, L, _), C = grads[0].shape, len(k_CLd)
        grad_CQd = grads[0].reshape(C, -1, v_CLd.shape[-1])
        grad_v_CLd = torch.bmm(weights_CQL.transpose(1, 2), grad_CQd)
        grad_weights_CQL = torch.bmm(grad_CQd, v_CLd.transpose(1, 2))
        grad_scores_CQL = torch.ops.aten._softmax_backward_data(
            grad_weights_CQL, weights_CQL, -1, weights_CQL.dtype
        ).mul_(ctx.scaling)
        grad_q_CQd = torch.bmm(grad_scores_CQL, k_CLd)
        grad_k_CLd = torch.bmm(grad_scores_CQL.transpose(1, 2), q_CQd)
        K = C // B
        return grad_q_CQd.view(B, H, L, -1), grad_k_CLd.view(B, K, L, -1), grad_v_CLd.view(B, K, L, -1), None, None


def _causal_softmax_(scores_MLL: torch.Tensor, scaling: float) -> torch.Tensor:
    if cpu_elementwise.runs(scores_MLL):
        return cpu_elementwise.causal_softmax_(scores_MLL, scaling)
    future_LL = torch.ones(scores_MLL.shape[1:], dtype=torch.bool).triu(1)
    scores_MLL.mul_(scaling).masked_fill_(future_LL, float("-inf"))
    return torch.softmax(scores_MLL, dim=-1)


def _rms_norm(module: Any, hidden_states: torch.Tensor) -> Any:
    if torch.is_grad_enabled() and hidden_states.requires_grad and hidden_states.device.type == "cpu":
        return RMSNorm.apply(hidden_states, module.weight, module.variance_epsilon)
    return type(module).forward(module, hidden_states)


class RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean x^2 + epsilon) over the last dimension, in float32 inside; `weight` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x_RD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> Any:
        if cpu_elementwise.runs(x_RD, weight_D):
            out_RD, inverse_R = cpu_elementwise.rms_norm(x_RD, weight_D, epsilon)
        else:
            wide_RD = x_RD.float()
            inverse_R = wide_RD.pow(2).mean(-1).add_(epsilon).rsqrt_()
            out_RD = weight_D * (wide_RD * inverse_R.unsqueeze(-1)).to(x_RD.dtype)
        ctx.save_for_backward(x_RD, weight_D, inverse_R)
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x_RD, weight_D, inverse_R = ctx.saved_tensors
        if cpu_elementwise.runs(x_RD, weight_D, grads[0]):
            return cpu_elementwise.rms_norm_backward(grads[0], x_RD, weight_D, inverse_R), None, None
        inverse_R1 = inverse_R.unsqueeze(-1)
        normal_RD = x_RD * inverse_R1  # in float32, as the inverse is
        grad_RD = (grads[0] * weight_D).float()
        along_R1 = (grad_RD * normal_RD).mean(-1, keepdim=True)
        return grad_RD.addcmul(normal_RD, along_R1, value=-1).mul_(inverse_R1).to(grads[0].dtype), None, None


def _gated_mlp(module: Any, x: torch.Tensor) -> Any:
    gate, up = module.gate_proj(x), module.up_proj(x)
    fast = torch.is_grad_enabled() and x.device.type == "cpu"
    return module.down_proj(SwiGLU.apply(gate, up) if fast else module.act_fn(gate) * up)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, in their dtype."""

    @staticmethod
    def forward(ctx: Any, gate_RI: torch.Tensor, up_RI: torch.Tensor) -> Any:
        ctx.save_for_backward(gate_RI, up_RI)
        if cpu_elementwise.runs(gate_RI, up_RI):
            return cpu_elementwise.swiglu(gate_RI, up_RI)
        return silu(gate_RI).mul_(up_RI)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate_RI, up_RI = ctx.saved_tensors
        if cpu_elementwise.runs(gate_RI, up_RI, grads[0]):
            return cpu_elementwise.swiglu_backward(grads[0], gate_RI, up_RI)
        return torch.ops.aten.silu_backward(grads[0] * up_RI, gate_RI), silu(gate_RI).mul_(grads[0])
