"""Guesses about a step, drawn with the recall and precision that a predictor has on misses.

What was measured: of the experts that a cache lacked, the share that was guessed (recall), and of the guessed ones that
it lacked, the share that was used (precision). Drawn: each missing expert of a layer with a chance of ``recall``, each
other absent one with the chance that gives ``precision`` on average.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from eval.speed.traces import RouteSizes
from expertflow_quant.formats import ExpertFlowError

MEASURED = Path(__file__).parents[1] / "results" / "predictors.json"
PREDICTOR = "encoder-decoder, pictures (charts + documents)"
CHANCE = "0.6"
"""Least probability that is acted on. Measured on an H100 beside 9.04 ms a step without guesses: from 0.4 on 6.63 ms,
0.5 6.38, 0.6 6.38, 0.7 6.48, 0.8 6.71: wrong guesses take the link from the right ones."""


@dataclass(frozen=True)
class Predictions:
    """Figures between 0 and 1 and where they are from. Raises ExpertFlowError for others."""

    recall: float
    precision: float
    source: str

    def __post_init__(self) -> None:
        if not (0 <= self.recall <= 1 and 0 < self.precision <= 1):
            raise ExpertFlowError(
                f"recall {self.recall} and precision {self.precision} of predictions: give shares, 0.7 for 70 %"
            )

    @classmethod
    def measured(cls, file: Path = MEASURED, predictor: str = PREDICTOR, chance: str = CHANCE) -> "Predictions":
        """The mean over the tasks in a results file of ``python -m eval predict``."""
        try:
            tasks = json.loads(file.read_text(encoding="utf-8"))["predictors"][predictor]["on"]
            found = [task["misses"]["by_chance"][chance] for task in tasks.values()]
        except (OSError, ValueError, KeyError) as error:
            raise ExpertFlowError(
                f"{file} has no figures of {predictor!r} acted on from {chance} ({error!r}): make it with "
                "python -m eval predict"
            ) from error
        recall, precision = (fmean(each[name] for each in found) for name in ("recall", "precision"))
        return cls(recall, precision, f"{predictor}, from a probability of {chance}, {' + '.join(tasks)}")

    def to_json(self) -> dict[str, Any]:
        return {"recall": round(self.recall, 4), "precision": round(self.precision, 4), "source": self.source}


class Drawn:
    """Guesses for one step at a time, for a cache that keeps the share ``resident`` of each layer's experts and misses
    the share ``missing`` of those that a token wants. ``ids`` int64 ``[layers, 1, experts]`` on the device: the experts
    guessed, the number of experts in the other places; captured steps read it."""

    def __init__(
        self, predictions: Predictions, sizes: RouteSizes, resident: float, missing: float, device: torch.device
    ) -> None:
        missed = sizes.top_k * missing
        absent = max(1.0, sizes.experts * (1 - resident) - missed)
        self._right = predictions.recall
        self._wrong = min(1.0, missed * predictions.recall * (1 / predictions.precision - 1) / absent)
        self._generator = torch.Generator(device).manual_seed(0)
        self._experts = torch.arange(sizes.experts, device=device)
        self.ids = torch.full((sizes.layers, 1, sizes.experts), sizes.experts, device=device)

    def draw(self, routes: Tensor) -> None:
        """For a step that will route ``routes`` int64 ``[layers, rows, top_k]``."""
        layers, _, experts = self.ids.shape
        used = torch.zeros(layers, experts, dtype=torch.bool, device=routes.device)
        used.scatter_(1, routes.reshape(layers, -1), True)
        luck = torch.rand(layers, experts, generator=self._generator, device=routes.device)
        named = luck < torch.where(used, self._right, self._wrong)
        self.ids[:, 0] = torch.where(named, self._experts, experts)
