"""What is observed is what the model computes; rare experts and modalities are weighed as documented."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.calibration import calls_of_the_plain_model, padded_batches, save_model
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError, ExpertShape
from expertflow_quant.pipeline import observe
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observe import Observations, ObservedLayer, ObserveOptions
from expertflow_quant.pipeline.observed import Tokens
from expertflow_quant.pipeline.stream import ModelStream, MoELayer

RAW = ObserveOptions(min_tokens=0, text_share=None)


@pytest.mark.parametrize("meet", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equal_to_the_models_own_forward(
    family: str, meet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch by batch through the blocks, and with forwards that wait for each other."""
    unwanted = "Replay" if meet else "Forwards"
    if meet:
        monkeypatch.setattr(observe, "find_chain", lambda *args: None)
    monkeypatch.setattr(observe, unwanted, lambda *args: pytest.fail(f"{unwanted} was used"))
    folder, batches = save_model(family, tmp_path), padded_batches(family)
    kept = [batch["attention_mask"].reshape(-1).bool() for batch in batches]
    wanted = calls_of_the_plain_model(folder, batches)
    observations = Observations(ModelStream(folder), CalibrationData.from_batches(batches), RAW)
    layers = list(observations.layers())
    assert len(layers) == len(wanted)
    for observed, calls in zip(layers, wanted, strict=True):
        hidden, index, affinity = (
            torch.cat([call[part][keep] for call, keep in zip(calls, kept, strict=True)]) for part in range(3)
        )
        torch.testing.assert_close(observed.hidden, hidden, rtol=1e-4, atol=1e-5)
        assert torch.equal(observed.index, index)
        torch.testing.assert_close(observed.affinity.float(), affinity.float(), rtol=1e-4, atol=1e-5)
        assert observed.counts == index.flatten().bincount(minlength=len(observed.counts)).tolist()
        assert observed.scores is not None
        if family != "deepseek_v3":  # there a bias takes part in the choice
            chosen = observed.scores.topk(index.shape[1]).indices.sort().values
            assert torch.equal(chosen, index.sort().values)


def test_rows_of_an_expert_are_its_tokens_with_their_affinity(tmp_path: Path) -> None:
    data = CalibrationData.from_batches(padded_batches("qwen3_moe"))
    observations = Observations(ModelStream(save_model("qwen3_moe", tmp_path)), data, RAW)
    for observed in observations.layers():
        for expert in range(8):
            tokens, place = (observed.index == expert).nonzero(as_tuple=True)
            rows = observed.rows(expert)
            assert torch.equal(rows.inputs, observed.hidden[tokens])
            assert torch.equal(rows.weights, observed.affinity[tokens, place])
            assert (rows.tokens, rows.coverage) == (len(tokens), "routed" if len(tokens) else "none")


def observed_layer(index: Tensor, scores: Tensor | None, min_tokens: int) -> ObservedLayer:
    tokens = len(index)
    layer = MoELayer(0, "experts", ExpertShape(8, 8), 4, 2)
    affinity = torch.tensor([0.75, 0.25]).repeat(tokens, 1)
    hidden = torch.arange(tokens).float()[:, None].repeat(1, 8)
    return ObservedLayer(layer, hidden, index, affinity, scores, torch.ones(tokens), min_tokens)


def test_a_rare_expert_gets_the_tokens_that_came_closest_to_choosing_it() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.9, 0.0], [9.0, 8.0, 1.0, 7.0], [5.0, 4.0, 3.5, 0.0], [9.0, 2.0, 8.0, 1.0]])
    observed = observed_layer(scores.topk(2).indices, scores, min_tokens=3)
    assert observed.counts == [4, 3, 1, 0]
    rare = observed.rows(2)  # its own token 3, then margins -0.1 (token 0), -0.5 (token 2), -7 (token 1)
    assert rare.inputs[:, 0].tolist() == [3, 0, 2]
    assert rare.weights.tolist() == [0.25, 0.25, 0.25]
    assert (rare.tokens, rare.coverage) == (1, "closest")
    unseen = observed.rows(3)  # margins -8 (token 0), -1 (token 1), -4 (token 2), -7 (token 3)
    assert unseen.inputs[:, 0].tolist() == [1, 2, 3]
    assert (unseen.tokens, unseen.coverage) == (0, "closest")
    assert observed.rows(0).coverage == "routed"


def test_without_router_scores_nothing_is_made_up() -> None:
    index = torch.tensor([[0, 1], [0, 1], [0, 2]])
    observed = observed_layer(index, None, min_tokens=3)
    assert [observed.rows(expert).coverage for expert in range(4)] == ["routed", "few", "few", "none"]
    assert observed.rows(3).inputs.shape == (0, 8)


