"""Rounding to nearest against loops over single weights, and the bounds that make it what it is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertflow_quant.formats import BF16, INT_BITS, ExpertFlowError, Format
from expertflow_quant.quantize import QuantizedMatrix, quantize_rtn

NAMES = [f"int{bits}-{group}{end}" for bits in INT_BITS for group in ("g8", "channel") for end in ("", "-asym")]


def weights(rows: int = 6, columns: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def slow_group(values: list[float], bits: int, symmetric: bool) -> tuple[list[int], float, int]:
    """One group in plain Python: codes, stored scale, zero."""
    top = 2**bits - 1
    high, low = max([*values, 0.0]), min([*values, 0.0])
    if symmetric:
        high = max(high, -low)
        low = -high
    scale = float(np.float16((high - low) / top)) or 1.0
    zero = 2 ** (bits - 1) if symmetric else min(top, round(-low / scale))
    return [min(top, max(0, round(value / scale) + zero)) for value in values], scale, zero


@pytest.mark.parametrize("name", NAMES)
def test_codes_scales_and_zeros_equal_the_slow_ones(name: str) -> None:
    format, weight = Format.parse(name), weights()
    got = quantize_rtn(weight, format)
    per_group = format.columns_per_group(24)
    for row in range(6):
        for group in range(format.groups(24)):
            span = slice(group * per_group, (group + 1) * per_group)
            codes, scale, zero = slow_group(weight[row, span].tolist(), format.bits, format.symmetric)
            assert got.codes[row, span].tolist() == codes
            assert float(got.scales[row, group]) == scale
            assert got.zeros is None or int(got.zeros[row, group]) == zero


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 1000), st.floats(0.1, 100.0))
def test_no_weight_is_off_by_more_than_half_its_scale(name: str, seed: int, size: float) -> None:
    format, weight = Format.parse(name), weights(seed=seed) * size
    got = quantize_rtn(weight, format)
    scale = got.scales.float().repeat_interleave(format.columns_per_group(24), dim=1)
    # the stored fp16 scale may be this much too small, and an asymmetric zero is itself rounded to a level
    slack = torch.clamp(scale * 2.0**-11, min=2.0**-25) * format.levels + (0 if format.symmetric else scale / 2)
    assert bool(((got.dequantize() - weight).abs() <= scale / 2 + 1.01 * slack).all())


@pytest.mark.parametrize("name", NAMES)
def test_mse_scales_never_do_worse(name: str) -> None:
    format, weight = Format.parse(name), weights(64, 48)
    plain = (quantize_rtn(weight, format).dequantize() - weight).square()
    searched = (quantize_rtn(weight, format, scales="mse").dequantize() - weight).square()
    grouped = (64, format.groups(48), -1)
    assert bool((searched.view(grouped).sum(-1) <= plain.view(grouped).sum(-1) * (1 + 1e-5)).all())
    if format.bits < 8:
        assert searched.sum() < plain.sum()


def test_int8_is_nearly_lossless_and_more_bits_are_better() -> None:
    weight = weights(64, 256)
    errors = [
        float((quantize_rtn(weight, Format("int", bits, 32)).dequantize() - weight).norm() / weight.norm())
        for bits in INT_BITS
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.006
    assert errors[2] < 0.1


def test_symmetric_zero_is_a_level_and_zero_weights_stay_zero() -> None:
    weight = weights()
    weight[:, :8] = 0
    weight[0, 8] = 0
    for name in NAMES:
        value = quantize_rtn(weight, Format.parse(name)).dequantize()
        assert not value[:, :8].any()
        assert value[0, 8] == 0


def test_parameters_and_transposed_weights_are_taken_as_they_come() -> None:
    weight, format = weights(), Format.parse("int4-g8")
    want = quantize_rtn(weight, format)
    for given_weight in (torch.nn.Parameter(weight), weight.T.contiguous().T):
        got = quantize_rtn(given_weight, format)
        assert torch.equal(got.codes, want.codes)
        assert got.codes.is_contiguous()
        assert not got.scales.requires_grad


def test_bf16_weights_round_like_their_float32_values() -> None:
    weight, format = weights().bfloat16(), Format.parse("int4-g8")
    assert torch.equal(quantize_rtn(weight, format).codes, quantize_rtn(weight.float(), format).codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weight = weights()
    weight[2, 3] = value
    with pytest.raises(ExpertFlowError, match=r"weight \(6, 24\) holds 1 values that are NaN or infinite"):
        quantize_rtn(weight, Format.parse("int4-g8"))


def test_what_cannot_be_coded_is_refused() -> None:
    with pytest.raises(ExpertFlowError, match="group size 32 does not divide 24"):
        quantize_rtn(weights(), Format.parse("int4-g32"))
    with pytest.raises(ExpertFlowError, match=r"weight \(2, 6, 24\) is not a matrix: pass \[out, in\]"):
        quantize_rtn(torch.stack([weights(), weights()]), Format.parse("int4-g8"))
    with pytest.raises(ExpertFlowError, match="rounding makes codes, not bf16"):
        quantize_rtn(weights(), BF16)
    with pytest.raises(ExpertFlowError, match="use bf16"):
        quantize_rtn(weights() * 1e9, Format.parse("int4-g8"))
    with pytest.raises(ExpertFlowError, match="scale rule 'best' is not known: use 'absmax' or 'mse'"):
        quantize_rtn(weights(), Format.parse("int4-g8"), scales="best")  # type: ignore[arg-type]


def test_matrices_whose_parts_disagree_cannot_be_built() -> None:
    good = quantize_rtn(weights(), Format.parse("int4-g8"))
    with pytest.raises(ExpertFlowError, match=r"scales are torch\.float32"):
        QuantizedMatrix(good.codes, good.scales.float(), None, good.format)
    with pytest.raises(ExpertFlowError, match=r"scales are .* \(6, 2\): .* needs torch.float16 \(6, 3\)"):
        QuantizedMatrix(good.codes, good.scales[:, :2], None, good.format)
    with pytest.raises(ExpertFlowError, match="has zeros: False"):
        QuantizedMatrix(good.codes, good.scales, torch.zeros(6, 3, dtype=torch.uint8), good.format)
    with pytest.raises(ExpertFlowError, match="code 16 in int4-g8: the largest is 15"):
        QuantizedMatrix(good.codes + 16 - good.codes, good.scales, None, good.format)
