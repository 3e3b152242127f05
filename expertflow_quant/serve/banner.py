"""What the server shows when it starts: the model, its experts, the address and a request to try."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from expertflow_quant.checkpoint.manifest import Manifest
from expertflow_quant.offload.budget import format_bytes
from expertflow_quant.runtime.fast.loop import FastRunner

if TYPE_CHECKING:
    from expertflow_quant.runtime.engine import Engine


def table(folder: Path, engine: "Engine", name: str, address: str, max_queue: int, together: str = "1") -> Table:
    """One line a fact; everything is read from the manifest and the loaded engine."""
    manifest = Manifest.load(folder)
    formats = Counter(expert.format.name for layer in manifest.layers for expert in layer.experts)
    records, slots = sum(formats.values()), _slots(engine)
    share = engine.device_expert_bytes / engine.expert_bytes
    shown = Table("", Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    for row in (
        ("model", f"{name} ({manifest.model_type})"),
        ("checkpoint", str(folder)),
        ("experts", f"{records} in {len(manifest.layers)} layers, {_top_k(manifest)} per token and layer"),
        ("formats", ", ".join(f"{format} x {count}" for format, count in sorted(formats.items()))),
        ("expert bytes", format_bytes(engine.expert_bytes)),
        ("on the device", f"{format_bytes(engine.device_expert_bytes)} in {slots} slots ({share:.0%})"),
        ("path", _path(engine)),
        ("context", f"{engine.context} tokens, prompt and answer" if engine.context else "as the model reads"),
        ("device", f"{engine.device}, {str(engine.model.dtype).removeprefix('torch.')}"),
        ("answered at once", together),
        ("queue", f"{max_queue} requests may wait"),
        ("address", address),
    ):
        shown.add_row(*row)
    return shown


def curl_example(name: str, address: str) -> str:
    """A shell command that asks about a picture ``chart.png``, which goes through a pipe: it may be large."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": "IMAGE"}},
        {"type": "text", "text": "What is the highest value?"},
    ]
    body = {"model": name, "max_tokens": 32, "messages": [{"role": "user", "content": parts}]}
    text = re.sub(r"([\\\\$`])", r"\\\1", json.dumps(body))
    text = text.replace("IMAGE", "data:image/png;base64,$(base64 < chart.png | tr -d '\\n')")
    return f"curl -s {address}/chat/completions -H 'content-type: application/json' -d @- <<JSON\n{text}\nJSON"


def _slots(engine: "Engine") -> int:
    if isinstance(engine.runner, FastRunner):
        return sum(slots for pools in engine.runner.resident.plan for _, slots in pools)
    return sum(size.slots for size in engine.model.expert_cache.classes)


def _path(engine: "Engine") -> str:
    """Which way the model runs, and why if not the fast one."""
    if not isinstance(engine.runner, FastRunner):
        return f"plain: {engine.plain_because}"
    graphs = engine.runner.graphs
    on_gpu = graphs.device.type == "cuda"
    captured = [str(bucket) for bucket in graphs.buckets if on_gpu and not graphs.streams(bucket)]
    many = "" if captured == ["1"] else "s"
    decode = f"decode captured for {', '.join(captured)} row{many}" if captured else "decode not captured"
    return f"fast: {decode}, prompts streamed"


def _top_k(manifest: Manifest) -> str:
    return " or ".join(str(count) for count in sorted({layer.top_k for layer in manifest.layers}))
