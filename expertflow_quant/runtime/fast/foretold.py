"""A trained path predictor inside captured steps: as a step begins it guesses the experts of all layers.

ExpertFlow's predictor (offload/path_model.py) reads prompts with its encoder once, when they are read by the model; of
each token that is about to run its decoder makes one guess, here with keys and values kept, so that a step costs the
same however long the answer is.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.foresight import PassTokens, item_of
from expertflow_quant.offload.path_model import PathBatch, PathModel, PathModelSizes, waves
from expertflow_quant.offload.predict_paths import PathPredictor, batch_of
from expertflow_quant.offload.trace import GENERATED

CHANCE = 0.6
"""Least probability that is acted on: a wrong guess takes the link from right ones. Measured on an H100 with guesses as
good as those of the shipped predictor, ms a step: 9.04 without any, from 0.4 on 6.63, 0.6 6.38, 0.7 6.48, 0.8 6.71."""

ANSWERS = 256
"""Tokens of an answer that are guessed; later ones are filled in when they are routed."""

FIRST = 2
"""Layers without a guess: they are reached before one is there."""


class Foretold:
    """Guesses for ``rows`` rows of at most ``room`` tokens, on ``device``; ``image_ids`` stand for images.

    ``read`` prompts into rows as they are prefilled. ``begin`` makes the guess of a step and can be captured; ``ids``
    int64 ``[layers, 1, experts]`` has it, the number of experts where none is named. Raises ExpertFlowError for a
    predictor of another model.
    """

    def __init__(
        self,
        predictor: PathPredictor,
        experts: Sequence[int],
        rows: int,
        room: int,
        image_ids: Sequence[int],
        device: torch.device,
        chance: float = CHANCE,
    ) -> None:
        self.sizes = sizes = predictor.model.sizes
        if [sizes.experts] * sizes.layers != list(experts):
            raise ExpertFlowError(
                f"the predictor was trained for {sizes.layers} layers of {sizes.experts} experts, this model has "
                f"{list(experts)}: train one with `python -m calibration predictor`"
            )
        self.looks_at_pictures = predictor.basis is not None
        self._predictor = predictor
        self._model: Any = copy.deepcopy(predictor.model).to(device).eval()
        self._image_ids = torch.tensor(list(image_ids), dtype=torch.int64)
        self._logit = math.log(chance / (1 - chance))
        self._layers: list[Any] = list(self._model.decoder.layers)
        head = sizes.width // sizes.heads

        def kept(places: int) -> list[Tensor]:
            shape = (2, rows, sizes.heads, places, head)
            return [torch.zeros(shape, device=device) for _ in self._layers]

        self._prompts, self._answers = kept(room), kept(ANSWERS)
        self._real = torch.zeros(rows, room, dtype=torch.bool, device=device)
        self._answered = torch.zeros(rows, dtype=torch.int64, device=device)
        self._waves = waves(ANSWERS, sizes.width).to(device)
        self._rows, self._places = torch.arange(rows, device=device), torch.arange(ANSWERS, device=device)
        self._experts = torch.arange(sizes.experts, device=device)
        self.ids = torch.full((sizes.layers, 1, sizes.experts), sizes.experts, device=device)

    @staticmethod
    def nbytes(sizes: PathModelSizes, rows: int, room: int) -> int:
        """Device bytes of weights, keys and values, all in float32."""
        with torch.device("meta"):
            weights = sum(value.numel() for value in PathModel(sizes).parameters())
        return 4 * (weights + 2 * sizes.decoder_layers * rows * sizes.width * (room + ANSWERS)) + rows * room

    @torch.no_grad()
    def read(self, first: int, inputs: Mapping[str, Any], embeddings: Tensor | None = None) -> None:
        """Prompts of ``inputs`` (input_ids and attention_mask ``[B, T]``) into rows ``first`` and on; ``embeddings``
        ``[B, T, H]``: the language model's inputs, for a predictor that looks at pictures."""
        ids, real = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu().bool()
        seen = embeddings.float().cpu() if embeddings is not None and self.looks_at_pictures else None
        tokens = PassTokens(ids, real, torch.isin(ids, self._image_ids), True, seen)
        batch = batch_of([item_of(self._predictor, tokens, row) for row in range(len(ids))], self.sizes)
        batch = _moved(batch, self.ids.device)
        memory = self._model.read(batch)
        rows, length = slice(first, first + len(ids)), memory.shape[1]
        for layer, kept in zip(self._layers, self._prompts, strict=True):
            kept[:, rows, :, :length] = torch.stack(self._heads(layer.multihead_attn, memory, 1, 3))  # keys, values
        self._real[rows] = False
        self._real[rows, :length] = batch.prompt_real
        self._answered[rows] = 0

    @torch.no_grad()
    def begin(self, tokens: Tensor, active: Tensor) -> None:
        """Guess for the tokens int64 ``[rows, 1]`` that are about to run, of the rows that are ``active`` bool."""
        count = len(tokens)
        at = self._answered[:count]
        inside = active & (at < ANSWERS)
        likely = (self._logits(tokens, at.clamp(max=ANSWERS - 1)) > self._logit) & inside[:, None, None]
        self.ids[:, 0].copy_(torch.where(likely.any(dim=0), self._experts, self.sizes.experts))
        at.add_(active)

    def guess(self, layer: int, hidden: Tensor | None) -> Tensor | None:
        """See ``lookahead.Guess``."""
        return None if layer < FIRST else self.ids[layer]

    def _logits(self, tokens: Tensor, at: Tensor) -> Tensor:
        """float32 ``[rows, layers, experts]``; the tokens' keys and values are kept at ``at``."""
        model, count = self._model, len(tokens)
        ids = tokens.clamp(max=self.sizes.tokens - 1)
        states = model.token(ids) + model.kind.weight[GENERATED] + self._waves[at].unsqueeze(1)
        so_far = (self._places <= at[:, None])[:, None, None]
        prompt = self._real[:count, None, None]
        for layer, answers, prompts in zip(self._layers, self._answers, self._prompts, strict=True):
            query, key, value = self._heads(layer.self_attn, layer.norm1(states), 0, 3)
            answers[0, self._rows[:count], :, at] = key[:, :, 0]
            answers[1, self._rows[:count], :, at] = value[:, :, 0]
            states = states + _joined(layer.self_attn, query, answers[:, :count], so_far)
            (query,) = self._heads(layer.multihead_attn, layer.norm2(states), 0, 1)
            states = states + _joined(layer.multihead_attn, query, prompts[:, :count], prompt)
            states = states + layer.linear2(layer.activation(layer.linear1(layer.norm3(states))))
        logits: Tensor = model.of_states(model.decoder.norm(states))
        return logits[:, 0]

    def _heads(self, attention: Any, states: Tensor, first: int, last: int) -> list[Tensor]:
        """Projections ``first`` to ``last`` of query, key and value of ``states [B, T, width]``, ``[B, heads, T, D]``
        each."""
        width = self.sizes.width
        part = slice(first * width, last * width)
        made = functional.linear(states, attention.in_proj_weight[part], attention.in_proj_bias[part])
        shape = (*states.shape[:2], self.sizes.heads, width // self.sizes.heads)
        return [made[..., at : at + width].reshape(shape).transpose(1, 2) for at in range(0, made.shape[-1], width)]


def _joined(attention: Any, query: Tensor, kept: Tensor, seen: Tensor) -> Tensor:
    """Attention of ``query [B, heads, 1, D]`` over keys and values ``[2, B, heads, N, D]``, projected:
    ``[B, 1, width]``."""
    # As two products, whose work is dealt out over the kept tokens: torch's fused attention has one program for each
    # head, which took 0.58 ms of a step on an H200 where a prompt had room for 2,209 tokens.
    scores = query @ kept[0].transpose(-1, -2) / math.sqrt(query.shape[-1])
    hidden = torch.finfo(scores.dtype).min  # no infinity: where a row sees nothing, nothing becomes NaN
    shares = torch.where(seen, scores, hidden).softmax(dim=-1)
    projected: Tensor = attention.out_proj((shares @ kept[1]).transpose(1, 2).flatten(2))
    return projected


def _moved(batch: PathBatch, device: torch.device) -> PathBatch:
    moved: dict[str, Any] = {}
    for field in fields(batch):
        part = getattr(batch, field.name)
        moved[field.name] = None if part is None else part.to(device)
    return replace(batch, **moved)
