import json
import math
import time
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.stats import INCONCLUSIVE, INFERIOR, NON_INFERIOR, SUPERIOR, paired_difference


def names(n: int, per_image: int = 1) -> list[str]:
    return [f"image{i // per_image}" for i in range(n)]


def test_mean_error_and_counts_by_hand():
    result = paired_difference([1, 0, 1, 1], [1, 1, 0, 0], ["a", "a", "b", "c"])
    assert (result.mean, result.items, result.images, result.better, result.worse) == (0.25, 4, 3, 2, 1)
    # residuals per image: -1 - 2/4, 1 - 1/4, 1 - 1/4; squares 2.25 + 0.5625 + 0.5625; times 3/2; root; over 4
    assert result.standard_error == pytest.approx(math.sqrt(1.5 * 3.375) / 4)


def test_clustered_error_without_clusters_is_the_plain_one():
    rng = np.random.default_rng(0)
    x, y = rng.random(200), rng.random(200)
    result = paired_difference(x.tolist(), y.tolist(), names(200))
    assert result.standard_error == pytest.approx(np.std(x - y, ddof=1) / math.sqrt(200))


def test_same_question_asked_twice_adds_no_certainty():
    rng = np.random.default_rng(1)
    x, y = rng.random(300), rng.random(300)
    once = paired_difference(x.tolist(), y.tolist(), names(300))
    twice = paired_difference(np.repeat(x, 2).tolist(), np.repeat(y, 2).tolist(), names(600, per_image=2))
    assert twice.standard_error == pytest.approx(once.standard_error)
    assert twice.lower == pytest.approx(once.lower, abs=0.003)


def test_a_sample_without_differences_is_not_certain():
    small, large = ([1.0] * n for n in (256, 1000))
    few, many = (paired_difference(x, x, names(len(x))) for x in (small, large))
    assert (few.mean, few.worse) == (0.0, 0)
    # the exact bound on an unseen loss is 1 - 0.05 ** (1 / n): 1.16 and 0.30 points
    assert few.lower == pytest.approx(-0.0117, abs=0.0002)
    assert many.lower == pytest.approx(-0.0030, abs=0.0001)
    assert (few.verdict(0.01), many.verdict(0.01)) == (INCONCLUSIVE, NON_INFERIOR)
    assert few.verdict(0.02) == NON_INFERIOR
    assert few.items_to_decide(0.01) == 299


def test_verdicts():
    rng = np.random.default_rng(2)
    base = (rng.random(2000) < 0.5).astype(float)
    better, worse = np.maximum(base, rng.random(2000) < 0.1), np.minimum(base, rng.random(2000) > 0.1)
    images = names(2000, per_image=2)
    assert paired_difference(better, base, images).verdict(0.01) == SUPERIOR
    assert paired_difference(worse, base, images).verdict(0.01) == INFERIOR
    assert paired_difference(base, rng.permutation(base), images).verdict(0.01) == INCONCLUSIVE


def test_items_to_decide_follows_from_the_discordance():
    discordant = np.zeros(2000)
    discordant[:20], discordant[20:40] = 1, -1  # 2 % of the items differ, evenly
    result = paired_difference((0.5 + discordant / 2), (0.5 - discordant / 2), names(2000))
    assert result.items_to_decide(0.01) == pytest.approx(1437, abs=10)  # 0.02 * (2.487 / 0.01) ** 2 + 2 / 0.01
    assert result.items_to_decide(0.02) < result.items_to_decide(0.01) / 3


@pytest.mark.parametrize("discordance", [0.005, 0.02])
def test_as_many_items_decide_with_80_percent_power(discordance):
    """Without the guard's share of them, half a percent of discordance passed in 54 % of the studies."""
    rng = np.random.default_rng(8)
    d = np.zeros(2000)
    d[: round(1000 * discordance)], d[-round(1000 * discordance) :] = 1, -1
    items = paired_difference(d / 2, -d / 2, names(2000)).items_to_decide(0.01)
    drawn = rng.choice([1.0, -1.0, 0.0], (300, items), p=[discordance / 2, discordance / 2, 1 - discordance])
    studies = [paired_difference(x / 2, -x / 2, names(items), resamples=500, seed=i) for i, x in enumerate(drawn)]
    assert 0.72 < np.mean([study.verdict(0.01) == NON_INFERIOR for study in studies]) < 0.88


