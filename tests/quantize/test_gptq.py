"""GPTQ against the paper's procedure written out column by column, and against brute force on tiny cases.

The slow version never factors anything: it removes rounded columns from an explicit inverse Hessian by
Gaussian elimination (the paper's equations 2 and 3, the update of Optimal Brain Quantization in a fixed
order), row by row, in plain Python floats.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from expertflow_quant.formats import BF16, ExpertFlowError, Format
from expertflow_quant.quantize import (
    QuantizedMatrix,
    accumulate_hessian,
    examine_hessian,
    quantize_gptq,
    quantize_rtn,
    shrink_hessian,
)

Rows = list[list[float]]


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs whose columns are mixed and of different sizes, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.exp(torch.randn(columns, generator=generator)) / columns**0.5


def case(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    affinity = torch.rand(tokens, generator=generator)
    return weight, accumulate_hessian(correlated(tokens, columns, seed), affinity)


def one(weight: Tensor, hessian: Tensor, format: Format, **options: object) -> QuantizedMatrix:
    got = quantize_gptq(weight, hessian, format, **options)  # type: ignore[arg-type]
    assert isinstance(got, QuantizedMatrix)
    return got


def output_error(weight: Tensor, approximate: Tensor, hessian: Tensor) -> float:
    change = (approximate - weight).double()
    return float(((change @ hessian.double()) * change).sum())


def slow_inverse(hessian: Tensor, damp: float) -> Rows:
    """The inverse of the dampened Hessian by Gauss-Jordan elimination."""
    n = len(hessian)
    a = [[float(value) for value in row] for row in hessian]
    live = [a[i][i] for i in range(n) if a[i][i] != 0]
    mean = sum(live) / len(live) if live else 1.0
    for i in range(n):
        a[i][i] += damp * mean if a[i][i] != 0 else mean
    inverse = [[float(i == j) for j in range(n)] for i in range(n)]
    for i in range(n):
        pivot = a[i][i]
        a[i] = [value / pivot for value in a[i]]
        inverse[i] = [value / pivot for value in inverse[i]]
        for j in range(n):
            if j != i:
                factor = a[j][i]
                a[j] = [x - factor * y for x, y in zip(a[j], a[i])]
                inverse[j] = [x - factor * y for x, y in zip(inverse[j], inverse[i])]
    return inverse


def slow_grid(values: list[float], format: Format) -> tuple[float, int]:
    top = 2**format.bits - 1
    high, low = max([*values, 0.0]), min([*values, 0.0])
    if format.symmetric:
        high = max(high, -low)
        low = -high
    scale = float(np.float16((high - low) / top)) or 1.0
    return scale, 2 ** (format.bits - 1) if format.symmetric else min(top, round(-low / scale))


def slow_gptq(
    weight: Tensor, hessian: Tensor, format: Format, damp: float, act_order: bool = False
) -> tuple[list[list[int]], Rows]:
    """Codes and rounded values, one row at a time."""
    n, per_group = weight.shape[1], format.columns_per_group(weight.shape[1])
    order = sorted(range(n), key=lambda i: -float(hessian[i, i])) if act_order else list(range(n))
    all_codes, all_values = [], []
    for row in weight.tolist():
        w, inverse = list(row), slow_inverse(hessian, damp)
        codes, values = [0] * n, [0.0] * n
        grids: dict[int, tuple[float, int]] = {}
        for place, i in enumerate(order):
            group = i // per_group
            if group not in grids:
                source = row if act_order else w
                grids[group] = slow_grid(source[group * per_group : (group + 1) * per_group], format)
            scale, zero = grids[group]
            codes[i] = min(2**format.bits - 1, max(0, round(w[i] / scale) + zero))
            values[i] = (codes[i] - zero) * scale
            error = (w[i] - values[i]) / inverse[i][i]
            for j in order[place + 1 :]:
                w[j] -= error * inverse[i][j]
            removed = inverse[i][:]
            for j in range(n):
                factor = inverse[j][i] / removed[i]
                inverse[j] = [x - factor * y for x, y in zip(inverse[j], removed)]
        all_codes.append(codes)
        all_values.append(values)
    return all_codes, all_values


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int2-g8", "int3-g8-asym", "int4-g16", "int4-channel", "int4-g24-asym", "int8-g8"])
def test_codes_equal_the_slow_implementation(name: str, act_order: bool) -> None:
    format = Format.parse(name)
    weight, hessian = case(rows=5, columns=48, tokens=64)
    codes, values = slow_gptq(weight, hessian, format, 0.01, act_order)
    for block in (128, 16, 20, 7):
        got = one(weight, hessian, format, block=block, act_order=act_order)
        assert got.codes.tolist() == codes
        torch.testing.assert_close(got.dequantize(), torch.tensor(values), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tokens", [0, 1, 3, 20])
@pytest.mark.parametrize("act_order", [False, True])
def test_rare_experts_equal_the_slow_implementation(tokens: int, act_order: bool) -> None:
    format = Format.parse("int3-g8")
    weight, hessian = case(rows=4, columns=24, tokens=tokens)
    hessian[5] = hessian[:, 5] = 0
    got = one(weight, hessian, format, act_order=act_order)
    codes, values = slow_gptq(weight, hessian, format, 0.01, act_order)
    slow_error = output_error(weight, torch.tensor(values), hessian)
    assert output_error(weight, got.dequantize(), hessian) == pytest.approx(slow_error, rel=1e-3, abs=1e-9)
    assert got.codes.tolist() == codes


def test_no_tokens_means_plain_rounding() -> None:
    weight = case(8, 32, 1)[0]
    for act_order in (False, True):
        got = one(weight, torch.zeros(32, 32), Format.parse("int4-g16"), act_order=act_order)
        assert torch.equal(got.codes, quantize_rtn(weight, Format.parse("int4-g16")).codes)


def test_diagonal_hessian_means_plain_rounding() -> None:
    weight = case(8, 32, 1)[0]
    hessian = torch.diag(torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1)
    for name in ("int2-g8", "int4-channel-asym"):
        got, plain = one(weight, hessian, Format.parse(name)), quantize_rtn(weight, Format.parse(name))
        assert torch.equal(got.codes, plain.codes)
        assert torch.equal(got.scales, plain.scales)


@pytest.mark.parametrize("seed", range(5))
def test_brute_force_over_all_codes_bounds_the_error(seed: int) -> None:
    """Eight columns at 2 bits on a fixed grid: 65,536 candidates, the best found by trying them all."""
    format = Format.parse("int2-channel")
    weight, hessian = case(rows=1, columns=8, tokens=32, seed=seed)
    got = one(weight, hessian, format, act_order=True)
    scale = float(got.scales[0, 0])
    codes = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.float64)
    change = (codes - 2) * scale - weight.double()
    best = float(((change @ hessian.double()) * change).sum(-1).min())
    reached = output_error(weight, got.dequantize(), hessian)
    rounded = output_error(weight, quantize_rtn(weight, format).dequantize(), hessian)
    assert best <= reached * (1 + 1e-6)
    assert best <= rounded * (1 + 1e-6)
    assert reached <= 1.6 * best


def test_brute_force_optimum_is_reached_when_columns_do_not_interact() -> None:
    format = Format.parse("int2-channel")
    weight = case(rows=1, columns=8, tokens=1)[0]
    hessian = torch.diag(torch.arange(1.0, 9.0))
    got = one(weight, hessian, format)
    codes = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.float64)
    change = (codes - 2) * float(got.scales[0, 0]) - weight.double()
    best = float(((change @ hessian.double()) * change).sum(-1).min())
    assert output_error(weight, got.dequantize(), hessian) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "margin"), [("int3-g32", 0.9), ("int4-g32", 0.8), ("int4-g32-asym", 0.8), ("int8-g32", 0.8)]
)
@pytest.mark.parametrize("seed", range(3))
def test_output_error_is_clearly_below_rounding(name: str, margin: float, seed: int) -> None:
    format = Format.parse(name)
    weight, hessian = case(rows=64, columns=128, tokens=400, seed=seed)
    rounded = output_error(weight, quantize_rtn(weight, format).dequantize(), hessian)
    in_order = output_error(weight, one(weight, hessian, format).dequantize(), hessian)
    by_size = output_error(weight, one(weight, hessian, format, act_order=True).dequantize(), hessian)
    assert in_order < margin * rounded
    assert by_size < 0.5 * rounded


def test_a_batch_of_experts_equals_one_by_one() -> None:
    cases = [case(6, 32, tokens, seed) for seed, tokens in enumerate((0, 5, 100))]
    weight, hessian = (torch.stack(parts) for parts in zip(*cases))
    for act_order in (False, True):
        batch = quantize_gptq(weight, hessian, Format.parse("int4-g8-asym"), act_order=act_order)
        assert isinstance(batch, list)
        for got, (single_weight, single_hessian) in zip(batch, cases, strict=True):
            alone = one(single_weight, single_hessian, Format.parse("int4-g8-asym"), act_order=act_order)
            assert torch.equal(got.codes, alone.codes)
            assert torch.equal(got.scales, alone.scales)
            assert torch.equal(got.dequantize(), alone.dequantize())


def test_the_hessians_scale_does_not_matter_and_inputs_stay_as_they_were() -> None:
    weight, hessian = case(6, 32, 50)
    hessian[3] = hessian[:, 3] = 0
    before = weight.clone(), hessian.clone()
    got = one(weight, hessian, Format.parse("int4-g8"))
    assert torch.equal(got.codes, one(weight, hessian * 2.0**-20, Format.parse("int4-g8")).codes)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_hessian_counts_squared_affinities_and_adds_up() -> None:
    inputs, affinity = correlated(20, 8), torch.rand(20, generator=torch.Generator().manual_seed(3))
    want = sum(float(c) ** 2 * torch.outer(x, x) for c, x in zip(affinity, inputs))
    got = accumulate_hessian(inputs[:7], affinity[:7]) + accumulate_hessian(inputs[7:], affinity[7:])
    torch.testing.assert_close(got, want)
    assert got.dtype == torch.float32
    assert not accumulate_hessian(inputs[:0], affinity[:0]).any()
    assert accumulate_hessian(inputs.bfloat16(), affinity).dtype == torch.float32


@pytest.mark.parametrize("tokens", [8, 32, 64])
def test_shrinking_helps_rare_experts_on_tokens_they_have_not_seen(tokens: int) -> None:
    """There is correlation to learn from, but most of what few tokens show is accident."""
    format, columns = Format.parse("int4-g32"), 128
    generator = torch.Generator().manual_seed(tokens)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    weight = torch.randn(64, columns, generator=generator)

    def hessian_of(count: int) -> Tensor:
        own = 0.7 * torch.randn(count, columns, generator=generator)
        return accumulate_hessian(torch.randn(count, columns, generator=generator) @ mix + own, torch.ones(count))

    seen, unseen = hessian_of(tokens), hessian_of(4000)
    bare = output_error(weight, one(weight, seen, format).dequantize(), unseen)
    steadied = output_error(weight, one(weight, shrink_hessian(seen, tokens), format).dequantize(), unseen)
    rounded = output_error(weight, quantize_rtn(weight, format).dequantize(), unseen)
    assert steadied < 0.9 * bare
    assert steadied < 1.2 * rounded


def test_shrinking_keeps_the_diagonal_and_fades_with_tokens() -> None:
    hessian = case(4, 16, 30)[1]
    none = shrink_hessian(hessian, 0)
    assert torch.equal(none, torch.diag(hessian.diagonal()))
    some = shrink_hessian(hessian, 4)
    torch.testing.assert_close(some.diagonal(), hessian.diagonal())
    torch.testing.assert_close(some[0, 1], hessian[0, 1] / 2)
    torch.testing.assert_close(shrink_hessian(hessian, 10**9), hessian)
    torch.testing.assert_close(shrink_hessian(torch.stack([hessian, hessian]), 4)[1], some)
    with pytest.raises(ExpertFlowError, match="-1 tokens cannot be"):
        shrink_hessian(hessian, -1)


def test_coverage_is_reported() -> None:
    hessian = accumulate_hessian(correlated(3, 16), torch.ones(3))
    hessian[4] = hessian[:, 4] = 0
    report = examine_hessian(hessian)
    assert (report.columns, report.dead, report.rank) == (16, 1, 3)
    assert examine_hessian(torch.zeros(16, 16)).rank == 0


def test_what_cannot_be_used_is_refused() -> None:
    weight, hessian = case(4, 16, 30)
    format = Format.parse("int4-g8")
    spoiled, holed = hessian.clone(), weight.clone()
    spoiled[0, 0], holed[0, 0] = float("nan"), float("inf")
    with pytest.raises(ExpertFlowError, match=r"hessian \(16, 16\) holds 1 values that are NaN"):
        quantize_gptq(weight, spoiled, format)
    with pytest.raises(ExpertFlowError, match=r"weight \(4, 16\) holds 1 values"):
        quantize_gptq(holed, hessian, format)
    with pytest.raises(ExpertFlowError, match=r"pass \[O, I\] with \[I, I\]"):
        quantize_gptq(weight, hessian[:8, :8], format)
    with pytest.raises(ExpertFlowError, match="dampening 0 must be above 0"):
        quantize_gptq(weight, hessian, format, damp=0)
    with pytest.raises(ExpertFlowError, match="not positive semidefinite"):
        quantize_gptq(weight, -hessian, format)
    with pytest.raises(ExpertFlowError, match="GPTQ makes codes, not bf16"):
        quantize_gptq(weight, hessian, BF16)
    with pytest.raises(ExpertFlowError, match="block of 0 columns"):
        quantize_gptq(weight, hessian, format, block=0)
    with pytest.raises(ExpertFlowError, match=r"inputs .* holds 1 values"):
        accumulate_hessian(torch.tensor([[float("nan")]]), torch.ones(1))
    with pytest.raises(ExpertFlowError, match=r"pass \[tokens, features\] and \[tokens\]"):
        accumulate_hessian(torch.ones(3, 2), torch.ones(2))
