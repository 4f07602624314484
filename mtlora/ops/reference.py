"""The routed low-rank path exactly as in the formula, in float64: the oracle of every faster implementation.

    h       = A x
    Pi[j,:] = softmax_i( (R x)[j,i] + b[j,i] )
    D(x)[j] = (alpha/r) * sum_i Pi[j,i] * B_i[j] h

(arXiv 2603.01526, section 3; b is this project's per-task router bias.)

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups of D/G dimensions.
"""

import torch


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
