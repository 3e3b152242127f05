"""Calibration tokens by modality are counted, stored and shown; samples are chosen from a pool."""

import json
from pathlib import Path

import pytest
from helpers import tiny
from typer.testing import CliRunner

from expertflow_quant.checkpoint import CheckpointError, CheckpointReader, ExpertEntry, Manifest
from expertflow_quant.cli.main import app
from expertflow_quant.formats import Format
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observed import Tokens
from expertflow_quant.pipeline.samples_io import generated_samples

runner = CliRunner(env={"COLUMNS": "120"})


def test_tokens_are_counted_by_modality_stored_and_shown(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tiny.tiny_model("qwen3_vl_moe").save_pretrained(model)
    tiny.save_processor("qwen3_vl_moe", model)
    made = runner.invoke(app, ["quantize", str(model), str(out), "--format", "int4-g16", "--num-samples", "2"])
    assert made.exit_code == 0, made.output
    assert "calibration tokens of an expert" in made.stdout
    assert "calibration tokens of an expert" in runner.invoke(app, ["inspect", str(out)]).stdout
    from expertflow_quant.models.processor import load_processor
    from expertflow_quant.models.seams import read_config

    data = CalibrationData.from_samples(load_processor(model), generated_samples(2))
    tokens = Tokens.of(data.batches[0](), read_config(model))
    for layer in CheckpointReader(out).layers:
        assert sum(expert.tokens for expert in layer.experts) == layer.top_k * int(tokens.valid.sum())
        text = sum(expert.text_tokens or 0 for expert in layer.experts)
        assert text == layer.top_k * int((tokens.valid & tokens.text).sum())
    value = json.loads((out / "manifest.json").read_text())
    for layer in value["layers"]:
        for expert in layer["experts"]:
            del expert["text_tokens"]  # as before they were counted
    (out / "manifest.json").write_text(json.dumps(value))
    assert Manifest.load(out).layers[0].experts[0].text_tokens is None
    assert "calibration tokens of an expert" not in runner.invoke(app, ["inspect", str(out)]).stdout


def test_more_text_than_tokens_is_refused() -> None:
    with pytest.raises(CheckpointError, match="5 of 4 tokens are text"):
        ExpertEntry(Format.parse("int4-g32"), False, 256, tokens=4, text_tokens=5)


def test_samples_are_chosen_from_a_pool(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.tiny_model("qwen3_vl_moe").save_pretrained(model)
    tiny.save_processor("qwen3_vl_moe", model)
    options = ["--format", "int4-g16", "--num-samples", "2"]
    for name, pool in (("first", []), ("all", ["--pool", "2"]), ("chosen", ["--pool", "5"])):
        made = runner.invoke(app, ["quantize", str(model), str(tmp_path / name), *options, *pool])
        assert made.exit_code == 0, made.output
    digests = {
        name: CheckpointReader(tmp_path / name).manifest.made["calibration"]["digest"]  # type: ignore[index]
        for name in ("first", "all", "chosen")
    }
    assert digests["first"] == digests["all"]
    assert digests["chosen"] != digests["first"]
    refused = runner.invoke(app, ["quantize", str(model), str(tmp_path / "x"), *options, "--pool", "1"])
    assert refused.exit_code == 2
    assert "2 samples cannot be chosen from a pool of 1" in refused.stderr.replace("\n", " ")
