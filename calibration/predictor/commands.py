"""``python -m calibration sight`` records what a predictor may see; ``python -m calibration predictor`` trains one.

::

    python -m calibration sight OUT --task charts --items 900 --split train -o charts.safetensors
    python -m calibration sight OUT --task documents --items 900 --split train -o documents.safetensors \\
        --basis charts.sight.safetensors
    python -m calibration predictor charts.safetensors documents.safetensors --out OUT
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import expertflow_quant
from calibration.predictor.train import Settings, train
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.sight import Basis, Sight, sight_path
from expertflow_quant.offload.trace import RoutingTrace
from expertflow_quant.runtime.recorder import recording
from expertflow_quant.runtime.watcher import watching
from expertflow_quant.samples import make_items

TASKS = {"charts": "chart", "documents": "document"}
console = Console(soft_wrap=True)


def sight(
    checkpoint: Annotated[Path, typer.Argument(help="quantized checkpoint")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="trace to write, or one of the same answers; sight beside it")
    ],
    task: Annotated[str, typer.Option(help="charts or documents")] = "charts",
    items: Annotated[int, typer.Option(min=1, help="questions")] = 128,
    split: Annotated[str, typer.Option(help="of the generated items: test, calibration or train")] = "test",
    seed: Annotated[int, typer.Option(help="of the generated items")] = 0,
    pictures: Annotated[int, typer.Option(min=0, help="numbers kept of every image token; 0: none")] = 64,
    basis: Annotated[
        Path | None, typer.Option(help="sight or predictor folder whose basis of pictures is used")
    ] = None,
    ahead: Annotated[bool, typer.Option(help="keep what later routers say, too")] = True,
) -> None:
    """Record a trace with what a predictor may see: image tokens' embeddings, later routers on present states."""
    try:
        if task not in TASKS:
            raise ExpertFlowError(f"task {task!r} is not known: use {' or '.join(TASKS)}")
        given = read_basis(basis) if basis is not None else None
        trace, seen = record(checkpoint, task, items, split, seed, pictures, given)
        if out.exists():
            check_same(RoutingTrace.load(out), trace)
        else:
            trace.without_weights().save(out)
        seen = seen if ahead else Sight(seen.token_ids, seen.num_experts, None, seen.codes, seen.basis)
        seen.save(sight_path(out))
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    console.print(f"{sight_path(out)}: {len(trace)} tokens, {sight_path(out).stat().st_size / 1e6:.2f} MB")


def predictor(
    traces: Annotated[list[Path], typer.Argument(help="trace files; their sights lie beside them")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for predictor.safetensors and predictor.json")],
    pictures: Annotated[bool, typer.Option(help="use the pictures of the sights, where all traces have one")] = True,
    width: Annotated[int, typer.Option(help="d_model; ExpertFlow's is 32")] = Settings.width,
    inner: Annotated[int, typer.Option(help="d_ff; ExpertFlow's is 2048")] = Settings.inner,
    loss: Annotated[str, typer.Option(help="bce or softmax")] = Settings.loss,
    rate: Annotated[float, typer.Option(help="highest learning rate")] = Settings.rate,
    steps: Annotated[int, typer.Option(min=1)] = Settings.steps,
    batch: Annotated[int, typer.Option(min=1, help="items a step")] = Settings.batch,
    generated: Annotated[
        float, typer.Option(help="how much a generated token counts in the loss, a prompt's counts 1")
    ] = Settings.generated,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the encoder-decoder that foretells every layer's experts from tokens."""
    try:
        found = [load_with_sight(path, pictures) for path in traces]
        settings = Settings(
            width=width,
            inner=inner,
            loss=loss,
            rate=rate,
            steps=steps,
            batch=batch,
            generated=generated,
            seed=seed,
        )
        with Progress(console=console, transient=True) as bar:
            row = bar.add_task("training", total=steps)
            trained = train(found, settings, lambda done, total: bar.update(row, completed=done, total=total))
        trained.predictor.save(out)
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    size = sum(parameter.numel() for parameter in trained.predictor.model.parameters())
    generated_only = "" if trained.generated_recall is None else f" (generated tokens {trained.generated_recall:.1%})"
    console.print(
        f"{out}: {trained.predictor.name}, {size / 1e6:.2f} M weights; recall at k {trained.recall:.1%}"
        f"{generated_only} on {trained.items[1]} items held out of {sum(trained.items)}; {trained.seconds:.0f} s",
        highlight=False,
    )


def record(
    checkpoint: Path, task: str, items: int, split: str, seed: int, pictures: int, basis: Basis | None
) -> tuple[RoutingTrace, Sight]:
    """The greedy answers to generated questions, one at a time; a ``basis`` is fitted to them unless given."""
    asked = make_items(TASKS[task], split, items, seed=seed)
    engine = expertflow_quant.load(checkpoint, fast=False)
    with (
        recording(engine, [task] * len(asked)) as recorder,
        watching(engine) as watcher,
        Progress(console=console, transient=True) as bar,
    ):
        for item in bar.track(asked, description="answering"):
            engine.generate([item.messages], item.max_new_tokens)
    trace = recorder.trace({"items": f"generated, {split} split, seed {seed}", "model": checkpoint.resolve().name})
    if basis is None and pictures:
        basis = fit_basis(watcher.embeddings_of(trace), pictures)
    return trace, watcher.sight(trace, basis)


def check_same(found: RoutingTrace, trace: RoutingTrace) -> None:
    """Raises ExpertFlowError when a recording does not repeat the trace that it belongs to."""
    if not torch.equal(found.token_ids, trace.token_ids) or not torch.equal(found.experts, trace.experts):
        raise ExpertFlowError(
            f"these answers of {len(trace)} tokens are not those of the trace of {len(found)} tokens that is there: "
            "name its checkpoint, task, items, split and seed, or another file"
        )


def fit_basis(embeddings: Tensor, count: int) -> Basis:
    """The ``count`` directions in which embeddings [M, H] vary most, scaled to unit variance."""
    if len(embeddings) <= count or count > embeddings.shape[1]:
        raise ExpertFlowError(
            f"{len(embeddings)} image tokens of width {embeddings.shape[1]} cannot give {count} directions: record "
            "more items, or ask for fewer --pictures"
        )
    values = embeddings.double()
    center = values.mean(0)
    found = torch.linalg.eigh((values - center).T @ (values - center) / len(values))
    scale = found.eigenvalues[-count:].clamp(min=1e-12).rsqrt()
    return Basis(center.float(), (found.eigenvectors[:, -count:] * scale).float())


def read_basis(path: Path) -> Basis:
    """The basis in a sight, or of a predictor's folder."""
    from expertflow_quant.offload.predict_paths import PathPredictor

    found: Any = PathPredictor.load(path) if path.is_dir() else Sight.load(path)
    if found.basis is None:
        raise ExpertFlowError(f"{path} has no basis of pictures: name one that was made with pictures")
    return found.basis


def load_with_sight(path: Path, pictures: bool) -> tuple[RoutingTrace, Sight | None]:
    """A trace, and the sight beside it if there is one and it is wanted."""
    beside = sight_path(path)
    return RoutingTrace.load(path), Sight.load(beside) if pictures and beside.exists() else None
