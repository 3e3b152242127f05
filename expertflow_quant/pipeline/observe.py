"""What calibration data shows each expert: the rows it is given, and how much each of them counts.

The model runs in full precision; samples meet at every MoE layer (``forwards``), so one layer's activations
are held at a time. An expert's row counts with the router's affinity, for that is what multiplies its
output, times the square root of its modality's weight (errors are squared): image tokens far outnumber text
tokens and matter less one by one, so text gets ``text_share`` of the total weight. An expert with fewer than
``min_tokens`` tokens is given, on top, the tokens that come closest to choosing it, by the distance of the
router's score to the lowest chosen one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.kernels import ExpertWeights, expert_product
from expertflow_quant.models.seams import find_router
from expertflow_quant.pipeline.backbone import load_backbone
from expertflow_quant.pipeline.batches import Batch, CalibrationData
from expertflow_quant.pipeline.forwards import ExpertsCall, Forward, Forwards, watch_router
from expertflow_quant.pipeline.stream import ModelStream, MoELayer

IMAGE_TOKEN_NAMES = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


@dataclass(frozen=True)
class ObserveOptions:
    """``min_tokens``: below so many routed tokens an expert is also given the closest ones. ``text_share``:
    text tokens' part of the total weight where there are image tokens too; None weighs all tokens alike."""

    min_tokens: int = 256
    text_share: float | None = 0.5

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise ExpertFlowError(f"min_tokens {self.min_tokens} must not be below 0 (256 is usual)")
        if self.text_share is not None and not 0 < self.text_share < 1:
            raise ExpertFlowError(
                f"text_share {self.text_share} must lie between 0 and 1 (0.5 is usual), or be None for raw counts"
            )


@dataclass(frozen=True)
class ExpertRows:
    """One expert's calibration rows: inputs ``[N, H]``, weights float32 ``[N]`` (they multiply its output's
    error), ``tokens`` routed to it, and ``coverage``: "routed", "closest" (rows beyond those tokens) or
    "none" (N is 0)."""

    inputs: Tensor
    weights: Tensor
    tokens: int
    coverage: str

    def thinned(self, limit: int) -> "ExpertRows":
        """At most ``limit`` rows, evenly spaced."""
        count = self.inputs.shape[0]
        if count <= limit:
            return self
        kept = torch.linspace(0, count - 1, limit, dtype=torch.float64, device=self.inputs.device).round().long()
        return ExpertRows(self.inputs[kept], self.weights[kept], self.tokens, self.coverage)


@dataclass(frozen=True)
class ObservedLayer:
    """All calibration tokens at one MoE layer, padding removed.

    ``hidden [T, H]``, chosen ``index [T, k]``, ``affinity [T, k]``, router ``scores [T, E]`` (None where the
    router could not be watched), ``importance [T]`` float32 (modality weight, mean 1).
    """

    layer: MoELayer
    hidden: Tensor
    index: Tensor
    affinity: Tensor
    scores: Tensor | None
    importance: Tensor
    min_tokens: int

    @property
    def counts(self) -> list[int]:
        """Tokens routed to each expert."""
        return [len(places) for places in self._places]

    def rows(self, expert: int) -> ExpertRows:
        """The calibration rows of one expert: its own tokens, then, if these are few, the closest others."""
        places = self._places[expert]
        tokens = places // max(self.index.shape[1], 1)
        affinity = self.affinity.reshape(-1)[places].float()
        enough = len(places) >= max(self.min_tokens, 1)
        coverage = "routed" if enough else "few" if len(places) else "none"
        if not enough and len(closest := self._closest(expert, tokens)):
            tokens = torch.cat([tokens, closest])
            affinity = torch.cat([affinity, self.affinity[closest].float().amin(1)])
            coverage = "closest"
        weights = affinity * self.importance[tokens].sqrt()
        return ExpertRows(self.hidden[tokens], weights, len(places), coverage)

    @cached_property
    def _places(self) -> Sequence[Tensor]:
        return _places(self.index, self.layer.experts)

    def _closest(self, expert: int, own: Tensor) -> Tensor:
        wanted = min(self.min_tokens, self.index.shape[0]) - len(own)
        if self.scores is None or wanted <= 0:
            return own[:0]
        chosen = self.index.clamp(max=self.layer.experts - 1)
        margin = self.scores[:, expert] - self.scores.gather(1, chosen).amin(1)
        margin[own] = -torch.inf
        return margin.argsort(descending=True, stable=True)[:wanted].sort().values


class Observations:
    """The activations that ``data`` gives at every MoE layer of a model, computed layer by layer as they are
    asked for.

    With ``keep`` they stay in memory after the first complete pass, for quantizing the same model by several
    methods.
    """

    def __init__(
        self,
        stream: ModelStream,
        data: CalibrationData,
        options: ObserveOptions | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        keep: bool = False,
    ) -> None:
        self.stream, self.data, self.options = stream, data, options or ObserveOptions()
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self._keep = keep
        self._kept: list[ObservedLayer] = []

    def about(self) -> dict[str, object]:
        """What decides the activations, as JSON."""
        return {
            "digest": self.data.digest,
            **self.data.about,
            "min_tokens": self.options.min_tokens,
            "text_share": self.options.text_share,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def layers(self) -> Iterator[ObservedLayer]:
        """Every MoE layer in order. Raises ExpertFlowError when the model runs its layers in another
        order."""
        if self._kept:
            yield from self._kept
            return
        seen = []
        for observed in _observe(self):
            if self._keep:
                seen.append(observed)
            if len(seen) == len(self.stream.layers):
                self._kept = seen
            yield observed


@dataclass(frozen=True)
class _Tokens:
    """Of one batch, flattened ``[B * S]``: the tokens that are not padding, and those that are text."""

    valid: Tensor
    text: Tensor

    @classmethod
    def of(cls, batch: Batch, config: Any) -> "_Tokens":
        ids = batch["input_ids"].reshape(-1)
        valid = batch.get("attention_mask", torch.ones_like(ids)).reshape(-1).bool()
        if "mm_token_type_ids" in batch:
            return cls(valid, batch["mm_token_type_ids"].reshape(-1) == 0)
        special = [value for name in IMAGE_TOKEN_NAMES if isinstance(value := getattr(config, name, None), int)]
        return cls(valid, ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device)))


