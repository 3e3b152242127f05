"""AWQ's search itself: every step of the grid for all experts of a batch at once, each keeping its own best.

Ratios are kept as numbers per expert and the scaled weights made again from them, so only one candidate is in memory.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from expertflow_quant.formats import SCALE_DTYPE, Format
from expertflow_quant.quantize.clip import clip_search
from expertflow_quant.quantize.folding import Gate
from expertflow_quant.quantize.grid import ScaleRangeError, ScaleRule
from expertflow_quant.quantize.rtn import Rounded

SMALLEST_SCALE = 1e-4  # before normalising, as published
SMALLEST_STORED = 2.0**-14  # the smallest normal fp16


@dataclass(frozen=True)
class Found:
    """What a search chose for each of E experts. ``ratio``, ``down_ratio`` float64 and ``clipped`` (by matrix) bool
    ``[E]``; ``error`` and ``rounding_error``, plain rounding's, are squared and weighted like ``size``, the
    output's: float64 ``[E]``."""

    gate_up: Rounded
    down: Rounded
    input_scale: Tensor  # fp16 [E, H]
    gate_up_bias: Tensor | None
    ratio: Tensor
    down_ratio: Tensor
    clipped: dict[str, Tensor]
    error: Tensor
    rounding_error: Tensor
    size: Tensor


@dataclass(frozen=True)
class _Scaled:
    """Float weights after scaling, input scales as they are stored, and gate_up's bias."""

    input_scale: Tensor
    gate_up: Tensor
    bias: Tensor | None
    down: Tensor


@dataclass(frozen=True)
class Search:
    """Float32 gate_up ``[E, 2I or I, H]``, down ``[E, H, I]``, inputs ``[E, T, H]`` and their weights ``[E, T]``;
    rows of weight 0 count nothing. ``rows`` of gate_up may take up down's scale, None: it stays unscaled."""

    gate_up: Tensor
    down: Tensor
    inputs: Tensor
    weights: Tensor
    gate: Gate
    format: Format
    scales: ScaleRule
    rows: slice | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def run(self, grid: int, clip: bool) -> Found:
        """The best of ``grid + 1`` ratios for gate_up, then for down, then with each of them clipped."""
        unscaled = torch.zeros(len(self.down), dtype=torch.float64, device=self.down.device)
        ratio, down_ratio = unscaled, unscaled
        best = rounding_error = self._error_at(unscaled, unscaled)
        steps = [torch.full_like(unscaled, step / grid) for step in range(1, grid + 1)]
        for tried in steps:
            error = self._error_at(tried, unscaled)
            ratio, best = torch.where(error < best, tried, ratio), torch.minimum(error, best)
        for tried in steps if self.rows is not None else ():
            error = self._error_at(ratio, tried)
            down_ratio, best = torch.where(error < best, tried, down_ratio), torch.minimum(error, best)
        scaled = self._scaled(ratio, down_ratio)
        gate_up, down = self._rounded(scaled, "gate_up"), self._rounded(scaled, "down")
        clipped = {}
        if clip:
            tried_up = clip_search(scaled.gate_up, self._weighed(self._arriving(scaled)), self.format, self.scales)
            error = self._error(scaled, tried_up, down)
            clipped["gate_up"], best = error < best, torch.minimum(error, best)
            gate_up = tried_up.where(clipped["gate_up"], gate_up)
            tried_down = clip_search(scaled.down, self._weighed(self._inner(scaled, gate_up)), self.format, self.scales)
            error = self._error(scaled, gate_up, tried_down)
            clipped["down"], best = error < best, torch.minimum(error, best)
            down = tried_down.where(clipped["down"], down)
        return Found(
            gate_up,
            down,
            scaled.input_scale,
            scaled.bias,
            ratio,
            down_ratio,
            clipped,
            best,
            rounding_error,
            _squared(self._weighed(self._output)),
        )

    @cached_property
    def _plain_inner(self) -> Tensor:
        """down's input in full precision ``[E, T, I]``."""
        return self._gated(_linear(self.inputs, self.gate_up, self.gate_up_bias))

    @cached_property
    def _output(self) -> Tensor:
        return _linear(self._plain_inner, self.down, self.down_bias)

    @cached_property
    def _activities(self) -> tuple[Tensor, Tensor]:
        """Of gate_up's and of down's input, ``[E, H]`` and ``[E, I]``."""
        return _activity(self.inputs, self.weights), _activity(self._plain_inner, self.weights)

    def _error_at(self, ratio: Tensor, down_ratio: Tensor) -> Tensor:
        scaled = self._scaled(ratio, down_ratio)
        return self._error(scaled, self._rounded(scaled, "gate_up"), self._rounded(scaled, "down"))

    def _scaled(self, ratio: Tensor, down_ratio: Tensor) -> _Scaled:
        activity, inner_activity = self._activities
        stored = (1 / _scale(activity, ratio)).clamp(min=SMALLEST_STORED).to(SCALE_DTYPE)
        gate_up, bias, down = self.gate_up / stored.float().unsqueeze(1), self.gate_up_bias, self.down
        if self.rows is not None:
            down_scale = _scale(inner_activity, down_ratio)
            down = down * down_scale.unsqueeze(1)
            gate_up[:, self.rows] /= down_scale.unsqueeze(-1)
            if bias is not None:
                bias = bias.clone()
                bias[:, self.rows] /= down_scale
        return _Scaled(stored, gate_up, bias, down)

    def _rounded(self, scaled: _Scaled, name: str) -> Rounded:
        try:
            return Rounded.of(getattr(scaled, name), self.format, self.scales)
        except ScaleRangeError as error:
            raise error.at(name) from None

    def _error(self, scaled: _Scaled, gate_up: Rounded, down: Rounded) -> Tensor:
        """Squared, weighed, of the whole expert as it will run: float64 ``[E]``."""
        output = _linear(self._inner(scaled, gate_up), down.values(), self.down_bias)
        return _squared(self._weighed(output - self._output))

    def _inner(self, scaled: _Scaled, gate_up: Rounded) -> Tensor:
        return self._gated(_linear(self._arriving(scaled), gate_up.values(), scaled.bias))

    def _arriving(self, scaled: _Scaled) -> Tensor:
        return self.inputs * scaled.input_scale.float().unsqueeze(1)

    def _gated(self, rows: Tensor) -> Tensor:
        gated = self.gate(rows.flatten(0, 1))
        return gated.view(*rows.shape[:2], self.down.shape[2])

    def _weighed(self, rows: Tensor) -> Tensor:
        return rows * self.weights.unsqueeze(-1)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[E, T, O]`` of inputs ``[E, T, I]`` and weight ``[E, O, I]``."""
    if bias is None:
        return inputs @ weight.mT
    return torch.baddbmm(bias.unsqueeze(1), inputs, weight.mT)


def _squared(rows: Tensor) -> Tensor:
    """Sums of squares, float64 ``[E]``: one dimension at a time, so that rows of zeros change no rounding."""
    return rows.square().sum(-1).to(torch.float64).sum(-1)


def _activity(inputs: Tensor, weights: Tensor) -> Tensor:
    """Mean magnitude of every channel ``[E, I]`` over rows ``[E, T, I]``, each counted with its weight."""
    counted = weights.abs()
    total = counted.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (inputs.abs() * counted.unsqueeze(-1)).sum(1) / total


def _scale(activity: Tensor, ratio: Tensor) -> Tensor:
    """``[E, I]`` of channels' activity and one ratio for each expert."""
    scale = activity.pow(ratio.unsqueeze(-1).to(activity.dtype)).clamp(min=SMALLEST_SCALE)
    return scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
