"""Foresight at work on the plain path: hooks tell it the tokens of each pass, and the cache what it expects of them.

Nothing that is computed depends on it; the cache fetches and keeps experts by it, the routers decide what runs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from expertflow_quant.models.routers import router_of
from expertflow_quant.models.seams import CACHE_NAMES, image_ids
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.foresight import Chances, Foresight, PassTokens
from expertflow_quant.runtime.experts import NAME, attached
from expertflow_quant.runtime.waited import waited_for

SURE, LEAST = 0.9, 0.6
"""Chances of the first and of the last expert that a next-gate guess names: about what was right of them
(eval/results/predictors.json)."""


class NextGate:
    """The next layer's router on what the present one was given; the first layer has no guess."""

    name = "next gate"

    def __init__(self, model: nn.Module) -> None:
        names = {module: name for name, module in model.named_modules()}
        modules = attached(model)
        self._routers = [router_of(model, names[module]) for module in modules]
        self._top_k = [layer.top_k for layer in getattr(modules[0], NAME).cache.store.layers]

    def before(self, tokens: PassTokens) -> Chances:
        return [[0.0] * len(router) for router in self._routers]

    def at(self, layer: int, hidden: Tensor) -> list[float] | None:
        if layer + 1 == len(self._routers):
            return None
        router, count = self._routers[layer + 1], self._top_k[layer + 1]
        named = router(hidden).topk(count, dim=-1).indices
        chance = torch.linspace(SURE, LEAST, count, device=hidden.device).expand(named.shape)
        missed = torch.ones(len(hidden), len(router), device=hidden.device).scatter_(1, named, 1 - chance)
        found: list[float] = (1 - missed.prod(0)).tolist()
        return found


def foresee(model: Any, cache: ExpertCache, foresight: Foresight) -> None:
    """From now on ``foresight`` is asked before every pass of ``model``, whose experts are in ``cache``."""
    hooks = _Hooks(model, cache, foresight)
    model.register_forward_pre_hook(hooks.ids_come, with_kwargs=True)
    model.get_decoder().register_forward_pre_hook(hooks.pass_begins, with_kwargs=True)
    for module in attached(model):
        module.register_forward_pre_hook(hooks.layer_begins)


class _Hooks:
    def __init__(self, model: Any, cache: ExpertCache, foresight: Foresight) -> None:
        self._cache, self._foresight = cache, foresight
        self._image_ids = torch.tensor(image_ids(model.config), dtype=torch.int64)
        self._named: dict[str, Any] = {}
        self._chances: Chances = []

    def ids_come(self, module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._named = named if named.get("input_ids") is not None or not args else {**named, "input_ids": args[0]}

    def pass_begins(self, module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = self._named.get("input_ids")
        if ids is None:  # called with embeddings alone, of which nothing can be foretold
            self._cache.progress.begin_step()
            return
        past = next((self._named[name] for name in CACHE_NAMES if self._named.get(name) is not None), None)
        begins = past is None or int(past.get_seq_length()) == 0
        ids = ids.detach().to("cpu", torch.int64)
        real = _real(self._named.get("attention_mask"), ids)
        if (waited := waited_for(real.numel())) is not None:
            real = real & waited.cpu().view_as(real)
        tokens = PassTokens(
            ids,
            real,
            torch.isin(ids, self._image_ids),
            begins,
            _on_cpu(named.get("inputs_embeds")),
        )
        self._chances = self._foresight.before(tokens)
        self._cache.progress.begin_step(self._chances)

    def layer_begins(self, module: Any, args: tuple[Any, ...]) -> None:
        layer = getattr(module, NAME).layer
        hidden = args[0].detach()
        if (waited := waited_for(len(hidden))) is not None:
            hidden = hidden[waited]
        better = self._foresight.at(layer, hidden)
        if better is not None and self._cache.progress.scores is self._chances:
            self._chances[layer + 1] = list(better)


def _real(mask: Any, ids: Tensor) -> Tensor:
    """Of a mask over all tokens so far, those of this pass."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask[:, -ids.shape[1] :].detach().to("cpu", torch.bool)


def _on_cpu(values: Any) -> Tensor | None:
    return values.detach().cpu() if isinstance(values, Tensor) else None
