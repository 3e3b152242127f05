"""From per-item results to figures with 90 % intervals, resampled by image, since questions share images."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.curves.fidelity import Scored
from eval.stats import CONFIDENCE, clustered_error, paired_difference
from eval.tasks import Task

RESAMPLES = 4_000
_Z = 1.645
_CHUNK = 200


@dataclass(frozen=True)
class Interval:
    """A figure with its two-sided 90 % interval."""

    mean: float
    lower: float
    upper: float


def ratio(above: Sequence[float], below: Sequence[float], images: Sequence[str], seed: int = 0) -> Interval:
    """``sum above / sum below`` over items; percentiles of a bootstrap that draws whole images."""
    _, cluster = np.unique(np.asarray(images), return_inverse=True)
    tops, bottoms = (np.bincount(cluster, weights=np.asarray(each, dtype=np.float64)) for each in (above, below))
    found = float(tops.sum() / bottoms.sum()) if bottoms.sum() else 0.0
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // _CHUNK):
        counts = _draws(len(tops), rng)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn.append((counts @ tops) / (counts @ bottoms))
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, (1 - CONFIDENCE, CONFIDENCE)) if len(values) else (found, found)
    return Interval(found, min(found, float(low)), max(found, float(high)))


def mean_score(scores: Sequence[float], images: Sequence[str]) -> Interval:
    """Mean score with its interval by the standard error clustered by image."""
    values = np.asarray(scores, dtype=np.float64)
    _, cluster = np.unique(np.asarray(images), return_inverse=True)
    reach = _Z * clustered_error(
        np.bincount(cluster, weights=values).astype(np.float64), np.bincount(cluster).astype(np.float64)
    )
    mean = float(values.mean())
    return Interval(mean, max(0.0, mean - reach), min(1.0, mean + reach))


def fidelity(scored: Scored, images: Sequence[str]) -> dict[str, Any]:
    """Divergence in nats an answer token, as is and softened, and the share of tokens of the same first choice."""
    same = [count - other for count, other in zip(scored.tokens, scored.differing, strict=True)]
    return {
        "kl": asdict(ratio(scored.divergence, scored.tokens, images)),
        "kl_softened": asdict(ratio(scored.softened, scored.tokens, images)),
        "top1_agreement": asdict(ratio(same, scored.tokens, images)),
        "answer_tokens": sum(scored.tokens),
        "same_answers": sum(not other for other in scored.differing) / len(scored.differing),
    }


def accuracy(tasks: Sequence[Task], scores: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Each task's mean, and its difference to ``baseline`` on the same items."""
    found, start = {}, 0
    for task in tasks:
        part = slice(start, start + len(task.items))
        images = [item.image_key for item in task.items]
        d = paired_difference(scores[part], baseline[part], images)
        difference = {name: getattr(d, name) for name in ("mean", "lower", "upper", "better", "worse")}
        found[task.name] = {**asdict(mean_score(scores[part], images)), "to_self": difference}
        start = part.stop
    return found


def compare(name: str, tasks: Sequence[Task], ours: Scored, theirs: Scored, theirs_name: str) -> dict[str, Any]:
    """Ours against theirs: the divergences' ratio, and the paired difference in each task."""
    images = [item.image_key for task in tasks for item in task.items]
    return {
        "point": name,
        "against": theirs_name,
        "kl_ratio": asdict(ratio(ours.divergence, theirs.divergence, images)),
        "kl_softened_ratio": asdict(ratio(ours.softened, theirs.softened, images)),
        "tasks": {
            task: figures["to_self"] for task, figures in accuracy(tasks, ours.scores, theirs.scores).items()
        },
    }  # fmt: skip


def _draws(clusters: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each cluster is drawn: [chunk, clusters]."""
    picks = rng.integers(clusters, size=(_CHUNK, clusters)) + np.arange(_CHUNK)[:, None] * clusters
    return np.bincount(picks.ravel(), minlength=_CHUNK * clusters).reshape(_CHUNK, clusters).astype(np.float64)
