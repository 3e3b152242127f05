"""Predictions at answers are the plain model's, and experts come and go as told, whatever their layout."""

from pathlib import Path

import pytest
import torch
from helpers import tiny

from expertflow_quant.kernels import ExpertWeights
from expertflow_quant.models.seams import model_class, read_config
from expertflow_quant.pipeline.batches import AnsweredBatch
from expertflow_quant.pipeline.stream import ModelStream
from expertflow_quant.pipeline.teacher import Teacher, divergence

FAMILIES = ("qwen3_vl_moe", "gpt_oss", "nemotron_h")  # pictures; transposed with biases; no gate


def answered(family: str) -> AnsweredBatch:
    inputs = tiny.model_inputs(family, rows=2)
    width = inputs["input_ids"].shape[1]
    places = torch.tensor([width - 4, width - 2, 2 * width - 3])
    return AnsweredBatch(inputs, places, inputs["input_ids"].reshape(-1)[places + 1], torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_the_plain_models_and_replaced_experts_come_and_go(family: str, tmp_path: Path) -> None:
    tiny.tiny_model(family).save_pretrained(tmp_path)
    teacher, batch = Teacher(tmp_path), answered(family)
    config = read_config(tmp_path)
    plain = model_class(config).from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = plain(**batch.inputs).logits
    wanted = logits.reshape(-1, logits.shape[-1])[batch.places].log_softmax(-1)
    before = teacher.log_probs(batch)
    torch.testing.assert_close(before, wanted, rtol=1e-4, atol=1e-5)
    own, stream = teacher.own(1, 2), ModelStream(tmp_path).expert(1, 2)
    for name, tensor in vars(stream).items():
        ours = getattr(own, name)
        assert ours is None if tensor is None else torch.equal(ours, tensor.float())
    scale = torch.linspace(0.5, 2, own.gate_up.shape[1])
    for expert in range(teacher.experts[1].num_experts):
        whole = teacher.own(1, expert)
        parts = vars(whole) | {"gate_up": whole.gate_up / scale, "input_scale": scale}
        teacher.put(1, expert, ExpertWeights(**parts))
    torch.testing.assert_close(teacher.log_probs(batch), before, rtol=1e-4, atol=1e-5)
    for expert in range(teacher.experts[1].num_experts):
        whole = teacher.own(1, expert)
        teacher.put(1, expert, ExpertWeights(**vars(whole) | {"down": torch.zeros_like(whole.down)}))
    assert float(divergence(before, teacher.log_probs(batch)).min()) > 0
    teacher.restore()
    assert torch.equal(teacher.log_probs(batch), before)
    assert torch.equal(divergence(before, before), torch.zeros(3, dtype=torch.float64))


def test_divergence_is_that_of_the_definition() -> None:
    p, q = (torch.rand(4, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    wanted = [sum(float(a.exp() * (a - b)) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    assert divergence(p, q).tolist() == pytest.approx(wanted)
