"""Predictors that count: how often experts were used in a training trace, by layer, by kind of token, by token."""

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.predictor import History, check_fits
from expertflow_quant.offload.sight import Sight
from expertflow_quant.offload.trace import RoutingTrace

_KINDS = 3
_PRIOR = 0.5


class Frequency:
    """The experts that most tokens used, in each layer; ``table`` float32 [kinds, L, E]: shares of the tokens of each
    kind, or [1, L, E] of all."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.name = "frequency by kind" if len(table) == _KINDS else "frequency"

    @classmethod
    def fit(cls, trace: RoutingTrace, by_kind: bool = False) -> "Frequency":
        """Counts of ``trace``; a kind that it does not have gets the shares of all tokens."""
        if not len(trace):
            raise ExpertFlowError("a trace without tokens tells no frequencies: record some items")
        paths = trace.paths().float()
        everything = paths.mean(0)
        if not by_kind:
            return cls(everything.unsqueeze(0))
        kinds = [paths[trace.kind == kind] for kind in range(_KINDS)]
        return cls(torch.stack([part.mean(0) if len(part) else everything for part in kinds]))

    def predict(self, history: History) -> Tensor:
        return self._of(history.kind[history.at])

    def scores_for(self, trace: RoutingTrace, sight: Sight | None = None) -> Tensor:
        check_fits(self.name, (self.table.shape[1], self.table.shape[2]), trace)
        return self._of(trace.kind)

    def _of(self, kind: Tensor) -> Tensor:
        return self.table[kind.long() if len(self.table) == _KINDS else torch.zeros_like(kind).long()]


class TokenTable:
    """The experts that a token's id used most; ``shares`` float32 [ids, L, E], where rare ids lean on ``prior``. Image
    tokens share one id, so they share one guess."""

    name = "token table"

    def __init__(self, shares: Tensor, prior: Frequency) -> None:
        self.shares, self.prior = shares, prior

    @classmethod
    def fit(cls, trace: RoutingTrace) -> "TokenTable":
        """Counts of ``trace`` by token id."""
        prior = Frequency.fit(trace)
        ids = trace.token_ids.long()
        sums = torch.zeros(int(ids.max()) + 1, trace.layers, trace.num_experts).index_add_(
            0, ids, trace.paths().float()
        )
        counts = torch.bincount(ids, minlength=len(sums)).view(-1, 1, 1)
        return cls((sums + _PRIOR * prior.table) / (counts + _PRIOR), prior)

    def predict(self, history: History) -> Tensor:
        return self._of(history.token_ids[history.at : history.at + 1])[0]

    def scores_for(self, trace: RoutingTrace, sight: Sight | None = None) -> Tensor:
        check_fits(self.name, (self.shares.shape[1], self.shares.shape[2]), trace)
        return self._of(trace.token_ids)

    def _of(self, ids: Tensor) -> Tensor:
        known = ids.long().clamp(max=len(self.shares) - 1)
        return torch.where((ids < len(self.shares)).view(-1, 1, 1), self.shares[known], self.prior.table)
