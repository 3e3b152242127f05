"""Paired comparison of two systems on the same items, and a verdict.

Several questions share an image, so their scores rise and fall together: both the standard error and the
bootstrap treat the image as the unit (Miller 2024, arXiv 2411.00640). "No significant difference" is no
evidence of equality, so a system passes only if the lower confidence bound of its difference lies above minus
the margin.

The guard. A resample of the observed images cannot contain a loss that the sample happens to miss, so with
few differences the plain bootstrap is too sure of itself (with none at all its interval has no width). The
lower bound is therefore taken with one more image in the sample, of one question, lost; the upper bound with
one more, won. For scores of 0 and 1 this comes close to the exact binomial bound: 256 questions without any
difference leave room for a loss of 1.2 points.
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

SUPERIOR, NON_INFERIOR, INFERIOR, INCONCLUSIVE = "superior", "non-inferior", "inferior", "inconclusive"
_Z_CONFIDENCE, _Z_POWER = 1.645, 0.842


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (score - baseline score) over items, with its uncertainty. Scores lie in 0..1, so do
    differences."""

    mean: float
    lower: float
    upper: float
    standard_error: float
    items: int
    images: int
    better: int
    worse: int

    def verdict(self, margin: float) -> str:
        """Superior, non-inferior, inferior (worse by more than ``margin`` for sure) or inconclusive."""
        if self.lower > 0:
            return SUPERIOR
        if self.lower > -margin:
            return NON_INFERIOR
        return INFERIOR if self.upper < -margin else INCONCLUSIVE

    def items_to_decide(self, margin: float) -> int:
        """About how many items would show non-inferiority with 80 % power, were the true difference zero.

        Never fewer than an exact test needs when it sees no loss at all.
        """
        by_power = self.standard_error**2 * self.items * ((_Z_CONFIDENCE + _Z_POWER) / margin) ** 2
        by_guard = math.log(1 - CONFIDENCE) / math.log(1 - margin)
        return math.ceil(max(by_power, by_guard))


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
    _, cluster = np.unique(np.asarray(images), return_inverse=True)
    sums = np.bincount(cluster, weights=differences).astype(np.float64)
    sizes = np.bincount(cluster).astype(np.float64)
    mean = float(differences.mean())
    lower, upper = _bounds(sums, sizes, resamples, np.random.default_rng(seed))
    return PairedDifference(
        mean=mean,
        lower=min(lower, mean),
        upper=max(upper, mean),
        standard_error=_clustered_error(sums, sizes, mean),
        items=len(differences),
        images=len(sums),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
    )


def _clustered_error(sums: NDArray[np.float64], sizes: NDArray[np.float64], mean: float) -> float:
    """Cluster-robust standard error of the mean, sums [K] and sizes [K] per image, with the K / (K - 1)
    correction."""
    k = len(sums)
    if k < 2:
        return math.inf
    residuals = sums - sizes * mean
    return float(np.sqrt(k / (k - 1) * (residuals**2).sum()) / sizes.sum())


def _bounds(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Percentile bounds of the guarded cluster bootstrap; sums [K] and sizes [K] per image."""
    sizes = np.append(sizes, 1.0)
    lows, highs = np.empty(resamples), np.empty(resamples)
    chunk = max(1, 4_000_000 // len(sizes))
    for start in range(0, resamples, chunk):
        rows = slice(start, min(start + chunk, resamples))
        drawn = _draw(len(sizes), rows.stop - rows.start, rng)
        total = drawn @ sizes
        seen, extra = drawn[:, :-1] @ sums, drawn[:, -1]
        lows[rows], highs[rows] = (seen - extra) / total, (seen + extra) / total
    return float(np.quantile(lows, 1 - CONFIDENCE)), float(np.quantile(highs, CONFIDENCE))


def _draw(k: int, rows: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each of k images is drawn when k are drawn with replacement: [rows, k], rows summing to k."""
    picks = rng.integers(k, size=(rows, k)) + np.arange(rows)[:, None] * k
    return np.bincount(picks.ravel(), minlength=rows * k).reshape(rows, k).astype(np.float64)
