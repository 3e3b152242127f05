"""A bound on every plan, and the few choices among which the best plan must lie.

With a price on each limit's use, layers and experts decide alone: the least of value + price * use over the slots of a
layer, and within them over the formats of each expert. That sum, less the prices, is below every plan that keeps the
limits (Lagrange; Geoffrion 1974); the best prices come from Kelley's cutting planes, one small linear program a round.
A choice whose cost at these prices lies more than t above the least of its layer costs any plan at least t over the
bound, so leaving out all such choices leaves every plan closer to the bound than t untouched.
"""

import torch
from torch import Tensor

from expertflow_quant.offload.planner_choices import Allowance, Choices, Kept
from expertflow_quant.offload.planner_program import best_prices

_ROUNDS = 60
_CLOSE = 1e-5


def kept_choices(choices: Choices, allowance: Allowance, most: int) -> Kept:
    """At most about ``most`` choices, the cheapest ones at the best prices; all of them where there are no more."""
    bound, prices = _bound(choices, allowance)
    if choices.value.numel() <= most:
        everything = torch.ones(choices.value.shape, dtype=torch.bool)
        return Kept(everything, everything.any(2).any(1), bound, torch.inf)
    priced = _priced(choices, allowance, prices)
    cheapest = priced.amin(2)
    of_slots = cheapest.sum(1)
    over_slots = of_slots - of_slots.amin(1, keepdim=True)
    over = priced - cheapest[:, :, None, :] + over_slots[:, None, None, :]
    reach = float(over.flatten().kthvalue(most).values)
    mask = over <= reach
    # an expert must have a format at every number of slots that is weighed, which its cheapest one always is
    return Kept(mask, over_slots <= reach, bound, reach)


def _bound(choices: Choices, allowance: Allowance) -> tuple[float, Tensor]:
    """The highest bound found and its prices."""
    uses = allowance.shares(choices)
    scale = float(choices.value.amax((2, 3)).sum()) or 1.0
    prices = torch.zeros(len(uses), dtype=torch.float64)
    best, best_at, cuts = -torch.inf, prices, []
    for _ in range(_ROUNDS):
        priced = choices.value + sum(price * use for price, use in zip(prices, uses, strict=True))
        per_expert, format_at = priced.min(2)
        least, slots_at = per_expert.sum(1).min(1)
        bound = float(least.sum() - prices.sum())
        if bound > best:
            best, best_at = bound, prices
        picked = format_at.gather(2, slots_at[:, None, None].expand(-1, format_at.shape[1], 1))
        cuts.append(_cut(choices.value, uses, picked, slots_at))
        prices, ceiling = best_prices(cuts, scale)
        if ceiling - best <= _CLOSE * max(abs(best), 1e-12):
            break
    return best, best_at


def _priced(choices: Choices, allowance: Allowance, prices: Tensor) -> Tensor:
    return choices.value + sum(p * use for p, use in zip(prices, allowance.shares(choices), strict=True))


def _cut(value: Tensor, uses: list[Tensor], formats: Tensor, slots: Tensor) -> tuple[list[float], list[list[float]]]:
    """Of the plan where expert e of layer l has format ``formats[l, e, 0]`` and layer l ``slots[l]``: every layer's
    value, and its use of each limit."""

    def of_layers(array: Tensor) -> list[float]:
        _, experts, kinds, _ = array.shape
        at_slots = array.gather(3, slots[:, None, None, None].expand(-1, experts, kinds, 1))[..., 0]
        return [float(total) for total in at_slots.gather(2, formats)[..., 0].sum(1)]

    return of_layers(value), [of_layers(use) for use in uses]
