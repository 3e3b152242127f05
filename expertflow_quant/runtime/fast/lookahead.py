"""Looking ahead in a decode step: records of layers to come arrive while the present layers are computed.

A guess only moves bytes early. The router decides what runs, and what was not guessed is filled in when it is routed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.kernels import fits_topk, small_topk
from expertflow_quant.models.routers import Router, router_of
from expertflow_quant.runtime.fast.foretold import Foretold
from expertflow_quant.runtime.fast.probe import FastPathError

Guess = Callable[[int, Tensor | None], Tensor | None]
"""(MoE layer to come, hidden states ``[T, H]`` that the present layer's router was given, None at the start of a step)
-> expert ids ``[T, n]`` that it is expected to want, or one row for all tokens together; more rows than the step has
are not looked at, None is no guess. Runs on a side stream of a captured step."""

FILLS = 2
"""Layers whose records arrive at once, where guesses reach that far: a fill by itself leaves the link idle as it begins
and as it ends. Measured on an H200, ms a step told what will be routed: one with 16 programs 5.44, two with 8 each
5.32, three with 6 each 5.41 (eval/results/speed.md)."""


@dataclass(frozen=True)
class Streams:
    """Those beside a step's own: ``choosing`` deals out the slots of a layer while the records of layers before it
    still arrive, on those of ``filling`` by the layer's number in turn."""

    choosing: torch.cuda.Stream
    filling: tuple[torch.cuda.Stream, ...]

    @classmethod
    def on(cls, device: torch.device, fills: int) -> "Streams":
        """For ``fills``, at least one, fills at once on a GPU."""
        choosing, *filling = (torch.cuda.Stream(device) for _ in range(1 + fills))  # type: ignore[no-untyped-call]
        return cls(choosing, tuple(filling))


class LookAhead:
    """Guesses for MoE layer ``l`` are made when layer ``l - distance`` has its hidden states, for the first
    ``distance`` layers when the step begins. ``foretold``: reads prompts, and makes the guesses of a step as it
    begins. On a GPU with ``streams``, elsewhere None. Raises ExpertFlowError for a distance below one."""

    def __init__(self, guess: Guess, distance: int, device: torch.device, foretold: Foretold | None = None) -> None:
        if distance < 1:
            raise ExpertFlowError(f"a look-ahead of {distance} layers: it must be at least 1")
        self.guess, self.distance, self.foretold = guess, distance, foretold
        self.streams = Streams.on(device, min(FILLS, distance)) if device.type == "cuda" else None


def next_gate(model: Any, names: Sequence[str], top_k: Sequence[int], widths: Sequence[int]) -> Guess:
    """Later layers' routers applied to the present layer's hidden states: no training, about 84 to 90 % right for the
    next layer by what others report (Mixtral-offloading, Eliseev and Mazur 2023; Fate, Fang et al. 2025).

    ``names`` are the experts modules' in model order, ``top_k`` how many a token uses in each, ``widths`` the sizes of
    the hidden states that experts get. A router's scores are its weight times the hidden states, plus its bias if it
    has one; what it does to them after that keeps their order in most models, and where it does not the guess is only
    worse. Raises FastPathError for a router without such a weight, or one that reads something else.
    """
    routers = [_gate(model, name, width) for name, width in zip(names, widths, strict=True)]

    def guess(layer: int, hidden: Tensor | None) -> Tensor | None:
        if hidden is None:
            return None
        scores = routers[layer](hidden).float()
        if fits_topk(scores.shape[1], top_k[layer]):
            return small_topk(scores, top_k[layer])[1]
        return scores.topk(top_k[layer], dim=-1).indices

    return guess


def _gate(model: Any, name: str, width: int) -> Router:
    try:
        router = router_of(model, name)
    except ExpertFlowError:
        router = None
    if router is None or router.weight.shape[1] != width:
        raise FastPathError(
            f"{name}: its router has no weight for the {width} hidden states that its experts get, to look ahead with: "
            "use look_ahead='off'"
        )
    return router
