"""From a checkpoint's folder to a server that answers: address, engine, table, requests."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.policies.named import known
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.foretell import SCHEDULES, foreteller
from expertflow_quant.runtime.loading import load
from expertflow_quant.runtime.schedule import PATIENCE
from expertflow_quant.serve import banner, server
from expertflow_quant.serve.app import create_app
from expertflow_quant.serve.limits import Limits
from expertflow_quant.serve.line import Batching

DTYPES = ("float32", "bfloat16", "float16")
USUAL_CONTEXT = 4096


@dataclass(frozen=True)
class Options:
    """``device`` "auto": CUDA where there is one. ``dtype`` None: float32 on the CPU, else the model's
    own. ``gpu_memory`` to ``slots`` as ``load`` takes them. ``batch`` requests at most are answered together, chosen
    by ``schedule`` (foretell.foreteller) and ``patience`` (line.Line)."""

    expert_memory: str = "100%"
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str | None = None
    max_queue: int = 16
    max_tokens: int | None = None
    gpu_memory: str | None = None
    host_memory: str | None = None
    context: int | None = None
    fast: bool | None = None
    policy: str | None = None
    predictor: str | None = None
    ahead: float | None = None
    usage: Path | None = None
    slots: Path | None = None
    batch: int = 1
    schedule: str = "auto"
    patience: int = PATIENCE

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ExpertFlowError(f"dtype {self.dtype!r} is not known: use one of {', '.join(DTYPES)}")
        if self.batch < 1 or self.patience < 0:
            raise ExpertFlowError(
                f"batch {self.batch} must be at least 1 request and patience {self.patience} at least 0 batches"
            )
        if known("schedule", self.schedule, SCHEDULES) in ("paths", "words") and self.batch == 1:
            raise ExpertFlowError(
                f"--schedule {self.schedule} chooses who is answered together, and --batch 1 answers one by one: give "
                "--batch 2 or more, or leave --schedule out"
            )


def launch(checkpoint: Callable[[], Path], name: str, options: Options, console: Console) -> None:
    """Serve until Ctrl-C. ``checkpoint`` is called once the address is taken; it may quantize first.

    Raises ExpertFlowError before the first request for an address that is taken and whatever ``load``
    refuses.
    """
    with closing(server.bind(options.host, options.port)) as listener:
        folder = checkpoint()
        engine = _loaded(folder, options, console)
        limits = Limits.for_context(engine.context or USUAL_CONTEXT, options.max_queue, options.max_tokens)
        foretell = foreteller(engine, folder, options.schedule, options.predictor) if options.batch > 1 else None
        app = create_app(engine, name, limits, Batching(options.batch, options.patience, foretell))
        address = server.address(listener)
        grouped = "" if foretell is None else f", grouped by {foretell.name}"
        together = f"up to {options.batch}{grouped}" if options.batch > 1 else "1"
        console.print(banner.table(folder, engine, name, address, limits.max_queue, together))
        if engine.memory_plan is not None:
            console.print(engine.memory_plan.table())
        if not server.is_private(listener):
            console.print("Other machines can reach this address, and there is no password.", style="yellow")
        console.print("\nTry it (Ctrl-C ends the server):")
        console.out(banner.curl_example(name, address), highlight=False)
        server.run(app, listener)


def _loaded(folder: Path, options: Options, console: Console) -> Engine:
    """The engine of ``folder`` for ``options.batch`` answers at once; what takes seconds is shown while it goes on."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("pinning experts", total=None, visible=False)

        def pinned(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        def step(text: str) -> None:
            progress.update(task, visible=False)
            progress.console.print(text, style="dim", highlight=False)

        return load(
            folder,
            options.expert_memory,
            options.device,
            options.dtype,
            gpu_memory=options.gpu_memory,
            host_memory=options.host_memory,
            context=options.context,
            rows=options.batch,
            fast=options.fast,
            policy=options.policy,
            predictor=options.predictor,
            ahead=options.ahead,
            usage=options.usage,
            slots=options.slots,
            on_step=step,
            on_pinned=pinned,
        )
