"""`expertflow-quant`: quantize, inspect, verify, and, where it is installed, serve and up."""

import importlib
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from expertflow_quant.formats.errors import ExpertFlowError

COMMAND_MODULES = ("quantize", "inspect", "serve")
FAILED = 2


class _Group(TyperGroup):
    """Shows our own errors as one red message, without a traceback, and ends with code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ExpertFlowError as error:
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(FAILED) from None


app = typer.Typer(
    cls=_Group,
    name="expertflow-quant",
    help="Mixture-of-Experts models on small GPUs: quantize every expert, then serve under a memory budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Mixture-of-Experts models on small GPUs: quantize every expert, then serve under a memory budget."""


def _register(name: str) -> None:
    module = f"expertflow_quant.cli.{name}"
    try:
        commands = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return
    commands.register(app)


for _name in COMMAND_MODULES:
    _register(_name)

if __name__ == "__main__":
    app()
