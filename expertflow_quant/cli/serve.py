"""``serve``: a checkpoint over HTTP. ``up``: the same for a plain model, quantized first if need be."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from expertflow_quant.cli.quantize import FormatName, Method, PlanFile, Samples, _plan, quantize
from expertflow_quant.formats.errors import ExpertFlowError

if TYPE_CHECKING:
    from expertflow_quant.serve.launch import Options

EXTRA = frozenset({"fastapi", "filelock", "prometheus_client", "uvicorn"})

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
GpuMemory = Annotated[
    str | None,
    typer.Option("--gpu-memory", help="All device memory, never exceeded: 8GiB, 40%. Experts get what is left."),
]
HostMemory = Annotated[
    str | None, typer.Option("--host-memory", help="Pinned host memory for experts; by default what is available.")
]
Context = Annotated[
    int | None, typer.Option("--context", help="Most tokens of a prompt and its answer; fewer leave more to experts.")
]
Fast = Annotated[
    bool | None, typer.Option("--fast/--no-fast", help="Captured decode and streamed prompts; by default on a GPU.")
]
Policy = Annotated[
    str | None,
    typer.Option("--policy", help="Which expert makes room: lru, lfu, static, predictive; plain path: scan too."),
]
Predictor = Annotated[
    str | None,
    typer.Option(
        "--predictor", help="off, frequency, previous, affinity, next-gate, paths, auto, or a trained one's folder."
    ),
]
Ahead = Annotated[
    float | None,
    typer.Option("--ahead", help="Records fetched ahead of each layer on the plain path, by the predictor."),
]
Usage = Annotated[Path | None, typer.Option("--usage", help="Recorded trace of this model to learn use from.")]
Slots = Annotated[Path | None, typer.Option("--slots", help="Slots of each layer, as calibration plan writes them.")]
Batch = Annotated[
    int,
    typer.Option(
        "--batch", help="Requests answered together at most: more a second, and room for each one's context is kept."
    ),
]
Schedule = Annotated[
    str, typer.Option("--schedule", help="Who goes together: paths, words, arrival; auto: paths with a predictor.")
]
Patience = Annotated[int, typer.Option("--patience", help="Batches that a request may be passed over for that.")]
Name = Annotated[str | None, typer.Option("--name", help="Model name for clients; the folder's by default.")]


def register(app: typer.Typer) -> None:
    """Adds the commands ``serve`` and ``up``."""
    app.command("serve")(_with_serving(serve))
    app.command("up")(_with_serving(up))


def serving(
    expert_memory: Memory = "100%",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    device: Device = "auto",
    dtype: Dtype = None,
    max_queue: MaxQueue = 16,
    max_tokens: MaxTokens = None,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    context: Context = None,
    fast: Fast = None,
    policy: Policy = None,
    predictor: Predictor = None,
    ahead: Ahead = None,
    usage: Usage = None,
    slots: Slots = None,
    batch: Batch = 1,
    schedule: Schedule = "auto",
    patience: Patience = 4,
) -> "Options":
    """What both commands take of the server and its engine; launch.Options has a field of each name."""
    given = locals()
    with _extra_told():
        from expertflow_quant.serve.launch import Options

    return Options(**given)


def serve(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that quantize wrote.")],
    *,
    options: "Options",
    name: Name = None,
) -> None:
    """Serve a quantized checkpoint as an OpenAI-style chat API, images included."""
    from expertflow_quant.serve.launch import launch

    launch(lambda: checkpoint, name or checkpoint.resolve().name, options, Console())


def up(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a plain transformers model.")],
    method: Method = "awq",
    format_name: FormatName = None,
    plan: PlanFile = None,
    samples: Samples = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where up keeps its checkpoints.")] = None,
    *,
    options: "Options",
    name: Name = None,
) -> None:
    """Quantize a model unless that was done before, then serve it. Stopped half way, it goes on next time."""
    with _extra_told():
        from expertflow_quant.serve.launch import launch
        from expertflow_quant.serve.shelf import Recipe, default_shelf, fetch

    console = Console()
    recipe = Recipe(model, method, _plan(format_name, plan), samples)

    def make(folder: Path) -> None:
        say(f"quantizing into {folder}")
        # overwrite: what another version of a library left half way is begun anew, our own goes on
        quantize(model, folder, method, format_name, plan, samples, device=options.device, overwrite=True)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    shelf = cache_dir or default_shelf()
    launch(lambda: fetch(shelf, recipe, make, say), name or model.resolve().name, options, console)


def _with_serving(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer is to see it: the parameters of ``serving`` stand in place of its ``options``."""
    shared = inspect.signature(serving).parameters

    def run(**given: Any) -> None:
        options = serving(**{name: given.pop(name) for name in shared})
        command(options=options, **given)

    own = inspect.signature(command).parameters
    joined = chain.from_iterable(shared.values() if name == "options" else [own[name]] for name in own)
    run.__signature__ = inspect.Signature(list(joined))  # type: ignore[attr-defined]
    run.__doc__ = command.__doc__
    return run


@contextmanager
def _extra_told() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if error.name not in EXTRA:
            raise
        raise ExpertFlowError(f"serving needs {error.name}: pip install 'expertflow-quant[serve]'") from None
