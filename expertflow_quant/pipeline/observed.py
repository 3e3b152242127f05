"""What calibration data shows each expert: the rows it is given, and how much each of them counts.

An expert's row counts with the router's affinity, for that is what multiplies its output, times the square root of
its modality's weight (errors are squared): image tokens far outnumber text tokens and matter less one by one, so
text gets ``text_share`` of the total weight. An expert with fewer than ``min_tokens`` tokens is given, on top, the
tokens that come closest to choosing it, by the distance of the router's score to the lowest chosen one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.pipeline.activations import Activations, MappedRows
from expertflow_quant.pipeline.batches import Batch
from expertflow_quant.pipeline.forwards import ExpertsCall
from expertflow_quant.pipeline.stream import MoELayer, is_finite

TEXT_SHARE = 0.9
"""Text tokens' part of the total weight, as `python -m calibration sensitivity` measured it on the shipped model: on
average 0.90 (0.84 to 1.00 in its six layers; 256 samples, eval/results/curves.md), where text is 19 % of the tokens."""

IMAGE_TOKEN_NAMES = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


@dataclass(frozen=True)
class ObserveOptions:
    """``min_tokens``: below so many routed tokens an expert is also given the closest ones. ``text_share``:
    text tokens' part of the total weight where there are image tokens too; None weighs all tokens alike."""

    min_tokens: int = 256
    text_share: float | None = TEXT_SHARE

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise ExpertFlowError(f"min_tokens {self.min_tokens} must not be below 0 (256 is usual)")
        if self.text_share is not None and not 0 < self.text_share < 1:
            raise ExpertFlowError(
                f"text_share {self.text_share} must lie between 0 and 1 ({TEXT_SHARE} is usual), or be None: by counts"
            )


@dataclass(frozen=True)
class ExpertRows:
    """One expert's calibration rows: inputs ``[N, H]``, weights float32 ``[N]`` (they multiply its output's
    error), ``tokens`` routed to it, and ``coverage``: "routed", "closest" (rows beyond those tokens) or
    "none" (N is 0). ``text_tokens``: those of the routed tokens that are text."""

    inputs: Tensor
    weights: Tensor
    tokens: int
    coverage: str
    text_tokens: int | None = None

    def thinned(self, limit: int) -> "ExpertRows":
        """At most ``limit`` rows, evenly spaced."""
        count = self.inputs.shape[0]
        if count <= limit:
            return self
        kept = torch.linspace(0, count - 1, limit, dtype=torch.float64, device=self.inputs.device).round().long()
        return replace(self, inputs=self.inputs[kept], weights=self.weights[kept])


