"""Captured steps on another GPU than the first, in a process that has captured on the first too."""

import pytest
import torch
from helpers.apart import ROOT, told_by

import expertflow_quant

SHIPPED = ROOT / "calibration" / "shipped" / "moe"

CHECKED = """
import json, sys
import torch
sys.path.insert(0, "tests")
from helpers import fast
import expertflow_quant
from expertflow_quant.runtime.fast.build import FastOptions

folder, *devices = sys.argv[1:]
asked = [fast.asked(text) for text in fast.TEXTS[:2]]
plain = expertflow_quant.load(folder, device=devices[0], dtype=torch.float32, fast=False)
found = {"wanted": fast.tokens(plain, asked), "before": torch.cuda.current_device(), "engines": []}
options = FastOptions(rows=2, room=160, compile_layers=False, look_ahead="next-gate")
for device in devices:
    engine = expertflow_quant.load(folder, "40%", device, torch.float32, fast=True, options=options)
    got, where = fast.tokens(engine, asked), str(engine.runner.resident.device)
    found["engines"].append({"tokens": got, "where": where, "after": torch.cuda.current_device()})
print(json.dumps(found))
"""
"""In a process of its own: the tests that weigh memory must not find this one's."""


@pytest.mark.cuda
@pytest.mark.alone  # those see all GPUs
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.skipif(not (SHIPPED / "config.json").is_file(), reason=f"no trained model in {SHIPPED}")
def test_every_gpu_gives_the_tokens_of_the_plain_path(tmp_path):
    expertflow_quant.quantize_model(SHIPPED, tmp_path / "int4", method="rtn")
    devices = ["cuda:0", "cuda:1", "cuda:0"]
    found = told_by(CHECKED, tmp_path / "int4", *devices)
    for device, engine in zip(devices, found["engines"], strict=True):
        assert engine == {"tokens": found["wanted"], "where": device, "after": found["before"]}
