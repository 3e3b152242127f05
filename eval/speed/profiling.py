"""Captured systems once more under torch.profiler, after all timing: what was attached to a device slows what follows.

Every system is built and warmed up anew, so nothing that goes wrong here, up to a device that no longer answers, takes
figures with it that a run already has.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from eval.runner import progress_bar
from eval.speed.measure import Run, prompt_tokens
from eval.speed.profile import Event, profile_figures, read_events
from eval.speed.systems import Setting, System, SystemSpec
from eval.speed.traces import Trace
from expertflow_quant.formats import ExpertFlowError

STEPS = 4
SETTLE = 1
"""Steps under the profiler before them: the first replay of a graph that is watched takes longer."""

ACTIVITIES = ((ProfilerActivity.CUDA,), (ProfilerActivity.CPU, ProfilerActivity.CUDA))
"""What is recorded; the second where the first finds no kernel."""


def profile_all(
    specs: Sequence[SystemSpec],
    settings: Sequence[Setting],
    trace: Trace,
    run: Run,
    figures: Sequence[dict[str, Any]],
    console: Console,
    done: Callable[[], object],
) -> None:
    """Add ``profile`` to the decode figures of captured systems: numbers, or the reason that there are none. ``done``
    is called after each."""
    captured = {spec.name: spec for spec in specs if spec.captured}
    wanted = [figure for figure in figures if figure["system"] in captured and not figure["refused"]]
    by_key = {(setting.resident, setting.batch, setting.prompt): setting for setting in settings}
    with progress_bar(console) as bar:
        task = bar.add_task("", total=len(wanted))
        for figure in wanted:
            bar.update(task, description=f"{figure['title']}: profile at {figure['resident']}")
            setting = by_key[figure["resident"], figure["batch"], figure["prompt"]]
            found = _profiled(captured[figure["system"]], setting, trace.part(setting.batch, setting.prompt), run)
            step_ms = figure["decode"]["step_ms"]["mean"]
            figure["decode"]["profile"] = {"refused": None, "step_ms": step_ms, **found}
            done()
            bar.advance(task)


def _profiled(spec: SystemSpec, setting: Setting, trace: Trace, run: Run) -> dict[str, Any]:
    if run.bench.device.type != "cuda":
        return {"refused": f"a profile needs a GPU, this run's device is {run.bench.device}"}
    system: System | None = None
    try:
        system = spec.build(run.bench)
        system.prepare(setting)
        return profile_steps(system, setting, trace, run)
    except Exception as error:  # of any kind: the run's figures matter more than their explanation
        return {"refused": reason(error)}
    finally:
        with suppress(Exception):  # where a device has failed, giving back fails too
            if system is not None:
                system.close()


def reason(error: Exception) -> str:
    """One line: errors of a device run over many."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def profile_steps(system: System, setting: Setting, trace: Trace, run: Run) -> dict[str, Any]:
    """The figures of a few of the steps that were timed, of a system that is prepared."""
    device = run.bench.device
    routes = torch.from_numpy(trace.decode)[:, : system.layers].to(device, torch.int64)
    prompt = torch.from_numpy(trace.prompt_routes())[: system.layers].to(device, torch.int64)
    for activities in ACTIVITIES:
        system.prefill(prompt_tokens(setting, run.bench), prompt)
        if setting.warm:
            system.decode(routes[: setting.warm], run.limit_seconds)
        try:
            events, steps = record(system, routes[setting.warm :], activities, run.limit_seconds)
            break
        except ExpertFlowError:
            if activities == ACTIVITIES[-1]:
                raise
    moved = system.counters().bytes_moved / steps
    return {
        **profile_figures(events, steps),
        "bytes_moved": round(moved),
        "link_bound_ms": round(moved / run.ceilings.link_gbs / 1e6, 4),
    }


def record(
    system: System, routes: Tensor, activities: Sequence[ProfilerActivity], limit_seconds: float
) -> tuple[list[Event], int]:
    """What the device did in up to ``STEPS`` steps after those that settle it, and how many there were; the system's
    counters are of them alone. Raises ExpertFlowError where the profiler saw nothing."""
    settle = min(SETTLE, len(routes) - 1)
    watched = routes[settle : settle + STEPS]
    phases = schedule(wait=0, warmup=1, active=1, repeat=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"

        def write(made: profile) -> None:
            made.export_chrome_trace(str(path))

        with profile(activities=activities, schedule=phases, on_trace_ready=write) as profiler:
            if settle:
                system.decode(routes[:settle], limit_seconds)
            system.reset_counters()
            wait(routes.device)
            profiler.step()
            steps = len(system.decode(watched, limit_seconds).steps)
            wait(routes.device)
            profiler.step()
        return read_events(path), steps


def wait(device: torch.device) -> None:
    """Until ``device`` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