@dataclass(frozen=True)
class ObservedLayer:
    """All calibration tokens at one MoE layer, padding removed.

    ``hidden [T, H]``, chosen ``index [T, k]``, ``affinity [T, k]``, router ``scores [T, E]`` (None where the
    router could not be watched), ``importance [T]`` float32 (modality weight, mean 1). ``used`` is told how many bytes
    of ``hidden`` were read, which may lie on disk. ``text`` bool [T]: the tokens that are text; None where that is not
    known.
    """

    layer: MoELayer
    hidden: Tensor
    index: Tensor
    affinity: Tensor
    scores: Tensor | None
    importance: Tensor
    min_tokens: int
    used: Callable[[int], None] = lambda nbytes: None
    text: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Tokens routed to each expert."""
        return [len(places) for places in self._places]

    def rows(self, expert: int) -> ExpertRows:
        """The calibration rows of one expert: its own tokens, then, if these are few, the closest others."""
        places = self._places[expert]
        tokens = places // max(self.index.shape[1], 1)
        text = None if self.text is None else int(self.text.to(tokens.device)[tokens].sum())
        affinity = self.affinity.reshape(-1)[places].float()
        enough = len(places) >= max(self.min_tokens, 1)
        coverage = "routed" if enough else "few" if len(places) else "none"
        if not enough and len(closest := self._closest(expert, tokens)):
            tokens = torch.cat([tokens, closest])
            affinity = torch.cat([affinity, self.affinity[closest].float().amin(1)])
            coverage = "closest"
        weights = affinity * self.importance[tokens].sqrt()
        inputs = self.hidden[tokens]
        self.used(inputs.nbytes)
        return ExpertRows(inputs, weights, len(places), coverage, text)

    @cached_property
    def _places(self) -> Sequence[Tensor]:
        return expert_places(self.index, self.layer.experts)

    def _closest(self, expert: int, own: Tensor) -> Tensor:
        wanted = min(self.min_tokens, self.index.shape[0]) - len(own)
        if self.scores is None or wanted <= 0:
            return own[:0]
        chosen = self.index.clamp(max=self.layer.experts - 1)
        margin = self.scores[:, expert] - self.scores.gather(1, chosen).amin(1)
        margin[own] = -torch.inf
        return margin.argsort(descending=True, stable=True)[:wanted].sort().values


@dataclass(frozen=True)
class Tokens:
    """Of one batch, flattened ``[B * S]``: the tokens that are not padding, and those that are text."""

    valid: Tensor
    text: Tensor

    @classmethod
    def of(cls, batch: Batch, config: Any) -> "Tokens":
        ids = batch["input_ids"].reshape(-1)
        valid = batch.get("attention_mask", torch.ones_like(ids)).reshape(-1).bool()
        if "mm_token_type_ids" in batch:
            return cls(valid, batch["mm_token_type_ids"].reshape(-1) == 0)
        special = [value for name in IMAGE_TOKEN_NAMES if isinstance(value := getattr(config, name, None), int)]
        return cls(valid, ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device)))


class Gathered:
    """Collects what the batches' calls show at one MoE layer, without padding, in the order in which they are added."""

    def __init__(self, layer: MoELayer, options: ObserveOptions, on_disk: Activations | None) -> None:
        self.layer, self._options, self._on_disk = layer, options, on_disk
        self._rows: MappedRows | None = None
        self._hidden: list[Tensor] = []
        self._calls: list[ExpertsCall] = []
        self._text: list[Tensor] = []

    def add(self, call: ExpertsCall, tokens: Tokens, batch: int) -> None:
        """Raises ExpertFlowError naming layer and batch when the experts are given a NaN or an infinity."""
        call, text = without_padding(call, tokens)
        if not is_finite(call.hidden):
            raise ExpertFlowError(
                f"calibration batch {batch} gives the experts of layer {self.layer.index} ({self.layer.module}) NaN or "
                f"infinity as input: the weights before it overflow in {call.hidden.dtype}, or the sample does: "
                f"leave that sample out, or use rtn, which needs none; layers that are finished stay"
            )
        self._text.append(text)
        self._hidden.append(self._put(call.hidden))
        self._calls.append(replace(call, hidden=call.hidden[:0].clone()))

    def layer_observed(self) -> "ObservedLayer":
        """All tokens of the batches at this layer."""
        calls, layer = self._calls, self.layer
        hidden = _joined(self._hidden, torch.zeros(0, layer.shape.hidden))
        used = None
        if self._rows is not None:
            hidden, used = self._rows.tensor(), self._rows.used
        index = _joined([call.top_k_index for call in calls], hidden.new_zeros(0, layer.top_k).long())
        affinity = _joined([call.top_k_weights for call in calls], hidden.new_zeros(0, layer.top_k))
        scores = [call.scores for call in calls if call.scores is not None]
        watched = [len(part) for part in scores] == [len(call.top_k_index) for call in calls]
        text = _joined(self._text, torch.zeros(0, dtype=torch.bool))
        return ObservedLayer(
            layer,
            hidden,
            index,
            affinity,
            torch.cat(scores).float() if watched and scores else None,
            _importance(text, self._options.text_share).to(index.device),
            self._options.min_tokens,
            used or (lambda nbytes: None),
            text,
        )

    def _put(self, hidden: Tensor) -> Tensor:
        """Rows that are to be written go to disk, and none is left in memory."""
        if self._on_disk is None or hidden.device.type != "cpu" or not len(hidden):
            return hidden
        if self._rows is None:
            self._rows = self._on_disk.rows()
        self._rows.add(hidden)
        return hidden[:0].clone()


def without_padding(call: ExpertsCall, tokens: Tokens) -> tuple[ExpertsCall, Tensor]:
    """A call's rows that count, and which of them are text; all where a row is no token of the batch."""
    if len(tokens.valid) != len(call.hidden):
        return call, torch.ones(len(call.hidden), dtype=torch.bool, device=call.hidden.device)
    kept = tokens.valid
    scores = call.scores[kept] if call.scores is not None and len(call.scores) == len(kept) else None
    seen = ExpertsCall(call.module, call.hidden[kept], call.top_k_index[kept], call.top_k_weights[kept], scores)
    return seen, tokens.text[kept]


def _joined(parts: Sequence[Tensor], none: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else none


def expert_places(index: Tensor, experts: int) -> Sequence[Tensor]:
    """Per expert the (token, k) pairs that chose it, as places in the flattened ``index [T, k]``."""
    flat = index.reshape(-1)
    return torch.split(flat.argsort(stable=True), flat.bincount(minlength=experts).tolist())[:experts]


def _importance(text: Tensor, text_share: float | None) -> Tensor:
    """Weights float32 ``[T]`` with mean 1 of which text tokens together hold ``text_share``."""
    count, of_text = len(text), int(text.sum())
    if text_share is None or of_text in (0, count):
        return torch.ones(count)
    each_text, each_other = text_share * count / of_text, (1 - text_share) * count / (count - of_text)
    return torch.where(text, each_text, each_other).float()
