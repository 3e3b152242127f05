"""What a user would run otherwise: whole layers offloaded by accelerate, and our own host-driven cache without a graph.

All of them are transformers' own eager forward passes; they differ in where experts lie and how they come.
"""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eval.speed.bench import Bench
from eval.speed.random_model import RandomModel
from eval.speed.routing import ForcedRoutes
from eval.speed.systems import Clock, Counters, Setting, SystemSpec, Timing
from expertflow_quant.models.seams import cache_argument
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.slots import minimum_bytes
from expertflow_quant.runtime.experts import NAME, LayerExperts, attach

MOST_STEPS_BEHIND = 2
"""Steps under way before the host waits, so that a time limit means device time."""


class EagerModel:
    """A transformers model on forced routes, token after token with its growing cache."""

    def __init__(self, made: RandomModel, device: torch.device) -> None:
        self.model = made.model
        self.device = device
        self._routes = ForcedRoutes([layer.module for layer in made.layers])
        self._past: Any = None
        self._token: Tensor | None = None

    def prefill(self, tokens: Tensor, routes: Tensor) -> float:
        """See System.prefill."""
        self._past, self._token = None, tokens[:, -1:]
        clock = Clock(self.device)
        self._past = DynamicCache(config=self.model.config)
        self._run(tokens, routes)
        clock.mark()
        return sum(clock.seconds())

    def decode(self, routes: Tensor, limit_seconds: float) -> Timing:
        """See System.decode."""
        clock, begun = Clock(self.device), time.perf_counter()
        for step, step_routes in enumerate(routes):
            self._run(self._token, step_routes)
            clock.mark()
            if step % MOST_STEPS_BEHIND and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if step > 0 and time.perf_counter() - begun > limit_seconds:
                break
        return Timing(clock.seconds())

    def close(self) -> None:
        self._routes.remove()
        self.model = self._past = self._token = None

    def _run(self, tokens: Tensor | None, routes: Tensor) -> None:
        self._routes.set(routes)
        cache = {cache_argument(self.model): self._past}
        with torch.inference_mode():
            made = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **cache)
            made.logits[:, -1:].argmax(dim=-1)  # as a user would; what follows is the prompt's last token again


class CachedSystem:
    """Our experts function over the host-driven least-recently-used cache, experts in ``format``.

    ``budget``: "setting", "minimum" (one token's working set: every layer loads its experts anew) or "all".
    """

    def __init__(self, bench: Bench, format: str, budget: str) -> None:
        self._bench, self._budget = bench, budget
        self._made = bench.backbone()
        self._store = bench.store(format)
        self._eager = EagerModel(self._made, bench.device)
        self._cache: ExpertCache | None = None
        self.layers = len(self._made.layers)
        self.expert_bytes = self._store.nbytes

    @property
    def device_expert_bytes(self) -> int:
        return self._cache.device_bytes if self._cache is not None else 0

    def prepare(self, setting: Setting) -> None:
        self._drop()
        smallest = minimum_bytes(self._store.layers)
        budget = {"minimum": smallest, "all": self._store.nbytes}.get(self._budget, setting.budget_bytes)
        self._cache = ExpertCache(self._store, budget, self._bench.device)
        self._cache.preload()
        for index, layer in enumerate(self._made.layers):
            attach(layer.module, LayerExperts(layer=index, cache=self._cache))

    def prefill(self, tokens: Tensor, routes: Tensor) -> float:
        return self._eager.prefill(tokens, routes)

    def decode(self, routes: Tensor, limit_seconds: float) -> Timing:
        return self._eager.decode(routes, limit_seconds)

    def counters(self) -> Counters:
        stats = self._cache.stats if self._cache is not None else None
        return Counters(stats.bytes_moved, stats.hits, stats.misses) if stats else Counters()

    def reset_counters(self) -> None:
        if self._cache is not None:
            self._cache.reset_stats()

    def close(self) -> None:
        self._drop()
        self._eager.close()
        del self._store, self._made, self._eager
        self._bench.release()

    def _drop(self) -> None:
        """The cache before goes before the next one is made."""
        self._cache = None
        for layer in self._made.layers:
            if hasattr(layer.module, NAME):
                delattr(layer.module, NAME)
        self._bench.release()


class AccelerateSystem:
    """transformers with accelerate's CPU offload of the experts modules, bf16: a pass moves all experts of a layer."""

    def __init__(self, bench: Bench) -> None:
        from accelerate import cpu_offload

        self._bench = bench
        self.layers = min(bench.baseline_layers or len(bench.layers), len(bench.layers))
        made = bench.whole(self.layers)
        self.expert_bytes = sum(p.nbytes for layer in made.layers for p in layer.module.parameters())
        self.device_expert_bytes = max(sum(p.nbytes for p in layer.module.parameters()) for layer in made.layers)
        self._eager = EagerModel(made, bench.device)
        self._passes = 0
        for layer in made.layers:
            cpu_offload(layer.module, execution_device=bench.device)

    def prepare(self, setting: Setting) -> None:
        self._bench.release()

    def prefill(self, tokens: Tensor, routes: Tensor) -> float:
        self._passes += 1
        return self._eager.prefill(tokens, routes)

    def decode(self, routes: Tensor, limit_seconds: float) -> Timing:
        timing = self._eager.decode(routes, limit_seconds)
        self._passes += len(timing.steps)
        return timing

    def counters(self) -> Counters:
        return Counters(bytes_moved=self._passes * self.expert_bytes)

    def reset_counters(self) -> None:
        self._passes = 0

    def close(self) -> None:
        self._eager.close()
        del self._eager
        self._bench.release()


def _cached(budget: str, bf16: bool = False) -> Any:
    return lambda bench: CachedSystem(bench, "bf16" if bf16 else bench.target.format, budget)


BASELINES = (
    SystemSpec("accelerate", "transformers + accelerate offload of the experts", AccelerateSystem, any_budget=True),
    SystemSpec("lru-bf16", "our host-driven LRU cache, experts in bf16, the same bytes", _cached("setting", bf16=True)),
    SystemSpec("on-demand", "ours, experts loaded on demand, no cache", _cached("minimum"), any_budget=True),
    SystemSpec("lru", "our host-driven LRU cache", _cached("setting")),
    SystemSpec("all-resident", "our host-driven cache with every expert resident", _cached("all"), any_budget=True),
)
"""In the order in which they run: bf16 apart, so that the experts are copied into host memory as rarely as can be."""
