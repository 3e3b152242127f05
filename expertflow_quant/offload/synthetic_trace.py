"""Routes drawn from a seed: a given skew of popularity and stickiness of a row's experts, at any model's sizes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.trace import GENERATED, PROMPT_TEXT, RoutingTrace

SKEW = 0.6


@dataclass(frozen=True)
class RouteSizes:
    """What routes must fit: MoE layers, experts in each, experts a token uses."""

    layers: int
    experts: int
    top_k: int


def synthetic_routes(
    sizes: RouteSizes,
    *,
    steps: int,
    rows: int,
    prompt: int,
    skew: float = SKEW,
    stickiness: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Routes int64 of prompts [prompt, layers, rows, top_k] and of the steps after them [steps, layers, rows, top_k].

    Experts have popularity 1 / rank ** ``skew`` (the ranks shuffled in every layer); each expert of a row's previous
    token stays with probability ``stickiness``; the rest is drawn by popularity, without repetition (Gumbel top-k).
    Raises ExpertFlowError for values out of range.
    """
    _check_range("skew", skew, 0, math.inf)
    _check_range("stickiness", stickiness, 0, 1)
    _check_range("top_k", sizes.top_k, 1, sizes.experts)
    for name, count in (("layers", sizes.layers), ("rows", rows)):
        _check_range(name, count, 1, math.inf)
    for name, count in (("steps", steps), ("prompt", prompt)):
        _check_range(name, count, 0, math.inf)
    generator = torch.Generator().manual_seed(seed)
    by_rank = -skew * torch.arange(1, sizes.experts + 1).log()
    shuffled = [by_rank[torch.randperm(sizes.experts, generator=generator)] for _ in range(sizes.layers)]
    log_popularity = torch.stack(shuffled)
    prompts = _walk(log_popularity, sizes.top_k, prompt, rows, stickiness, generator)
    last = prompts[-1] if prompt else None
    return prompts, _walk(log_popularity, sizes.top_k, steps, rows, stickiness, generator, last)


def synthetic_trace(
    sizes: RouteSizes,
    *,
    steps: int,
    rows: int,
    prompt: int,
    skew: float = SKEW,
    stickiness: float = 0.0,
    seed: int = 0,
) -> RoutingTrace:
    """The same routes as a trace: each row is an item of task "synthetic" with a text prompt and generated tokens. All
    token ids are 0, for routes do not follow from them, and gate weights are left out."""
    options = {"skew": skew, "stickiness": stickiness, "seed": seed}
    prompts, decode = synthetic_routes(
        sizes, steps=steps, rows=rows, prompt=prompt, skew=skew, stickiness=stickiness, seed=seed
    )
    by_row = torch.cat([prompts, decode]).permute(2, 0, 1, 3)
    kinds = torch.tensor([PROMPT_TEXT] * prompt + [GENERATED] * steps).repeat(rows)
    return RoutingTrace.of(
        torch.zeros(len(kinds), dtype=torch.int32),
        kinds,
        torch.arange(rows).repeat_interleave(prompt + steps),
        by_row.reshape(len(kinds), sizes.layers, sizes.top_k),
        sizes.experts,
        ["synthetic"] * rows,
        meta={"model": "synthetic"} | {name: str(value) for name, value in options.items()},
    )


def _walk(
    log_popularity: Tensor,
    top_k: int,
    steps: int,
    rows: int,
    stickiness: float,
    generator: torch.Generator,
    previous: Tensor | None = None,
) -> Tensor:
    """int64 [steps, layers, rows, top_k]; ``previous`` [layers, rows, top_k] is what the first step follows."""
    layers, experts = log_popularity.shape
    routes = torch.empty(steps, layers, rows, top_k, dtype=torch.int64)
    for step in range(steps):
        waits = torch.empty(layers, rows, experts).exponential_(generator=generator)
        drawn = log_popularity[:, None] - waits.clamp_(min=torch.finfo(waits.dtype).tiny).log_()
        if previous is not None:
            stays = torch.rand(previous.shape, generator=generator) < stickiness
            kept = drawn.gather(2, previous)
            drawn.scatter_(2, previous, kept.masked_fill_(stays, math.inf))
        previous = drawn.topk(top_k, dim=2).indices
        routes[step] = previous
    return routes


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ExpertFlowError(f"{name} {value} must lie between {low:g} and {high:g}")
