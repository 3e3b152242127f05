"""What a run is told of each pass before it: chances of experts from the tokens that are about to run.

Predictors (predictor.py) score one token of one item; a pass has many tokens of several rows, and wants an expert if
any of them does, so a pass's chance is 1 - product of (1 - a token's chance).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.path_model import PathBatch
from expertflow_quant.offload.policies.predictive import Demand
from expertflow_quant.offload.predict_paths import PathItem, PathPredictor, batch_of
from expertflow_quant.offload.sight import STEP, coded
from expertflow_quant.offload.trace import PROMPT_IMAGE, PROMPT_TEXT

Chances = list[list[float]]
"""Of every layer's experts, 0 to 1: ``[layers][experts]``."""


@dataclass(frozen=True)
class PassTokens:
    """Tokens about to run, on the CPU: ``ids`` int64 [B, T]; ``real``, those that are waited for (no padding, no answer
    that has ended), and ``image`` bool [B, T];
    ``embeddings`` float [B, T, H] that the language model is given, if they are known. ``begins``: prompts of new
    answers, else a token of each answer under way."""

    ids: Tensor
    real: Tensor
    image: Tensor
    begins: bool
    embeddings: Tensor | None = None


class Foresight(Protocol):
    """Tells a run what its passes will want. One run at a time."""

    name: str

    def before(self, tokens: PassTokens) -> Chances:
        """Chances for the pass that is about to run."""

    def at(self, layer: int, hidden: Tensor) -> Sequence[float] | None:
        """Better chances for the layer after ``layer``, whose router saw ``hidden`` [T, H]; None: none."""


class DemandForesight:
    """Expects of every pass what ``demand`` does of the next step, whatever its tokens are."""

    def __init__(self, name: str, demand: Demand, experts: Sequence[int]) -> None:
        self.name, self._demand, self._experts = name, demand, tuple(experts)

    def before(self, tokens: PassTokens) -> Chances:
        rate = self._demand.rate
        return [[rate((layer, expert)) for expert in range(count)] for layer, count in enumerate(self._experts)]

    def at(self, layer: int, hidden: Tensor) -> None:
        """Nothing that was not said before."""
        return


class PathForesight:
    """Runs a trained path predictor along with the answers; prompts are read by its encoder once."""

    def __init__(self, predictor: PathPredictor, experts: Sequence[int]) -> None:
        sizes = predictor.model.sizes
        if [sizes.experts] * sizes.layers != list(experts):
            raise ExpertFlowError(
                f"the predictor was trained for {sizes.layers} layers of {sizes.experts} experts, this model has "
                f"{list(experts)}: train one with `python -m calibration predictor`"
            )
        self.name, self._predictor = predictor.name, predictor
        self._batch: PathBatch | None = None
        self._memory = torch.empty(0)

    def before(self, tokens: PassTokens) -> Chances:
        if tokens.begins or self._batch is None or len(self._batch.prompt) != len(tokens.ids):
            return self._read(tokens)
        with torch.no_grad():
            batch, ids = self._batch, tokens.ids.clamp(max=self._predictor.model.sizes.tokens - 1)
            real = torch.cat([batch.answer_real, torch.ones_like(ids, dtype=torch.bool)], dim=1)
            self._batch = replace(batch, answer=torch.cat([batch.answer, ids], dim=1), answer_real=real)
            logits = self._predictor.model.of_answers(self._batch, self._memory)
        return joined(logits[:, -ids.shape[1] :][tokens.real])

    def at(self, layer: int, hidden: Tensor) -> None:
        """Nothing: all layers were foretold before the first."""
        return

    def _read(self, tokens: PassTokens) -> Chances:
        model, items = self._predictor.model, [item_of(self._predictor, tokens, row) for row in range(len(tokens.ids))]
        with torch.no_grad():
            self._batch = batch_of(items, model.sizes)
            self._memory = model.read(self._batch)
            return joined(model.of_states(self._memory)[self._batch.prompt_real])


def joined(logits: Tensor) -> Chances:
    """Chances that any of a pass's tokens uses an expert, from their logits [T, L, E]."""
    found: Chances = (1 - torch.sigmoid(-logits.float()).prod(0)).tolist()
    return found


def item_of(predictor: PathPredictor, tokens: PassTokens, row: int) -> PathItem:
    """What ``predictor`` reads of one row of prompts. Raises ExpertFlowError where it lacks pictures."""
    real = tokens.real[row]
    image = tokens.image[row][real]
    kind = torch.where(image, PROMPT_IMAGE, PROMPT_TEXT)
    if predictor.basis is None:
        return PathItem(tokens.ids[row][real], kind)
    if tokens.embeddings is None:
        raise ExpertFlowError(f"{predictor.name} looks at pictures, which this model does not show: train it on ids")
    pictures = predictor.basis(tokens.embeddings[row][real][image])
    return PathItem(tokens.ids[row][real], kind, coded(pictures).float() / STEP)