def _observe(wanted: Observations) -> Iterator[ObservedLayer]:
    stream = wanted.stream
    model = load_backbone(stream, wanted.device, wanted.dtype)
    modules = [model.get_submodule(layer.module) for layer in stream.layers]
    routers = [(find_router(model, layer.module), layer.experts) for layer in stream.layers]
    hooks = [watch_router(router, experts) for router, experts in routers if router is not None]
    forwards = Forwards(
        model, [partial(_on_device, make, wanted.device) for make in wanted.data.batches], wanted.device
    )
    try:
        forwards.resume(dict.fromkeys(forwards.all))
        tokens = {forward: _Tokens.of(forward.batch, stream.config) for forward in forwards.all}
        for layer, module in zip(stream.layers, modules, strict=True):
            here = [forward for forward in forwards.all if _at(forward) is module]
            calls = [forward.call for forward in here if forward.call is not None]
            yield _join(layer, calls, [tokens[forward] for forward in here], wanted)
            if module is not modules[-1]:
                forwards.resume(dict(zip(here, _answers(stream, layer, calls), strict=True)))
                _refuse_going_back(forwards.all, modules[: layer.index + 1], layer)
    finally:
        forwards.close()
        for hook in hooks:
            hook.remove()


def _on_device(make_batch: Callable[[], Batch], device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in make_batch().items()}


def _at(forward: Forward) -> nn.Module | None:
    return None if forward.call is None else forward.call.module


def _refuse_going_back(forwards: Sequence[Forward], done: Sequence[nn.Module], layer: MoELayer) -> None:
    if any(_at(forward) is module for forward in forwards for module in done):
        raise ExpertFlowError(
            f"after {layer.module} the model runs an MoE layer that comes before it, so its layers cannot be "
            "calibrated one after the other: use --method rtn, which needs no calibration"
        )


def _join(
    layer: MoELayer, calls: Sequence[ExpertsCall], tokens: Sequence[_Tokens], wanted: Observations
) -> ObservedLayer:
    """The calls of all batches at one layer, without padding."""
    if not calls:
        empty = torch.zeros(0, layer.top_k, device=wanted.device)
        hidden = torch.zeros(0, layer.shape.hidden, dtype=wanted.dtype, device=wanted.device)
        return ObservedLayer(layer, hidden, empty.long(), empty, None, empty[:, 0], wanted.options.min_tokens)
    aligned = all(call.hidden.shape[0] == len(of.valid) for call, of in zip(calls, tokens, strict=True))
    valid = [of.valid if aligned else slice(None) for of in tokens]

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part[kept] for part, kept in zip(parts, valid, strict=True)])

    scores = [call.scores for call in calls if call.scores is not None]
    watched = [part.shape[0] for part in scores] == [call.hidden.shape[0] for call in calls]
    index = joined([call.top_k_index for call in calls])
    text = joined([of.text for of in tokens]) if aligned else torch.ones(len(index), dtype=torch.bool)
    return ObservedLayer(
        layer,
        joined([call.hidden for call in calls]),
        index,
        joined([call.top_k_weights for call in calls]),
        joined(scores).float() if watched else None,
        _importance(text, wanted.options.text_share).to(index.device),
        wanted.options.min_tokens,
    )


def _places(index: Tensor, experts: int) -> Sequence[Tensor]:
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


def _answers(stream: ModelStream, layer: MoELayer, calls: Sequence[ExpertsCall]) -> Sequence[Tensor]:
    """What the layer's experts answer in full precision, each expert read once; summed in expert order in
    float32."""
    if not calls:
        return []
    hidden = torch.cat([call.hidden for call in calls])
    index = torch.cat([call.top_k_index for call in calls])
    affinity = torch.cat([call.top_k_weights for call in calls]).reshape(-1).float()
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    places = _places(index, layer.experts)
    with torch.no_grad():
        for expert in range(layer.experts):
            if len(at := places[expert]):
                tokens = at // index.shape[1]
                weights = in_dtype(stream.expert(layer.index, expert), hidden)
                product = expert_product(hidden[tokens], weights, stream.gate(layer.index))
                total.index_add_(0, tokens, product.float() * affinity[at, None])
    return torch.split(total.to(hidden.dtype), [len(call.hidden) for call in calls])


def in_dtype(weights: ExpertWeights, like: Tensor) -> ExpertWeights:
    """An expert's weights in the dtype and on the device of ``like``."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(like)

    return ExpertWeights(
        weights.gate_up.to(like),
        weights.down.to(like),
        gate_up_bias=moved(weights.gate_up_bias),
        down_bias=moved(weights.down_bias),
    )
