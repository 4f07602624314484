"""The routed low-rank path, computed so that no tensor per expert ever exists.

With z_j = Pi[j,:] (x) h in R^(N*r), group j of the output is one product z_j @ Bcat_j: the path costs what one low-rank
layer of rank N*r costs. [A; R] is one product of r + G*N rows.

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups, E = D/G dimensions of a group, K = N*r,
S = r + G*N rows of [A; R].
"""

from typing import NamedTuple

import torch


class PackedBlock(NamedTuple):
    """One block's weights in the layout the products want. Any floating dtype; all three of the same one but the bias.

    shrink_SD: [A; R], [r + G*N, D].
    expand_GKE: the experts times alpha/r, [G, N*r, D/G].
    rank: r, where A ends in shrink_SD.
    """

    shrink_SD: torch.Tensor
    expand_GKE: torch.Tensor
    rank: int

    @property
    def num_experts(self) -> int:
        """N."""
        return self.expand_GKE.shape[1] // self.rank

    @property
    def num_groups(self) -> int:
        """G."""
        return self.expand_GKE.shape[0]


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
) -> PackedBlock:
    """Pack one block's checkpoint tensors for inference; alpha/r is folded into the experts before rounding."""
    shrink_SD = torch.cat([lora_A_rD, lora_route]).to(dtype).contiguous()
    expand_GKE = (pack_experts(lora_B_NDr.float(), num_groups) * scaling).to(dtype).contiguous()
    return PackedBlock(shrink_SD, expand_GKE, lora_A_rD.shape[0])


def route(logits_TGN: torch.Tensor, bias_TGN: torch.Tensor | None) -> torch.Tensor:
    """Softmax over experts in float32, per token and group."""
    logits_TGN = logits_TGN.float()
    return torch.softmax(logits_TGN if bias_TGN is None else logits_TGN + bias_TGN, dim=-1)


def expand(h_Tr: torch.Tensor, weights_TGN: torch.Tensor, expand_GKE: torch.Tensor) -> torch.Tensor:
    """z_j @ Bcat_j for every group: [T, D]."""
    T, G, N = weights_TGN.shape
    z_GTK = torch.einsum("tgn,tr->gtnr", weights_TGN.to(h_Tr.dtype), h_Tr).reshape(G, T, N * h_Tr.shape[1])
    return torch.bmm(z_GTK, expand_GKE).transpose(0, 1).reshape(T, -1)


def routed_lora(x_TD: torch.Tensor, block: PackedBlock, bias_TGN: torch.Tensor | None) -> torch.Tensor:
    """The path's output [T, D], in x's dtype, for tokens that share one adapter.

    bias_TGN: router bias per token in float32, [T, G, N] or broadcastable to it.
    """
    s_TS = torch.nn.functional.linear(x_TD, block.shrink_SD)
    h_Tr, logits = s_TS[:, : block.rank], s_TS[:, block.rank :]
    weights_TGN = route(logits.view(-1, block.num_groups, block.num_experts), bias_TGN)
    return expand(h_Tr, weights_TGN, block.expand_GKE)
