"""AWQ against the same search in plain Python loops, and the promises it makes.

The slow version knows no tensors: lists, float64, one multiplication at a time, the whole expert evaluated
for every ratio, clipping judged token by token.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats import BF16, ExpertFlowError, ExpertShape, Format, RecordLayout
from expertflow_quant.kernels import expert_product, expert_weights
from expertflow_quant.quantize import AWQResult, expert_fields, quantize_rtn, scalable_rows, search_awq

Rows = list[list[float]]


def silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def clamped_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2].clamp(max=7), gate_up[..., 1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def case(hidden: int, inner: int, tokens: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, ...]:
    """gate_up, down, inputs with a few large channels, affinities."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(hidden, generator=generator))
    inputs = torch.randn(tokens, hidden, generator=generator) * size
    inputs = inputs / inputs.square().mean(-1, keepdim=True).sqrt()
    gate_up = torch.randn(2 * inner, hidden, generator=generator) * 1.5 / hidden**0.5
    down = torch.randn(hidden, inner, generator=generator) / inner**0.5
    return gate_up, down, inputs, torch.rand(tokens, generator=generator) + 0.05


# --- the slow version ---


def slow_round(row: list[float], format: Format, per_group: int) -> tuple[list[int], list[float]]:
    """Codes and values of one row."""
    top = 2**format.bits - 1
    codes, values = [], []
    for start in range(0, len(row), per_group):
        group = row[start : start + per_group]
        high, low = max([*group, 0.0]), min([*group, 0.0])
        if format.symmetric:
            high = max(high, -low)
            low = -high
        scale = float(np.float16((high - low) / top)) or 1.0
        zero = 2 ** (format.bits - 1) if format.symmetric else min(top, round(-low / scale))
        for value in group:
            codes.append(min(top, max(0, round(value / scale) + zero)))
            values.append((codes[-1] - zero) * scale)
    return codes, values


def slow_matrix(weight: Rows, format: Format) -> tuple[list[list[int]], Rows]:
    per_group = format.columns_per_group(len(weight[0]))
    rounded = [slow_round(row, format, per_group) for row in weight]
    return [codes for codes, _ in rounded], [values for _, values in rounded]


def times(weight: Rows, x: list[float]) -> list[float]:
    return [sum(w * v for w, v in zip(row, x)) for row in weight]


def slow_inner(gate_up: Rows, x: list[float]) -> list[float]:
    both = times(gate_up, x)
    half = len(both) // 2
    return [g / (1 + math.exp(-g)) * u for g, u in zip(both[:half], both[half:])]


def slow_scale(activity: list[float], ratio: float) -> list[float]:
    scale = [max(1e-4, value**ratio) for value in activity]
    middle = math.sqrt(max(scale) * min(scale))
    return [value / middle for value in scale]


def slow_activity(inputs: Rows, weights: list[float]) -> list[float]:
    return [sum(c * abs(x[i]) for c, x in zip(weights, inputs)) / sum(weights) for i in range(len(inputs[0]))]


def slow_clip(weight: Rows, inputs: Rows, format: Format) -> Rows:
    """Every group of every row on its own; inputs are weighted already."""
    per_group = format.columns_per_group(len(weight[0]))
    clipped = []
    for row in weight:
        kept: list[float] = []
        for start in range(0, len(row), per_group):
            group = row[start : start + per_group]
            best, best_error = group, math.inf
            for step in range(10):
                limit = max(abs(value) for value in group) * (1 - step / 20)
                tried = [min(limit, max(-limit, value)) for value in group]
                change = [q - w for q, w in zip(slow_round(tried, format, per_group)[1], group)]
                error = sum(sum(d * x[start + i] for i, d in enumerate(change)) ** 2 for x in inputs)
                if error < best_error:
                    best, best_error = tried, error
            kept += best
        clipped.append(kept)
    return clipped


