"""Blocks run apart give what the whole model gives; a pass that was stopped goes on from disk; where a model's blocks
cannot be run apart, that is found out."""

import warnings
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.calibration import calls_of_the_plain_model, padded_batches, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mixtral import modeling_mixtral as mixtral

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.models.seams import expert_modules
from expertflow_quant.pipeline.activations import Activations, structure_of, value_of
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observe import Observations, ObservedLayer, ObserveOptions
from expertflow_quant.pipeline.replay import Replay
from expertflow_quant.pipeline.stream import ModelStream

RAW = ObserveOptions(min_tokens=0, text_share=None)


@pytest.fixture(autouse=True)
def four_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deep enough that blocks are skipped; falling back to waiting in memory is an error where none is expected."""
    monkeypatch.setitem(tiny.TEXT, "num_hidden_layers", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def observations(folder: Path, family: str) -> Observations:
    return Observations(ModelStream(folder), CalibrationData.from_batches(padded_batches(family)), RAW)


def assert_as_the_plain_model(layers: list[ObservedLayer], folder: Path, family: str) -> None:
    batches = padded_batches(family)
    kept = [batch["attention_mask"].reshape(-1).bool() for batch in batches]
    for observed, calls in zip(layers, calls_of_the_plain_model(folder, batches), strict=True):
        hidden = torch.cat([call[0][keep] for call, keep in zip(calls, kept, strict=True)])
        index = torch.cat([call[1][keep] for call, keep in zip(calls, kept, strict=True)])
        torch.testing.assert_close(observed.hidden, hidden, rtol=1e-4, atol=1e-5)
        assert torch.equal(observed.index, index)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_many_blocks_equal_the_models_own_forward(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    assert_as_the_plain_model(list(observations(folder, family).layers()), folder, family)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "deepseek_v3"])
def test_a_stopped_pass_goes_on_behind_the_last_block(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scratch = save_model(family, tmp_path / "model"), tmp_path / "scratch"
    whole = list(observations(folder, family).layers())
    brought, bring = [], Replay._bring

    def noted(self: Replay, start: int, stop: int, *args: Any) -> Any:
        brought.append((start, stop))
        return bring(self, start, stop, *args)

    monkeypatch.setattr(Replay, "_bring", noted)
    layers = observations(folder, family).layers(0, scratch)
    assert torch.equal(next(layers).hidden, whole[0].hidden)
    next(layers)
    layers.close()  # type: ignore[attr-defined]
    before, count = list(brought), len(whole)
    brought.clear()
    rest = list(observations(folder, family).layers(2, scratch))
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(rest, whole[2:], strict=True))
    assert before[0][0] == 0
    assert brought[0] == (before[-1][1] + 1, before[-1][1] + 1)
    assert len(brought) == count - 2


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "no state"])
def test_damaged_activations_are_made_again(damage: str, tmp_path: Path) -> None:
    folder, scratch = save_model("qwen3_moe", tmp_path / "model"), tmp_path / "scratch"
    whole = list(observations(folder, "qwen3_moe").layers())
    layers = observations(folder, "qwen3_moe").layers(0, scratch)
    next(layers)
    next(layers)
    layers.close()  # type: ignore[attr-defined]
    path = scratch / ("block-00001.json" if damage == "no state" else "block-00001-batch-00001.safetensors")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    rest = list(observations(folder, "qwen3_moe").layers(2, scratch))
    assert [of.layer.index for of in rest] == [2, 3]
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(rest, whole[2:], strict=True))


def test_only_one_layers_activations_are_on_disk(tmp_path: Path) -> None:
    folder, scratch = save_model("qwen3_vl_moe", tmp_path / "model"), tmp_path / "scratch"
    for observed in observations(folder, "qwen3_vl_moe").layers(0, scratch):
        blocks = {path.name.split("-")[1][:5] for path in scratch.glob("block-*")}
        here = observed.layer.index
        assert blocks <= {f"{here - 1:05d}", f"{here:05d}"}


SPECIAL = {
    "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "shared_expert_intermediate_size": 48},
    "afmoe": {"num_dense_layers": 1},
    "gemma4_text": {
        "enable_moe_block": True,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "top_k_experts": 2,
    },
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_models_that_are_made_in_other_ways(kind: str, tmp_path: Path) -> None:
    """Linear attention and a gate in the block's own hands; a bias beside the router; scaled embeddings and a dict
    that blocks could share, but nobody reads."""
    config = CONFIG_MAPPING[kind](**tiny.TEXT, **tiny.MOE, **SPECIAL[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for _, module in expert_modules(model):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    family = "qwen3_moe"  # whose batches fit all text models
    assert_as_the_plain_model(list(observations(tmp_path, family).layers()), tmp_path, family)


def forward_with(sums: bool = False, masked: bool = False, **given: Any) -> Any:
    """A model's forward whose blocks get ``given`` too, or read the sum of all blocks before them."""

    def forward(self: Any, input_ids: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        hidden = self.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        embeddings, outputs = self.rotary_emb(hidden, places), [torch.zeros_like(hidden)]
        mask = torch.full((len(places[0]),) * 2, -torch.inf).triu(1)[None, None] if masked else None
        more = {name: make() for name, make in given.items()}
        for layer in self.layers:
            hidden = layer(
                hidden + (sum(outputs) if sums else 0),
                attention_mask=mask,
                position_ids=places,
                position_embeddings=embeddings,
                **more,
            )
            outputs.append(hidden)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden))

    return forward


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (forward_with(shared=list), "a list .shared. that they may write to"),
        (forward_with(shared=lambda: {"all": []}), "a dict .shared. that they may write to"),
        (forward_with(sums=True), "other blocks"),
    ],
    ids=["list", "dict of lists", "sums"],
)
def test_blocks_that_cannot_run_apart_meet_in_memory(
    forward: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixtral.MixtralModel, "forward", forward)
    folder = save_model("mixtral", tmp_path)
    with pytest.warns(UserWarning, match=why):
        layers = list(observations(folder, "mixtral").layers())
    assert [of.layer.index for of in layers] == [0, 1, 2, 3]
    assert_as_the_plain_model(layers, folder, "mixtral")


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_dict_that_blocks_share_is_kept_with_their_outputs(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block leaves something there; the last one reads it, though only what is between has run before it."""
    monkeypatch.setattr(mixtral.MixtralModel, "forward", forward_with(shared=kind))
    plain, folder = mixtral.MixtralDecoderLayer.forward, save_model("mixtral", tmp_path / "model")

    def sharing(self: Any, hidden: Tensor, shared: Any, **kwargs: Any) -> Any:
        if (number := self.self_attn.layer_idx) == 0:
            shared["first"] = hidden * 2, hidden + 1
        return plain(self, hidden + (sum(shared["first"]) if number == 3 else 0), **kwargs)

    monkeypatch.setattr(mixtral.MixtralDecoderLayer, "forward", sharing)
    scratch = tmp_path / "scratch"
    layers = observations(folder, "mixtral").layers(0, scratch)
    first = [next(layers), next(layers)]
    layers.close()  # type: ignore[attr-defined]
    assert_as_the_plain_model(first + list(observations(folder, "mixtral").layers(2, scratch)), folder, "mixtral")


def test_a_plain_chain_of_blocks_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask may hold minus infinity."""
    monkeypatch.setattr(mixtral.MixtralModel, "forward", forward_with(masked=True))
    folder = save_model("mixtral", tmp_path)
    assert_as_the_plain_model(list(observations(folder, "mixtral").layers()), folder, "mixtral")


@pytest.mark.parametrize("value", [torch.ones(2), (torch.ones(2), None), [torch.zeros(1), (3, True, torch.ones(1))]])
def test_outputs_are_taken_apart_and_put_together(value: Any, tmp_path: Path) -> None:
    tensors: list[Tensor] = []
    structure = structure_of(value, tensors)
    store = Activations(tmp_path)
    stored = store.save("x", tensors, structure)
    again = value_of(stored.structure, store.load(stored))
    torch.testing.assert_close(again, value, rtol=0, atol=0)
    with pytest.raises(TypeError, match="a dict"):
        structure_of({"a": 1}, [])


def test_infinity_in_activations_names_layer_and_batch(tmp_path: Path) -> None:
    model = tiny.tiny_model("qwen3_moe")
    torch.nn.init.constant_(model.model.layers[2].post_attention_layernorm.weight, 3e38)
    model.save_pretrained(tmp_path)
    layers = observations(tmp_path, "qwen3_moe").layers()
    assert [next(layers).layer.index for _ in range(2)] == [0, 1]
    with pytest.raises(
        ExpertFlowError, match=r"batch 0 gives the experts of layer 2 \(model\.layers\.2\.mlp\.experts\)"
    ):
        next(layers)
