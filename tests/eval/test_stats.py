import math
import time

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
    assert result.items_to_decide(0.01) == pytest.approx(1237, abs=10)  # 0.02 * (2.487 / 0.01) ** 2
    assert result.items_to_decide(0.02) < result.items_to_decide(0.01) / 3


@pytest.mark.parametrize(("loss", "gain", "correlation"), [(0.04, 0.02, 0.0), (0.02, 0.0, 0.0), (0.08, 0.06, 0.5)])
def test_a_true_loss_of_the_margin_rarely_passes(loss, gain, correlation):
    """Nominal rate 5 %: at the edge of the hypothesis 400 simulated studies pass about 20 times."""
    rng = np.random.default_rng(3)
    n, per_image, studies, passed = 256, 4, 400, 0
    for _ in range(studies):
        shared = np.repeat(rng.random(n // per_image), per_image)
        draw = np.where(rng.random(n) < correlation, shared, rng.random(n))
        difference = np.where(draw < loss, -1.0, np.where(draw > 1 - gain, 1.0, 0.0))
        result = paired_difference(difference, np.zeros(n), names(n, per_image), resamples=300, seed=0)
        passed += result.verdict(0.02) in (NON_INFERIOR, SUPERIOR)
    assert passed / studies <= 0.08


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
