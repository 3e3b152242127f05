"""Next-gate look-ahead: the router of a later layer applied to the present layer's router input. Nothing is trained.

Known only while the token runs, ``distance`` layers ahead of use: layers before that get the guess of ``prior``.
"""

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.predict_frequency import Frequency
from expertflow_quant.offload.predictor import History, check_fits
from expertflow_quant.offload.sight import Sight
from expertflow_quant.offload.trace import RoutingTrace


class NextGate:
    """Experts that layer l's router puts first on the router input of layer l - ``distance``, the first highest."""

    def __init__(self, prior: Frequency, distance: int = 1) -> None:
        if distance < 1:
            raise ExpertFlowError(f"distance {distance} must be at least 1: how many layers ahead is looked")
        self.prior, self.distance = prior, distance
        self.name = f"next gate, {distance} ahead"

    def predict(self, history: History) -> Tensor:
        if history.ahead is None:
            raise ExpertFlowError(f"{self.name} needs what the token's routers saw: give a history with ahead")
        return self._scores(history.ahead.unsqueeze(0), self.prior.predict(history).unsqueeze(0))[0]

    def scores_for(self, trace: RoutingTrace, sight: Sight | None = None) -> Tensor:
        if sight is None or sight.ahead is None:
            raise ExpertFlowError(
                f"{self.name} needs a sight with ahead: record one with `python -m calibration sight`"
            )
        scores = self.prior.scores_for(trace)
        check_fits(self.name, (sight.ahead.shape[1], sight.num_experts), trace)
        return self._scores(sight.check(trace).ahead, scores)

    def _scores(self, ahead: Tensor | None, prior: Tensor) -> Tensor:
        if ahead is None or ahead.shape[2] < self.distance:
            raise ExpertFlowError(f"{self.name} needs a sight that looks {self.distance} layers ahead: record it so")
        layers, experts = prior.shape[1:]
        named = ahead[:, : max(layers - self.distance, 0), self.distance - 1].long()
        ranks = torch.arange(named.shape[-1], 0, -1, dtype=torch.float32).expand(named.shape)
        room = torch.zeros(*named.shape[:2], experts + 1).scatter_(2, named, ranks)
        late = room[..., :experts] + prior[:, self.distance :] * 0.5
        return torch.cat([prior[:, : self.distance], late], dim=1)
