"""Predictors: which experts a token will use, guessed before it runs. A guess moves records early; the router decides.

One interface, over ids alone, so that a predictor can be scored on a recorded trace without a model or a device. Kinds:
predict_frequency.py (counts), predict_previous.py (the tokens before), predict_ahead.py (later routers on the present
hidden state) and predict_paths.py (ExpertFlow's encoder-decoder).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.sight import Sight
from expertflow_quant.offload.trace import GENERATED, RoutingTrace


@dataclass(frozen=True)
class History:
    """What is known of one item when its token ``at`` is about to run.

    ``token_ids`` and ``kind`` [n]: the tokens so far with those of the pass that is about to run, so a prompt whole, as
    it is known before it runs; ``at`` is one of that pass. ``experts`` [m, L, K]: of the m tokens of earlier passes.
    ``pictures`` float [image tokens of the item, F] and ``ahead`` int64 [L, D, W] of token ``at``: what ``Sight`` keeps
    of the model, or none.
    """

    token_ids: Tensor
    kind: Tensor
    at: int
    experts: Tensor
    pictures: Tensor | None = None
    ahead: Tensor | None = None

    @classmethod
    def of(cls, trace: RoutingTrace, row: int, sight: Sight | None = None) -> "History":
        """What was known when token ``row`` of a recorded run was about to run."""
        rows = trace.rows(int(trace.item[row]))
        known = next(step for step in trace.steps(int(trace.item[row])) if step.start <= row < step.stop)
        return cls(
            trace.token_ids[rows.start : known.stop],
            trace.kind[rows.start : known.stop],
            row - rows.start,
            trace.experts[rows.start : known.start].long(),
            None if sight is None or sight.pictures is None else sight.pictures_of(trace, rows),
            None if sight is None or sight.ahead is None else sight.ahead[row].long(),
        )


class Predictor(Protocol):
    """Scores experts: the higher, the likelier. Both calls use only what is known before a token runs."""

    name: str

    def predict(self, history: History) -> Tensor:
        """float32 [L, E]: scores of the experts of token ``history.at``."""

    def scores_for(self, trace: RoutingTrace, sight: Sight | None = None) -> Tensor:
        """float32 [N, L, E]: the same for every token of a recorded run."""


def widths(top_k: int) -> dict[str, int]:
    """How many experts of a layer a guess may name: top_k, one and a half times and twice that."""
    return {"k": top_k, "1.5k": (3 * top_k + 1) // 2, "2k": 2 * top_k}


def best(scores: Tensor, count: int) -> Tensor:
    """bool like ``scores`` [..., E]: the ``count`` experts of highest score."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, scores.topk(min(count, scores.shape[-1]), dim=-1).indices, True)


def passes_of(trace: RoutingTrace) -> Tensor:
    """int64 [N]: the row at which each token's pass begins: its prompt's first row, or a generated token's own."""
    rows = torch.arange(len(trace))
    starts = torch.searchsorted(trace.item, trace.item)
    return torch.where(trace.kind == GENERATED, rows, starts)


def check_fits(name: str, sizes: tuple[int, int], trace: RoutingTrace) -> None:
    """Raises ExpertFlowError when a predictor of ``sizes`` (layers, experts) meets another model's trace."""
    found = (trace.layers, trace.num_experts)
    if found != sizes:
        raise ExpertFlowError(
            f"{name} was made for {sizes[0]} layers of {sizes[1]} experts, this trace has {found[0]} of {found[1]}: "
            "give a trace of the same model, or make the predictor anew"
        )
