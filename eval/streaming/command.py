"""``python -m eval streaming --out FILE``: the memory that quantizing takes, of a model that is larger than that."""

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eval.plots import save
from eval.provenance import provenance
from eval.report import make_console, write_json
from eval.runner import progress_bar
from eval.streaming.model import Sizes, write_model
from eval.streaming.plots import memory_figure
from eval.streaming.watch import Watched, job_command, watch
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.models.device import pick_device
from expertflow_quant.pipeline.methods import check_method

GIB = 1 << 30
MEMORY_LIMIT = 3 * GIB
POINTS = 400  # of a curve in the results file

Methods = Annotated[
    list[str] | None, typer.Option("--method", help="rtn, gptq, awq; may be given again; by default rtn, gptq")
]


def streaming(
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    method: Methods = None,
    form: Annotated[str, typer.Option("--format", help="of the experts")] = "int4-g32",
    layers: Annotated[int, typer.Option(min=1, help="of 207 MB each in bf16")] = 42,
    real: Annotated[bool, typer.Option(help="layers of Qwen3-30B-A3B's sizes, 1.25 GB each")] = False,
    batches: Annotated[int, typer.Option(min=1, help="of calibration, each of --rows rows")] = 4,
    rows: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="of a row")] = 128,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    folder: Annotated[Path | None, typer.Option(help="for the model and the checkpoints, which are deleted")] = None,
    tiny: Annotated[bool, typer.Option(help="layers of 1 MB, for a try")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...; it is host memory that is watched")] = "cpu",
    seed: Annotated[int, typer.Option(help="of the weights")] = 0,
) -> None:
    """Make a model with random weights, quantize it, and watch how much memory that takes."""
    console = make_console()
    sizes = _sizes(layers, tiny, real)
    methods = method or ["rtn", "gptq"]
    try:
        for name in methods:
            check_method(name)
        with tempfile.TemporaryDirectory(dir=folder, prefix="streaming-") as room:
            nbytes = _write(Path(room) / "model", sizes, seed, console)
            on = str(pick_device(device))
            jobs = {name: [form, 0 if name == "rtn" else batches, rows, tokens, on] for name in methods}
            runs = [_run(Path(room), name, jobs[name], threads, console) for name in methods]
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    results = {
        **provenance("eval", _told(sys.argv[1:]), on),
        "model": {"bytes": nbytes, **asdict(sizes), "decoder_layer_bytes": sizes.layer_bytes},
        "format": form,
        "calibration": {"batches": batches, "rows": rows, "tokens": tokens},
        "threads": threads,
        "limit_bytes": MEMORY_LIMIT,
        "runs": runs,
    }
    write_json(out, results)
    save(memory_figure(results), out.with_suffix(".png"))
    for run in runs:
        console.print(verdict(run, nbytes), highlight=False)
    if any(run["peak_bytes"] > MEMORY_LIMIT for run in runs):
        raise typer.Exit(1)


def _sizes(layers: int, tiny: bool, real: bool) -> Sizes:
    if tiny:
        return Sizes(layers, experts=16, hidden=128, intermediate=64, vocabulary=512, heads=4, top_k=2)
    if real:
        return Sizes(layers, experts=128, hidden=2048, intermediate=768, vocabulary=151936, heads=64, top_k=8)
    return Sizes(layers)


def _told(arguments: Sequence[str]) -> list[str]:
    """The command line without the folder for temporary files, which decides nothing."""
    before = ["", *arguments][:-1]
    return [each for each, last in zip(arguments, before, strict=True) if "--folder" not in (each, last)]


def verdict(run: dict[str, Any], nbytes: int) -> str:
    """One line about a run."""
    return (
        f"{run['method']}: {nbytes / 1e9:.2f} GB of weights in {run['seconds']:.0f} s; at most "
        f"{run['peak_bytes'] / GIB:.2f} GiB resident, {run['start_bytes'] / GIB:.2f} GiB of them before the model was "
        f"opened (limit {MEMORY_LIMIT / GIB:.0f} GiB)"
    )


def _write(folder: Path, sizes: Sizes, seed: int, console: Console) -> int:
    with progress_bar(console) as bar:
        task = bar.add_task("writing the model", total=None)
        return write_model(folder, sizes, seed, lambda done, total: bar.update(task, completed=done, total=total))


def _run(room: Path, method: str, job: Sequence[object], threads: int, console: Console) -> dict[str, Any]:
    out = room / method
    with console.status(f"{method}: quantizing"):
        started = time.time()
        watched = watch(job_command(room / "model", out, method, *job), threads)
    shutil.rmtree(out)
    return summary(method, watched, started)


def summary(method: str, watched: Watched, started: float) -> dict[str, Any]:
    """A run as it goes into the results: bytes, and seconds since ``started``."""
    said = {event["what"]: event for event in reversed(watched.events)}
    ready, done = said["libraries are loaded"]["time"], said["done"]
    before = [sample["rss"] for sample in watched.samples if sample["time"] <= ready]
    thinned = watched.samples[:: max(1, len(watched.samples) // POINTS)]
    largest = max(watched.samples, key=lambda sample: sample["rss"])
    return {
        "method": method,
        "seconds": done["seconds"],
        "expert_bytes": done["expert_bytes"],
        "peak_bytes": watched.peak,
        "start_bytes": before[-1] if before else 0,
        "at_peak": {name: largest[name] for name in ("rss", "anonymous", "file", "shared")},
        "layers_begin": [round(event["time"] - started, 2) for event in _first_of_layers(watched.events)],
        "curve": {
            "seconds": [round(sample["time"] - started, 2) for sample in thinned],
            "rss": [sample["rss"] for sample in thinned],
            "anonymous": [sample["anonymous"] for sample in thinned],
        },
    }


def _first_of_layers(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was said first in every layer: its first expert is done."""
    first: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["what"].startswith("layer "):
            first.setdefault(event["what"], event)
    return list(first.values())
