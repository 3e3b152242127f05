"""One system against another on the same items: the difference, the verdict, and where it comes from."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.judge import Judgement
from eval.records import ItemResult
from eval.stats import (
    INCONCLUSIVE,
    INFERIOR,
    MARGINS,
    NON_INFERIOR,
    PASSED,
    SUPERIOR,
    PairedDifference,
    clustered_error,
    paired_difference,
)

DIMENSIONS: dict[str, Callable[[ItemResult], str]] = {"kind": lambda r: r.kind, "split": lambda r: r.family}
"""What scores are told apart by: the kind of question, and the split ("human") or family of pictures ("bar")."""
_Z = 1.645


@dataclass(frozen=True)
class Group:
    """The items of one kind or split: mean scores of both, and the difference with its clustered standard error.

    Descriptive: no verdict is given on a part of a task.
    """

    dimension: str
    name: str
    items: int
    images: int
    system_mean: float
    baseline_mean: float
    standard_error: float
    better: int
    worse: int

    @property
    def mean(self) -> float:
        """Of the differences."""
        return self.system_mean - self.baseline_mean

    @property
    def interval(self) -> tuple[float, float]:
        """The 90 % interval of the difference by its standard error, within -1..1."""
        reach = _Z * self.standard_error
        return max(-1.0, self.mean - reach), min(1.0, self.mean + reach)


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline on one task, with the margin fixed beforehand."""

    system: str
    baseline: str
    task: str
    margin: float
    difference: PairedDifference
    same_predictions: int
    system_mean: float
    baseline_mean: float
    groups: tuple[Group, ...] = ()

    @property
    def verdict(self) -> str:
        """Superior, non-inferior, inferior or inconclusive at the margin."""
        return self.difference.verdict(self.margin)

    @property
    def recovery(self) -> float | None:
        """The system's mean score by the baseline's; None where the baseline has none."""
        return self.system_mean / self.baseline_mean if self.baseline_mean else None

    def to_json(self) -> dict[str, Any]:
        """All numbers, with the verdict and how many items would decide."""
        names = ("system", "baseline", "task", "margin", "same_predictions", "system_mean", "baseline_mean")
        head = {name: getattr(self, name) for name in names}
        tail = {
            "recovery": self.recovery,
            "mcnemar_p": self.difference.mcnemar,
            "verdict": self.verdict,
            "verdicts": {f"{100 * margin:g}": self.difference.verdict(margin) for margin in MARGINS},
            "items_to_decide": self.difference.items_to_decide(self.margin),
            "items_as_observed": self.difference.items_as_observed(self.margin),
        }
        return head | asdict(self.difference) | tail | {"groups": [asdict(group) for group in self.groups]}


def compare(system: Judgement, baseline: Judgement, margin: float, seed: int = 0) -> list[Comparison]:
    """Paired differences per task. Raises ValueError unless both answered the same items in the same order, and where
    one answered none: what failed as a whole says nothing about a model, though a baseline of 0 would make any system
    superior."""
    ours, theirs = ([(r.task, r.id, r.image_key) for r in side.results] for side in (system, baseline))
    if ours != theirs:
        raise ValueError(
            f"{system.system.label} answered {len(ours)} items and {baseline.system.label} {len(theirs)}, "
            "not the same ones in the same order: judge both with the same tasks, number of items and seed"
        )
    for side in (system, baseline):
        _require_answers(side)
    return [_compare_task(system, baseline, task, margin, seed) for task in dict.fromkeys(name for name, _, _ in ours)]


def _require_answers(side: Judgement) -> None:
    if side.results and side.failures == len(side.results):
        raise ValueError(
            f"{side.system.label} failed on all {len(side.results)} items (the first: {side.results[0].error}), so "
            f"there is nothing to compare: mend that, delete {side.system.name}.jsonl and run the command again"
        )


def overall_verdict(comparisons: Sequence[Comparison]) -> str:
    """Of one pair of systems over all tasks: it passes only where every task does (an intersection-union test, so
    nothing is to be corrected for several tests), and is inferior where one task is."""
    verdicts = [comparison.verdict for comparison in comparisons]
    if all(verdict == SUPERIOR for verdict in verdicts):
        return SUPERIOR
    if all(verdict in PASSED for verdict in verdicts):
        return NON_INFERIOR
    return INFERIOR if INFERIOR in verdicts else INCONCLUSIVE


def pairs_of(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    """Comparisons by (system, baseline), in order."""
    found: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        found[comparison.system, comparison.baseline].append(comparison)
    return dict(found)


def _compare_task(system: Judgement, baseline: Judgement, task: str, margin: float, seed: int) -> Comparison:
    mine, other = system.of_task(task), baseline.of_task(task)
    keys = [result.image_key for result in mine]
    return Comparison(
        system=system.system.label,
        baseline=baseline.system.label,
        task=task,
        margin=margin,
        difference=paired_difference([r.score for r in mine], [r.score for r in other], keys, seed=seed),
        same_predictions=sum(a.prediction == b.prediction for a, b in zip(mine, other, strict=True)),
        system_mean=system.mean(task),
        baseline_mean=baseline.mean(task),
        groups=tuple(group for dimension in DIMENSIONS for group in _groups(dimension, mine, other)),
    )


def _groups(dimension: str, mine: Sequence[ItemResult], other: Sequence[ItemResult]) -> list[Group]:
    members: dict[str, list[tuple[ItemResult, ItemResult]]] = defaultdict(list)
    for pair in zip(mine, other, strict=True):
        members[DIMENSIONS[dimension](pair[0])].append(pair)
    ordered = sorted(members.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return [_group(dimension, name, pairs) for name, pairs in ordered]


def _group(dimension: str, name: str, pairs: Sequence[tuple[ItemResult, ItemResult]]) -> Group:
    scores = np.array([(ours.score, theirs.score) for ours, theirs in pairs])
    differences = scores[:, 0] - scores[:, 1]
    _, cluster = np.unique([ours.image_key for ours, _ in pairs], return_inverse=True)
    sums, sizes = np.bincount(cluster, weights=differences), np.bincount(cluster).astype(np.float64)
    return Group(
        dimension=dimension,
        name=name,
        items=len(pairs),
        images=len(sums),
        system_mean=float(scores[:, 0].mean()),
        baseline_mean=float(scores[:, 1].mean()),
        standard_error=clustered_error(sums, sizes),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
    )