class SlowAWQ:
    def __init__(self, gate_up: Rows, down: Rows, inputs: Rows, weights: list[float], format: Format) -> None:
        self.gate_up, self.down, self.inputs, self.weights, self.format = (
            gate_up,
            down,
            inputs,
            weights,
            format,
        )
        self.inner = [slow_inner(gate_up, x) for x in inputs]
        self.output = [times(down, a) for a in self.inner]

    def scaled(self, ratio: float, down_ratio: float, fold: bool) -> tuple[list[float], Rows, Rows]:
        scale = slow_scale(slow_activity(self.inputs, self.weights), ratio)
        stored = [float(np.float16(1 / s)) for s in scale]
        gate_up = [[w / s for w, s in zip(row, stored)] for row in self.gate_up]
        down = self.down
        if fold:
            inner_scale = slow_scale(slow_activity(self.inner, self.weights), down_ratio)
            half = len(gate_up) // 2
            gate_up = gate_up[:half] + [[w / s for w in row] for row, s in zip(gate_up[half:], inner_scale)]
            down = [[w * s for w, s in zip(row, inner_scale)] for row in down]
        return stored, gate_up, down

    def error(self, stored: list[float], gate_up: Rows, down: Rows) -> float:
        total = 0.0
        for x, want, c in zip(self.inputs, self.output, self.weights):
            got = times(down, slow_inner(gate_up, [v * s for v, s in zip(x, stored)]))
            total += sum((c * (a - b)) ** 2 for a, b in zip(got, want))
        return total

    def rounded_error(self, stored: list[float], gate_up: Rows, down: Rows) -> float:
        return self.error(stored, slow_matrix(gate_up, self.format)[1], slow_matrix(down, self.format)[1])

    def search(self, grid: int) -> dict[str, object]:
        best = (0.0, 0.0, self.rounded_error(*self.scaled(0.0, 0.0, False)))
        plain = best[2]
        fold = False
        for step in range(1, grid + 1):
            error = self.rounded_error(*self.scaled(step / grid, 0.0, False))
            best = min(best, (step / grid, 0.0, error), key=lambda trial: trial[2])
        for step in range(1, grid + 1):
            error = self.rounded_error(*self.scaled(best[0], step / grid, True))
            if error < best[2]:
                best, fold = (best[0], step / grid, error), True
        stored, gate_up, down = self.scaled(best[0], best[1], fold)
        error, clipped = best[2], []
        arriving = [[v * s * c for v, s in zip(x, stored)] for x, c in zip(self.inputs, self.weights)]
        tried = slow_clip(gate_up, arriving, self.format)
        if (tried_error := self.rounded_error(stored, tried, down)) < error:
            gate_up, error, clipped = tried, tried_error, ["gate_up"]
        values = slow_matrix(gate_up, self.format)[1]
        arriving = [
            [a * c for a in slow_inner(values, [v * s for v, s in zip(x, stored)])]
            for x, c in zip(self.inputs, self.weights)
        ]
        tried = slow_clip(down, arriving, self.format)
        if (tried_error := self.rounded_error(stored, gate_up, tried)) < error:
            down, error, clipped = tried, tried_error, [*clipped, "down"]
        size = sum((c * y) ** 2 for row, c in zip(self.output, self.weights) for y in row)
        return {
            "ratio": best[0],
            "down_ratio": best[1],
            "clipped": tuple(clipped),
            "error": math.sqrt(error / size),
            "rounding_error": math.sqrt(plain / size),
            "gate_up": slow_matrix(gate_up, self.format)[0],
            "down": slow_matrix(down, self.format)[0],
            "input_scale": stored,
        }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["int2-g8", "int3-g8-asym", "int4-channel", "int4-g4-asym"])
def test_search_equals_the_slow_one(name: str, seed: int) -> None:
    format = Format.parse(name)
    gate_up, down, inputs, weights = case(hidden=16, inner=8, tokens=12, seed=seed)
    slow = SlowAWQ(gate_up.tolist(), down.tolist(), inputs.tolist(), weights.tolist(), format).search(grid=5)
    got = search_awq(gate_up, down, silu_gate, inputs, weights, format, grid=5)
    assert (got.ratio, got.down_ratio, got.clipped) == (slow["ratio"], slow["down_ratio"], slow["clipped"])
    assert got.gate_up.codes.tolist() == slow["gate_up"]
    assert got.down.codes.tolist() == slow["down"]
    assert got.input_scale.tolist() == slow["input_scale"]
    assert got.error == pytest.approx(slow["error"], rel=1e-4)
    assert got.rounding_error == pytest.approx(slow["rounding_error"], rel=1e-4)


