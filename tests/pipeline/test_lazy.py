"""A model whose blocks are read while they run computes what the whole model computes, a block at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.calibration import save_model
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.models.seams import expert_modules, model_class
from expertflow_quant.pipeline.backbone import load_backbone
from expertflow_quant.pipeline.forwards import ExpertsCall, observed_by
from expertflow_quant.pipeline.stream import ModelStream


class Zeros:
    """Experts that answer nothing."""

    scores: Tensor | None = None

    def answer(self, call: ExpertsCall) -> Tensor:
        return torch.zeros_like(call.hidden)


def held(model: Any) -> set[str]:
    """The first parts, down to a block's number, of the names of all parameters that are in memory."""
    names = [name.split(".") for name, parameter in model.named_parameters() if parameter.device.type != "meta"]
    ends = [next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), len(parts)) for parts in names]
    return {".".join(parts[:end]) for parts, end in zip(names, ends, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_blocks_come_and_go(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stream, batch = ModelStream(save_model(family, tmp_path)), tiny.model_inputs(family)
    plain = model_class(stream.config).from_pretrained(tmp_path, dtype=dtype, experts_implementation="eager").eval()
    for _, module in expert_modules(plain):
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
    model = load_backbone(stream, torch.device("cpu"), dtype)
    at_rest, seen = held(model), []
    for name, module in model.named_modules():
        if type(module).__name__.endswith(("Attention", "MLP")) and any(part.isdecimal() for part in name.split(".")):
            module.register_forward_pre_hook(lambda *args: seen.append(held(model) - at_rest))
    assert not any(part.isdecimal() for name in at_rest for part in name.split("."))
    assert not any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in at_rest)
    with observed_by(Zeros()), torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    assert torch.equal(logits, plain(**batch, use_cache=False).logits)
    assert len(seen) >= 2
    assert {len(blocks) for blocks in seen} == {1}
    assert held(model) == at_rest


def test_a_block_stays_for_as_long_as_a_forward_is_in_it(tmp_path: Path) -> None:
    model = load_backbone(ModelStream(save_model("mixtral", tmp_path)), torch.device("cpu"), torch.float32)
    lazy, layer = model.lazy_weights, model.model.layers[1]
    unit = next(unit for unit in lazy.units if unit.module is layer)
    with lazy.held(unit):
        with lazy.held(unit):
            weight = layer.self_attn.q_proj.weight
        assert layer.self_attn.q_proj.weight is weight
    assert not hasattr(layer.self_attn.q_proj, "weight")


def test_a_prepared_model_does_not_run_unobserved(tmp_path: Path) -> None:
    model = load_backbone(ModelStream(save_model("mixtral", tmp_path)), torch.device("cpu"), torch.float32)
    with pytest.raises(ExpertFlowError, match="only runs while it is observed"), torch.no_grad():
        model(**tiny.model_inputs("mixtral"))
