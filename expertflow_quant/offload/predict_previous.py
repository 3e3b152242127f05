"""The predictor that expects more of the same: experts of the tokens before, the latest first."""

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.predict_frequency import Frequency
from expertflow_quant.offload.predictor import History, check_fits
from expertflow_quant.offload.sight import Sight
from expertflow_quant.offload.trace import RoutingTrace

_LITTLE = 1e-4


class PreviousToken:
    """Scores halve (``decay``) with every token since an expert's use; ``prior`` decides between experts not used yet.

    A prompt runs in one pass, so none of its tokens' routes are known before it. ``in_turn`` scores it as if its tokens
    ran one after the other, which flatters this predictor on prompts.
    """

    def __init__(self, prior: Frequency, decay: float = 0.5, in_turn: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ExpertFlowError(f"decay {decay} must lie in 0 .. 1, 1 left out: 0 keeps the last token only")
        self.prior, self.decay, self.in_turn = prior, decay, in_turn
        self.name = "previous token, prompt in turn" if in_turn else "previous token"

    def predict(self, history: History) -> Tensor:
        state = torch.zeros_like(self.prior.table[0])
        for used in history.experts:
            state = state * self.decay + torch.zeros_like(state).scatter_(1, used, 1.0)
        return state + _LITTLE * self.prior.predict(history)

    def scores_for(self, trace: RoutingTrace, sight: Sight | None = None) -> Tensor:
        scores = _LITTLE * self.prior.scores_for(trace)
        check_fits(self.name, (trace.layers, trace.num_experts), trace)
        paths = trace.paths().float()
        for item in range(trace.items):
            state = torch.zeros_like(paths[0])
            for step in trace.steps(item):
                if not self.in_turn:
                    scores[step] += state
                for row in range(step.start, step.stop):
                    if self.in_turn:
                        scores[row] += state
                    state = state * self.decay + paths[row]
        return scores
