"""Spans of columns rounded by the kernel: the twin's codes and errors, bit by bit."""

import pytest
import torch
from torch import Tensor

from expertflow_quant.formats import Format
from expertflow_quant.quantize import accumulate_hessian, quantize_gptq
from expertflow_quant.quantize.grid import fit_grid
from expertflow_quant.quantize.hessian import inverse_factor
from expertflow_quant.quantize.spans import round_span, round_span_reference


def case(experts: int, columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """work ``[E, I, O]`` and factor ``[E, I, I]``; the second expert has seen three tokens."""
    generator = torch.Generator().manual_seed(columns)
    work = torch.randn(experts, columns, rows, generator=generator) * 0.05
    tokens = [4 * columns, 3, *[columns] * experts][:experts]
    inputs = [torch.randn(count, columns, generator=generator) for count in tokens]
    hessian = torch.stack([accumulate_hessian(each, torch.ones(len(each))) for each in inputs])
    return work, inverse_factor(hessian, 0.01)


@pytest.mark.parametrize("name", ["int2-g16", "int3-g16-asym", "int4-g16", "int8-g16-asym"])
@pytest.mark.parametrize("span", [slice(0, 16), slice(16, 27), slice(47, 48)])
def test_codes_and_errors_equal_the_twins(device: str, name: str, span: slice) -> None:
    format = Format.parse(name)
    work, factor = (each.to(device) for each in case(3, 48, 40))
    scales, zeros = fit_grid(work[:, :16].transpose(1, 2), format)
    grids = [grid.unsqueeze(1).expand(-1, span.stop - span.start, -1) for grid in (scales, zeros)]
    before = work.clone()
    found, wanted = (torch.zeros(work.shape, dtype=torch.uint8, device=device) for _ in range(2))
    errors = round_span(work, factor, span, *grids, found, format)
    expected = round_span_reference(work, factor, span, *grids, wanted, format)
    assert torch.equal(found, wanted)
    assert torch.equal(errors, expected)
    assert torch.equal(work, before)


def test_every_column_may_have_its_own_grid(device: str) -> None:
    format, span = Format.parse("int4-g16"), slice(8, 40)
    work, factor = (each.to(device) for each in case(2, 48, 33))
    scales = (torch.rand(2, 32, 33, device=device) / 50).half()
    zeros = torch.randint(0, 16, (2, 32, 33), dtype=torch.uint8, device=device)
    found, wanted = (torch.zeros(work.shape, dtype=torch.uint8, device=device) for _ in range(2))
    errors = round_span(work, factor, span, scales, zeros, found, format)
    assert torch.equal(errors, round_span_reference(work, factor, span, scales, zeros, wanted, format))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int3-g32", "int4-channel-asym"])
def test_gptq_gives_what_the_cpu_gives(device: str, name: str, act_order: bool) -> None:
    """On a GPU products are summed in another order: nearly every code, and the output error within 1 %."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) / 8
    inputs = [torch.randn(count, 64, generator=generator) @ mix for count in (200, 30)]
    hessian = torch.stack([accumulate_hessian(each, torch.ones(len(each))) for each in inputs])
    weight = torch.randn(2, 24, 64, generator=generator) * 0.05
    wanted = quantize_gptq(weight, hessian, Format.parse(name), act_order=act_order)
    found = quantize_gptq(weight.to(device), hessian.to(device), Format.parse(name), act_order=act_order)
    for expert, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):  # type: ignore[arg-type]
        assert float((mine.codes.cpu() == theirs.codes).float().mean()) > 0.99
        errors = [
            float(((change := each.dequantize().cpu() - weight[expert]) @ hessian[expert] * change).sum())
            for each in (mine, theirs)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.01)
