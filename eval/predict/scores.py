"""Recall and precision of guesses, by kind of token and by layer, and on the misses that remain after a cache.

A guess of width w names w experts of a layer. Recall: the share of used experts that it names. Precision: the share of
named experts that are used. Both are taken over all tokens and layers of a trace, each alike.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertflow_quant.offload.predictor import best, widths
from expertflow_quant.offload.trace import GENERATED, PROMPT_IMAGE, PROMPT_TEXT, RoutingTrace

KINDS = {"text": PROMPT_TEXT, "image": PROMPT_IMAGE, "generated": GENERATED}
RESAMPLES, CONFIDENCE = 1000, 0.9
CHANCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Least probabilities at which a guess of a network is acted on."""


@dataclass(frozen=True)
class Truth:
    """What a trace says, worked out once: ``paths`` bool [N, L, E]; ``resident`` bool [N, L, E], what the cache holds
    when a token is about to run."""

    trace: RoutingTrace
    paths: Tensor
    resident: Tensor

    @property
    def decode(self) -> Tensor:
        """bool [N]: generated tokens."""
        return self.trace.kind == GENERATED


def quality(scores: Tensor, truth: Truth, logits: bool = False) -> dict[str, Any]:
    """Every figure of one predictor on one trace. ``logits``: its scores are those of probabilities."""
    trace, paths = truth.trace, truth.paths
    found: dict[str, Any] = {"recall": {}, "precision": {}, "recall_at_k_by_layer": {}}
    for name, width in widths(trace.top_k).items():
        hits = (best(scores, width) & paths).sum(-1).double()
        share = hits / trace.top_k
        found["recall"][name] = by_kind(share, trace)
        found["precision"][name] = by_kind(hits / min(width, trace.num_experts), trace)
        if name == "k":
            found["recall_at_k_interval"] = {
                kind: interval(share[mask].mean(1), trace.item[mask]) for kind, mask in masks(trace).items()
            }
            found["recall_at_k_by_layer"] = {
                kind: [round(float(value), 4) for value in share[mask].mean(0)] for kind, mask in masks(trace).items()
            }
    found["misses"] = misses(scores, truth)
    if logits:
        found["misses"]["by_chance"] = by_chance(scores, truth)
    return found


def masks(trace: RoutingTrace) -> dict[str, Tensor]:
    """bool [N] of all tokens and of each kind that the trace has."""
    every = {"all": torch.ones(len(trace), dtype=torch.bool)}
    return every | {name: trace.kind == kind for name, kind in KINDS.items() if bool((trace.kind == kind).any())}


def by_kind(values: Tensor, trace: RoutingTrace) -> dict[str, float]:
    """Means of ``values`` [N, L] over all tokens and over each kind."""
    return {name: round(float(values[mask].mean()), 4) for name, mask in masks(trace).items()}


def interval(values: Tensor, items: Tensor, seed: int = 0) -> list[float]:
    """90 % bootstrap interval of the mean of ``values`` [n]; whole items are drawn, for their tokens are alike."""
    _, inverse = torch.unique(items, return_inverse=True)
    count = int(inverse.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, inverse, values.double()).numpy()
    sizes = torch.bincount(inverse, minlength=count).double().numpy()
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    edge = (1 - CONFIDENCE) / 2
    return [round(float(value), 4) for value in np.quantile(means, [edge, 1 - edge])]


def misses(scores: Tensor, truth: Truth) -> dict[str, Any]:
    """How much of what the cache lacks for generated tokens a guess names.

    ``named``: experts among the w best of all. ``absent``: the w best of those that are not resident, a prefetch of w
    experts a layer. Of each: ``recall``, the share of missed experts named; ``precision``, the share of the named ones
    not resident that are used (nothing is moved for a resident one); ``moved`` of them for a token and layer.
    """
    here = truth.decode
    used, resident, guess = truth.paths[here], truth.resident[here], scores[here]
    missed = used & ~resident
    found: dict[str, Any] = {"hit_rate": _share(used & resident, used), "missed": int(missed.sum())}
    outside = guess.masked_fill(resident, -torch.inf)
    for name, width in widths(truth.trace.top_k).items():
        top = {"named": best(guess, width) & ~resident, "absent": best(outside, width) & ~resident}
        found[name] = {
            how: {
                "recall": _share(mask & missed, missed),
                "precision": _share(mask & missed, mask),
                "moved": round(float(mask.sum(-1).double().mean()), 4) if mask.numel() else 0.0,
            }
            for how, mask in top.items()
        }
    return found


def by_chance(scores: Tensor, truth: Truth) -> dict[str, dict[str, float | None]]:
    """Of the absent experts whose probability, the sigmoid of their score, is at least a number: as in ``misses``."""
    here = truth.decode
    used, resident, chance = truth.paths[here], truth.resident[here], scores[here].float().sigmoid()
    missed, found = used & ~resident, {}
    for least in CHANCES:
        moved = (chance >= least) & ~resident
        found[str(least)] = {"recall": _share(moved & missed, missed), "precision": _share(moved & missed, moved)}
    return found


def _share(part: Tensor, whole: Tensor) -> float | None:
    total = int(whole.sum())
    return round(int(part.sum()) / total, 4) if total else None


def lru_residents(trace: RoutingTrace, slots: int) -> Tensor:
    """bool [N, L, E]: what a least-recently-used cache of ``slots`` in every layer holds when each token is about to
    run, items one after the other, prompts token by token."""
    resident = torch.zeros(len(trace), trace.layers, trace.num_experts, dtype=torch.bool)
    for layer in range(trace.layers):
        order: dict[int, None] = {}
        for row, wanted in enumerate(trace.experts[:, layer].tolist()):
            resident[row, layer, list(order)] = True
            for expert in wanted:
                order.pop(expert, None)
                order[expert] = None
            while len(order) > slots:
                del order[next(iter(order))]
    return resident


def truth_of(trace: RoutingTrace, share: float) -> tuple[Truth, int]:
    """The truth of a trace with a cache of ``share`` of each layer's experts, and its slots."""
    slots = min(trace.num_experts, max(trace.top_k, int(trace.num_experts * share)))
    return Truth(trace, trace.paths(), lru_residents(trace, slots)), slots
