"""From seconds and counters to figures: rates, what bounds them, and the share of the bound that was reached.

Bounds are times that no arrangement could go below: the bytes that were moved at the link's rate, the bytes that must
be read at the device memory's rate, the products at the rate of one large product.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.speed.ceilings import Ceilings


@dataclass(frozen=True)
class Work:
    """What one pass asks for at least: bytes ``moved`` through the link, bytes ``read`` of device memory, ``flops``."""

    moved: float
    read: float
    flops: float


def bounds(work: Work, ceilings: Ceilings) -> dict[str, float]:
    """Seconds by ceiling, and under "bound" the largest of them, since all can go on at once."""
    found = {
        "link": work.moved / (ceilings.link_gbs * 1e9),
        "memory": work.read / (ceilings.memory_gbs * 1e9),
        "product": work.flops / (ceilings.product_tflops * 1e12),
    }
    return found | {"bound": max(found.values())}


def pass_figures(seconds: float, work: Work, ceilings: Ceilings) -> dict[str, Any]:
    """Seconds of a pass beside its bounds; ``share_of_*``: 1 at the bound."""
    found = bounds(work, ceilings)
    return {
        "bytes_moved": round(work.moved),
        "bytes_read": round(work.read),
        "flops": round(work.flops),
        "bound_s": {name: _digits(value) for name, value in found.items()},
        "share_of": {name: _digits(value / seconds) for name, value in found.items()},
    }


def step_figures(steps: Sequence[float], rows: int, work: Work, ceilings: Ceilings) -> dict[str, Any]:
    """Decode figures: tokens a second of all rows, milliseconds a step, and the bounds of an average step."""
    seconds = statistics.fmean(steps)
    found = pass_figures(seconds, work, ceilings)
    return {
        "steps": len(steps),
        "tokens_per_s": _digits(rows / seconds),
        "bound_tokens_per_s": {name: _digits(rows / s) if s else None for name, s in found["bound_s"].items()},
        "step_ms": {
            "mean": _digits(1e3 * seconds),
            "median": _digits(1e3 * statistics.median(steps)),
            **{f"p{percent}": _digits(1e3 * quantile(steps, percent / 100)) for percent in (10, 90)},
        },
        "bytes_per_token": round(work.moved / rows),
        **found,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie, between neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _digits(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")
