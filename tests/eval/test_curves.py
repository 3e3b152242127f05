"""Answers are read back where they stand, the shortcut around generating gives the true scores, intervals are sound."""

import numpy as np
import pytest
import torch

from eval.curves.fidelity import Scored, Self, forced_batch
from eval.curves.figures import fidelity, mean_score, ratio
from eval.curves.plots import curves_figure
from eval.plots import save
from eval.tasks import generated_tasks
from expertflow_quant.kernels import ExpertWeights


def test_answers_stand_behind_left_padded_prompts():
    ids = torch.tensor([[0, 7, 8], [5, 6, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "mm_token_type_ids": torch.ones_like(ids)}
    batch = forced_batch(inputs, [(3, 4), (2,)], 10)
    assert batch.inputs["input_ids"].tolist() == [[0, 7, 8, 3, 4], [5, 6, 9, 2, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.inputs["mm_token_type_ids"].tolist() == [[1, 1, 1, 0, 0]] * 2
    assert batch.sample.tolist() == [10, 10, 11]
    assert batch.targets.tolist() == [3, 4, 2]
    flat = batch.inputs["input_ids"].flatten()
    assert flat[batch.places].tolist() == [8, 3, 9]
    assert flat[batch.places + 1].tolist() == batch.targets.tolist()


@pytest.fixture(scope="module")
def own(small_moe):
    return Self(small_moe, generated_tasks(3), 2, lambda count: None)


def test_its_own_experts_change_nothing(own):
    found = own.measure({(0, 0): own.teacher.own(0, 0)}, lambda count: None)
    assert found.differing == [0] * 6
    assert found.tokens == [len(answer) for answer in own.answers]
    assert max(map(abs, found.divergence)) < 1e-9
    assert found.scores == [own.score(number) for number in range(6)]


def test_only_items_that_differ_are_generated_and_the_others_would_be_the_same(own):
    experts = {}
    for layer in (4, 5):
        for expert in range(16):
            whole = own.teacher.own(layer, expert)
            noise = torch.randn(whole.down.shape, generator=torch.Generator().manual_seed(expert))
            experts[layer, expert] = ExpertWeights(whole.gate_up, whole.down + 2.0 * whole.down.std() * noise)
    found = own.measure(experts, lambda count: None)
    assert sum(map(bool, found.differing)) > 0
    assert min(found.divergence) > 0
    assert min(found.softened) > 0
    for place, weights in experts.items():
        own.teacher.put(*place, weights)
    answers = [
        answer.token_ids
        for batch in own._batches
        for answer in own.engine.generate(
            [item.messages for item in batch.items], max_new_tokens=batch.items[0].max_new_tokens
        )
    ]
    own.teacher.restore()
    same = [ours == theirs for ours, theirs in zip(answers, own.answers, strict=True)]
    assert same == [not other for other in found.differing]


def test_points_are_kept_and_belong_to_their_settings(tmp_path):
    scored = Scored([1.0, 0.5], [3, 4], [0, 1], [1e-6, 2e-3], [1e-5, 1e-2])
    path = tmp_path / "points" / "a.json"
    scored.save(path, {"items": 2})
    assert Scored.load(path, {"items": 2}) == scored
    assert Scored.load(path, {"items": 3}) is None
    assert Scored.load(tmp_path / "b.json", {}) is None


def test_ratios_and_means_with_images_as_the_unit():
    rng = np.random.default_rng(0)
    images = [str(i // 4) for i in range(400)]
    below = [1.0] * 400
    above = np.repeat(rng.exponential(1.0, 100), 4).tolist()
    found = ratio(above, below, images)
    assert found.mean == pytest.approx(np.mean(above))
    assert found.lower < found.mean < found.upper
    by_item = ratio(above, below, [str(i) for i in range(400)])
    assert (found.upper - found.lower) > 1.6 * (by_item.upper - by_item.lower)  # four alike are no four
    assert ratio(above, above, images).lower == pytest.approx(1.0)
    reach = 1.645 * np.std(above[::4], ddof=1) / 10
    mean = mean_score([min(1.0, each / 10) for each in above], images)
    assert mean.upper - mean.mean == pytest.approx(reach / 10, rel=0.02)


def test_the_figures_of_a_point_are_drawn(tmp_path):
    scored = Scored([1.0] * 4, [2] * 4, [0, 0, 0, 1], [1e-6] * 4, [1e-5] * 4)
    figures = fidelity(scored, ["a", "a", "b", "c"])
    assert figures["top1_agreement"]["mean"] == 7 / 8
    assert figures["same_answers"] == 3 / 4
    assert figures["kl"]["mean"] == pytest.approx(5e-7)
    score = {"mean": 0.98, "lower": 0.97, "upper": 0.99}
    tasks = {"chart": score, "document": score}
    points = [
        {"method": method, "kind": kind, "bits": bits, "tasks": tasks, "fidelity": figures}
        for method in ("rtn", "gptq")
        for kind in ("uniform", "mixed")
        for bits in (2, 3)
    ]
    results = {"settings": {"softened": 2.0}, "points": points, "self": {"tasks": tasks}, "dense": None}
    save(curves_figure(results), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
