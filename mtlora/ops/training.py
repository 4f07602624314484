"""The registered operator of training, `mtlora::path_with_gradients`: the path of one adapter, with gradients.

It saves x, h and the routing weights for the backward pass; it never makes a tensor [T, D] per expert. On a CPU, the
compiled kernel computes both passes. Otherwise torch ops do; in a block's backward pass they recompute z and its
gradient, both [G, T, K], and free them afterwards.

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups, E = D/G dimensions of a group, K = N*r,
J = G*N, S = r + J.
"""

from typing import Any

import torch

from mtlora.ops import cpu_training
from mtlora.ops.cpu_training import PathInputs, Saved
from mtlora.ops.packed_block import outer, pack_experts, route


def path_with_gradients(
    x_TD: torch.Tensor,
    lora_A_rD: torch.Tensor,
    lora_B_NDr: torch.Tensor,
    lora_route: torch.Tensor,
    bias_TGN: torch.Tensor | None,
    *,
    num_groups: int,
    scaling: float,
    dropped_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the path's output [T, D], the routing weights [T, G, N]), both differentiable in every tensor.

    lora_A_rD, lora_B_NDr, lora_route [G*N, D] (group-major): one floating dtype, also used for the computation. x_TD:
    any floating dtype; the output has it too. bias_TGN: router bias per token. dropped_TD: x after dropout, which A
    reads instead of x. All tensors are on one device. Raises ValueError for anything else.
    """
    delta_TD, weights_TGN, _ = torch.ops.mtlora.path_with_gradients(
        x_TD, dropped_TD, lora_A_rD, lora_B_NDr, lora_route, bias_TGN, num_groups, scaling
    )
    return delta_TD, weights_TGN


def _check(inputs: PathInputs) -> None:
    x, dropped, lora_A, lora_B, lora_route, bias, num_groups, _ = inputs
    if x.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 3:
        raise ValueError("x must be [tokens, D], lora_A [r, D] and lora_B [N, D, r]")
    (T, D), r, N = x.shape, lora_A.shape[0], lora_B.shape[0]
    if num_groups < 1 or D % num_groups:
        raise ValueError(f"num_groups {num_groups} does not divide the hidden size {D}")
    expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "dropped": (dropped, (T, D)),
        "lora_A": (lora_A, (r, D)),
        "lora_B": (lora_B, (N, D, r)),
        "lora_route": (lora_route, (num_groups * N, D)),
        "bias": (bias, (T, num_groups, N)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if name == "dropped" and tensor.dtype != x.dtype:
            raise ValueError(f"dropped is {tensor.dtype}, x {x.dtype}")
        if name.startswith("lora") and tensor.dtype != lora_A.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, lora_A {lora_A.dtype}")
    for name, dtype in (("x", x.dtype), ("lora_A", lora_A.dtype)):
        if not dtype.is_floating_point:
            raise ValueError(f"{name} must be of a floating dtype, got {dtype}")


@torch.library.custom_op("mtlora::path_with_gradients", mutates_args=())
def _path_with_gradients(
    x: torch.Tensor,
    dropped: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    lora_route: torch.Tensor,
    bias: torch.Tensor | None,
    num_groups: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = PathInputs(x, dropped, lora_A, lora_B, lora_route, bias, num_groups, scaling)
    _check(inputs)
    return cpu_training.forward(inputs) if cpu_training.runs(x, lora_A) else _in_torch_ops(inputs)


def _in_torch_ops(inputs: PathInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_TD, dropped_TD, lora_A_rD, lora_B_NDr, lora_route, bias_TGN, num_groups, scaling = inputs
    T, dtype = len(x_TD), x_TD.dtype
    x_TD = x_TD.to(lora_A_rD.dtype)
    if dropped_TD is None:
        s_TS = torch.nn.functional.linear(x_TD, torch.cat([lora_A_rD, lora_route]))
        h_Tr, logits_TJ = s_TS[:, : len(lora_A_rD)].contiguous(), s_TS[:, len(lora_A_rD) :]
    else:
        h_Tr, logits_TJ = dropped_TD.to(x_TD.dtype) @ lora_A_rD.t(), x_TD @ lora_route.t()
    weights_TGN = route(logits_TJ.reshape(T, num_groups, -1), bias_TGN)
    delta_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    delta_GTE = delta_TD.view(T, num_groups, -1).transpose(0, 1)
    torch.bmm(outer(h_Tr * scaling, weights_TGN), pack_experts(lora_B_NDr, num_groups), out=delta_GTE)
    return delta_TD.to(dtype), weights_TGN, h_Tr


@_path_with_gradients.register_fake
def _fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = PathInputs(*arguments)
    _check(inputs)
    x, _, lora_A, lora_B, _, _, num_groups, _ = inputs
    weights_dtype = lora_A.dtype if lora_A.dtype == torch.float64 else torch.float32
    weights = x.new_empty(len(x), num_groups, len(lora_B), dtype=weights_dtype)
    h = x.new_empty(len(x), len(lora_A), dtype=lora_A.dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), weights, h


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, bias, _, ctx.scaling = inputs
    _, weights_TGN, h_Tr = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors, weights_TGN, h_Tr)
    ctx.mark_non_differentiable(h_Tr)


def _backward(ctx: Any, grad_delta_TD: torch.Tensor, grad_weights_TGN: torch.Tensor, _: Any) -> tuple[Any, ...]:
    saved = Saved(*ctx.saved_tensors)
    run = cpu_training.backward if cpu_training.runs(saved.x_TD, saved.lora_A_rD) else _backward_in_torch_ops
    needs_x, needs_dropped = ctx.needs_input_grad[:2]
    *grads, grad_logits_TGN = run(
        grad_delta_TD, grad_weights_TGN, saved, ctx.scaling, needs_x=needs_x, needs_dropped=needs_dropped
    )
    grad_bias_TGN = None if ctx.bias_dtype is None else grad_logits_TGN.to(ctx.bias_dtype)
    return *grads, grad_bias_TGN, None, None


def _backward_in_torch_ops(
    grad_delta_TD: torch.Tensor,
    grad_weights_TGN: torch.Tensor,
    saved: Saved,
    scaling: float,
    *,
    needs_x: bool,
    needs_dropped: bool,
) -> cpu_training.Gradients:
    x_TD, dropped_TD, lora_A_rD, lora_B_NDr, lora_route, weights_TGN, h_Tr = saved
    (N, D, r), (T, G, _), dtype = lora_B_NDr.shape, weights_TGN.shape, x_TD.dtype
    x_TD, grad_delta_TD = x_TD.to(lora_A_rD.dtype), grad_delta_TD.to(lora_A_rD.dtype)
    grad_GTE = grad_delta_TD.reshape(T, G, -1).transpose(0, 1)

    z_GTK = outer(h_Tr * scaling, weights_TGN)
    grad_B_GKE = torch.bmm(z_GTK.transpose(1, 2), grad_GTE)
    grad_B_NDr = grad_B_GKE.view(G, N, r, -1).permute(1, 0, 3, 2).reshape(N, D, r)
    del z_GTK, grad_B_GKE

    grad_z_GTNr = torch.bmm(grad_GTE, pack_experts(lora_B_NDr, G).transpose(1, 2)).view(G, T, N, r)
    weights_GT1N = weights_TGN.to(h_Tr.dtype).transpose(0, 1).unsqueeze(2)
    grad_h_Tr = (weights_GT1N @ grad_z_GTNr).sum(dim=0).view(T, r) * scaling
    grad_mix_GTN = (grad_z_GTNr @ (h_Tr * scaling).unsqueeze(-1)).squeeze(-1)
    grad_weights_TGN = grad_weights_TGN + grad_mix_GTN.transpose(0, 1)
    del grad_z_GTNr

    inner_TG1 = (weights_TGN * grad_weights_TGN).sum(dim=-1, keepdim=True)
    grad_logits_TGN = weights_TGN * (grad_weights_TGN - inner_TG1)
    grad_logits_TJ = grad_logits_TGN.reshape(T, G * N).to(x_TD.dtype)

    grad_x_TD = grad_dropped_TD = None
    if dropped_TD is None:
        grad_s_TS = torch.cat([grad_h_Tr, grad_logits_TJ], dim=1)
        grad_A_rD, grad_route = (grad_s_TS.t() @ x_TD).split([r, G * N])
        if needs_x:
            grad_x_TD = (grad_s_TS @ torch.cat([lora_A_rD, lora_route])).to(dtype)
    else:
        grad_A_rD, grad_route = grad_h_Tr.t() @ dropped_TD.to(x_TD.dtype), grad_logits_TJ.t() @ x_TD
        if needs_x:
            grad_x_TD = (grad_logits_TJ @ lora_route).to(dtype)
        if needs_dropped:
            grad_dropped_TD = (grad_h_Tr @ lora_A_rD).to(dtype)
    return grad_x_TD, grad_dropped_TD, grad_A_rD, grad_B_NDr, grad_route, grad_logits_TGN


torch.library.register_autograd("mtlora::path_with_gradients", _backward, setup_context=_save)
