"""``serve``: a checkpoint over HTTP. ``up``: the same for a plain model, quantized first if need be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.budget import format_bytes

if TYPE_CHECKING:
    from expertflow_quant.serve.shelf import Recipe

Memory = Annotated[str, typer.Option("--expert-memory", help="Device memory for experts: 2MiB, 25%, bytes.")]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; on the CPU float32 by default, else the model's own."),
]
MaxQueue = Annotated[int, typer.Option(help="Requests that may wait while one is answered; more get 429.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer that a client may ask for.")]
Name = Annotated[str | None, typer.Option("--name", help="Model name for clients; the folder's by default.")]


def register(app: typer.Typer) -> None:
    """Add the commands ``serve`` and ``up``."""
    app.command("serve")(serve)
    app.command("up")(up)


def serve(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `quantize` wrote.")],
    expert_memory: Memory = "100%",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    device: Device = "auto",
    dtype: Dtype = None,
    max_queue: MaxQueue = 16,
    max_tokens: MaxTokens = None,
    name: Name = None,
) -> None:
    """Serve a quantized checkpoint as an OpenAI-style chat API, images included."""
    with _told():
        from expertflow_quant.serve.launch import Options, launch

        options = Options(expert_memory, host, port, device, dtype, max_queue, max_tokens)
        launch(lambda: checkpoint, name or checkpoint.resolve().name, options, Console())


def up(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a plain transformers model.")],
    method: Annotated[str, typer.Option(help="awq, gptq or rtn.")] = "awq",
    format: Annotated[str, typer.Option(help="Format of every expert, such as int4-g32.")] = "int4-g32",
    plan: Annotated[
        Path | None, typer.Option(help="JSON file with formats per expert, for --format.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Calibration items; generated ones by default.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where checkpoints are kept.")] = None,
    expert_memory: Memory = "100%",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    device: Device = "auto",
    dtype: Dtype = None,
    max_queue: MaxQueue = 16,
    max_tokens: MaxTokens = None,
    name: Name = None,
) -> None:
    """Quantize a model unless that was done before, then serve it."""
    console = Console()
    with _told():
        from expertflow_quant.checkpoint.plan import Plan
        from expertflow_quant.serve.launch import Options, launch
        from expertflow_quant.serve.shelf import Recipe, default_shelf, fetch

        options = Options(expert_memory, host, port, device, dtype, max_queue, max_tokens)
        recipe = Recipe(model, method, Plan.load(plan) if plan else Plan.uniform(format), samples)
        shelf = cache_dir or default_shelf()

        def make(folder: Path) -> None:
            _quantize(recipe, folder, options.torch_device, console)

        def say(text: str) -> None:
            console.print(text, soft_wrap=True)

        launch(lambda: fetch(shelf, recipe, make, say), name or model.resolve().name, options, console)


def _quantize(recipe: "Recipe", folder: Path, device: str, console: Console) -> None:
    from expertflow_quant.pipeline.quantize import quantize_model
    from expertflow_quant.pipeline.samples_io import load_samples

    what = f"{recipe.model} by {recipe.method} into {recipe.plan}"
    console.print(f"quantizing {what}: {folder}", soft_wrap=True)
    with Progress(console=console) as bar:
        task = bar.add_task("reading")
        report = quantize_model(
            recipe.model,
            folder,
            method=recipe.method,
            plan=recipe.plan,
            samples=load_samples(recipe.samples) if recipe.samples else None,
            device=device,
            overwrite=True,  # an unfinished run of the same job still goes on
            progress=lambda done, total, what: bar.update(
                task, completed=done, total=total, description=what
            ),
        )
    resumed = f", {report.layers_resumed} layers from an earlier run" if report.layers_resumed else ""
    console.print(
        f"quantized in {report.seconds:.1f} s{resumed}: {format_bytes(report.expert_bytes)} of experts"
    )


@contextmanager
def _told() -> Iterator[None]:
    """Errors of ours end the command with their message alone."""
    try:
        yield
    except ImportError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "filelock"):
            raise
        typer.echo(f"serving needs {error.name}: pip install 'expertflow-quant[serve]'", err=True)
        raise typer.Exit(1) from None
    except ExpertFlowError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