# --- what it promises ---


def as_run(result: AWQResult, gate: object, inputs: Tensor, down_bias: Tensor | None = None) -> Tensor:
    """The expert's output from the record that these parts make."""
    hidden, inner = result.down.codes.shape
    has_bias = result.gate_up_bias is not None
    layout = RecordLayout(ExpertShape(hidden, inner, True, has_bias), result.down.format, input_scale=True)
    fields = expert_fields(
        layout,
        result.gate_up,
        result.down,
        input_scale=result.input_scale,
        gate_up_bias=result.gate_up_bias,
        down_bias=down_bias,
    )
    weights = expert_weights(layout.views(layout.pack(fields)), layout, torch.float32)
    return expert_product(inputs, weights, gate)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["int2-g32", "int3-g32", "int4-g32", "int4-g32-asym", "int8-g32"])
def test_never_worse_than_rounding_and_clearly_better_at_few_bits(name: str, seed: int) -> None:
    format = Format.parse(name)
    gate_up, down, inputs, weights = case(hidden=64, inner=32, tokens=200, seed=seed)
    result = search_awq(gate_up, down, silu_gate, inputs, weights, format)
    assert result.error <= result.rounding_error
    if format.bits < 8:
        assert result.error < 0.95 * result.rounding_error
    else:
        assert result.error < 0.015


def test_reported_error_is_that_of_the_packed_record() -> None:
    gate_up, down, inputs, weights = case(hidden=64, inner=32, tokens=100)
    result = search_awq(gate_up, down, silu_gate, inputs, weights, Format.parse("int3-g32"))
    want = silu_gate(inputs @ gate_up.T) @ down.T
    change = (as_run(result, silu_gate, inputs) - want) * weights.unsqueeze(-1)
    assert result.down_ratio > 0
    assert float(change.norm() / (want * weights.unsqueeze(-1)).norm()) == pytest.approx(result.error, rel=1e-4)


def test_rounding_error_is_that_of_plain_rounding() -> None:
    gate_up, down, inputs, weights = case(hidden=64, inner=32, tokens=100)
    format = Format.parse("int4-g32")
    up, low = quantize_rtn(gate_up, format).dequantize(), quantize_rtn(down, format).dequantize()
    want = silu_gate(inputs @ gate_up.T) @ down.T
    change = (silu_gate(inputs @ up.T) @ low.T - want) * weights.unsqueeze(-1)
    result = search_awq(gate_up, down, silu_gate, inputs, weights, format)
    assert float(change.norm() / (want * weights.unsqueeze(-1)).norm()) == pytest.approx(
        result.rounding_error, rel=1e-4
    )


def test_biases_are_folded_with_their_rows() -> None:
    gate_up, down, inputs, weights = case(hidden=64, inner=32, tokens=100)
    # values that bf16 holds exactly, so that the record's biases are these
    up_bias = torch.randint(-8, 8, (64,), generator=torch.Generator().manual_seed(5)) / 8
    down_bias = torch.randint(-8, 8, (64,), generator=torch.Generator().manual_seed(6)) / 8
    result = search_awq(
        gate_up,
        down,
        silu_gate,
        inputs,
        weights,
        Format.parse("int8-g32"),
        gate_up_bias=up_bias,
        down_bias=down_bias,
    )
    want = silu_gate(inputs @ gate_up.T + up_bias) @ down.T + down_bias
    assert result.down_ratio > 0
    assert result.error < 0.015
    assert float((as_run(result, silu_gate, inputs, down_bias) - want).norm() / want.norm()) < 0.02


def test_a_gate_that_is_not_linear_in_up_is_not_folded() -> None:
    gate_up, down, inputs, weights = case(hidden=64, inner=32, tokens=100)
    result = search_awq(gate_up, down, clamped_gate, inputs, weights, Format.parse("int4-g32"))
    assert result.down_ratio == 0
    assert result.ratio > 0
    want = clamped_gate(inputs @ gate_up.T) @ down.T
    change = (as_run(result, clamped_gate, inputs) - want) * weights.unsqueeze(-1)
    assert float(change.norm() / (want * weights.unsqueeze(-1)).norm()) == pytest.approx(result.error, rel=1e-4)


