"""Batched GPTQ and AWQ, every width, group size and symmetry, against independent implementations in float64.

Written from the papers with NumPy, one expert and one candidate at a time. GPTQ there removes rounded columns from an
explicit inverse by elimination; nothing is factored. Codes are equal but where float32 and float64 round a weight that
lies between two levels to different sides, so output errors are what is held: within 1 %.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertflow_quant.formats import INT_BITS, Format
from expertflow_quant.quantize import QuantizedMatrix, accumulate_hessian, quantize_gptq, search_awq_batch

Matrix = NDArray[np.float64]
FORMATS = [
    Format("int", bits, group, symmetric)
    for bits in INT_BITS
    for group in (32, 64, 128, 0)
    for symmetric in (True, False)
]
TOKENS = (900, 60, 300)
"""Of the three experts of a batch; the second's Hessian is far from full rank."""


def grid(groups: Matrix, format: Format) -> tuple[Matrix, Matrix]:
    """Scale and zero of the last axis, kept as length 1."""
    high, low = np.maximum(groups.max(-1, keepdims=True), 0), np.minimum(groups.min(-1, keepdims=True), 0)
    if format.symmetric:
        high = np.maximum(high, -low)
        low = -high
    scale = ((high - low) / (format.levels - 1)).astype(np.float16).astype(np.float64)
    scale[scale == 0] = 1
    zero = np.full_like(scale, format.levels // 2) if format.symmetric else np.rint(-low / scale)
    return scale, np.clip(zero, 0, format.levels - 1)


def nearest(values: Matrix, scale: Matrix, zero: Matrix, format: Format) -> tuple[Matrix, Matrix]:
    codes = np.clip(np.rint(values / scale) + zero, 0, format.levels - 1)
    return codes, (codes - zero) * scale


def rounded(weight: Matrix, format: Format) -> tuple[Matrix, Matrix]:
    groups = weight.reshape(len(weight), -1, format.columns_per_group(weight.shape[1]))
    codes, values = nearest(groups, *grid(groups, format), format)
    return codes.reshape(weight.shape), values.reshape(weight.shape)


def slow_gptq(weight: Matrix, hessian: Matrix, format: Format, damp: float, act_order: bool) -> tuple[Matrix, Matrix]:
    """Codes and values."""
    columns, size = weight.shape[1], format.columns_per_group(weight.shape[1])
    inverse = np.linalg.inv(hessian + damp * np.diag(hessian).mean() * np.eye(columns))
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(columns)
    left, codes, values = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    grids: dict[int, tuple[Matrix, Matrix]] = {}
    for place, column in enumerate(order):
        group = column // size
        if group not in grids:
            grids[group] = grid((weight if act_order else left)[:, group * size : (group + 1) * size], format)
        codes[:, [column]], values[:, [column]] = nearest(left[:, [column]], *grids[group], format)
        error = (left[:, column] - values[:, column]) / inverse[column, column]
        later = order[place + 1 :]
        left[:, later] -= np.outer(error, inverse[column, later])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, values


@pytest.fixture(scope="module")
def gptq_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(256, 256, generator=generator) / 16
    size = torch.exp(torch.randn(256, generator=generator))
    inputs = [torch.randn(count, 256, generator=generator) @ mix * size for count in TOKENS]
    hessians = [accumulate_hessian(each, torch.rand(len(each), generator=generator)) for each in inputs]
    return torch.randn(3, 12, 256, generator=generator) * 0.05, torch.stack(hessians)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gptq(gptq_batch: tuple[Tensor, Tensor], format: Format, act_order: bool) -> None:
    found: Any = quantize_gptq(*gptq_batch, format, act_order=act_order)
    for mine, weight, hessian in zip(found, *(part.double().numpy() for part in gptq_batch), strict=True):
        codes, values = slow_gptq(weight, hessian, format, 0.01, act_order)
        assert (mine.codes.numpy() == codes).mean() > 0.98
        errors = [
            np.trace(change @ hessian @ change.T) for change in (mine.dequantize().numpy() - weight, values - weight)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.01)


class SlowExpert:
    """One expert's search in float64: plain, 1 to ``steps`` for gate_up, then for down, then clipped."""

    def __init__(self, gate_up: Matrix, down: Matrix, inputs: Matrix, weights: Matrix, format: Format) -> None:
        self.gate_up, self.down, self.inputs, self.weights, self.format = gate_up, down, inputs, weights, format
        self.inner = self.gated(inputs @ gate_up.T)
        self.output = self.inner @ down.T

    @staticmethod
    def gated(rows: Matrix) -> Matrix:
        gate, up = np.split(rows, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up

    def scale(self, rows: Matrix, ratio: float) -> Matrix:
        activity = (np.abs(rows) * self.weights[:, None]).sum(0) / self.weights.sum()
        scale = np.maximum(activity**ratio, 1e-4)
        return scale / np.sqrt(scale.max() * scale.min())

    def scaled(self, ratio: float, down_ratio: float) -> tuple[Matrix, Matrix, Matrix]:
        stored = (1 / self.scale(self.inputs, ratio)).astype(np.float16).astype(np.float64)
        inner = self.scale(self.inner, down_ratio)
        gate, up = np.split(self.gate_up / stored, 2)
        return stored, np.concatenate([gate, up / inner[:, None]]), self.down * inner

    def error(self, stored: Matrix, gate_up: Matrix, down: Matrix) -> float:
        change = self.gated(self.inputs * stored @ gate_up.T) @ down.T - self.output
        return float(((change * self.weights[:, None]) ** 2).sum())

    def error_at(self, ratio: float, down_ratio: float) -> float:
        stored, gate_up, down = self.scaled(ratio, down_ratio)
        return self.error(stored, rounded(gate_up, self.format)[1], rounded(down, self.format)[1])

    def clipped(self, weight: Matrix, rows: Matrix) -> Matrix:
        """``weight``'s values, each group clipped to what suits ``rows`` best."""
        size = self.format.columns_per_group(weight.shape[1])
        values = np.zeros_like(weight)
        for start in range(0, weight.shape[1], size):
            group, own = weight[:, start : start + size], (rows * self.weights[:, None])[:, start : start + size]
            limit, best = np.abs(group).max(1, keepdims=True), np.full(len(weight), np.inf)
            for step in range(10):
                tried = np.clip(group, -limit * (1 - step / 20), limit * (1 - step / 20))
                tried = nearest(tried, *grid(tried, self.format), self.format)[1]
                error = ((own @ (tried - group).T) ** 2).sum(0)
                values[error < best, start : start + size] = tried[error < best]
                best = np.minimum(error, best)
        return values

    def search(self, steps: int) -> float:
        """The smallest relative error found."""
        ratios = [step / steps for step in range(1, steps + 1)]
        ratio = min([0.0, *ratios], key=lambda tried: self.error_at(tried, 0.0))
        down_ratio = min([0.0, *ratios], key=lambda tried: self.error_at(ratio, tried))
        stored, gate_up, down = self.scaled(ratio, down_ratio)
        values_up, values_down = rounded(gate_up, self.format)[1], rounded(down, self.format)[1]
        best = self.error(stored, values_up, values_down)
        tried = self.clipped(gate_up, self.inputs * stored)
        if (error := self.error(stored, tried, values_down)) < best:
            best, values_up = error, tried
        tried = self.clipped(down, self.gated(self.inputs * stored @ values_up.T))
        best = min(best, self.error(stored, values_up, tried))
        return float(np.sqrt(best / ((self.output * self.weights[:, None]) ** 2).sum()))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_awq(format: Format) -> None:
    generator = torch.Generator().manual_seed(format.bits)
    size = torch.exp(torch.randn(128, generator=generator))
    gate_up = [torch.randn(256, 128, generator=generator) / 8 for _ in TOKENS]
    down = [torch.randn(128, 128, generator=generator) / 11 for _ in TOKENS]
    inputs = [torch.randn(count // 10, 128, generator=generator) * size for count in TOKENS]
    weights = [torch.rand(len(each), generator=generator) + 0.05 for each in inputs]

    def gate(rows: Tensor) -> Tensor:
        return torch.nn.functional.silu(rows[:, :128]) * rows[:, 128:]

    found = search_awq_batch(gate_up, down, gate, inputs, weights, format, grid=5)
    for mine, *parts in zip(found, gate_up, down, inputs, weights, strict=True):
        slow = SlowExpert(*(part.double().numpy() for part in parts), format)
        assert mine.error == pytest.approx(slow.search(5), rel=0.01)
        assert mine.error == pytest.approx(error_as_run(mine.gate_up, mine.down, mine.input_scale, slow), rel=1e-3)


def error_as_run(gate_up: QuantizedMatrix, down: QuantizedMatrix, scale: Tensor, slow: SlowExpert) -> float:
    error = slow.error(scale.double().numpy(), gate_up.dequantize().numpy(), down.dequantize().numpy())
    return float(np.sqrt(error / ((slow.output * slow.weights[:, None]) ** 2).sum()))
