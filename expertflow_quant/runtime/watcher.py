"""Recording what a predictor may see of a model while an engine answers (offload/sight.py), beside runtime/recorder.py.

Hooks on the experts modules apply the routers of later layers to the present layer's router input; a hook on the
language model notes the input embeddings of image tokens, which are known before its first layer runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.models.routers import Router, router_of
from expertflow_quant.models.seams import expert_modules
from expertflow_quant.offload.sight import Basis, Sight, coded
from expertflow_quant.offload.trace import PROMPT_IMAGE, RoutingTrace
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.experts import attached


class Watcher:
    """What was seen so far, on the CPU: ``ahead`` for each layer the calls' [T, D, W]; ``embeddings`` float16 [T, H] of
    the language model's passes."""

    def __init__(self, routers: Sequence[Router], distances: int, width: int) -> None:
        self.routers, self.distances = routers, distances
        self.experts = max(map(len, routers))
        self.width = min(width, *map(len, routers))
        self.ahead: list[list[Tensor]] = [[] for _ in routers]
        self.embeddings: list[Tensor] = []

    def look_ahead(self, layer: int, hidden: Tensor) -> None:
        """Note which experts later routers put first on ``hidden`` [T, H], the router input of ``layer``."""
        dtype = torch.int16 if self.experts > 255 else torch.uint8
        found = torch.full((len(hidden), self.distances, self.width), self.experts, dtype=dtype)
        for distance in range(1, self.distances + 1):
            if layer + distance < len(self.routers):
                logits = self.routers[layer + distance](hidden.float())
                found[:, distance - 1] = logits.topk(self.width, dim=-1).indices.to("cpu", dtype)
        self.ahead[layer].append(found)

    def embeddings_of(self, trace: RoutingTrace) -> Tensor:
        """float16 [M, H] of the image tokens of ``trace``, which was recorded in the same run."""
        return self._of(trace, torch.cat(self.embeddings))[trace.kind == PROMPT_IMAGE]

    def sight(self, trace: RoutingTrace, basis: Basis | None = None) -> Sight:
        """Everything seen while ``trace`` was recorded; pictures with a ``basis`` only."""
        ahead = torch.stack([self._of(trace, torch.cat(calls)) for calls in self.ahead], dim=1)
        codes = None if basis is None else coded(basis(self.embeddings_of(trace)))
        return Sight(trace.token_ids, self.experts, ahead, codes, basis)

    def _of(self, trace: RoutingTrace, seen: Tensor) -> Tensor:
        if len(seen) != len(trace):
            raise ExpertFlowError(
                f"{len(seen)} tokens were watched, the trace has {len(trace)}: record and watch the same answers"
            )
        return seen


@contextmanager
def watching(engine: Engine, distances: int = 2, width: int = 4) -> Iterator[Watcher]:
    """While the block runs, answers of ``engine`` are watched: routers up to ``distances`` layers ahead and the
    ``width`` experts that they put first.

    Raises ExpertFlowError for a model whose routers are no plain matrices.
    """
    modules = attached(engine.model) or [module for _, module in expert_modules(engine.model)]
    names = {module: name for name, module in engine.model.named_modules()}
    watcher = Watcher([router_of(engine.model, names[module]) for module in modules], distances, width)
    hooks = [module.register_forward_pre_hook(_looking(watcher, layer)) for layer, module in enumerate(modules)]
    decoder = engine.model.get_decoder()
    hooks.append(decoder.register_forward_pre_hook(_embedding(watcher), with_kwargs=True))
    try:
        yield watcher
    finally:
        for hook in hooks:
            hook.remove()


def _looking(watcher: Watcher, layer: int) -> Any:
    def look(module: Any, args: tuple[Any, ...]) -> None:
        watcher.look_ahead(layer, args[0].detach())

    return look


def _embedding(watcher: Watcher) -> Any:
    def note(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = named.get("inputs_embeds")
        if inputs is not None:
            watcher.embeddings.append(inputs.detach().flatten(0, -2).to("cpu", torch.float16))

    return note
