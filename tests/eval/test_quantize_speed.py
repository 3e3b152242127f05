"""The timing of a layer runs end to end on a small one, and its check finds experts that differ."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from eval.__main__ import app
from eval.quantize_speed.layer import RandomLayer
from eval.quantize_speed.measure import Bench, compared
from expertflow_quant.formats import ExpertShape, Format
from expertflow_quant.pipeline.methods import MethodOptions

LAYER = RandomLayer.make(ExpertShape(64, 32), 4, 2, 200, "cpu")


def test_the_command_writes_figures_and_a_plot(tmp_path):
    out = tmp_path / "speed.json"
    run = CliRunner().invoke(app, ["quantize-speed", "--tiny", "--device", "cpu", "--alone", "2", "--out", str(out)])
    assert run.exit_code == 0, run.output
    found = json.loads(out.read_text())
    assert set(found["methods"]) == {"awq", "gptq"}
    for method in found["methods"].values():
        assert method["experts"] == 8
        assert method["one_by_one_measured_on"] == 2
        assert method["batched_seconds"] > 0
        assert method["check"]["passed"]
        assert method["target_seconds"] is None
    assert sum(found["settings"]["rows"].values()) > 0
    assert out.with_suffix(".png").stat().st_size > 5000


def test_every_routed_token_is_a_row_of_its_experts():
    assert sum(LAYER.rows) == 400
    for job in LAYER.jobs(Format.parse("int4-g32"), range(4), "cpu"):
        tokens, choices = (LAYER.index == job.expert).nonzero(as_tuple=True)
        assert job.rows is not None
        assert torch.equal(job.rows.inputs, LAYER.hidden[tokens])
        assert torch.equal(job.rows.weights, LAYER.affinity[tokens, choices])
        assert job.rows.tokens == LAYER.rows[job.expert]


def test_a_wrong_expert_does_not_pass_the_check():
    bench = Bench(LAYER, "gptq", Format.parse("int4-g32"), MethodOptions(), "cpu")
    made = bench.quantize(range(2))
    assert compared(made, made) == {"experts": 2, "equal_codes": 1.0, "error_apart": 0.0, "passed": True}
    swapped = {0: made[0], 1: replace(made[0], error=made[1].error * 1.02)}
    found = compared(swapped, made)
    assert found["equal_codes"] < 0.7
    assert found["error_apart"] == pytest.approx(0.02)
    assert not found["passed"]


def test_what_cannot_be_coded_is_told(tmp_path):
    run = CliRunner().invoke(app, ["quantize-speed", "--tiny", "--format", "int4-g48", "--out", str(tmp_path / "x")])
    assert run.exit_code == 1
    assert "group size 48 does not divide" in run.output
