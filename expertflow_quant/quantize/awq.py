"""AWQ (Lin, Tang, Tang, Yang, Dang, Han 2023, arXiv 2306.00978) for one expert of a mixture.

Input channels with large activations matter most: their weights are multiplied by ``s > 1`` before rounding
and the activation divided by it, which shrinks the error where it counts. ``s = mean|x| ^ ratio``, normalised
by ``sqrt(max(s) * min(s))``; the ratio is found on a grid over [0, 1], then each group's range is clipped
where that lowers its output error (clip search as in the published code: shrinking to no less than half in
steps of 1/20).

Where this goes beyond the paper, since an expert is alone behind a norm that all experts share:
- gate_up's scale is kept with the expert and multiplies the activation (``input_scale = 1 / s``, rounded to
  fp16, as stored, before anything is measured). down's is folded into up's rows, where the gate allows it.
- Means and errors are weighted by the router's affinity: token t's output counts ``weights[t] ^ 2``.
- The error is that of the whole expert as it will run, both matrices rounded. A step is taken only if it
  lowers that error and the first is plain rounding: on the data it was given the result is never worse.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats import SCALE_DTYPE, ExpertFlowError, Format
from expertflow_quant.quantize.clip import clip_search
from expertflow_quant.quantize.folding import Gate, scalable_rows
from expertflow_quant.quantize.grid import ScaleRule, require_finite
from expertflow_quant.quantize.matrix import QuantizedMatrix
from expertflow_quant.quantize.rtn import quantize_rtn, require_int

SMALLEST_SCALE = 1e-4  # before normalising, as published
SMALLEST_STORED = 2.0**-14  # the smallest normal fp16


@dataclass(frozen=True)
class AWQResult:
    """One expert after the search: ``down @ gate(gate_up @ (x * input_scale) + gate_up_bias) + down_bias``.

    ``ratio`` and ``down_ratio`` are the grid's choices (0: unscaled), ``clipped`` names the matrices whose
    clipping was kept, ``tokens`` counts what was seen. ``error`` is the expert's relative output error (root
    of the affinity-weighted squared error over the squared output), ``rounding_error`` that of plain
    rounding.
    """

    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    input_scale: Tensor  # fp16 [H]
    gate_up_bias: Tensor | None  # float32 [2I or I], its up rows scaled like the weights
    ratio: float
    down_ratio: float
    clipped: tuple[str, ...]
    tokens: int
    error: float
    rounding_error: float


@torch.no_grad()
def search_awq(
    gate_up: Tensor,
    down: Tensor,
    gate: Gate,
    inputs: Tensor,
    weights: Tensor,
    format: Format,
    grid: int = 20,
    *,
    fold: bool = True,
    clip: bool = True,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scales: ScaleRule = "absmax",
) -> AWQResult:
    """Quantize one expert by its ``inputs [T, H]`` and their router affinities ``weights [T]``.

    gate_up is ``[2I or I, H]``, down ``[H, I]``; ``gate`` maps float32 ``[T, 2I or I]`` to ``[T, I]``. The
    grid has ``grid + 1`` ratios, 0 and 1 included. ``fold=False`` leaves down's input unscaled, as it always
    is when the gate is not linear in up. No tokens give plain rounding and ``tokens == 0``. Raises
    ExpertFlowError for NaN or infinity, shapes that do not match, bf16.
    """
    require_int(format, "AWQ")
    _check(gate_up, down, inputs, weights, grid)
    expert = _Expert(
        gate_up=_plain("gate_up", gate_up),
        down=_plain("down", down),
        inputs=_plain("inputs", inputs),
        weights=_plain("weights", weights),
        gate=gate,
        format=format,
        scales=scales,
        gate_up_bias=None if gate_up_bias is None else _plain("gate_up_bias", gate_up_bias),
        down_bias=None if down_bias is None else _plain("down_bias", down_bias),
    )
    best = plain = expert.trial(0.0, 0.0, None)
    ratios = [step / grid for step in range(1, grid + 1)]
    for ratio in ratios:
        best = _better(best, expert.trial(ratio, 0.0, None))
    rows = scalable_rows(gate, gate_up.shape[0], down.shape[1], gate_up.device) if fold else None
    for ratio in ratios if rows is not None else ():
        best = _better(best, expert.trial(best.ratio, ratio, rows))
    if clip:
        best = _better(best, expert.clip_gate_up(best))
        best = _better(best, expert.clip_down(best))
    return expert.result(best, plain.error)


@dataclass(frozen=True)
class _Trial:
    """One candidate: the scaled float weights, their codes, and the squared error of that expert."""

    ratio: float
    down_ratio: float
    input_scale: Tensor
    bias: Tensor | None
    gate_up_scaled: Tensor
    down_scaled: Tensor
    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    error: float = float("inf")
    clipped: tuple[str, ...] = ()


def _better(best: _Trial, other: _Trial) -> _Trial:
    return other if other.error < best.error else best


@dataclass(frozen=True)
class _Expert:
    gate_up: Tensor
    down: Tensor
    inputs: Tensor
    weights: Tensor
    gate: Gate
    format: Format
    scales: ScaleRule
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    @cached_property
    def inner(self) -> Tensor:
        """down's input in full precision ``[T, I]``."""
        return self.gate(functional.linear(self.inputs, self.gate_up, self.gate_up_bias))

    @cached_property
    def output(self) -> Tensor:
        return functional.linear(self.inner, self.down, self.down_bias)

    @cached_property
    def input_activity(self) -> Tensor:
        return _activity(self.inputs, self.weights)

    @cached_property
    def inner_activity(self) -> Tensor:
        return _activity(self.inner, self.weights)

    def trial(self, ratio: float, down_ratio: float, rows: slice | None) -> _Trial:
        """Scale by both ratios, round, measure. ``rows`` take up down's scale; needed unless ``down_ratio``
        is 0."""
        stored = (1 / _scale(self.input_activity, ratio)).clamp(min=SMALLEST_STORED).to(SCALE_DTYPE)
        gate_up, bias, down = self.gate_up / stored.float(), self.gate_up_bias, self.down
        if rows is not None:
            down_scale = _scale(self.inner_activity, down_ratio)
            down = down * down_scale
            gate_up[rows] /= down_scale.unsqueeze(-1)
            if bias is not None:
                bias = bias.clone()
                bias[rows] /= down_scale
        rounded_up = quantize_rtn(gate_up, self.format, scales=self.scales)
        rounded_down = quantize_rtn(down, self.format, scales=self.scales)
        return self._measured(_Trial(ratio, down_ratio, stored, bias, gate_up, down, rounded_up, rounded_down))

    def clip_gate_up(self, trial: _Trial) -> _Trial:
        scaled = self.inputs * trial.input_scale.float() * self.weights.unsqueeze(-1)
        clipped = clip_search(trial.gate_up_scaled, scaled, self.format, self.scales)
        return self._measured(replace(trial, gate_up=clipped, clipped=(*trial.clipped, "gate_up")))

    def clip_down(self, trial: _Trial) -> _Trial:
        arriving = self._inner_of(trial) * self.weights.unsqueeze(-1)
        clipped = clip_search(trial.down_scaled, arriving, self.format, self.scales)
        return self._measured(replace(trial, down=clipped, clipped=(*trial.clipped, "down")))

    def result(self, trial: _Trial, plain_error: float) -> AWQResult:
        squared = float((self.output * self.weights.unsqueeze(-1)).square().sum()) or 1.0
        return AWQResult(
            gate_up=trial.gate_up,
            down=trial.down,
            input_scale=trial.input_scale,
            gate_up_bias=trial.bias,
            ratio=trial.ratio,
            down_ratio=trial.down_ratio,
            clipped=trial.clipped,
            tokens=self.inputs.shape[0],
            error=(trial.error / squared) ** 0.5,
            rounding_error=(plain_error / squared) ** 0.5,
        )

    def _inner_of(self, trial: _Trial) -> Tensor:
        scaled = self.inputs * trial.input_scale.float()
        return self.gate(functional.linear(scaled, trial.gate_up.dequantize(), trial.bias))

    def _measured(self, trial: _Trial) -> _Trial:
        output = functional.linear(self._inner_of(trial), trial.down.dequantize(), self.down_bias)
        change = (output - self.output) * self.weights.unsqueeze(-1)
        return replace(trial, error=float(change.square().sum()))


