"""Guesses drawn with a recall and a precision have them."""

import json

import pytest
import torch

from eval.speed.drawn import CHANCE, PREDICTOR, Drawn, Predictions
from eval.speed.traces import RouteSizes
from expertflow_quant.formats import ExpertFlowError

SIZES = RouteSizes(40, 128, 8)


@pytest.mark.parametrize(("recall", "precision"), [(0.7, 0.85), (0.4, 0.5), (1.0, 1.0), (0.0, 0.9)])
def test_recall_and_precision_on_misses_are_those_asked_for(recall, precision):
    resident, missing = 0.25, 0.3
    drawn = Drawn(Predictions(recall, precision, "here"), SIZES, resident, missing, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    missed = right = named = 0
    for _ in range(30):
        routes = torch.stack([torch.randperm(128, generator=generator)[:8][None] for _ in range(40)])
        drawn.draw(routes)
        guessed = [set(row[row < 128].tolist()) for row in drawn.ids[:, 0]]
        for layer, routed in enumerate(routes[:, 0].tolist()):
            # 2.4 of 8 are missing on average, and the rest of the absent are any
            lacking = set(routed[: 3 if layer % 5 < 2 else 2])
            unused = [expert for expert in range(128) if expert not in routed][: 96 - len(lacking)]
            missed += len(lacking)
            right += len(guessed[layer] & lacking)
            named += len(guessed[layer] & (lacking | set(unused)))
    assert right / missed == pytest.approx(recall, abs=0.02)
    if recall:
        assert right / named == pytest.approx(precision, abs=0.03)
    else:
        assert named == 0


def test_figures_are_read_from_a_results_file(tmp_path):
    tasks = {
        name: {"misses": {"by_chance": {CHANCE: {"recall": recall, "precision": 0.8}}}}
        for name, recall in (("charts", 0.6), ("documents", 0.7))
    }
    file = tmp_path / "predictors.json"
    file.write_text(json.dumps({"predictors": {PREDICTOR: {"on": tasks}}}))
    found = Predictions.measured(file)
    assert found.to_json() == {
        "recall": 0.65,
        "precision": 0.8,
        "source": f"{PREDICTOR}, from a probability of {CHANCE}, charts + documents",
    }
    with pytest.raises(ExpertFlowError, match=r"no figures of 'another' acted on.*python -m eval predict"):
        Predictions.measured(file, "another")


def test_the_committed_figures_are_there():
    found = Predictions.measured()
    assert 0.5 < found.recall < 1
    assert 0.5 < found.precision < 1


def test_shares_that_cannot_be_are_refused():
    with pytest.raises(ExpertFlowError, match=r"give shares, 0\.7 for 70 %"):
        Predictions(70, 0.9, "here")
