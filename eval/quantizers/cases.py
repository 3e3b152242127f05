"""A batch of three experts with random weights and inputs, quantized by the library and by ``slow``."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.quantizers.slow import SlowExpert, error_as_run, slow_gptq
from expertflow_quant.formats import INT_BITS, Format
from expertflow_quant.quantize import accumulate_hessian, quantize_gptq, search_awq_batch

FORMATS = tuple(
    Format("int", bits, group, symmetric)
    for bits in INT_BITS
    for group in (32, 64, 128, 0)
    for symmetric in (True, False)
)
TOKENS = (900, 60, 300)
"""Of the three experts of a batch; the second's Hessian is far from full rank."""

DAMP = 0.01
AWQ_STEPS = 5


@dataclass(frozen=True)
class Case:
    """One expert: output errors of both on the same inputs, and the share of codes that are equal (GPTQ). ``as_run``:
    the library's error as ``slow`` measures it (AWQ)."""

    ours: float
    slow: float
    equal_codes: float | None = None
    as_run: float | None = None


def gptq_batch() -> tuple[Tensor, Tensor]:
    """Weights float32 [3, 12, 256] and Hessians [3, 256, 256] of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(256, 256, generator=generator) / 16
    size = torch.exp(torch.randn(256, generator=generator))
    inputs = [torch.randn(count, 256, generator=generator) @ mix * size for count in TOKENS]
    hessians = [accumulate_hessian(each, torch.rand(len(each), generator=generator)) for each in inputs]
    return torch.randn(3, 12, 256, generator=generator) * 0.05, torch.stack(hessians)


def gptq_cases(batch: tuple[Tensor, Tensor], format: Format, act_order: bool) -> list[Case]:
    """GPTQ's error is the Hessian's norm of what changed."""
    found: Any = quantize_gptq(*batch, format, act_order=act_order)
    cases = []
    for mine, weight, hessian in zip(found, *(part.double().numpy() for part in batch), strict=True):
        codes, values = slow_gptq(weight, hessian, format, DAMP, act_order)
        changes = (mine.dequantize().numpy() - weight, values - weight)
        ours, slow = (float(np.trace(change @ hessian @ change.T)) for change in changes)
        cases.append(Case(ours, slow, equal_codes=float((mine.codes.numpy() == codes).mean())))
    return cases


def awq_cases(format: Format) -> list[Case]:
    """AWQ's error is that of an expert's output, relative."""
    generator = torch.Generator().manual_seed(format.bits)
    size = torch.exp(torch.randn(128, generator=generator))
    gate_up = [torch.randn(256, 128, generator=generator) / 8 for _ in TOKENS]
    down = [torch.randn(128, 128, generator=generator) / 11 for _ in TOKENS]
    inputs = [torch.randn(count // 10, 128, generator=generator) * size for count in TOKENS]
    weights = [torch.rand(len(each), generator=generator) + 0.05 for each in inputs]

    def gate(rows: Tensor) -> Tensor:
        return torch.nn.functional.silu(rows[:, :128]) * rows[:, 128:]

    cases = []
    found = search_awq_batch(gate_up, down, gate, inputs, weights, format, grid=AWQ_STEPS)
    for mine, *parts in zip(found, gate_up, down, inputs, weights, strict=True):
        slow = SlowExpert(*(part.double().numpy() for part in parts), format)
        as_run = error_as_run(mine.gate_up, mine.down, mine.input_scale, slow)
        cases.append(Case(mine.error, slow.search(AWQ_STEPS), as_run=as_run))
    return cases
