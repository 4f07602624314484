"""The routed low-rank path exactly as in the formula, in float64: the oracle of every faster implementation.

    h       = A x
    Pi[j,:] = softmax_i( (R x)[j,i] + b[j,i] )
    D(x)[j] = (alpha/r) * sum_i Pi[j,i] * B_i[j] h

(arXiv 2603.01526, section 3; b is this project's per-task router bias.)

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups of D/G dimensions, b rows of a bias table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class ReferenceAdapter(NamedTuple):
    """One adapter's weights for one block, as in a checkpoint.

    bias_bGN: the router biases of its tasks, or None.
    """

    lora_A_rD: torch.Tensor
    lora_B_NDr: torch.Tensor
    lora_route: torch.Tensor
    bias_bGN: torch.Tensor | None
    num_groups: int
    scaling: float


def routed_lora_reference(
    x_TD: torch.Tensor,
    lora_A_rD: torch.Tensor,
    lora_B_NDr: torch.Tensor,
    lora_route: torch.Tensor,
    bias_TGN: torch.Tensor | None,
    *,
    num_groups: int,
    scaling: float,
) -> torch.Tensor:
    """The path's output [T, D] in float64. `lora_route` is [G*N, D], group-major; `bias_TGN` is a row per token."""
    x_TD, A, B, R = (t.to(torch.float64) for t in (x_TD, lora_A_rD, lora_B_NDr, lora_route))
    num_experts, d, _ = B.shape
    group_size = d // num_groups
    out_TD = torch.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        h_r = A @ x_D
        for j in range(num_groups):
            logits_N = R[j * num_experts : (j + 1) * num_experts] @ x_D
            if bias_TGN is not None:
                logits_N = logits_N + bias_TGN[t, j].to(torch.float64)
            weights_N = torch.exp(logits_N - logits_N.max())
            weights_N = weights_N / weights_N.sum()
            rows = slice(j * group_size, (j + 1) * group_size)
            for i in range(num_experts):
                out_TD[t, rows] += scaling * weights_N[i] * (B[i, rows] @ h_r)
    return out_TD


def routed_lora_batch_reference(
    x_TD: torch.Tensor,
    adapters: Sequence[ReferenceAdapter | None],
    rows: Sequence[int],
    bias_rows: Sequence[int],
) -> torch.Tensor:
    """The path's output [T, D] in float64 for a batch of many adapters.

    rows: index into `adapters` per token, -1 for none; an empty row (None) adds nothing.
    bias_rows: row of the adapter's bias table per token, -1 for none.
    """
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, (row, bias_row) in enumerate(zip(rows, bias_rows, strict=True)):
        adapter = adapters[row] if row >= 0 else None
        if adapter is None:
            continue
        A, B, R, table, num_groups, scaling = adapter
        bias_TGN = None if table is None or bias_row < 0 else table[bias_row : bias_row + 1]
        out_TD[t] = routed_lora_reference(x_TD[t : t + 1], A, B, R, bias_TGN, num_groups=num_groups, scaling=scaling)[0]
    return out_TD
