"""GPTQ and AWQ as slow as they are plain: NumPy in float64, one expert and one candidate at a time.

Written from the papers, apart from the library's own. GPTQ here removes rounded columns from an explicit inverse by
elimination; nothing is factored. Codes are equal but where float32 and float64 round a weight that lies between two
levels to different sides.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from expertflow_quant.formats import Format
from expertflow_quant.quantize import QuantizedMatrix

Matrix = NDArray[np.float64]


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
    """Codes and values."""
    codes = np.clip(np.rint(values / scale) + zero, 0, format.levels - 1)
    return codes, (codes - zero) * scale


def rounded(weight: Matrix, format: Format) -> tuple[Matrix, Matrix]:
    """Codes and values of a whole matrix."""
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


def error_as_run(gate_up: QuantizedMatrix, down: QuantizedMatrix, scale: Tensor, slow: SlowExpert) -> float:
    """The relative error of an expert's matrices and stored input scale, as ``slow`` measures its own."""
    error = slow.error(scale.double().numpy(), gate_up.dequantize().numpy(), down.dequantize().numpy())
    return float(np.sqrt(error / ((slow.output * slow.weights[:, None]) ** 2).sum()))
