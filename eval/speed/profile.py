"""What the device did in profiled decode steps: kernels by group, and how far fills ran beside everything else.

The link is busy while a fill runs, everything else is computing: a step is the time of fills alone, of both at once, of
computing alone, and of neither. Read from the trace in Chrome's format that torch.profiler writes.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertflow_quant.formats import ExpertFlowError

FILL, OTHER = "fill", "other"
KERNELS = {
    "fill": ("_fill",),
    "control": ("_resolve", "_count_hits", "_overflow", "topk_kernel", "_plan", "_cut"),
    "experts": ("gate_up_kernel", "down_kernel", "grouped_kernel", "combine_kernel", "unpack_kernel"),
    "attention": ("split_kernel", "join_kernel"),
    "dense": (),
    "other": ("round_span_kernel",),
}
"""The library's kernels by group. A device knows a Triton kernel by the bare name of its function. ``_overflow`` only
deals out places, the records that go there are moved by ``_fill``; dense is what others' names say (``DENSE``)."""

DENSE = re.compile(r"^triton_|gemm|gemv|nvjet|cublas|cutlass|splitk", re.IGNORECASE)
"""Kernels of torch.compile, and matrix products of cuBLAS and CUTLASS."""

OVER_LINK = "HtoD"
"""In the name of a copy from host memory: streamed steps move their records by these."""

CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
LARGEST = 12
"""Kernels that are named one by one, those that took longest."""

NAME = 80
"""Characters that are kept of a name: those of templates fill pages."""

_GROUP_OF = {name: group for group, names in KERNELS.items() for name in names}
Span = tuple[float, float]


@dataclass(frozen=True)
class Event:
    """A kernel, copy or memset: its name, and when it began and ended, in microseconds."""

    name: str
    begin: float
    end: float


def group_of(name: str) -> str:
    """The group, one of ``KERNELS``, of a kernel, copy or memset as a trace names it."""
    if name.startswith(("Memcpy", "Memset")):
        return FILL if OVER_LINK in name else OTHER
    return _GROUP_OF.get(name) or ("dense" if DENSE.search(name) else OTHER)


def read_events(path: Path) -> list[Event]:
    """The device's work in a trace file, in the order of beginning. Raises ExpertFlowError where there is none."""
    trace = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
    events = [
        Event(str(found["name"]), float(found["ts"]), float(found["ts"]) + float(found["dur"]))
        for found in trace["traceEvents"]
        if found.get("ph") == "X" and found.get("cat") in CATEGORIES
    ]
    if not events:
        raise ExpertFlowError(
            "the profiler saw no kernel: run without another profiler beside it, and where CUPTI can be loaded"
        )
    return sorted(events, key=lambda event: event.begin)


def profile_figures(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Milliseconds and kernels of one of ``steps`` steps, on average."""
    first, last = min(event.begin for event in events), max(event.end for event in events)
    link = union((event.begin, event.end) for event in events if group_of(event.name) == FILL)
    others = union((event.begin, event.end) for event in events if group_of(event.name) != FILL)

    def per_step(microseconds: float) -> float:
        return round(microseconds / 1e3 / steps, 4)

    def summed(chosen: Sequence[Event]) -> dict[str, float]:
        return {
            "ms": per_step(sum(event.end - event.begin for event in chosen)),
            "kernels": round(len(chosen) / steps, 2),
        }

    groups = {group: summed([event for event in events if group_of(event.name) == group]) for group in KERNELS}
    by_name: dict[str, list[Event]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event)
    named: list[dict[str, Any]] = [
        {"name": name[:NAME], "group": group_of(name), **summed(chosen)} for name, chosen in by_name.items()
    ]
    return {
        "steps": steps,
        "ms": per_step(last - first),
        "link_busy_ms": per_step(length(link)),
        "others_busy_ms": per_step(length(others)),
        "both_ms": per_step(length(link) + length(others) - length(union([*link, *others]))),
        "idle_ms": per_step(last - first - length(union([*link, *others]))),
        "groups": groups,
        "largest": sorted(named, key=lambda found: -found["ms"])[:LARGEST],
    }


def parts(profile: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a step that add up to all of it: what the link and everything else did, apart or together."""
    both = profile["both_ms"]
    return {
        "link only": profile["link_busy_ms"] - both,
        "both": both,
        "others only": profile["others_busy_ms"] - both,
        "idle": profile["idle_ms"],
    }


def union(spans: Iterable[Span]) -> list[Span]:
    """The same times as spans that are in order and do not touch."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(spans: Iterable[Span]) -> float:
    """Of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)
