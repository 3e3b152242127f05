"""Experts, sizes and routers are found in every family; what is not understood is refused by name."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import tiny

from expertflow_quant.formats import ExpertFlowError, ExpertShape
from expertflow_quant.models.seams import (
    expert_modules,
    expert_shape,
    find_router,
    model_class,
    num_experts,
    read_config,
    top_k,
)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_experts_and_routers_of_every_family(family: str) -> None:
    model = tiny.tiny_model(family)
    for name, module in expert_modules(model):
        shape = expert_shape(module)
        assert (shape.hidden, shape.intermediate) == (64, 48)
        assert num_experts(module) == module.get_parameter("down_proj").shape[0]
        assert shape.has_gate == (family != "nemotron_h")
        assert shape.has_bias == (family == "gpt_oss")
        assert top_k(model, name) == 2
        router = find_router(model, name)
        assert router is not None
        assert num_experts(router) == num_experts(module)


def test_an_unknown_parameter_is_refused() -> None:
    model = tiny.tiny_model("mixtral")
    name, module = expert_modules(model)[1]
    module.register_parameter("shift", torch.nn.Parameter(torch.zeros(8, 64)))
    with pytest.raises(ExpertFlowError, match=rf"{name} .* has shift, which this build does not implement"):
        expert_modules(model)


def test_weights_in_submodules_are_refused() -> None:
    model = tiny.tiny_model("mixtral")
    expert_modules(model)[0][1].add_module("norm", torch.nn.LayerNorm(64))
    with pytest.raises(ExpertFlowError, match="weights in submodules"):
        expert_modules(model)


def test_an_unknown_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def decorator(cls: type | None = None, *, has_gate: bool = True, has_second_gate: bool = False) -> None: ...

    monkeypatch.setattr("expertflow_quant.models.seams.use_experts_implementation", decorator)
    model = tiny.tiny_model("mixtral")
    assert len(expert_modules(model)) == 2
    expert_modules(model)[0][1].has_second_gate = True  # type: ignore[assignment]
    with pytest.raises(ExpertFlowError, match="has_second_gate"):
        expert_modules(model)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ExpertFlowError, match="Linear has no experts module"):
        expert_modules(torch.nn.Linear(2, 2))


def test_sizes_that_do_not_fit_are_refused() -> None:
    module = expert_modules(tiny.tiny_model("qwen3_moe"))[0][1]
    module.down_proj = torch.nn.Parameter(torch.zeros(8, 64, 40))
    with pytest.raises(ExpertFlowError, match="are not implemented"):
        expert_shape(module)
    assert expert_shape(expert_modules(tiny.tiny_model("gpt_oss"))[0][1]) == ExpertShape(64, 48, True, True)


def test_configs_and_classes(tmp_path: Path) -> None:
    with pytest.raises(ExpertFlowError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "of_next_year"}')
    with pytest.raises(ExpertFlowError, match="of_next_year"):
        read_config(tmp_path)
    assert model_class(transformers.MixtralConfig()) is transformers.MixtralForCausalLM
    named = transformers.MixtralConfig(architectures=["MixtralForSequenceClassification"])
    assert model_class(named) is transformers.MixtralForSequenceClassification
    with pytest.raises(ExpertFlowError, match="generates text with no SimpleNamespace"):
        model_class(SimpleNamespace(architectures=None))
