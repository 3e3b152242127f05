"""Which experts follow which: the chance that later steps use an expert, from the experts that each layer used last.

A ridge regression on a recorded run. What an item is about shows in the experts that it uses, so the present ones tell
the next ones better than counts do.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.policy import Key, Progress

FORGET = 0.8
RIDGE = 30.0


@dataclass(frozen=True)
class AffinityTable:
    """``weights`` float32 [n, n] and ``bias`` float32 [n] of the n experts of all layers, layer by layer: the demand
    for expert j is bias[j] + sum of weights[i, j] over the experts i that their layers used last."""

    weights: Tensor
    bias: Tensor


def fit_affinity(
    requests: Sequence[Sequence[Collection[int]]],
    experts: Sequence[int],
    forget: float = FORGET,
    ridge: float = RIDGE,
) -> AffinityTable:
    """Least squares, with ``ridge`` on the weights, for an expert's use in the steps that follow its layer's turn: the
    k-th of them weighs (1 - forget) * forget ** (k - 1), so ``forget`` 0 fits the next step alone.

    Raises ExpertFlowError for fewer than two steps or a weight that is none.
    """
    if len(requests) < 2 or not 0 <= forget < 1 or ridge <= 0:
        raise ExpertFlowError(
            f"{len(requests)} steps, forget {forget}, ridge {ridge}: give two steps or more, 0 to below 1, above 0"
        )
    starts = _starts(experts)
    used = torch.zeros(len(requests), sum(experts), dtype=torch.float64)
    for step, layers in enumerate(requests):
        used[step, [starts[layer] + expert for layer, wanted in enumerate(layers) for expert in wanted]] = 1
    target = torch.zeros_like(used)
    for step in range(len(requests) - 2, -1, -1):
        target[step] = forget * target[step + 1] + (1 - forget) * used[step + 1]
    before = torch.cat([torch.zeros_like(used[:1]), used[:-1]])
    bias = torch.empty(sum(experts), dtype=torch.float64)
    weights = torch.empty(sum(experts), sum(experts), dtype=torch.float64)
    for layer, count in enumerate(experts):
        own = slice(starts[layer], starts[layer] + count)
        state = torch.cat([used[:, : own.stop], before[:, own.stop :]], dim=1)  # as it is when the layer runs
        center, mean = state.mean(0), target[:, own].mean(0)
        gram = (state - center).T @ (state - center) + ridge * torch.eye(len(center), dtype=torch.float64)
        weights[:, own] = torch.linalg.solve(gram, (state - center).T @ (target[:, own] - mean))
        bias[own] = mean - center @ weights[:, own]
    return AffinityTable(weights.float(), bias.float())


class Affinity:
    """Demand (predictive.py) by an AffinityTable, kept up to date with every request of ``progress``."""

    def __init__(self, progress: Progress, table: AffinityTable) -> None:
        self._starts, self._weights = _starts(progress.experts), table.weights
        if table.weights.shape != (sum(progress.experts),) * 2:
            raise ExpertFlowError(
                f"an affinity table of {table.weights.shape[0]} experts, the model has {sum(progress.experts)}: fit it "
                "on a trace of this model"
            )
        self._part = [torch.zeros_like(table.bias) for _ in progress.experts]
        self._sum = table.bias.clone()
        self._rates = self._sum.tolist()
        progress.watch(self._asked)

    def rate(self, key: Key) -> float:
        """0 to 1: the demand expected for ``key`` in the steps to come."""
        return min(max(self._rates[self._starts[key[0]] + key[1]], 0.0), 1.0)

    def _asked(self, layer: int, experts: Collection[int]) -> None:
        self._sum -= self._part[layer]
        self._part[layer] = self._weights[[self._starts[layer] + expert for expert in experts]].sum(0)
        self._sum += self._part[layer]
        self._rates = self._sum.tolist()


def _starts(experts: Sequence[int]) -> list[int]:
    return [sum(experts[:layer]) for layer in range(len(experts))]
