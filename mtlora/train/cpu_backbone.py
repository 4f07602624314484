"""Three operations of a frozen backbone whose gradients torch computes slowly on a CPU, done anew for training.

Of a training step with short sequences torch's fused CPU attention took 14 %, most of it in the backward pass; the
eager RMSNorm's backward pass is a dozen small operations of which four are needed, and keeps more than its input; the
gated MLP keeps the activated gate, which is soon made again. Without gradients, on a GPU, or where a model's layers are
not of these forms, the originals run.

Shape suffixes: B sequences, L positions, H query heads, K key heads, d head size.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from mtlora.families import FAMILIES
from mtlora.ops import cpu_elementwise

# Above this length the scores [B, H, L, L] that the backward pass keeps outweigh what they save.
MAX_ATTENTION_LENGTH = 320
_ATTENTION = "mtlora_grouped"
_RMS_NORMS = {family.rms_norm for family in FAMILIES.values()}
_GATED_MLPS = {family.gated_mlp for family in FAMILIES.values()}


def speed_up_training(model: Any) -> None:
    """Let a transformers causal language model use them where gradients are wanted and the tensors are on a CPU."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    # With sdpa's mask rule a plain causal mask is never built: attention_mask is None.
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
    for module in model.modules():
        if type(module).__name__ in _RMS_NORMS:
            module.forward = MethodType(_rms_norm, module)
        elif type(module).__name__ in _GATED_MLPS and module.config.hidden_act == "silu":
            module.forward = MethodType(_gated_mlp, module)


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
        return causal_attention(query, key, value, scale).transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def causal_attention(q_BHLd: torch.Tensor, k_BKLd: torch.Tensor, v_BKLd: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal softmax(scaling q k^T) v, [B, H, L, d], in plain products; key heads are never repeated.

    Keeps the weights [B, H, L, L] for the backward pass.
    """
    return _CausalAttention.apply(q_BHLd, k_BKLd, v_BKLd, scaling)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHLd: torch.Tensor, k_BKLd: torch.Tensor, v_BKLd: torch.Tensor, scaling: float) -> Any:
        (B, H, L, d), K = q_BHLd.shape, k_BKLd.shape[1]
        q, k, v = q_BHLd.reshape(B * K, -1, d), k_BKLd.reshape(B * K, L, d), v_BKLd.reshape(B * K, L, -1)
        scores = torch.bmm(q, k.transpose(1, 2))
        weights = _causal_softmax_(scores.view(B * H, L, L), scaling).view(scores.shape)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling = scaling
        return torch.bmm(weights, v).view(B, H, L, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, weights = ctx.saved_tensors
        (B, H, L, _), BK = grads[0].shape, len(k)
        grad = grads[0].reshape(BK, -1, v.shape[-1])
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        K = BK // B
        return grad_q.view(B, H, L, -1), grad_k.view(B, K, L, -1), grad_v.view(B, K, L, -1), None


def _causal_softmax_(scores_MLL: torch.Tensor, scaling: float) -> torch.Tensor:
    if cpu_elementwise.runs(scores_MLL):
        return cpu_elementwise.causal_softmax_(scores_MLL, scaling)
    future_LL = torch.ones(scores_MLL.shape[1:], dtype=torch.bool).triu(1)
    scores_MLL.mul_(scaling).masked_fill_(future_LL, float("-inf"))
    return torch.softmax(scores_MLL, dim=-1)


def _rms_norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and hidden_states.requires_grad and hidden_states.device.type == "cpu":
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)
    result: torch.Tensor = type(module).forward(module, hidden_states)
    return result


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight * x / sqrt(mean x^2 + epsilon) over the last dimension, in float32 inside; `weight` gets no gradient."""
    return _RMSNorm.apply(x, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> Any:
        if cpu_elementwise.runs(x, weight):
            out, inverse = cpu_elementwise.rms_norm(x, weight, epsilon)
        else:
            wide = x.float()
            inverse = wide.pow(2).mean(-1).add_(epsilon).rsqrt_()
            out = weight * (wide * inverse.unsqueeze(-1)).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        if cpu_elementwise.runs(x, weight, grads[0]):
            return cpu_elementwise.rms_norm_backward(grads[0], x, weight, inverse), None, None
        inverse = inverse.unsqueeze(-1)
        normal = x * inverse  # in float32, as inverse is
        grad = (grads[0] * weight).float()
        along = (grad * normal).mean(-1, keepdim=True)
        return grad.addcmul(normal, along, value=-1).mul_(inverse).to(grads[0].dtype), None, None


def _gated_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if torch.is_grad_enabled() and x.device.type == "cpu":
        gated = swiglu(gate, up)
    else:
        gated = module.act_fn(gate) * up
    result: torch.Tensor = module.down_proj(gated)
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in their dtype."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> Any:
        ctx.save_for_backward(gate, up)
        return cpu_elementwise.swiglu(gate, up) if cpu_elementwise.runs(gate, up) else silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        if cpu_elementwise.runs(gate, up, grads[0]):
            return cpu_elementwise.swiglu_backward(grads[0], gate, up)
        return torch.ops.aten.silu_backward(grads[0] * up, gate), silu(gate).mul_(grads[0])
