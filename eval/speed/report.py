"""A run's JSON file, and the table that is read off it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from eval.provenance import provenance, versions
from eval.report import cells_table, percent, share_cell

SCHEMA = 1
MORE_PACKAGES = ("accelerate", "triton")
COLUMNS = ("system", "memory", "rows", "prompt", "TTFT s", "tokens/s", "ms/step", "p10", "p90")
COLUMNS += ("MB/ token", "hits %", "link %", "bound %", "peak GiB", "saved %")


def speed_json(
    arguments: Sequence[str],
    device: str,
    target: Mapping[str, Any],
    settings: Mapping[str, Any],
    trace: Mapping[str, Any],
    ceilings: Mapping[str, Any],
    figures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything a table or plot shows, with how it was made."""
    made = provenance("eval", arguments, device)
    made["packages"] |= versions(MORE_PACKAGES)
    made["cuda"] = torch.version.cuda
    return {
        "kind": "speed",
        "schema": SCHEMA,
        "made": made,
        "target": dict(target),
        "settings": dict(settings),
        "trace": dict(trace),
        "ceilings": dict(ceilings),
        "figures": [dict(figure) for figure in figures],
    }


def speed_table(results: Mapping[str, Any]) -> Table:
    """One row a system and setting; where layers were left out, a second one scaled to all."""
    table = cells_table(title(results), COLUMNS, [row for figure in results["figures"] for row in figure_rows(figure)])
    names = {figure["system"]: figure["title"] for figure in results["figures"]}
    notes = ["link %: bytes moved at the link's rate; bound %: the largest of link, memory, products; of a step's time"]
    notes += [f"{name}: {meaning}" for name, meaning in names.items()]
    refused = dict.fromkeys(
        f"{f['system']} at {f['resident']}: {f['refused']}" for f in results["figures"] if f["refused"]
    )
    table.caption = "\n".join([*notes, *(f"not run: {line}" for line in refused)])
    table.caption_justify = "left"
    return table


def title(results: Mapping[str, Any]) -> str:
    """What was run, where, and how fast that can be."""
    target, ceilings = results["target"], results["ceilings"]
    layers = (
        f"{target['layers']} of {target['whole_layers']} layers, " if target["layers"] < target["whole_layers"] else ""
    )
    machine = f"link {ceilings['link_gbs']:.1f} GB/s, memory {ceilings['memory_gbs']:.0f} GB/s"
    machine += f", products {ceilings['product_tflops']:.1f} TFLOP/s"
    return f"{target['name']}, {layers}{target['format']}; {results['made']['device']}: {machine}"


def figure_rows(figure: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a figure's row, and of its scaled one if it has one."""
    where = [figure["resident"], str(figure["batch"]), str(figure["prompt"])]
    if figure["refused"]:
        return [_filled([figure["system"], *where])]
    prefill, decode, scaled = figure["prefill"], figure["decode"], figure["scaled"]
    step, peak = decode["step_ms"], figure["peak_reserved_bytes"]
    cells = [
        f"{prefill['ttft_s']:.3f}",
        f"{decode['tokens_per_s']:.2f}",
        *(f"{step[name]:.2f}" for name in ("median", "p10", "p90")),
        f"{decode['bytes_per_token'] / 1e6:.1f}",
        share_cell(decode["hit_rate"]),
        percent(decode["share_of"]["link"]),
        percent(decode["share_of"]["bound"]),
        "-" if peak is None else f"{peak / 2**30:.2f}",
        percent(figure["saved_against_bf16"]),
    ]
    if scaled is None:
        return [[figure["system"], *where, *cells]]
    again = [f"{scaled['ttft_s']:.3f}", f"{scaled['tokens_per_s']:.2f}", f"{scaled['step_ms']:.2f}"]
    return [
        [f"{figure['system']}, {scaled['measured_layers']} layers", *where, *cells],
        _filled([f"  scaled to {scaled['layers']}", *where, *again]),
    ]


def _filled(cells: list[str]) -> list[str]:
    return cells + ["-"] * (len(COLUMNS) - len(cells))


def trace_lines(trace: Mapping[str, Any]) -> list[str]:
    """The statistics of a trace for a person."""
    found, origin = trace["statistics"], trace["origin"]
    if origin["kind"] == "synthetic":
        what = f"synthetic, skew {origin['skew']:g}, stickiness {origin['stickiness']:g}, seed {origin['seed']}"
    else:
        what = f"recorded in {origin['file']}"
    by_rows = {
        rows: ", ".join(f"{percent(rate)} % at {100 * float(share):g} %" for share, rate in rates.items())
        for rows, rates in found["lru_hit_rate"].items()
    }
    distinct = ", ".join(f"{n:g} at {rows}" for rows, n in found["distinct_by_rows"].items())
    return [
        f"routes: {what}; {found['steps']} steps of {found['rows']} rows, {found['layers']} layers",
        *(f"  hits of an LRU in every layer, {rows} row(s): {hits}" for rows, hits in by_rows.items()),
        f"  distinct experts a layer and step by rows: {distinct}; in a prefill {found['distinct_in_prefill']:g}",
        f"  effective number of experts {found['effective_experts']:g}; {percent(found['repeat_rate'])} % of a token's "
        "experts were the previous token's",
    ]
