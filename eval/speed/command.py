"""``python -m eval speed TARGET --out FILE``: systems side by side at given memory, batch sizes and prompt lengths."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from eval.plots import save
from eval.report import make_console, write_json
from eval.runner import progress_bar
from eval.speed.bench import Bench, find_target
from eval.speed.catalogue import SYSTEMS, chosen_systems
from eval.speed.ceilings import measure_ceilings
from eval.speed.drawn import Predictions
from eval.speed.measure import Run, measure, refused
from eval.speed.plots import save_profile, speed_figure
from eval.speed.profile_table import profile_tables, refusals
from eval.speed.profiling import profile_all
from eval.speed.report import speed_json, speed_tables, trace_lines
from eval.speed.shapes import SHAPES
from eval.speed.systems import Setting, SystemSpec
from eval.speed.trace_stats import statistics
from eval.speed.traces import SKEW, Trace, calibrate, load_trace, save_trace, synthetic
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.models.device import pick_device
from expertflow_quant.offload.budget import parse_budget
from expertflow_quant.offload.layer_policy import (
    BEST_LAYER_POLICY,
    LAYER_POLICIES,
    layer_policy,
    refuse_without_usage,
)


@dataclass(frozen=True)
class TraceOptions:
    """Where routes come from: a file, or a draw; ``stickiness`` None is calibrated."""

    file: Path | None
    skew: float
    stickiness: float | None
    seed: int


def speed(
    target: Annotated[str, typer.Argument(help=f"a checkpoint's folder, or one of {', '.join(SHAPES)}")],
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    layers: Annotated[int | None, typer.Option(min=1, help="first layers only; figures scaled to all beside")] = None,
    format: Annotated[str | None, typer.Option(help="of the experts: int4-g128 ...")] = None,
    resident: Annotated[list[str] | None, typer.Option(help="expert memory: 25%, 4GiB ...; by default 25%")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="rows at a time; by default 1")] = None,
    prompt: Annotated[list[int] | None, typer.Option(min=1, help="tokens of a prompt; by default 2048")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="decode steps that are timed")] = 128,
    warm: Annotated[int, typer.Option(min=0, help="decode steps before them")] = 32,
    trace: Annotated[Path | None, typer.Option(help="recorded routes, .npz; else they are drawn")] = None,
    skew: Annotated[float, typer.Option(help="exponent of the experts' popularity")] = SKEW,
    stickiness: Annotated[
        float | None,
        typer.Option(help="chance that a token keeps an expert; by default such that an LRU hits 70 % at 25 %"),
    ] = None,
    save_routes: Annotated[Path | None, typer.Option(help="write the routes here, to run them again")] = None,
    policy: Annotated[
        str, typer.Option(help=f"which expert makes room on our fast path: {', '.join(LAYER_POLICIES)}")
    ] = BEST_LAYER_POLICY,
    systems: Annotated[str | None, typer.Option(help=f"{','.join(s.name for s in SYSTEMS)}; by default all")] = None,
    baseline_layers: Annotated[int | None, typer.Option(min=1, help="layers that accelerate gets; scaled")] = None,
    time_limit: Annotated[float, typer.Option(help="seconds that prefills, warm-up and steps may each take")] = 60.0,
    profile: Annotated[
        bool, typer.Option("--profile", help="then show where the time of captured steps goes; builds them again")
    ] = False,
    tiny: Annotated[bool, typer.Option(help="a shape's tiny variant, for a try on any machine")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    seed: Annotated[int, typer.Option(help="of weights, prompts and routes")] = 0,
) -> None:
    """Time to the first token, tokens a second, bytes moved, and how near that is to what the machine can do."""
    console = make_console()
    try:
        specs = chosen_systems(systems)
        if not time_limit > 0:
            raise ValueError(f"a --time-limit of {time_limit} seconds leaves no time: give more than 0, or inf")
        found = find_target(target, layers, tiny, format, seed)
        refuse_without_usage(layer_policy(policy), None)
        bench = Bench(found, pick_device(device), seed, baseline_layers, policy)
        settings = make_settings(bench, resident or ["25%"], batch or [1], prompt or [2048], new_tokens, warm)
        options = TraceOptions(trace, skew, stickiness, seed)
        routes = make_trace(bench, settings, options)
        if save_routes is not None:
            save_trace(save_routes, routes)
        told = describe_trace(bench, routes, settings)
        for line in trace_lines(told):
            console.print(line, highlight=False)
        ceilings = measure_ceilings(bench.device)
        run = Run(bench, ceilings, time_limit)
        figures = run_all(specs, settings, routes, run, console)
    except (ExpertFlowError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    asked: dict[str, Any] = {
        "resident": resident or ["25%"],
        "batch": batch or [1],
        "prompt": prompt or [2048],
        "seed": seed,
    }
    asked |= {
        "policy": policy,
        "new_tokens": new_tokens,
        "warm": warm,
        "time_limit_s": time_limit,
        "systems": [s.name for s in specs],
    }
    if any(spec.looks_ahead for spec in specs):
        asked["predictions"] = Predictions.measured().to_json()
    results = speed_json(
        sys.argv[1:], str(bench.device), describe_target(bench), asked, told, asdict(ceilings), figures
    )
    write_results(out, results, console)
    if profile:
        profile_all(specs, settings, routes, run, results["figures"], console, lambda: write_json(out, results))
        write_profiles(out, results, console)


def make_settings(
    bench: Bench, resident: Sequence[str], batches: Sequence[int], prompts: Sequence[int], new_tokens: int, warm: int
) -> list[Setting]:
    """Every combination. Raises BudgetError for memory that cannot be read."""
    total = bench.expert_bytes
    return [
        Setting(share, parse_budget(share, total), rows, prompt, new_tokens, warm)
        for share, rows, prompt in itertools.product(resident, batches, prompts)
    ]


def make_trace(bench: Bench, settings: Sequence[Setting], options: TraceOptions) -> Trace:
    """Routes for the largest batch and the longest prompt; smaller settings take a part of them."""
    rows, prompt = max(s.batch for s in settings), max(s.prompt for s in settings)
    steps = settings[0].warm + settings[0].new_tokens
    if options.file is not None:
        return load_trace(options.file, bench.routes, steps=steps, rows=rows, prompt=prompt)
    sticky = options.stickiness
    if sticky is None:
        sticky = calibrate(bench.routes, skew=options.skew, seed=options.seed)
    return synthetic(
        bench.routes, steps=steps, rows=rows, prompt=prompt, skew=options.skew, stickiness=sticky, seed=options.seed
    )


def run_all(
    specs: Sequence[SystemSpec], settings: Sequence[Setting], trace: Trace, run: Run, console: Console
) -> list[dict[str, Any]]:
    """Each system is built once and goes through its settings; only one exists at a time."""
    figures = []
    with progress_bar(console) as bar:
        wanted = {spec.name: _settings_of(spec, settings, run.bench.expert_bytes) for spec in specs}
        task = bar.add_task("", total=sum(map(len, wanted.values())))
        for spec in specs:
            bar.update(task, description=f"{spec.title}: building")
            try:
                system = spec.build(run.bench)
            except (ExpertFlowError, ImportError, torch.OutOfMemoryError) as error:
                figures += [refused(spec, setting, run.bench, error) for setting in wanted[spec.name]]
                bar.advance(task, len(wanted[spec.name]))
                continue
            for setting in wanted[spec.name]:
                what = f"{spec.title}: {setting.resident}, {setting.batch} x {setting.prompt}"
                bar.update(task, description=what)
                figures.append(measure(spec, system, setting, trace.part(setting.batch, setting.prompt), run))
                bar.advance(task)
            system.close()
    return figures


def describe_target(bench: Bench) -> dict[str, Any]:
    """The model under test, for the results file."""
    shape, first = bench.target.shape, bench.layers[0]
    return {
        "name": shape.name,
        "kind": bench.target.kind,
        "layers": shape.layers,
        "whole_layers": shape.whole_layers,
        "format": bench.target.format,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "experts": first.experts,
        "top_k": first.top_k,
        "hidden": first.shape.hidden,
        "intermediate": first.shape.intermediate,
        "expert_bytes": bench.expert_bytes,
        "bf16_expert_bytes": bench.sizes.bf16_expert_bytes,
        "other_bytes_read_per_step": (bench.sizes.body + bench.sizes.head) * bench.dtype.itemsize,
    }


def describe_trace(bench: Bench, trace: Trace, settings: Sequence[Setting]) -> dict[str, Any]:
    """Origin and statistics of the routes at the settings' shares of memory."""
    total = bench.expert_bytes
    shares = [min(1.0, round(setting.budget_bytes / total, 4)) for setting in settings]
    found = statistics(trace.decode, trace.prefill, trace.experts, shares)
    return {"origin": trace.origin, "statistics": found}


def write_results(out: Path, results: dict[str, Any], console: Console) -> None:
    """The file, its plot, and the tables."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    for table in speed_tables(results):
        console.print(table)
    if all(figure["refused"] for figure in results["figures"]):
        console.print(f"no system ran; {out}", style="yellow", highlight=False)
        raise typer.Exit(1)
    save(speed_figure(results), out.with_suffix(".png"))
    console.print(f"results and plot: {out}, {out.with_suffix('.png')}", highlight=False)


def write_profiles(out: Path, results: dict[str, Any], console: Console) -> None:
    """The tables and the plot of the profiles, which the file has."""
    for table in profile_tables(results):
        console.print(table)
    for line in refusals(results):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if (picture := save_profile(results, out)) is not None:
        console.print(f"plot of the profiles: {picture}", highlight=False)


def _settings_of(spec: SystemSpec, settings: Sequence[Setting], all_bytes: int) -> list[Setting]:
    """All of them; for a system that takes no budget, those of the first one; for guesses, those with misses."""
    if spec.any_budget:
        return [s for s in settings if s.resident == settings[0].resident]
    return [s for s in settings if not spec.looks_ahead or s.budget_bytes < all_bytes]
