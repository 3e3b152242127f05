"""A trained predictor in captured steps: the guesses are the predictor's own, and the answers those without it."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import fast
from helpers.fast import CONVERSATIONS, rebuilt, tokens

import expertflow_quant
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.path_model import PathModel, PathModelSizes
from expertflow_quant.offload.predict_paths import PathItem, PathPredictor
from expertflow_quant.offload.sight import Basis
from expertflow_quant.offload.trace import GENERATED, PROMPT_IMAGE, PROMPT_TEXT
from expertflow_quant.runtime.fast.build import FastOptions
from expertflow_quant.runtime.fast.foretold import ANSWERS, FIRST, Foretold
from expertflow_quant.samples import make_items

CPU = torch.device("cpu")
SHIPPED = Path(__file__).parents[3] / "calibration" / "shipped"
SIZES = PathModelSizes(tokens=50, layers=4, experts=6, width=16, inner=24, heads=2, features=0)
IMAGE = 7
TEXT, VISION = "qwen3_moe", "qwen3_vl_moe"


def predictor_of(sizes, seed=0, features=0, hidden=8):
    torch.manual_seed(seed)
    sizes = replace(sizes, features=features)
    basis = Basis(torch.randn(hidden), torch.randn(hidden, features)) if features else None
    return PathPredictor(PathModel(sizes), basis, {})


def prompts_of(lengths, generator, tokens=50):
    """Left-padded ids and mask; every third token is an image's."""
    width = max(lengths)
    ids = torch.randint(8, tokens, (len(lengths), width), generator=generator)
    ids[:, ::3] = IMAGE
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def item_of_row(inputs, row, answer):
    prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    kind = torch.where(prompt == IMAGE, PROMPT_IMAGE, PROMPT_TEXT)
    kinds = torch.cat([kind, torch.full((len(answer),), GENERATED)])
    return PathItem(torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)]), kinds)


def test_steps_make_the_predictors_guesses_in_rows_of_their_own():
    generator = torch.Generator().manual_seed(2)
    predictor = predictor_of(SIZES)
    foretold = Foretold(predictor, [6] * 4, 3, 40, [IMAGE], CPU, chance=0.55)
    first, second = prompts_of([9, 30], generator), prompts_of([12], generator)
    foretold.read(0, first)
    foretold.read(2, second)
    active = torch.tensor([True, False, True])
    answers = [[], [], []]
    for step in range(12):
        given = torch.randint(8, 60, (3, 1), generator=generator)  # some ids the predictor does not know
        before = foretold._answered.clone()
        logits = foretold._logits(given, before)
        foretold.begin(given, active)
        named = torch.zeros(4, 6, dtype=torch.bool)
        for row, (inputs, at) in enumerate(((first, 0), (first, 1), (second, 0))):
            if active[row]:
                answers[row].append(int(given[row]))
                want = predictor.logits_of(item_of_row(inputs, at, answers[row]))[-1]
                torch.testing.assert_close(logits[row], want, rtol=0, atol=2e-5)
                named |= want.sigmoid() > 0.55
        guessed = [set(row[row < 6].tolist()) for row in foretold.ids[:, 0]]
        assert guessed == [set(row.nonzero().flatten().tolist()) for row in named]
        assert foretold._answered.tolist() == [step + 1, 0, step + 1]
    foretold.read(0, prompts_of([4], generator))
    assert foretold._answered.tolist() == [0, 0, 12]
    assert all(foretold.guess(layer, None) is None for layer in range(FIRST))
    assert torch.equal(foretold.guess(FIRST, None), foretold.ids[FIRST])


def test_a_row_that_nobody_read_makes_no_nan():
    foretold = Foretold(predictor_of(SIZES), [6] * 4, 2, 30, [IMAGE], CPU, chance=0.01)
    foretold.read(0, prompts_of([8], torch.Generator().manual_seed(0)))
    foretold.begin(torch.tensor([[9], [10]]), torch.tensor([True, False]))
    assert all(kept.isfinite().all() for kept in foretold._answers)
    assert (foretold.ids < 6).any()


