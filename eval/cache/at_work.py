"""``python -m eval policies OUT --out FILE``: every switch of the plain path's cache on a real engine, same answers."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import expertflow_quant
from eval.cache.at_work_plot import at_work_figure
from eval.plots import save
from eval.provenance import provenance
from eval.report import cells_table, make_console, write_json
from eval.runner import progress_bar
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.samples import Item, make_items


def switches(usage: Path | None, learned: Path | None) -> list[dict[str, Any]]:
    """What ``load`` is told, run by run; LRU on demand first."""
    told: list[dict[str, Any]] = [{"policy": name} for name in ("lru", "scan", "lfu", "predictive")]
    guesses = ["frequency", "previous", "next-gate"]
    if usage is not None:
        told += [{"policy": "static", "usage": usage}, {"policy": "predictive", "usage": usage}]
    told += [{"policy": "lru", "predictor": "next-gate", "ahead": 1.0}]
    told += [{"policy": "predictive", "predictor": name, "ahead": 1.0} for name in guesses]
    if usage is not None:
        told.append({"policy": "predictive", "predictor": "affinity", "usage": usage, "ahead": 1.0})
    if learned is not None:
        told += [{"policy": "predictive", "predictor": str(learned), "ahead": ahead} for ahead in (0.0, 1.0, 2.0)]
    return told


def policies(
    checkpoint: Annotated[Path, typer.Argument(help="quantized checkpoint")],
    out: Annotated[Path, typer.Option(help="results file")],
    usage: Annotated[Path | None, typer.Option(help="recorded trace that policies learn from")] = None,
    learned: Annotated[Path | None, typer.Option(help="folder of a trained predictor")] = None,
    items: Annotated[int, typer.Option(min=1, help="questions of each task")] = 48,
    expert_memory: Annotated[str, typer.Option(help="device bytes for experts")] = "25%",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
) -> None:
    """Hits, bytes and time of the plain path under every policy and predictor, answering charts and documents."""
    console = make_console()
    asked = [item for kind in ("chart", "document") for item in make_items(kind, "test", items)]
    told = switches(usage, learned)
    try:
        with progress_bar(console) as bar:
            row = bar.add_task("answering", total=len(told))
            found = []
            for given in told:
                found.append(run(checkpoint, expert_memory, device, given, asked))
                bar.advance(row)
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    answers = [entry.pop("answers") for entry in found]
    for entry, own in zip(found, answers, strict=True):
        entry["same_answers"] = own == answers[0]
    settings = {"checkpoint": checkpoint.name, "items": items, "expert_memory": expert_memory}
    results = {"made": provenance("eval", sys.argv[1:], device), "settings": settings, "runs": found}
    write_json(out, results)
    save(at_work_figure(results), out.with_suffix(".png"))
    rows = [
        [entry["policy"], entry["predictor"], f"{entry['ahead']:g}", f"{100 * entry['hit_rate']:.1f} %"]
        + [f"{entry[name] / 1e3:.0f}" for name in ("bytes_per_token", "ahead_bytes_per_token")]
        + [f"{entry['ms_per_token']:.2f}", "yes" if entry["same_answers"] else "no"]
        for entry in found
    ]
    columns = ["policy", "predictor", "ahead", "hits", "kB/token", "of it ahead", "ms/token", "same answers"]
    console.print(cells_table(f"plain path, experts in {expert_memory}", columns, rows))


def run(checkpoint: Path, expert_memory: str, device: str, given: dict[str, Any], asked: list[Item]) -> dict[str, Any]:
    """One engine with the switches ``given``; on a CPU the time is the processor's, so that other work does not disturb
    it."""
    engine = expertflow_quant.load(checkpoint, expert_memory, device, fast=False, **given)
    clock = time.process_time if device == "cpu" else time.perf_counter
    engine.generate([asked[0].messages], 4)
    engine.reset_stats()
    started = clock()
    answers = [engine.generate([item.messages], item.max_new_tokens)[0].token_ids for item in asked]
    seconds, stats = clock() - started, engine.stats
    tokens = sum(map(len, answers))
    return {
        "policy": given["policy"] + (", usage" if "usage" in given else ""),
        "predictor": Path(given.get("predictor", "off")).name,
        "ahead": given.get("ahead", 0.0),
        "hit_rate": round(stats.hit_rate, 4),
        "bytes_per_token": round(stats.bytes_moved / tokens),
        "ahead_bytes_per_token": round(stats.ahead_bytes / tokens),
        "ms_per_token": round(1000 * seconds / tokens, 3),
        "stall_ms_per_token": round(1000 * stats.stall_seconds / tokens, 3),
        "answers": answers,
    }