def _plain(name: str, tensor: Tensor) -> Tensor:
    require_finite(**{name: tensor})
    return tensor.to(torch.float32).contiguous()


def _activity(inputs: Tensor, weights: Tensor) -> Tensor:
    """Mean magnitude of every channel ``[I]`` over tokens ``[T, I]``, each counted with its affinity."""
    counted = weights.abs()
    return (inputs.abs() * counted.unsqueeze(-1)).sum(0) / counted.sum().clamp(min=torch.finfo(torch.float32).tiny)


def _scale(activity: Tensor, ratio: float) -> Tensor:
    scale = activity.pow(ratio).clamp(min=SMALLEST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def _check(gate_up: Tensor, down: Tensor, inputs: Tensor, weights: Tensor, grid: int) -> None:
    hidden, intermediate = down.shape
    if gate_up.shape not in ((2 * intermediate, hidden), (intermediate, hidden)):
        raise ExpertFlowError(
            f"gate_up {tuple(gate_up.shape)} does not belong to down {tuple(down.shape)}: pass [2I or I, H] and [H, I]"
        )
    if inputs.ndim != 2 or inputs.shape[1] != hidden or weights.shape != inputs.shape[:1]:
        raise ExpertFlowError(
            f"inputs {tuple(inputs.shape)} with weights {tuple(weights.shape)}: pass [tokens, {hidden}] and [tokens]"
        )
    if grid < 1:
        raise ExpertFlowError(f"a grid of {grid} steps must have at least 1 (20 is usual)")
