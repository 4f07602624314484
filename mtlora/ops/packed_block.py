"""One block's weights in the layout of the products, and the path of one adapter in torch ops.

With z_j = Pi[j,:] (x) h in R^(N*r), group j of the output is one product z_j @ Bcat_j. So the path costs as much as one
low-rank layer of rank N*r, and no tensor per expert exists. [A; R] is one product of r + G*N columns.

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups, E = D/G dimensions of a group, K = N*r,
J = G*N, S = r + J rows of [A; R], b rows of a bias table.
"""

from typing import NamedTuple

import torch


class PackedBlock(NamedTuple):
    """One block's weights in the layout of all backends: each row is one index of the summed dimension.

    shrink_DS: [A; R] transposed, [D, r + G*N].
    expand_GKE: the experts times alpha/r, [G, N*r, D/G], in the same dtype.
    rank: r; the first r columns of shrink_DS are A, the rest R.
    bias_bGN: router biases, float32 [b, G, N], if the adapter has any.
    """

    shrink_DS: torch.Tensor
    expand_GKE: torch.Tensor
    rank: int
    bias_bGN: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        """N."""
        return self.expand_GKE.shape[1] // self.rank

    @property
    def num_groups(self) -> int:
        """G."""
        return self.expand_GKE.shape[0]

    def to(self, device: torch.device) -> "PackedBlock":
        """The block on another device."""
        bias_bGN = None if self.bias_bGN is None else self.bias_bGN.to(device)
        return PackedBlock(self.shrink_DS.to(device), self.expand_GKE.to(device), self.rank, bias_bGN)


def pack_experts(lora_B_NDr: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[N, D, r] -> [G, N*r, D/G]: Bcat_j stacks the transposed rows of group j of every expert."""
    N, D, r = lora_B_NDr.shape
    return lora_B_NDr.view(N, num_groups, D // num_groups, r).permute(1, 0, 3, 2).reshape(num_groups, N * r, -1)


def pack_block(
    lora_A_rD: torch.Tensor,
    lora_B_NDr: torch.Tensor,
    lora_route: torch.Tensor,
    *,
    num_groups: int,
    scaling: float,
    dtype: torch.dtype,
    bias_bGN: torch.Tensor | None = None,
) -> PackedBlock:
    """Pack one block's checkpoint tensors for inference; alpha/r is folded into the experts before rounding."""
    shrink_DS = torch.cat([lora_A_rD, lora_route]).t().to(dtype).contiguous()
    expand_GKE = (pack_experts(lora_B_NDr.float(), num_groups) * scaling).to(dtype).contiguous()
    bias_bGN = None if bias_bGN is None else bias_bGN.float().contiguous()
    return PackedBlock(shrink_DS, expand_GKE, lora_A_rD.shape[0], bias_bGN)


def route(logits_TGN: torch.Tensor, bias_TGN: torch.Tensor | None) -> torch.Tensor:
    """Softmax over experts, per token and group, in float32 (in float64 for float64 logits)."""
    logits_TGN = logits_TGN if logits_TGN.dtype == torch.float64 else logits_TGN.float()
    return torch.softmax(logits_TGN if bias_TGN is None else logits_TGN + bias_TGN, dim=-1)


def outer(h_Tr: torch.Tensor, weights_TGN: torch.Tensor) -> torch.Tensor:
    """z [G, T, K], in h's dtype: h scaled by each expert's routing weight."""
    T, G, N = weights_TGN.shape
    weights_GTN1 = weights_TGN.to(h_Tr.dtype).transpose(0, 1).unsqueeze(-1)
    return (weights_GTN1 * h_Tr.view(1, T, 1, -1)).view(G, T, N * h_Tr.shape[1])


def expand(h_Tr: torch.Tensor, weights_TGN: torch.Tensor, expand_GKE: torch.Tensor) -> torch.Tensor:
    """z_j @ Bcat_j for every group: [T, D]."""
    return torch.bmm(outer(h_Tr, weights_TGN), expand_GKE).transpose(0, 1).reshape(len(h_Tr), -1)


def packed_path(x_TD: torch.Tensor, block: PackedBlock, bias_TGN: torch.Tensor | None) -> torch.Tensor:
    """The path's output [T, D], in x's dtype, for tokens that share one adapter.

    bias_TGN: router bias per token in float32, [T, G, N] or broadcastable to it; `block.bias_bGN` is not read.
    """
    s_TS = x_TD @ block.shrink_DS
    h_Tr, logits_TJ = s_TS[:, : block.rank], s_TS[:, block.rank :]
    weights_TGN = route(logits_TJ.reshape(-1, block.num_groups, block.num_experts), bias_TGN)
    return expand(h_Tr, weights_TGN, block.expand_GKE)
