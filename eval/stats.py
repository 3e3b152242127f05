"""Paired comparison of two systems on the same items, and a verdict.

Several questions share an image, so their scores rise and fall together: both the standard error and the
bootstrap treat the image as the unit (Miller 2024, arXiv 2411.00640). "No significant difference" is no
evidence of equality, so a system passes only if the lower confidence bound of its difference lies above minus
the margin.

The guard. A resample of the observed images cannot contain a loss that the sample happens to miss, so with
few differences the plain bootstrap is too sure of itself (with none at all its interval has no width). The
lower bound is therefore taken with one more image in the sample, lost; the upper bound with one more, won. It
has one question where 20 images or more differ. Where fewer do, what was not seen may come in clumps, so it
grows, down to 10 images, to as many questions as are lost together (``_clump``). How often a true loss of the
margin passes with this, and with which other bounds it passes too often: ``python -m eval calibrate-verdict``.
For scores of 0 and 1, an image a question, it comes close to the exact binomial bound: 256 questions without
any difference leave room for a loss of 1.2 points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
"""Of each one-sided bound; lower and upper together are the two-sided 90 % interval."""
MARGIN_OWN = 0.01
"""Against the model's own full precision: one point."""
MARGIN_DENSE = 0.02
"""Against another model, where 10 to 15 % of the answers differ: two points."""
MARGINS = (0.005, 0.01, 0.015, 0.02)
"""At which verdicts are shown beside the one that counts."""

SUPERIOR, NON_INFERIOR, INFERIOR, INCONCLUSIVE = "superior", "non-inferior", "inferior", "inconclusive"
PASSED = (SUPERIOR, NON_INFERIOR)
_Z_CONFIDENCE, _Z_POWER = 1.645, 0.842
_CORRELATION = 0.3
_FEW, _ENOUGH = 10.0, 20.0
_WIDE = 0.4
"""A distance from the margin beyond which no fewer items decide: six, all lost, are the fewest that do."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (score - baseline score) over items, with its uncertainty. Scores lie in 0..1, so do
    differences.

    ``better`` and ``worse`` count items that the system scores higher and lower; ``clump``: about how many
    questions of an image are lost together.
    """

    mean: float
    lower: float
    upper: float
    standard_error: float
    items: int
    images: int
    better: int
    worse: int
    clump: float = 1.0

    def verdict(self, margin: float) -> str:
        """Superior, non-inferior, inferior (worse by more than ``margin`` for sure) or inconclusive."""
        if self.lower > 0:
            return SUPERIOR
        if self.lower > -margin:
            return NON_INFERIOR
        return INFERIOR if self.upper < -margin else INCONCLUSIVE

    @property
    def mcnemar(self) -> float:
        """Exact two-sided p of as uneven a split into better and worse, were both as likely (McNemar 1947).

        It takes every item for independent and says nothing about margins: a description, no verdict.
        """
        n = self.better + self.worse
        tail = sum(math.comb(n, i) for i in range(min(self.better, self.worse) + 1))
        return min(1.0, 2 * tail / 2**n)

    def items_to_decide(self, margin: float) -> int:
        """About how many items would show non-inferiority with 80 % power, were the true difference zero.

        Never fewer than an exact test needs when it sees no loss at all.
        """
        return self._items_for(margin)

    def items_as_observed(self, margin: float) -> int | None:
        """About how many items would decide, one way or the other, with 80 % power, were the true difference
        the one observed; None where that is the margin itself. Never fewer than an exact test needs either."""
        distance = abs(self.mean + margin)
        return self._items_for(distance) if distance > 1e-9 else None

    def _items_for(self, distance: float) -> int:
        by_error = self.standard_error**2 * self.items * ((_Z_CONFIDENCE + _Z_POWER) / distance) ** 2
        # of n items the guard takes a bound clump / n nearer, which about 2 clump / distance items more make good
        by_error += 2 * self.clump / distance
        unseen = self.clump * math.log(1 - CONFIDENCE) / math.log1p(-min(distance, _WIDE))
        return math.ceil(max(by_error, unseen))


def paired_difference(
    scores: Sequence[float],
    baseline: Sequence[float],
    images: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Compare two systems item by item; ``images[i]`` names the image of item i. Raises ValueError unless all
    match."""
    if not len(scores) == len(baseline) == len(images) or not len(scores):
        raise ValueError(
            f"{len(scores)} scores, {len(baseline)} baseline scores and {len(images)} image keys: "
            "a paired comparison needs as many of each, at least one: judge both systems on the same items"
        )
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise ValueError("a score is not a finite number: score what cannot be scored 0, never drop it")
    _, cluster = np.unique(np.asarray(images), return_inverse=True)
    sums = np.bincount(cluster, weights=differences).astype(np.float64).round(12)  # so that images alike are equal
    sizes = np.bincount(cluster).astype(np.float64)
    mean, clump = float(differences.mean()), _clump(sums, sizes)
    guard = 1 + (clump - 1) * _thinness(sums)
    lower, upper = _bounds(sums, sizes, guard, resamples, np.random.default_rng(seed))
    return PairedDifference(
        mean=mean,
        lower=min(lower, mean),
        upper=max(upper, mean),
        standard_error=clustered_error(sums, sizes),
        items=len(differences),
        images=len(sums),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
        clump=clump,
    )


def clustered_error(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    """Cluster-robust standard error of the mean, sums [K] and sizes [K] per image, with the K / (K - 1)
    correction; 1.0, as large as it can be, for a single image, which says nothing about others."""
    k = len(sums)
    if k < 2:
        return 1.0
    residuals = sums - sizes * sums.sum() / sizes.sum()
    return float(np.sqrt(k / (k - 1) * (residuals**2).sum()) / sizes.sum())


def _thinness(sums: NDArray[np.float64]) -> float:
    """1.0 where at most 10 images differ, 0.0 from 20 on, counted by weight (Kish's effective number)."""
    weight, squares = np.abs(sums).sum(), (sums**2).sum()
    effective = weight**2 / squares if squares > 0 else 0.0
    return float(np.clip((_ENOUGH - effective) / (_ENOUGH - _FEW), 0, 1))


def _clump(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    """Questions lost (or won) together with a typical lost one: as observed, and no fewer than an intra-image
    correlation of 0.3 gives."""
    assumed = 1 + _CORRELATION * ((sizes**2).sum() / sizes.sum() - 1)
    weight = np.abs(sums).sum()
    return float(max(assumed, (sums**2).sum() / weight if weight > 0 else 0.0))


def _bounds(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], guard: float, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Percentile bounds of the cluster bootstrap with a guard of so many questions; sums [K] and sizes [K] per image.

    Images that are alike are drawn together: how often each kind of image comes up is multinomial.
    """
    pairs, first, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)  # so that exchanging the systems mirrors the bounds
    pairs, chances = pairs[order], np.append(counts[order], 1.0) / (len(sums) + 1)
    lows, highs = np.empty(resamples), np.empty(resamples)
    chunk = max(1, 4_000_000 // len(chances))
    for start in range(0, resamples, chunk):
        rows = slice(start, min(start + chunk, resamples))
        drawn = rng.multinomial(len(sums) + 1, chances, size=rows.stop - rows.start)
        seen, extra = drawn[:, :-1] @ pairs[:, 0], guard * drawn[:, -1]
        total = drawn[:, :-1] @ pairs[:, 1] + extra
        lows[rows], highs[rows] = (seen - extra) / total, (seen + extra) / total
    return float(np.quantile(lows, 1 - CONFIDENCE)), float(np.quantile(highs, CONFIDENCE))