def test_options_switch_folding_and_clipping_off() -> None:
    gate_up, down, inputs, weights = case(hidden=64, inner=32, tokens=100)
    format = Format.parse("int3-g32")
    result = search_awq(gate_up, down, silu_gate, inputs, weights, format, fold=False, clip=False)
    assert result.down_ratio == 0
    assert result.clipped == ()
    assert torch.equal(result.down.codes, quantize_rtn(down, format).codes)
    assert result.error <= result.rounding_error


def test_parameters_and_transposed_weights_are_taken_as_they_come() -> None:
    gate_up, down, inputs, weights = case(hidden=64, inner=32, tokens=50)
    format = Format.parse("int4-g32")
    want = search_awq(gate_up, down, silu_gate, inputs, weights, format)
    got = search_awq(
        torch.nn.Parameter(gate_up),
        down.T.contiguous().T,
        silu_gate,
        inputs.T.contiguous().T,
        weights,
        format,
    )
    assert got.error == pytest.approx(want.error, rel=1e-4)
    assert (got.ratio, got.down_ratio, got.clipped) == (want.ratio, want.down_ratio, want.clipped)


def test_rare_experts() -> None:
    gate_up, down, inputs, weights = case(hidden=32, inner=16, tokens=2)
    format = Format.parse("int4-g16")
    unseen = search_awq(gate_up, down, silu_gate, inputs[:0], weights[:0], format)
    assert (unseen.tokens, unseen.ratio, unseen.error, unseen.clipped) == (0, 0.0, 0.0, ())
    assert torch.equal(unseen.gate_up.codes, quantize_rtn(gate_up, format).codes)
    few = search_awq(gate_up, down, silu_gate, inputs, weights, format)
    assert few.tokens == 2
    assert few.error <= few.rounding_error
    inputs[:, 3] = 0
    assert search_awq(gate_up, down, silu_gate, inputs, weights, format).input_scale.isfinite().all()


@pytest.mark.parametrize(
    ("gate", "rows", "found"),
    [
        (silu_gate, 16, slice(8, 16)),
        (lambda x: functional.gelu(x[:, :8], approximate="tanh") * x[:, 8:], 16, slice(8, 16)),
        (lambda x: functional.silu(x[:, ::2]) * x[:, 1::2], 16, slice(1, 16, 2)),
        (clamped_gate, 16, None),
        (lambda x: functional.silu(x[:, :8].clamp(max=10)) * x[:, 8:].clamp(-10, 10), 16, None),
        (functional.relu, 8, slice(0, 8)),
        (lambda x: functional.relu(x).square(), 8, None),
        (functional.gelu, 8, None),
    ],
)
def test_rows_that_can_be_scaled_are_found_by_asking(gate: object, rows: int, found: slice | None) -> None:
    assert scalable_rows(gate, rows, 8) == found  # type: ignore[arg-type]


def test_what_cannot_be_used_is_refused() -> None:
    gate_up, down, inputs, weights = case(hidden=32, inner=16, tokens=5)
    format = Format.parse("int4-g16")
    spoiled = inputs.clone()
    spoiled[1, 1] = float("nan")
    with pytest.raises(ExpertFlowError, match=r"inputs \(5, 32\) holds 1 values that are NaN or infinite"):
        search_awq(gate_up, down, silu_gate, spoiled, weights, format)
    with pytest.raises(ExpertFlowError, match=r"down \(32, 16\) holds 512 values"):
        search_awq(gate_up, down * float("inf"), silu_gate, inputs, weights, format)
    with pytest.raises(ExpertFlowError, match=r"gate_up \(30, 32\) does not belong to down \(32, 16\)"):
        search_awq(gate_up[:30], down, silu_gate, inputs, weights, format)
    with pytest.raises(ExpertFlowError, match=r"pass \[tokens, 32\] and \[tokens\]"):
        search_awq(gate_up, down, silu_gate, inputs, weights[:3], format)
    with pytest.raises(ExpertFlowError, match="grid of 0 steps"):
        search_awq(gate_up, down, silu_gate, inputs, weights, format, grid=0)
    with pytest.raises(ExpertFlowError, match="AWQ makes codes, not bf16"):
        search_awq(gate_up, down, silu_gate, inputs, weights, BF16)
