"""Predictors over recorded routes: counts against a slow reference, nothing known too early, files that come back."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.path_model import PathModel, PathModelSizes
from expertflow_quant.offload.predict_ahead import NextGate
from expertflow_quant.offload.predict_frequency import Frequency, TokenTable
from expertflow_quant.offload.predict_paths import PathPredictor, places_in_images
from expertflow_quant.offload.predict_previous import PreviousToken
from expertflow_quant.offload.predictor import History, best, passes_of, widths
from expertflow_quant.offload.sight import FORMAT, VERSION, Basis, Sight, coded
from expertflow_quant.offload.trace import GENERATED, PROMPT_IMAGE, PROMPT_TEXT, RoutingTrace

LAYERS, EXPERTS, TOP_K, FEATURES, HIDDEN = 3, 8, 2, 4, 6


def routing(seed: int = 0, items: int = 3, images: int = 4) -> RoutingTrace:
    """Items of two text tokens, an image, one more text token and up to three generated ones."""
    generator = torch.Generator().manual_seed(seed)
    kinds, numbers = [], []
    for item in range(items):
        answer = int(torch.randint(0, 4, (1,), generator=generator))
        kinds += [PROMPT_TEXT] * 2 + [PROMPT_IMAGE] * images + [PROMPT_TEXT] + [GENERATED] * answer
        numbers += [item] * (3 + images + answer)
    ids = torch.randint(0, 20, (len(kinds),), generator=generator)
    order = torch.rand(len(kinds), LAYERS, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    return RoutingTrace.of(ids, kinds, numbers, order, EXPERTS, ["charts"] * items)


def seen(trace: RoutingTrace, seed: int = 0) -> Sight:
    """A sight of ``trace`` with random pictures, and with routers one layer ahead that say what will be used."""
    generator = torch.Generator().manual_seed(seed)
    basis = Basis(torch.zeros(HIDDEN), torch.randn(HIDDEN, FEATURES, generator=generator))
    images = int((trace.kind == PROMPT_IMAGE).sum())
    ahead = torch.full((len(trace), LAYERS, 2, TOP_K), EXPERTS, dtype=torch.uint8)
    ahead[:, :-1, 0] = trace.experts[:, 1:]
    ahead[:, :-2, 1] = trace.experts[:, 2:].flip(-1)
    return Sight(trace.token_ids, EXPERTS, ahead, coded(torch.randn(images, FEATURES, generator=generator)), basis)


def paths_predictor(basis: Basis | None) -> PathPredictor:
    torch.manual_seed(1)
    sizes = PathModelSizes(
        21, LAYERS, EXPERTS, width=8, inner=16, heads=2, encoder_layers=1, decoder_layers=1, places=4,
        features=0 if basis is None else FEATURES,
    )  # fmt: skip
    return PathPredictor(PathModel(sizes), basis)


def every_predictor(trace: RoutingTrace, sight: Sight):
    prior = Frequency.fit(trace, by_kind=True)
    return [
        Frequency.fit(trace), prior, TokenTable.fit(trace), PreviousToken(prior), PreviousToken(prior, 0.0),
        NextGate(prior), NextGate(prior, 2), paths_predictor(None), paths_predictor(sight.basis),
    ]  # fmt: skip


def test_token_by_token_gives_the_scores_of_the_whole_trace():
    trace, other = routing(), routing(seed=5)
    sight = seen(trace)
    for predictor in every_predictor(other, sight):
        together = predictor.scores_for(trace, sight)
        assert together.shape == (len(trace), LAYERS, EXPERTS)
        assert together.dtype == torch.float32
        for row in range(len(trace)):
            alone = predictor.predict(History.of(trace, row, sight))
            assert torch.allclose(alone, together[row], atol=1e-5), (predictor.name, row)


def test_nothing_after_a_token_s_pass_changes_its_scores():
    trace = routing(seed=2, items=2)
    sight = seen(trace)
    begins = passes_of(trace)
    rows = trace.rows(1)
    for row in (rows.start + 1, rows.stop - 1):
        known = int(begins[row]) if trace.kind[row] == GENERATED else rows.start
        experts = trace.experts.clone()
        experts[known:] = (experts[known:] + 1) % EXPERTS
        ids = trace.token_ids.clone()
        if trace.kind[row] == GENERATED:
            ids[row + 1 :] = 0
        else:
            ids[rows][trace.kind[rows] == GENERATED] = 0
        changed = RoutingTrace.of(ids, trace.kind, trace.item, experts, EXPERTS, trace.tasks)
        as_seen = Sight(ids.int(), EXPERTS, sight.ahead, sight.codes, sight.basis)
        for predictor in every_predictor(routing(seed=5), sight):
            before, after = predictor.scores_for(trace, sight)[row], predictor.scores_for(changed, as_seen)[row]
            assert torch.allclose(before, after, atol=1e-5), predictor.name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_frequency_and_token_table_count(seed):
    trace = routing(seed)
    table, tokens = Frequency.fit(trace).table[0], TokenTable.fit(trace)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            uses = sum(expert in token for token in trace.experts[:, layer].tolist())
            assert table[layer, expert] == pytest.approx(uses / len(trace))
    token = int(trace.token_ids[0])
    rows = [row for row, found in enumerate(trace.token_ids.tolist()) if found == token]
    uses = sum(int(trace.experts[rows[0], 0, 0]) in trace.experts[row, 0].tolist() for row in rows)
    prior = float(table[0, int(trace.experts[rows[0], 0, 0])])
    got = float(tokens.scores_for(trace)[rows[0], 0, int(trace.experts[rows[0], 0, 0])])
    assert got == pytest.approx((uses + 0.5 * prior) / (len(rows) + 0.5))


def test_unknown_tokens_and_kinds_fall_back_to_all_tokens():
    trace = routing()
    text = RoutingTrace.of(
        torch.tensor([3, 4]), [PROMPT_TEXT] * 2, [0, 0], trace.experts[:2].long(), EXPERTS, ["charts"]
    )
    everything = Frequency.fit(text).table[0]
    assert torch.equal(Frequency.fit(text, by_kind=True).table[GENERATED], everything)
    strange = RoutingTrace.of(torch.tensor([19]), [PROMPT_TEXT], [0], trace.experts[:1].long(), EXPERTS, ["charts"])
    assert torch.equal(TokenTable.fit(text).scores_for(strange)[0], everything)


def test_previous_token_of_a_generated_one_is_the_latest():
    trace = routing(seed=3)
    scores = PreviousToken(Frequency.fit(trace), 0.3).scores_for(trace)
    in_turn = PreviousToken(Frequency.fit(trace), 0.3, in_turn=True).scores_for(trace)
    guess = best(scores, TOP_K)
    for row in range(1, len(trace)):
        if trace.kind[row] == GENERATED:
            assert torch.equal(guess[row], trace.paths()[row - 1])
            assert torch.allclose(scores[row], in_turn[row])
    prompt = trace.rows(0)
    assert torch.equal(best(in_turn, TOP_K)[prompt.start + 1], trace.paths()[prompt.start])


def test_next_gate_finds_what_later_routers_said():
    trace = routing()
    sight = seen(trace)
    for distance in (1, 2):
        guess = best(NextGate(Frequency.fit(trace), distance).scores_for(trace, sight), TOP_K)
        assert torch.equal(guess[:, distance:], trace.paths()[:, distance:])
        assert torch.equal(guess[:, :distance], best(Frequency.fit(trace).scores_for(trace), TOP_K)[:, :distance])
    with pytest.raises(ExpertFlowError, match="looks 3 layers ahead"):
        NextGate(Frequency.fit(trace), 3).scores_for(trace, sight)


def test_padding_changes_no_scores():
    trace = routing(seed=4, items=4)
    predictor = paths_predictor(None)
    for item in range(trace.items):
        alone = predictor.scores_for(trace.of_items([item]))
        assert torch.allclose(alone, predictor.scores_for(trace)[trace.rows(item)], atol=1e-5)


def test_places_count_from_each_image_s_first_token():
    image, text = PROMPT_IMAGE, PROMPT_TEXT
    kind = torch.tensor([image, image, text, text, image, image, image, text])
    assert places_in_images(kind).tolist() == [0, 1, 0, 0, 0, 1, 2, 0]


def test_predictor_comes_back_from_its_folder(tmp_path):
    trace = routing()
    sight = seen(trace)
    predictor = paths_predictor(sight.basis)
    predictor.model.half().float()
    predictor.trained = {"tasks": ["charts"]}
    predictor.save(tmp_path)
    again = PathPredictor.load(tmp_path)
    assert torch.equal(again.scores_for(trace, sight), predictor.scores_for(trace, sight))
    assert again.trained == predictor.trained
    assert again.name == predictor.name


@pytest.mark.parametrize("damage", ["absent", "cut", "version", "sizes", "heads"])
def test_a_folder_that_is_no_predictor_is_refused(tmp_path, damage):
    paths_predictor(None).save(tmp_path)
    sizes = tmp_path / "predictor.json"
    head = json.loads(sizes.read_text())
    if damage == "absent":
        sizes.unlink()
    elif damage == "cut":
        weights = tmp_path / "predictor.safetensors"
        weights.write_bytes(weights.read_bytes()[:-50])
    else:
        changed = {"version": 9, "sizes": {"tokens": 3}, "heads": head["sizes"] | {"heads": 7}}
        head["version" if damage == "version" else "sizes"] = changed[damage]
        sizes.write_text(json.dumps(head))
    with pytest.raises(ExpertFlowError, match="python -m calibration predictor"):
        PathPredictor.load(tmp_path)


def test_sight_comes_back_and_knows_its_trace(tmp_path):
    trace = routing()
    sight = seen(trace)
    sight.save(tmp_path / "x.sight.safetensors")
    again = Sight.load(tmp_path / "x.sight.safetensors").check(trace)
    assert torch.equal(again.ahead, sight.ahead)
    assert torch.equal(again.pictures, sight.pictures)
    assert again.num_experts == EXPERTS
    assert torch.equal(again.basis.basis, sight.basis.basis)
    with pytest.raises(ExpertFlowError, match="another trace"):
        again.check(routing(seed=9))
    with pytest.raises(ExpertFlowError, match="record it again"):
        Sight.load(tmp_path / "absent.safetensors")
    trace.save(tmp_path / "trace.safetensors")
    with pytest.raises(ExpertFlowError, match="no sight"):
        Sight.load(tmp_path / "trace.safetensors")
    for damaged in ({}, {"num_experts": "many"}):
        save_file(
            {"token_ids": sight.token_ids}, tmp_path / "damaged", {"format": FORMAT, "version": VERSION} | damaged
        )
        with pytest.raises(ExpertFlowError, match="no sight"):
            Sight.load(tmp_path / "damaged")


def test_what_does_not_fit_is_refused():
    trace = routing()
    sight = seen(trace)
    larger = RoutingTrace.of(trace.token_ids, trace.kind, trace.item, trace.experts.long(), EXPERTS + 1, trace.tasks)
    for predictor in every_predictor(trace, sight):
        with pytest.raises(ExpertFlowError, match="this trace has"):
            predictor.scores_for(larger, sight)
    with pytest.raises(ExpertFlowError, match="give a sight"):
        paths_predictor(sight.basis).scores_for(trace)
    other = Sight(sight.token_ids, EXPERTS, None, sight.codes, Basis(torch.zeros(HIDDEN), torch.ones(HIDDEN, FEATURES)))
    with pytest.raises(ExpertFlowError, match="another basis"):
        paths_predictor(sight.basis).scores_for(trace, other)
    with pytest.raises(ExpertFlowError, match="decay 1"):
        PreviousToken(Frequency.fit(trace), 1)


def test_widths_and_best():
    assert widths(2) == {"k": 2, "1.5k": 3, "2k": 4}
    assert widths(1) == {"k": 1, "1.5k": 2, "2k": 2}
    scores = torch.tensor([[0.1, 0.9, 0.5]])
    assert best(scores, 2).tolist() == [[False, True, True]]
    assert best(scores, 9).all()