def test_long_answers_are_no_longer_guessed():
    foretold = Foretold(predictor_of(SIZES), [6] * 4, 1, 8, [IMAGE], CPU, chance=0.01)
    foretold.read(0, prompts_of([8], torch.Generator().manual_seed(0)))
    given, active = torch.tensor([[9]]), torch.tensor([True])
    foretold.begin(given, active)
    assert (foretold.ids < 6).any()
    foretold._answered.fill_(ANSWERS)
    foretold.begin(given, active)
    assert (foretold.ids == 6).all()


def test_memory_is_what_was_planned():
    for rows, room in ((1, 30), (8, 300)):
        foretold = Foretold(predictor_of(SIZES), [6] * 4, rows, room, [], CPU)
        held = [*foretold._prompts, *foretold._answers, foretold._real, *foretold._model.parameters()]
        assert Foretold.nbytes(SIZES, rows, room) == sum(tensor.nbytes for tensor in held)


def test_a_predictor_of_another_model_is_refused():
    with pytest.raises(ExpertFlowError, match="trained for 4 layers of 6 experts, this model has"):
        Foretold(predictor_of(SIZES), [6] * 3, 1, 8, [], CPU)


@pytest.mark.parametrize(("family", "features"), [(TEXT, 0), (VISION, 0), (VISION, 5)])
def test_answers_are_those_without_it(family, features, tmp_path):
    folder = fast.checkpoint(tmp_path / "model", family, lambda layer, expert: "int4-g16")
    plain = expertflow_quant.load(folder, "40%", fast=True, options=FastOptions(rows=4, room=160))
    layers, hidden = plain.model.expert_store.layers, plain.model.get_decoder().config.hidden_size
    sizes = replace(SIZES, tokens=500, layers=len(layers), experts=len(layers[0].nbytes))
    predictor_of(sizes, features=features, hidden=hidden).save(tmp_path / "predictor")
    options = FastOptions(rows=4, room=160, look_ahead=str(tmp_path / "predictor"))
    engine = rebuilt_engine(plain, options)
    asked = CONVERSATIONS[:4]
    if family == VISION:
        asked = [fast.asked("How many?", fast.picture(seed)) for seed in range(3)]
    wanted = tokens(plain, asked, 6)
    assert tokens(engine, asked, 6) == wanted
    assert [tokens(engine, [one], 6)[0] for one in asked[:2]] == [tokens(plain, [one], 6)[0] for one in asked[:2]]
    foretold = engine.runner.graphs.foretold
    assert foretold.looks_at_pictures is bool(features)
    assert int(foretold._answered.sum()) > 0


def rebuilt_engine(engine, options, memory="40%"):
    """The same engine with another runner."""
    other = copy.copy(engine)
    other.runner = rebuilt(engine, memory, options)
    return other


def test_the_shipped_predictor_leaves_fewer_misses(tmp_path):
    """Of the shipped model's questions, one at a time, in a quarter of the experts' memory."""
    expertflow_quant.quantize_model(SHIPPED / "moe", tmp_path / "model", method="rtn", plan="int4-g32")
    plain = expertflow_quant.load(tmp_path / "model", "25%", fast=True, options=FastOptions(rows=1, room=320))
    predictor = Path(__file__).parents[3] / "calibration" / "predictor" / "shipped" / "ids"
    engine = rebuilt_engine(plain, FastOptions(rows=1, room=320, look_ahead=str(predictor)), "25%")
    asked = [item.messages for item in make_items("document", "test", 4)]
    found = []
    for each in (plain, engine):
        each.reset_stats()
        rows = [tokens(each, [one], 12)[0] for one in asked]
        steps = [layer.misses for layer in each.stats.layers]
        found.append((rows, steps, each.runner.resident.prefetched_bytes))
    (wanted, without, none), (got, told, moved) = found
    assert got == wanted
    assert none == 0 < moved
    assert sum(told[FIRST:]) < 0.5 * sum(without[FIRST:])
