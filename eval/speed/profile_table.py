"""The tables of a run's profiles: where a decode step's time went, and which kernels took how much of it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from eval.report import cells_table
from eval.speed.profile import KERNELS, parts

HEAD = ("system", "memory", "rows", "prompt")
PARTS = (*HEAD, "ms/step", "ms profiled", "link bound", "link only", "both", "others only", "idle")


def profile_of(figure: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The profile of a row's decode steps, None where there is none."""
    found = None if figure["refused"] else figure["decode"].get("profile")
    return found if found and not found["refused"] else None


def profile_tables(results: Mapping[str, Any]) -> tuple[Table, ...]:
    """A row a profile: milliseconds of a step by what was busy, then by group of kernels. None without any profile."""
    busy, kernels = [], []
    for figure in results["figures"]:
        if (found := profile_of(figure)) is None:
            continue
        head = [figure["system"], figure["resident"], str(figure["batch"]), str(figure["prompt"])]
        times = found["step_ms"], found["ms"], found["link_bound_ms"], *parts(found).values()
        busy.append([*head, *(f"{ms:.2f}" for ms in times)])
        groups = (found["groups"][group] for group in KERNELS)
        kernels.append([*head, *(f"{group['ms']:.2f} ({group['kernels']:g})" for group in groups)])
    if not busy:
        return ()
    first = cells_table("a decode step in ms, as timed and under the profiler", PARTS, busy)
    first.caption = (
        "link bound: the bytes it moved at the link's rate; link: while a fill runs, others: any other kernel"
    )
    second = cells_table("kernels of a step in ms (how many)", (*HEAD, *KERNELS), kernels)
    second.caption = "added up: kernels that ran at the same time, two fills ahead among them, count as many times"
    for table in (first, second):
        table.caption_justify = "left"
    return first, second


def refusals(results: Mapping[str, Any]) -> list[str]:
    """A line for every profile that there is not, and why."""
    asked = [figure for figure in results["figures"] if not figure["refused"] and "profile" in figure["decode"]]
    refused = [(figure, figure["decode"]["profile"]["refused"]) for figure in asked]
    lines = [f"no profile: {figure['system']} at {figure['resident']}: {why}" for figure, why in refused if why]
    return list(dict.fromkeys(lines))
