"""A checkpoint with nf4 experts beside integer ones gives the logits of the same weights decoded by hand."""

from pathlib import Path

import pytest
import torch
from helpers import fast, tiny

import expertflow_quant
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.pipeline.quantize import quantize_model

FAMILY = "qwen3_moe"


def mixed(layer: int, expert: int) -> str:
    return ("nf4-g16", "int4-g16", "nf4-channel", "bf16")[(layer + expert) % 4]


def test_loaded_experts_answer_like_their_decoded_weights(tmp_path: Path) -> None:
    model = tiny.tiny_model(FAMILY)
    folder = fast.checkpoint(tmp_path / "model", FAMILY, mixed)
    engine = expertflow_quant.load(folder, "50%")
    inputs = tiny.model_inputs(FAMILY)
    with torch.no_grad():
        wanted = tiny.dequantized(model, mixed)(**inputs).logits
        found = engine.model(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_fast_path_takes_nf4(tmp_path: Path) -> None:
    folder = fast.checkpoint(tmp_path / "model", FAMILY, mixed)
    plain, quick = expertflow_quant.load(folder, "100%"), fast.load_fast(folder)
    conversations = fast.CONVERSATIONS[:3]
    assert fast.tokens(quick, conversations) == fast.tokens(plain, conversations)


def test_gptq_refuses_a_plan_with_nf4_before_anything_runs(tmp_path: Path) -> None:
    tiny.tiny_model(FAMILY).save_pretrained(tmp_path / "model")
    with pytest.raises(ExpertFlowError, match="gptq makes integer codes, not nf4-g16: use awq or rtn"):
        quantize_model(tmp_path / "model", tmp_path / "out", method="gptq", plan="nf4-g16")
    assert not (tmp_path / "out").exists()
    report = quantize_model(tmp_path / "model", tmp_path / "out", method="rtn", plan="nf4-g16")
    assert {entry.format.name for _, _, entry in report.experts} == {"nf4-g16"}
