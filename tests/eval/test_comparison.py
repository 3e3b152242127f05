"""Comparisons of two judged systems: groups, recovery, the verdict over several tasks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eval.comparison import compare, overall_verdict, pairs_of
from eval.judge import Judgement, System
from eval.records import ItemResult
from eval.stats import INCONCLUSIVE, INFERIOR, NON_INFERIOR, SUPERIOR


def result(index: int, score: float, task: str = "chart", per_image: int = 2) -> ItemResult:
    return ItemResult(
        id=f"{task}-{index}", task=task, kind=("value", "value", "sum")[index % 3],
        family=("human", "augmented")[index % 2],
        image_key=f"image{index // per_image}", question="How many?", answers=("4",), prediction="4" if score else "5",
        score=score, prompt_tokens=9, image_tokens=4, completion_tokens=2, seconds=0.1,
    )  # fmt: skip


def judgement(name: str, *tasks: list[float]) -> Judgement:
    rows = [result(i, score, f"task{t}") for t, scores in enumerate(tasks) for i, score in enumerate(scores)]
    return Judgement(System(name, name, Path(name)), tuple(rows), {}, 1 << 20, 1 << 20)


def test_groups_hold_every_item_once_and_their_means_make_the_whole():
    ours, theirs = judgement("a", [1, 0, 1, 1, 0, 1, 0.5]), judgement("b", [1, 1, 0, 1, 0, 0, 1])
    (found,) = compare(ours, theirs, 0.01)
    assert found.recovery == pytest.approx(4.5 / 4)
    assert found.same_predictions == 4
    for dimension in ("kind", "split"):
        groups = [g for g in found.groups if g.dimension == dimension]
        assert sum(g.items for g in groups) == 7
        assert sum(g.items * g.mean for g in groups) == pytest.approx(7 * found.difference.mean)
        assert sum(g.better for g in groups) == found.difference.better == 2
        assert sum(g.worse for g in groups) == found.difference.worse == 2
        assert all(-1 <= g.interval[0] <= g.mean <= g.interval[1] <= 1 for g in groups)
    assert [g.name for g in found.groups] == ["value", "sum", "human", "augmented"]
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["mcnemar_p"] == 1.0
    assert list(written["verdicts"]) == ["0.5", "1", "1.5", "2"]


def test_a_baseline_without_a_point_has_no_recovery():
    (found,) = compare(judgement("a", [1, 1]), judgement("b", [0, 0]), 0.01)
    assert found.recovery is None


def test_other_images_under_the_same_ids_are_refused():
    ours = judgement("a", [1, 0])
    other = replace(ours, results=(ours.results[0], replace(ours.results[1], image_key="else")))
    with pytest.raises(ValueError, match="not the same ones in the same order"):
        compare(ours, other, 0.01)


def test_a_pair_passes_only_where_every_task_does():
    even, worse, better = [1.0, 0.0] * 300, [1.0] * 600, [0.0] * 600
    few = [1.0, 0.0] * 4

    def verdict(*pairs: tuple[list[float], list[float]]) -> str:
        ours, theirs = judgement("a", *(p[0] for p in pairs)), judgement("b", *(p[1] for p in pairs))
        found = compare(ours, theirs, 0.01)
        assert list(pairs_of(found)) == [("a", "b")]
        return overall_verdict(found)

    assert verdict((even, better), (even, better)) == SUPERIOR
    assert verdict((even, better), (even, even)) == NON_INFERIOR
    assert verdict((even, even), (even, worse)) == INFERIOR
    assert verdict((even, better), (few, few)) == INCONCLUSIVE