def test_bounds_are_those_of_a_plain_slow_bootstrap():
    """Resampling images one by one, with one more image that was lost; the production code draws kinds of images."""
    rng = np.random.default_rng(6)
    images = [f"i{i}" for i in range(120) for _ in range(1 + i % 4)]
    d = rng.choice([-1.0, -0.4, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0], size=len(images))
    got = paired_difference(d / 2 + 0.5, 0.5 - d / 2, images, resamples=20_000)
    groups = [[x for x, name in zip(d, images, strict=True) if name == f"i{i}"] for i in range(120)]
    pairs = np.array([(sum(group), len(group)) for group in groups] + [(-1.0, 1)])
    drawn = pairs[rng.integers(121, size=(20_000, 121))].sum(axis=1)
    assert got.lower == pytest.approx(np.quantile(drawn[:, 0] / drawn[:, 1], 0.05), abs=0.002)
    assert got.mean == pytest.approx(d.mean())


def test_few_differing_images_leave_room_for_a_clump():
    alone, four = ([0.0] * 400, names(400)), ([0.0] * 400, names(400, per_image=4))
    lone, clumped = (paired_difference(x, x, images) for x, images in (alone, four))
    assert (lone.clump, clumped.clump) == (1.0, pytest.approx(1.9))  # 1 + 0.3 * (4 - 1)
    assert clumped.lower < 1.7 * lone.lower < 0
    whole_image = [1.0] * 4 + [0.0] * 396
    assert paired_difference([0.0] * 400, whole_image, names(400, per_image=4)).clump == 4.0
    assert clumped.items_to_decide(0.01) == pytest.approx(1.9 * 298.07, abs=1)


def test_exact_mcnemar_by_hand():
    def p(better: int, worse: int) -> float:
        d = np.array([1.0] * better + [-1.0] * worse + [0.0] * 5)
        return paired_difference(d / 2, -d / 2, names(len(d)), resamples=10).mcnemar

    assert (p(0, 0), p(3, 3)) == (1.0, 1.0)
    assert p(1, 5) == pytest.approx(2 * 7 / 64)
    assert p(10, 0) == pytest.approx(2 / 1024)
    assert p(900, 1000) == pytest.approx(0.0232, abs=0.001)  # normal approximation with continuity correction


def test_one_image_says_nothing_about_others():
    only = paired_difference([1.0, 1.0, 1.0], [0.0, 1.0, 1.0], ["a", "a", "a"])
    assert (only.lower, only.standard_error, only.verdict(0.02)) == (-1.0, 1.0, INCONCLUSIVE)
    assert only.items_to_decide(0.02) > 1000
    json.loads(json.dumps(asdict(only), allow_nan=False))


def test_items_as_observed_decide_either_way():
    discordant = np.zeros(2000)
    discordant[:20], discordant[20:60] = 1, -1  # 3 % differ, mean -1 point
    result = paired_difference(discordant / 2, -discordant / 2, names(2000))
    assert result.items_as_observed(0.01) is None
    assert result.items_as_observed(0.02) == pytest.approx(0.0299 * (2.487 / 0.01) ** 2 + 2 / 0.01, rel=0.01)
    assert result.items_as_observed(0.02) == result.items_as_observed(0.0)


def test_without_a_difference_seen_an_exact_test_says_how_many_items_decide():
    """The error is 0 there, and 0 items would decide nothing."""
    same = paired_difference([1.0] * 40, [1.0] * 40, names(40))
    assert same.verdict(0.02) == INCONCLUSIVE
    assert same.items_as_observed(0.02) == same.items_to_decide(0.02) == 149
    all_lost = paired_difference([0.0] * 3, [1.0] * 3, names(3))
    assert (all_lost.verdict(0.02), all_lost.items_as_observed(0.02)) == (INCONCLUSIVE, 6)
    assert paired_difference([0.0] * 6, [1.0] * 6, names(6)).verdict(0.02) == INFERIOR


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="score what cannot be scored 0"):
        paired_difference([float("nan"), 1], [1, 1], ["a", "b"])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=30))
def test_bounds_enclose_the_mean_and_swap_with_the_systems(rows):
    x, y, images = zip(*rows, strict=True)
    there = paired_difference(x, y, [str(i) for i in images], resamples=200)
    back = paired_difference(y, x, [str(i) for i in images], resamples=200)
    assert -1 <= there.lower <= there.mean <= there.upper <= 1
    assert (back.lower, back.mean, back.upper) == pytest.approx((-there.upper, -there.mean, -there.lower))


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 scores, 1 baseline scores and 2 image keys"):
        paired_difference([1, 0], [1], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        paired_difference([], [], [])


def test_same_seed_same_bounds_and_fast():
    rng = np.random.default_rng(4)
    x, y = rng.random(2500), rng.random(2500)
    start = time.perf_counter()
    first = paired_difference(x, y, names(2500, per_image=2))
    assert time.perf_counter() - start < 10
    assert first == paired_difference(x, y, names(2500, per_image=2))
