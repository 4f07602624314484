"""Linear heads of many tasks over an encoder's features, and the linear probe that they start from.

Shape suffixes: B images, N examples, F size of a feature, K classes of all tasks, C classes of one.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

# Weights of the squared norm that a probe tries, on a fifth of its examples.
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
_HELD_OUT = 5
_ITERATIONS = 60
_LEAST = 1e-6


class Heads(nn.Module):
    """One linear layer whose outputs are the classes of all tasks; features are standardised first.

    classes: for each task, the outputs that are its labels, in their order. told: whether an image's task is known, and
    with it which outputs count.
    """

    classes_TK: torch.Tensor
    mean_F: torch.Tensor
    std_F: torch.Tensor
    probe_weight_KF: torch.Tensor
    probe_bias_K: torch.Tensor

    def __init__(self, classes: Sequence[Sequence[int]], features: int, *, told: bool = True) -> None:
        super().__init__()
        self.classes = [list(each) for each in classes]
        self.told = told
        K = 1 + max(max(each) for each in self.classes)
        self.weight = nn.Parameter(torch.zeros(K, features))
        self.bias = nn.Parameter(torch.zeros(K))
        self.register_buffer("mean_F", torch.zeros(features))
        self.register_buffer("std_F", torch.ones(features))
        # The probe's weights, to compare with.
        self.register_buffer("probe_weight_KF", torch.zeros(K, features))
        self.register_buffer("probe_bias_K", torch.zeros(K))
        self.register_buffer("classes_TK", torch.zeros(len(self.classes), K, dtype=torch.bool), persistent=False)
        for task, each in enumerate(self.classes):
            self.classes_TK[task, each] = True

    def forward(self, features_BF: torch.Tensor, tasks_B: torch.Tensor) -> torch.Tensor:
        """Logits [B, K]; minus infinity for other tasks' classes, if the task is told."""
        return self._logits(features_BF, tasks_B, self.weight, self.bias)

    def alone(self, features_BF: torch.Tensor, tasks_B: torch.Tensor) -> torch.Tensor:
        """The probe's logits [B, K], for features of the backbone alone."""
        return self._logits(features_BF, tasks_B, self.probe_weight_KF, self.probe_bias_K)

    def _logits(
        self, features_BF: torch.Tensor, tasks_B: torch.Tensor, weight_KF: torch.Tensor, bias_K: torch.Tensor
    ) -> torch.Tensor:
        logits_BK = nn.functional.linear((features_BF - self.mean_F) / self.std_F, weight_KF, bias_K)
        return logits_BK.masked_fill(~self.classes_TK[tasks_B], float("-inf")) if self.told else logits_BK

    @torch.no_grad()
    def fit(self, features_NF: torch.Tensor, tasks_N: torch.Tensor, targets_N: torch.Tensor) -> None:
        """Start from a linear probe of these examples' features, and keep it. targets_N: outputs, 0 to K-1."""
        self.mean_F.copy_(features_NF.mean(0))
        # The deviation of one example is 0.
        self.std_F.copy_(features_NF.std(0, correction=min(1, len(features_NF) - 1)).clamp_min(_LEAST))
        self.start(features_NF, tasks_N, targets_N)
        self.probe_weight_KF.copy_(self.weight)
        self.probe_bias_K.copy_(self.bias)

    @torch.no_grad()
    def start(self, features_NF: torch.Tensor, tasks_N: torch.Tensor, targets_N: torch.Tensor) -> None:
        """Start from a probe of some of the examples that were fitted."""
        standard_NF = (features_NF - self.mean_F) / self.std_F
        groups = [[task] for task in range(len(self.classes))] if self._apart() else [list(range(len(self.classes)))]
        for group in groups:
            chosen = torch.isin(tasks_N, torch.tensor(group))
            outputs = torch.tensor(sorted({output for task in group for output in self.classes[task]}))
            if not chosen.any():
                continue
            place_K = torch.zeros(len(self.bias), dtype=torch.int64)
            place_K[outputs] = torch.arange(len(outputs))
            weight_CF, bias_C = linear_probe(standard_NF[chosen], place_K[targets_N[chosen]], len(outputs))
            self.weight[outputs], self.bias[outputs] = weight_CF, bias_C

    def _apart(self) -> bool:
        """Whether the tasks' heads share no outputs."""
        return self.told and sum(map(len, self.classes)) == len(self.bias)

    def folded(self, task: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A task's (weight [C, F], bias [C]) for features that are not standardised."""
        weight_CF = self.weight[self.classes[task]].detach() / self.std_F
        return weight_CF, self.bias[self.classes[task]].detach() - weight_CF @ self.mean_F


def linear_probe(features_NF: torch.Tensor, targets_N: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [C, F], bias [C]) of a multinomial regression on standardised features, by L-BFGS.

    The penalty is the one that predicts every fifth example best; then all examples are fitted.
    """
    penalty, held = _PENALTIES[1], torch.arange(len(targets_N)) % _HELD_OUT == 0
    if len(targets_N) >= 2 * _HELD_OUT:
        losses = []
        for each in _PENALTIES:
            weight_CF, bias_C = _fitted(features_NF[~held], targets_N[~held], classes, each)
            losses.append(cross_entropy(features_NF[held] @ weight_CF.T + bias_C, targets_N[held]).item())
        penalty = _PENALTIES[losses.index(min(losses))]
    return _fitted(features_NF, targets_N, classes, penalty)


def _fitted(
    features_NF: torch.Tensor, targets_N: torch.Tensor, classes: int, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        weight_CF = torch.zeros(classes, features_NF.shape[1], requires_grad=True)
        bias_C = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight_CF, bias_C], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(nn.functional.linear(features_NF, weight_CF, bias_C), targets_N)
            loss = loss + penalty * weight_CF.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight_CF.detach(), bias_C.detach()
