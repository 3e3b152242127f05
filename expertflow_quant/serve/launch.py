"""From a checkpoint's folder to a server that answers: address, engine, table, requests."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.loading import load
from expertflow_quant.serve import banner, server
from expertflow_quant.serve.app import create_app
from expertflow_quant.serve.limits import Limits

DTYPES = ("float32", "bfloat16", "float16")
USUAL_CONTEXT = 4096


@dataclass(frozen=True)
class Options:
    """``device`` "auto": CUDA where there is one. ``dtype`` None: float32 on the CPU, else the model's
    own."""

    expert_memory: str = "100%"
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str | None = None
    max_queue: int = 16
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ExpertFlowError(f"dtype {self.dtype!r} is not known: use one of {', '.join(DTYPES)}")


def launch(checkpoint: Callable[[], Path], name: str, options: Options, console: Console) -> None:
    """Serve until Ctrl-C. ``checkpoint`` is called once the address is taken; it may quantize first.

    Raises ExpertFlowError before the first request for an address that is taken and whatever ``load``
    refuses.
    """
    with closing(server.bind(options.host, options.port)) as listener:
        folder = checkpoint()
        engine = load(folder, options.expert_memory, options.device, options.dtype)
        limits = Limits.for_context(_context(engine), options.max_queue, options.max_tokens)
        app, address = create_app(engine, name, limits), server.address(listener)
        console.print(banner.table(folder, engine, name, address, limits.max_queue))
        if not server.is_private(listener):
            console.print("Other machines can reach this address, and there is no password.", style="yellow")
        console.print("\nTry it (Ctrl-C ends the server):")
        console.out(banner.curl_example(name, address), highlight=False)
        server.run(app, listener)


def _context(engine: Engine) -> int:
    text = engine.model.config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None) or USUAL_CONTEXT
