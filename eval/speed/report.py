"""A run's JSON file, and the tables that are read off it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from eval.provenance import provenance, versions
from eval.report import cells_table, percent, share_cell

SCHEMA = 1
MORE_PACKAGES = ("accelerate", "triton")
HEAD = ("system", "layers", "memory", "rows", "prompt")
DECODE = (*HEAD, "tokens/s", "ms/step", "p10", "p90", "MB/token", "hits %", "link %", "bound %")
PREFILL = (*HEAD, "TTFT s", "x floor", "GB moved", "bound %", "answers/s", "peak GiB", "saved %")


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


def speed_tables(results: Mapping[str, Any]) -> tuple[Table, Table]:
    """Decode, then prefill and memory: a row a system and setting, and where layers were left out a second one, scaled
    to all."""
    figures = results["figures"]
    decode = cells_table(title(results), DECODE, [row for figure in figures for row in decode_rows(figure)])
    decode.caption = "link %, bound %: of a step, what its bytes at the link's rate, and the largest bound, would take"
    prefill = cells_table("", PREFILL, [row for figure in figures for row in prefill_rows(figure)])
    notes = [
        "x floor: TTFT over the bytes not resident at the link's rate; "
        f"answers/s: prompts read and {results['settings']['new_tokens']} tokens each"
    ]
    notes += [f"{name}: {meaning}" for name, meaning in {f["system"]: f["title"] for f in figures}.items()]
    refused = dict.fromkeys(f"{f['system']} at {f['resident']}: {f['refused']}" for f in figures if f["refused"])
    prefill.caption = "\n".join([*notes, *(f"not run: {line}" for line in refused)])
    decode.caption_justify = prefill.caption_justify = "left"
    return decode, prefill


def title(results: Mapping[str, Any]) -> str:
    """What was run, where, and how fast that can be."""
    target, ceilings = results["target"], results["ceilings"]
    layers = (
        f"{target['layers']} of {target['whole_layers']} layers, " if target["layers"] < target["whole_layers"] else ""
    )
    machine = f"link {ceilings['link_gbs']:.1f} GB/s, memory {ceilings['memory_gbs']:.0f} GB/s"
    machine += f", products {ceilings['product_tflops']:.1f} TFLOP/s"
    return f"{target['name']}, {layers}{target['format']}; {results['made']['device']}: {machine}"


def decode_rows(figure: Mapping[str, Any]) -> list[list[str]]:
    """The decode cells of a figure, and its scaled ones if it has them."""
    if figure["refused"]:
        return [_filled(_head(figure), DECODE)]
    decode, scaled = figure["decode"], figure["scaled"]
    cells = [
        number(decode["tokens_per_s"]),
        *(f"{decode['step_ms'][name]:.2f}" for name in ("median", "p10", "p90")),
        f"{decode['bytes_per_token'] / 1e6:.1f}",
        share_cell(decode["hit_rate"]),
        percent(decode["share_of"]["link"]),
        percent(decode["share_of"]["bound"]),
    ]
    rows = [[*_head(figure), *cells]]
    if scaled is not None:
        again = [*_head(figure, scaled=True), number(scaled["tokens_per_s"]), f"{scaled['step_ms']:.2f}"]
        rows.append(_filled(again, DECODE))
    return rows


def prefill_rows(figure: Mapping[str, Any]) -> list[list[str]]:
    """The other cells of a figure, and its scaled ones if it has them."""
    if figure["refused"]:
        return [_filled(_head(figure), PREFILL)]
    prefill, scaled, peak = figure["prefill"], figure["scaled"], figure["peak_reserved_bytes"]
    floor = prefill["times_not_resident_over_link"]
    cells = [
        f"{prefill['ttft_s']:.3f}",
        "-" if floor is None else number(floor),
        f"{prefill['bytes_moved'] / 1e9:.2f}",
        percent(prefill["share_of"]["bound"]),
        number(figure["requests"]["per_s"]),
        "-" if peak is None else f"{peak / 2**30:.2f}",
        percent(figure["saved_against_bf16"]),
    ]
    rows = [[*_head(figure), *cells]]
    if scaled is not None:
        rows.append(_filled([*_head(figure, scaled=True), f"{scaled['ttft_s']:.3f}"], PREFILL))
    return rows


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _head(figure: Mapping[str, Any], scaled: bool = False) -> list[str]:
    layers = "-" if figure["refused"] else str(figure["layers"])
    layers = f"{layers} as {figure['scaled']['layers']}" if scaled else layers
    return [figure["system"], layers, figure["resident"], str(figure["batch"]), str(figure["prompt"])]


def _filled(cells: list[str], columns: Sequence[str]) -> list[str]:
    return cells + ["-"] * (len(columns) - len(cells))


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
