"""Captured steps on another GPU than the first, in a process that has captured on the first too."""

from pathlib import Path

import pytest
import torch
from helpers import fast

import expertflow_quant
from expertflow_quant.runtime.fast.build import FastOptions

SHIPPED = Path(__file__).parents[3] / "calibration" / "shipped" / "moe"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.alone,  # beside the tests that weigh memory, which see all GPUs
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU"),
    pytest.mark.skipif(not (SHIPPED / "config.json").is_file(), reason=f"no trained model in {SHIPPED}"),
]


def test_every_gpu_gives_the_tokens_of_the_plain_path(tmp_path):
    expertflow_quant.quantize_model(SHIPPED, tmp_path / "int4", method="rtn", device="cuda")
    asked = [fast.asked(text) for text in fast.TEXTS[:2]]
    plain = expertflow_quant.load(tmp_path / "int4", device="cuda", dtype=torch.float32, fast=False)
    wanted, before = fast.tokens(plain, asked), torch.cuda.current_device()
    options = FastOptions(rows=2, room=160, compile_layers=False, look_ahead="next-gate")
    for name in ("cuda:0", "cuda:1", "cuda:0"):
        engine = expertflow_quant.load(tmp_path / "int4", "40%", name, torch.float32, fast=True, options=options)
        assert fast.tokens(engine, asked) == wanted
        assert engine.runner.resident.device == torch.device(name)
        assert torch.cuda.current_device() == before
