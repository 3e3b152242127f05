"""nf4 against a loop over single weights, and against bitsandbytes where it is installed."""

import importlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertflow_quant.formats import NF4_VALUES, ExpertFlowError, Format
from expertflow_quant.quantize import quantize_gptq, quantize_rtn, search_awq

NF4 = Format.parse("nf4-g64")


def weights(rows: int = 24, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def slow_codes(group: list[float]) -> list[int]:
    """Single precision throughout; each value's code is the number of middles below it."""
    one = np.float32
    inverse = one(1) / max(one(1e-38), max(abs(one(value)) for value in group))
    middles = [(one(low) + one(high)) / one(2) for low, high in itertools.pairwise(NF4_VALUES)]
    return [sum(bool(one(value) * inverse > middle) for middle in middles) for value in group]


@pytest.mark.parametrize("name", ["nf4-g32", "nf4-g64", "nf4-g128", "nf4-channel"])
def test_codes_and_scales_equal_the_slow_ones(name: str) -> None:
    format, weight = Format.parse(name), weights(3)
    got = quantize_rtn(weight, format)
    assert got.zeros is None
    size = format.columns_per_group(128)
    for row in range(3):
        for group in range(128 // size):
            values = weight[row, group * size : (group + 1) * size].tolist()
            assert got.codes[row, group * size : (group + 1) * size].tolist() == slow_codes(values)
            assert float(got.scales[row, group]) == float(np.float16(max(abs(value) for value in values)))


def test_no_other_level_would_be_nearer() -> None:
    weight = weights()
    got = quantize_rtn(weight, NF4)
    scales = got.scales.float().repeat_interleave(64, dim=1)
    levels = torch.tensor(NF4_VALUES) * scales.unsqueeze(-1)
    nearest = (levels - weight.unsqueeze(-1)).abs().amin(-1)
    assert bool(((got.dequantize() - weight).abs() <= nearest + 2e-3 * scales).all())  # scales are rounded to fp16


def test_normal_weights_lose_less_than_in_int4() -> None:
    weight = weights(256, 256)
    nf4, int4 = (
        float((quantize_rtn(weight, Format.parse(f"{kind}4-g64")).dequantize() - weight).norm())
        for kind in ("nf", "int")
    )
    assert nf4 < 0.95 * int4


def test_zeros_stay_zeros_and_tiny_groups_become_them() -> None:
    weight = weights(2)
    weight[0, :64] = 0
    weight[1, :64] *= 1e-9  # below fp16's smallest
    got = quantize_rtn(weight, NF4).dequantize()
    assert not got[:, :64].any()
    assert got[:, 64:].any()


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_equal_those_of_bitsandbytes(block: int, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    functional: Any = importlib.import_module("bitsandbytes.functional")
    weight = weights(64, 256).to(dtype)
    weight[3, :block] = 0
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=False)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=-1).view(64, 256)
    got = quantize_rtn(weight, Format.parse(f"nf4-g{block}"))
    assert torch.equal(got.codes, codes)
    assert torch.equal(got.scales, state.absmax.view(64, -1).half())
    theirs = functional.dequantize_4bit(packed, state).float()
    torch.testing.assert_close(got.dequantize(), theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6)


def test_awq_searches_scales_for_nf4() -> None:
    generator = torch.Generator().manual_seed(1)
    size = torch.exp(1.5 * torch.randn(64, generator=generator))
    inputs = torch.randn(200, 64, generator=generator) * size
    result = search_awq(
        weights(64, 64) * 3,
        weights(64, 32) * 3,
        lambda rows: torch.nn.functional.silu(rows[:, :32]) * rows[:, 32:],
        inputs,
        torch.rand(200, generator=generator),
        Format.parse("nf4-g32"),
        grid=10,
    )
    assert result.gate_up.format.name == "nf4-g32"
    assert result.ratio > 0
    assert result.error < 0.95 * result.rounding_error


def test_what_nf4_cannot_do_is_refused() -> None:
    with pytest.raises(ExpertFlowError, match="GPTQ makes integer codes, not nf4-g64: use rtn or AWQ"):
        quantize_gptq(weights(), torch.eye(128), NF4)
    with pytest.raises(ExpertFlowError, match="scale rule 'mse' is not there for nf4-g64: use 'absmax'"):
        quantize_rtn(weights(), NF4, scales="mse")
    with pytest.raises(ExpertFlowError, match="in nf4: scales are stored as fp16, use bf16"):
        quantize_rtn(weights() * 1e7, NF4)
    with pytest.raises(ExpertFlowError, match="group size 64 does not divide 96"):
        quantize_rtn(weights(2, 96), NF4)
