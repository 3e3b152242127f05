"""``python -m calibration trace``: routes of a model that answers generated questions, as predictors, cache policies
and plans read them.

The committed traces of the shipped model (calibration/traces/) come from
::

    expertflow-quant quantize calibration/shipped/moe OUT --method rtn --format int4-g32
    python -m calibration trace OUT --task charts --items 128 -o calibration/traces/charts.safetensors
    python -m calibration trace OUT --task charts --items 256 --split train --no-weights \\
        -o calibration/traces/charts-train.safetensors

and the same for documents; the train ones are for fitting predictors, the others for judging. Answers are greedy and
recorded one at a time, prompts in one pass.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import expertflow_quant
from expertflow_quant.checkpoint.manifest import MANIFEST_FILE, Manifest
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.trace import GENERATED, PROMPT_IMAGE, PROMPT_TEXT, RoutingTrace
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.recorder import recording
from expertflow_quant.samples import Item, make_items
from expertflow_quant.samples.sheets import SPLITS

TASKS = {"charts": ("chart",), "documents": ("document",), "both": ("chart", "document")}
_NAMES = {"chart": "charts", "document": "documents"}

console = Console(soft_wrap=True)


def trace(
    checkpoint: Annotated[Path, typer.Argument(help="quantized checkpoint, or a model in its own full precision")],
    out: Annotated[Path, typer.Option("--out", "-o", help="trace file to write (.safetensors)")],
    task: Annotated[str, typer.Option(help="charts, documents or both")] = "both",
    items: Annotated[int, typer.Option(min=1, help="questions of each task")] = 128,
    split: Annotated[str, typer.Option(help="of the generated items: test, calibration or train")] = "test",
    seed: Annotated[int, typer.Option(help="of the generated items")] = 0,
    device: Annotated[str, typer.Option(help="where the model runs")] = "cpu",
    weights: Annotated[bool, typer.Option(help="keep the gate's weights too")] = True,
) -> None:
    """Record which experts every token is sent to while the model answers."""
    try:
        found = record(checkpoint, task, items, split, seed, device)
        found = found if weights else found.without_weights()
        found.save(out)
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    console.print(_summary(found))
    console.print(f"{out}: {out.stat().st_size / 1e6:.2f} MB", highlight=False)


def record(
    checkpoint: Path, task: str, items: int, split: str = "test", seed: int = 0, device: str = "cpu"
) -> RoutingTrace:
    """Routes of ``items`` questions of each task, task after task. Raises ExpertFlowError for a task or split that is
    not known and for a folder that cannot be loaded."""
    if task not in TASKS:
        raise ExpertFlowError(f"task {task!r} is not known: use {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ExpertFlowError(f"split {split!r} is not known: use {', '.join(SPLITS)}")
    asked = [item for name in TASKS[task] for item in make_items(name, split, items, seed=seed)]
    quantized = (checkpoint / MANIFEST_FILE).is_file()
    if quantized:
        engine = expertflow_quant.load(checkpoint, device=device, fast=False)
    else:
        engine = Engine.from_plain(checkpoint, device)
    meta = _origin(checkpoint, quantized) | {
        "items": f"generated, {split} split, seed {seed}, {items} of each task",
        "decoding": "greedy, one item at a time, at most the task's number of new tokens",
        "device": engine.device.type,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    return _recorded(engine, asked, meta)


def _origin(checkpoint: Path, quantized: bool) -> dict[str, str]:
    """Which model was recorded, and how its experts are coded."""
    if not quantized:
        return {"model": checkpoint.resolve().name, "formats": "full precision"}
    manifest = Manifest.load(checkpoint)
    formats = sorted({expert.format.name for layer in manifest.layers for expert in layer.experts})
    return {"model": manifest.model_id, "formats": ", ".join(formats), "method": str(manifest.made.get("method"))}


def _recorded(engine: Engine, asked: list[Item], meta: dict[str, str]) -> RoutingTrace:
    with (
        recording(engine, [_NAMES[item.task] for item in asked]) as recorder,
        Progress(console=console, transient=True) as bar,
    ):
        for item in bar.track(asked, description="answering"):
            engine.generate([item.messages], item.max_new_tokens)
    return recorder.trace(meta)


def _summary(found: RoutingTrace) -> Table:
    """Tokens by task and kind."""
    table = Table("task", "items", "text", "image", "generated")
    for task in dict.fromkeys(found.tasks):
        part = found.of_task(task)
        kinds: list[Any] = [int((part.kind == kind).sum()) for kind in (PROMPT_TEXT, PROMPT_IMAGE, GENERATED)]
        table.add_row(task, str(part.items), *map(str, kinds))
    table.title = f"tokens; {found.layers} layers, {found.top_k} of {found.num_experts} experts"
    return table
