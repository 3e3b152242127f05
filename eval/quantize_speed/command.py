"""``python -m eval quantize-speed --out FILE``: seconds to quantize one layer's experts, batched and one by one."""

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from eval.plots import save
from eval.provenance import provenance
from eval.quantize_speed.layer import RandomLayer
from eval.quantize_speed.measure import Bench
from eval.quantize_speed.plots import quantize_speed_figure
from eval.report import cells_table, make_console, mebibytes, write_json
from expertflow_quant.formats import ExpertFlowError, ExpertShape, Format
from expertflow_quant.pipeline.methods import MethodOptions

QWEN3_30B = {"hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8}
TARGETS = {"gptq": 10.0, "awq": 20.0}
"""Seconds for a layer of Qwen3-30B-A3B's shape on an H100."""
TINY = {"hidden": 64, "intermediate": 32, "experts": 8, "top_k": 2, "tokens": 256}


def quantize_speed(
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    hidden: Annotated[int, typer.Option(min=8)] = QWEN3_30B["hidden"],
    intermediate: Annotated[int, typer.Option(min=8)] = QWEN3_30B["intermediate"],
    experts: Annotated[int, typer.Option(min=1)] = QWEN3_30B["experts"],
    top_k: Annotated[int, typer.Option(min=1)] = QWEN3_30B["top_k"],
    tokens: Annotated[int, typer.Option(min=1, help="of calibration; a token goes to top-k experts")] = 32768,
    format: Annotated[str, typer.Option(help="int4-g128, int3-g64-asym ...")] = "int4-g32",
    method: Annotated[list[str] | None, typer.Option(help="awq, gptq; default: both")] = None,
    alone: Annotated[int, typer.Option(min=1, help="experts timed one by one")] = 8,
    checked: Annotated[int, typer.Option(min=1, help="experts made again on the CPU")] = 2,
    device: Annotated[str | None, typer.Option(help="default: cuda where there is one")] = None,
    tiny: Annotated[bool, typer.Option(help="a small layer, whatever the sizes say")] = False,
) -> None:
    """Random weights of one layer, random inputs routed to its experts; the default is a layer of Qwen3-30B-A3B."""
    console = make_console()
    sizes = {"hidden": hidden, "intermediate": intermediate, "experts": experts, "top_k": top_k, "tokens": tokens}
    sizes = TINY if tiny else sizes
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed, shape = Format.parse(format), ExpertShape(sizes["hidden"], sizes["intermediate"])
        layer = RandomLayer.make(shape, sizes["experts"], sizes["top_k"], sizes["tokens"], target)
        found: dict[str, Any] = {}
        for name in method or list(TARGETS):
            bench = Bench(layer, name, parsed, MethodOptions(), target)
            found[name] = bench.measure(min(alone, sizes["experts"]), min(checked, sizes["experts"]))
            full = all(sizes[key] == value for key, value in QWEN3_30B.items()) and target != "cpu"
            found[name]["target_seconds"] = TARGETS.get(name) if full else None
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    counts = sorted(layer.rows)
    rows = {"fewest": counts[0], "median": counts[len(counts) // 2], "most": counts[-1]}
    settings = {**sizes, "format": format, "rows": rows, "options": MethodOptions().to_json()}
    made = provenance("eval", sys.argv[1:], target)
    write_json(out, {"made": made, "settings": settings, "methods": found})
    title = f"{sizes['experts']} experts of {sizes['hidden']} x {sizes['intermediate']}, {format}, {made['device']}"
    save(quantize_speed_figure(found, title), out.with_suffix(".png"))
    console.print(speed_table(found, title))
    console.print(f"results and plot: {out}, {out.with_suffix('.png')}", highlight=False)
    if not all(each["check"]["passed"] for each in found.values()):
        console.print("batched experts differ from single ones on the CPU: see check in the results", style="red")
        raise typer.Exit(1)


def speed_table(methods: dict[str, Any], title: str) -> Table:
    columns = ["method", "batched", "at most", "one by one", "together", "device memory", "equal codes", "error apart"]
    rows = []
    for name, found in methods.items():
        target, memory, check = found["target_seconds"], found["device_bytes"], found["check"]
        rows.append(
            [
                name,
                f"{found['batched_seconds']:.2f} s",
                "" if target is None else f"{target:.0f} s",
                f"{found['one_by_one_layer_seconds']:.2f} s",
                str(found["experts_together"]),
                "" if memory is None else mebibytes(memory),
                f"{100 * check['equal_codes']:.2f} %",
                f"{100 * check['error_apart']:+.3f} %",
            ]
        )
    return cells_table(title, columns, rows)
