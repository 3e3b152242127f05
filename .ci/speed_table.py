"""The README's table of speed on a GPU, from the files that `python -m eval speed` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "eval" / "results"
WHOLE, REQUESTS, PEERS = "speed-qwen3-30b.json", "speed-qwen3-30b-requests.json", "speed-qwen3-30b-12-layers.json"


def speed_table() -> str:
    """Each figure beside its ceiling, measured in the same run, as Markdown."""
    whole, requests, peers = (_read(name) for name in (WHOLE, REQUESTS, PEERS))
    part, whole_of_it = whole["settings"]["resident"]
    guesses = whole["settings"]["predictions"]
    rows = [["", "measured", "ceiling", "share of it"]]
    rows += [
        _decode(whole, "graph", part, f"decode, {part} of the experts on the device"),
        _decode(
            whole,
            "graph-predicted",
            part,
            f"the same, guesses that find {100 * guesses['recall']:.0f} % of the misses, "
            f"{100 * guesses['precision']:.0f} % of them right",
        ),
        _decode(whole, "graph-oracle", part, "the same, told what will be routed"),
        _decode(whole, "graph", whole_of_it, "decode, all experts on the device"),
        _prefill(whole, "graph", part),
        _beside(whole),
    ]
    rows += [_requests(requests, batch) for batch in (requests["settings"]["batch"][-1], 1)]
    rows += [
        _decode(whole, "lru", part, f"decode, host-driven LRU cache, {part}, int4"),
        _scaled(peers, "lru-bf16", "the same in bf16, as many bytes"),
        _scaled(peers, "accelerate", "decode, transformers with accelerate, bf16"),
    ]
    lines = [rows[0], ["---", "---:", "---:", "---:"], *rows[1:]]
    saved = 100 * _figure(whole, "graph", part)["saved_against_bf16"]
    target, made = whole["target"], whole["made"]
    layers = [_figure(peers, system)["scaled"]["measured_layers"] for system in ("lru-bf16", "accelerate")]
    return "\n".join(
        [
            "",
            *("| " + " | ".join(cells) + " |" for cells in lines),
            "",
            f"{target['name']}'s shapes with random weights, {target['format']}, on an {made['device']}; batch 1 and "
            f"a prompt of {whole['settings']['prompt'][0]:,} tokens unless said otherwise, routes drawn so that an LRU "
            f"of {part} hits {100 * _lru_hits(whole):.0f} %. Experts on the device at {part} take {saved:.1f} % less "
            f"than all of them in bf16. The last two rows are of {layers[0]} and {layers[1]} layers, scaled to "
            f"{target['whole_layers']}. From `eval/results/{WHOLE}`, `{REQUESTS}` and `{PEERS}`.",
            "",
            "",
        ]
    )


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def _figure(results: dict[str, Any], system: str, resident: str | None = None, batch: int = 1) -> dict[str, Any]:
    wanted = [f for f in results["figures"] if f["system"] == system and f["batch"] == batch]
    return next(f for f in wanted if resident in (None, f["resident"]))


def _lru_hits(results: dict[str, Any]) -> float:
    hits: float = next(iter(results["trace"]["statistics"]["lru_hit_rate"]["1"].values()))
    return hits


def _decode(results: dict[str, Any], system: str, resident: str, what: str) -> list[str]:
    decode = _figure(results, system, resident)["decode"]
    by = max((name for name in ("link", "memory", "product")), key=lambda name: decode["bound_s"][name])
    rate, bound = decode["tokens_per_s"], decode["bound_tokens_per_s"][by]
    return [
        what,
        f"{rate:.3g} tokens/s",
        f"{bound:.3g}, {by}" if bound < 999.5 else f"{bound:,.0f}, {by}",
        f"{100 * rate / bound:.0f} %",
    ]


def _prefill(results: dict[str, Any], system: str, resident: str) -> list[str]:
    found = _figure(results, system, resident)
    seconds = found["prefill"]["ttft_s"]
    floor = seconds / found["prefill"]["times_not_resident_over_link"]
    what = f"prompt of {found['prompt']:,} tokens, {resident}"
    return [what, f"{seconds:.3f} s", f"{floor:.3f} s, link", f"{seconds / floor:.2f} times"]


def _beside(results: dict[str, Any]) -> list[str]:
    beside, link = (results["ceilings"][name] for name in ("beside_gbs", "link_gbs"))
    return [
        "moving experts while products run",
        f"{beside:.1f} GB/s",
        f"{link:.1f}, link",
        f"{100 * beside / link:.0f} %",
    ]


def _requests(results: dict[str, Any], batch: int) -> list[str]:
    found = _figure(results, "graph", batch=batch)
    per_s, bound = found["requests"]["per_s"], found["requests"]["link_bound_per_s"]
    tokens = f"{found['prompt']:,} + {found['requests']['answer_tokens']} tokens"
    what = f"requests of {tokens}, {found['resident']}, {batch} at a time"
    return [what, f"{per_s:.3g} /s", f"{bound:.3g}, link", f"{100 * per_s / bound:.0f} %"]


def _scaled(results: dict[str, Any], system: str, what: str) -> list[str]:
    return [what, f"{_figure(results, system)['scaled']['tokens_per_s']:.2g} tokens/s", "", ""]
