"""How the plain path keeps experts: which policy, which guess, what is fetched ahead, whose slots."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.foresight import DemandForesight, Foresight, PathForesight
from expertflow_quant.offload.policies.named import (
    BEST_POLICY,
    GUESSES,
    POLICIES,
    Usage,
    guess_demand,
    known,
    policy_maker,
)
from expertflow_quant.offload.policy import Progress
from expertflow_quant.offload.predict_paths import WEIGHTS_FILE, PathPredictor
from expertflow_quant.offload.slots import SizeClass, plan_slots
from expertflow_quant.offload.slots_file import layer_classes, read_slots
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime.foresee import NextGate, foresee

AUTO, OFF, NEXT_GATE, PATHS = "auto", "off", "next-gate", "paths"
PREDICTORS = (AUTO, OFF, *GUESSES, NEXT_GATE, PATHS)
BEST_UNTRAINED = NEXT_GATE


@dataclass(frozen=True)
class CacheOptions:
    """``policy``: one of policies.named.POLICIES. ``predictor``: one of PREDICTORS or the folder of a trained one;
    "auto" has nothing to predict without ``ahead``, else takes the checkpoint's own (predictor.safetensors in its
    folder), or "next-gate". ``ahead``: records that are fetched ahead beside each layer's computation, by the
    prediction. ``usage``: a trace of this model that "static", "predictive" and "affinity" learn from. ``slots``: the
    file of a plan's slots (slots_file.py); without one all layers share the slots.

    The defaults measured best (eval/results/cache.json, eval/results/policies.json), on a CPU, where copies do not run
    beside the computation: fetching ahead hits more (37 for 25 %) but moves more bytes, and a trained predictor without
    it (26 %) takes longer than the copies that it saves, so both are off. Raises ExpertFlowError for unknown names.
    """

    policy: str = BEST_POLICY
    predictor: str = AUTO
    ahead: float = 0.0
    usage: str | Path | None = None
    slots: str | Path | None = None

    def __post_init__(self) -> None:
        known("policy", self.policy, POLICIES)
        if not (math.isfinite(self.ahead) and self.ahead >= 0):
            raise ExpertFlowError(f"{self.ahead} records ahead of each layer: give none (0) or more")
        if self.predictor not in PREDICTORS and not Path(self.predictor).is_dir():
            raise ExpertFlowError(
                f"predictor {self.predictor!r} is not known: use one of {', '.join(PREDICTORS)}, or the folder of a "
                "trained one"
            )

    def classes(self, store: ExpertStore, budget_bytes: int) -> tuple[SizeClass, ...]:
        """The slots that ``budget_bytes`` give. Raises BudgetError when they are too few."""
        if self.slots is None:
            return plan_slots(store.layers, budget_bytes)
        return layer_classes(store.layers, read_slots(self.slots, store.layers), budget_bytes)


def make_cache(store: ExpertStore, budget_bytes: int, device: torch.device, options: CacheOptions) -> ExpertCache:
    """The cache of ``options``, filled. Raises BudgetError and ExpertFlowError."""
    progress = Progress([len(layer.nbytes) for layer in store.layers])
    policy = policy_maker(options.policy, progress, _usage(options, progress))
    classes = options.classes(store, budget_bytes)
    cache = ExpertCache(store, budget_bytes, device, policy, progress, classes, options.ahead)
    cache.preload()
    return cache


def attach_foresight(model: Any, options: CacheOptions, folder: Path) -> Foresight | None:
    """Let the chosen predictor tell the cache of ``model`` what comes; ``folder``: the checkpoint's. Raises
    ExpertFlowError for a predictor that is missing or of another model."""
    cache: ExpertCache = model.expert_cache
    name = _resolved(options, folder)
    if name == OFF:
        return None
    experts = cache.progress.experts
    foresight: Foresight
    if name in GUESSES:
        demand = guess_demand(name, cache.progress, _usage(options, cache.progress))
        foresight = DemandForesight(name, demand, experts)
    elif name == NEXT_GATE:
        foresight = NextGate(model)
    else:
        foresight = PathForesight(PathPredictor.load(folder if name == PATHS else name), experts)
    foresee(model, cache, foresight)
    return foresight


def has_predictor(folder: Path) -> bool:
    """Whether a checkpoint has a trained predictor of its own."""
    return (folder / WEIGHTS_FILE).is_file()


def _resolved(options: CacheOptions, folder: Path) -> str:
    if options.predictor != AUTO:
        return options.predictor
    if not options.ahead:
        return OFF
    return PATHS if has_predictor(folder) else BEST_UNTRAINED


def _usage(options: CacheOptions, progress: Progress) -> Usage | None:
    return None if options.usage is None else Usage.load(options.usage, progress.experts)