def test_more_tokens_are_wanted_than_there_are() -> None:
    scores = torch.rand(3, 4)
    observed = observed_layer(scores.topk(2).indices, scores, min_tokens=100)
    for expert in range(4):
        assert sorted(observed.rows(expert).inputs[:, 0].tolist()) == [0, 1, 2]


def test_thinning_keeps_evenly_spaced_rows() -> None:
    index = torch.tensor([[0, 1]] * 10)
    rows = observed_layer(index, None, 0).rows(0)
    assert rows.thinned(4).inputs[:, 0].tolist() == [0, 3, 6, 9]
    assert rows.thinned(10) is rows
    assert rows.thinned(4).tokens == 10


@pytest.mark.parametrize("share", [None, 0.5, 0.9])
def test_modalities_share_the_weight(share: float | None, tmp_path: Path) -> None:
    batches = padded_batches("qwen3_vl_moe")
    valid = [batch["attention_mask"].bool() for batch in batches]
    text = torch.cat([(b["input_ids"] != tiny.IMAGE)[v] for b, v in zip(batches, valid, strict=True)])
    data = CalibrationData.from_batches(batches)
    options = ObserveOptions(min_tokens=0, text_share=share)
    stream = ModelStream(save_model("qwen3_vl_moe", tmp_path))
    for observed in Observations(stream, data, options).layers():
        importance = observed.importance
        assert importance.mean().item() == pytest.approx(1)
        expected = text.float().mean().item() if share is None else share
        assert (importance[text].sum() / importance.sum()).item() == pytest.approx(expected)
        assert len(set(importance[text].tolist())) == 1
        rows = observed.rows(int(observed.index[0, 0]))
        assert rows.weights[0].item() == pytest.approx(observed.affinity[0, 0].item() * importance[0].sqrt().item())


def test_modality_is_read_off_the_token_ids_where_the_processor_does_not_say() -> None:
    config = tiny.tiny_model("qwen3_vl_moe").config
    batch = padded_batches("qwen3_vl_moe")[1]
    told = Tokens.of(batch, config)
    del batch["mm_token_type_ids"]
    guessed = Tokens.of(batch, config)
    assert torch.equal(told.text, guessed.text)
    assert torch.equal(told.valid, guessed.valid)
    assert int((~told.valid).sum()) == 5


def test_kept_observations_run_the_model_once(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return tiny.model_inputs("mixtral")

    data = CalibrationData([make], "digest")
    stream = ModelStream(save_model("mixtral", tmp_path))
    kept = Observations(stream, data, keep=True)
    first, second = list(kept.layers()), list(kept.layers())
    assert len(made) == 1
    assert all(a is b for a, b in zip(first, second, strict=True))
    fresh = Observations(stream, data)
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(fresh.layers(), fresh.layers(), strict=True))
    assert len(made) == 3


def test_results_do_not_depend_on_threads(tmp_path: Path) -> None:
    stream = ModelStream(save_model("qwen3_moe", tmp_path))
    data = CalibrationData.from_batches([tiny.model_inputs("qwen3_moe", seed=seed) for seed in range(5)])
    single = [layer.hidden.clone() for layer in Observations(stream, data).layers()]
    torch.set_num_threads(3)
    try:
        threaded = [layer.hidden.clone() for layer in Observations(stream, data).layers()]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(single, threaded, strict=True))


def test_stopping_early_ends_all_forwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "find_chain", lambda *args: None)
    stream = ModelStream(save_model("qwen3_moe", tmp_path))
    data = CalibrationData.from_batches([tiny.model_inputs("qwen3_moe", seed=seed) for seed in range(3)])
    before = threading.active_count()
    layers = Observations(stream, data).layers()
    next(layers)
    assert threading.active_count() > before
    layers.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_inside_a_forward_is_raised_here(tmp_path: Path) -> None:
    stream = ModelStream(save_model("qwen3_moe", tmp_path))
    bad = tiny.model_inputs("qwen3_moe") | {"input_ids": torch.full((2, 12), 10**6)}
    before = threading.active_count()
    with pytest.raises(ExpertFlowError, match="not one 1000000"):
        list(Observations(stream, CalibrationData.from_batches([tiny.model_inputs("qwen3_moe"), bad])).layers())
    assert threading.active_count() == before


@pytest.mark.parametrize("options", [{"min_tokens": -1}, {"text_share": 0.0}, {"text_share": 1.5}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ExpertFlowError):
        ObserveOptions(**options)
    with pytest.raises(ExpertFlowError, match="no calibration samples"):
        CalibrationData.from_batches([])
