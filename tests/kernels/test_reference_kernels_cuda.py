"""The same bits on a GPU: decoding and the quantizers do not depend on the device beyond rounding."""

import pytest
import torch
from torch.nn import functional

from expertflow_quant.formats import ExpertShape, Format, RecordLayout
from expertflow_quant.kernels import expert_product, expert_weights
from expertflow_quant.quantize import (
    accumulate_hessian,
    expert_fields,
    quantize_gptq,
    quantize_rtn,
    search_awq,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NAMES = ["int2-g32", "int3-g32-asym", "int4-g32", "int4-g32-asym", "int8-channel"]


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


@pytest.mark.parametrize("name", NAMES)
def test_decoded_weights_are_the_same_bits(name: str) -> None:
    layout = RecordLayout(ExpertShape(256, 96), Format.parse(name), input_scale=True)
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(192, 256, generator=generator), torch.randn(256, 96, generator=generator)
    parts = quantize_rtn(up, layout.format), quantize_rtn(down, layout.format)
    record = layout.pack(expert_fields(layout, *parts, input_scale=torch.rand(256, generator=generator)))
    here = expert_weights(layout.views(record), layout, torch.bfloat16)
    there = expert_weights(layout.views(record.cuda()), layout, torch.bfloat16)
    assert torch.equal(here.gate_up, there.gate_up.cpu())
    assert torch.equal(here.down, there.down.cpu())
    hidden = torch.randn(7, 256, generator=generator).bfloat16()
    want = expert_product(hidden, here, silu_gate).float()
    got = expert_product(hidden.cuda(), there, silu_gate).float().cpu()
    assert float((got - want).norm() / want.norm()) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_quantizers_run_on_the_device_and_agree(name: str) -> None:
    format = Format.parse(name)
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(192, 256, generator=generator) / 16, torch.randn(256, 96, generator=generator) / 10
    inputs = torch.randn(300, 256, generator=generator) * torch.exp(torch.randn(256, generator=generator))
    affinity = torch.rand(300, generator=generator)
    assert torch.equal(quantize_rtn(up, format).codes, quantize_rtn(up.cuda(), format).codes.cpu())
    hessian = accumulate_hessian(inputs, affinity)
    for act_order in (False, True):
        batch = (torch.stack([up, up]), torch.stack([hessian, hessian]))
        here = quantize_gptq(*batch, format, act_order=act_order)
        there = quantize_gptq(*(part.cuda() for part in batch), format, act_order=act_order)
        assert isinstance(here, list)
        assert isinstance(there, list)
        for a, b in zip(here, there):
            assert float((a.codes != b.codes.cpu()).float().mean()) < 0.01
    on_cpu = search_awq(up, down, silu_gate, inputs, affinity, format)
    on_gpu = search_awq(up.cuda(), down.cuda(), silu_gate, inputs.cuda(), affinity.cuda(), format)
    assert on_gpu.error == pytest.approx(on_cpu.error, rel=0.02)
