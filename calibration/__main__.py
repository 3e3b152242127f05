"""``python -m calibration``: commands that look at data to decide."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from calibration.measure import measure_errors, weights_digest
from calibration.plan import Choice, ExpertErrors, choose, errors_from_json, errors_to_json
from calibration.plan_options import JointOptions, plan_jointly
from calibration.predictor.commands import predictor, sight
from calibration.trace_command import trace
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.pipeline.samples_io import generated_samples
from expertflow_quant.quantize import ScaleRule

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)


@app.callback()
def commands() -> None:
    """What looks at data to decide."""


app.command("trace")(trace)
app.command("sight")(sight)
app.command("predictor")(predictor)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="folder of the model in its own full precision")],
    output: Annotated[Path, typer.Option("--output", "-o", help="plan file to write")],
    average_bits: Annotated[float, typer.Option(help="of the codes, over all experts' weights")] = 3.0,
    formats: Annotated[str, typer.Option(help="formats to choose from")] = "int2-g32,int3-g32,int4-g32",
    samples: Annotated[int, typer.Option(min=1, help="generated calibration items")] = 64,
    scales: Annotated[str, typer.Option(help="how a group's range is found: absmax or mse")] = "absmax",
    errors: Annotated[Path | None, typer.Option(help="keep, or reuse, the measured errors")] = None,
    traces: Annotated[list[Path] | None, typer.Option("--trace", help="recorded: plan slots and link time too")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="recorded: compare plans on these")] = None,
    expert_memory: Annotated[str, typer.Option(help="with --trace: device bytes for experts")] = "25%",
    link_weight: Annotated[float, typer.Option(min=0, help="worth of link time; damage has 1")] = 1.0,
    damage_share: Annotated[float, typer.Option(min=0, help="most damage, of that of one format for all")] = 1.0,
    link: Annotated[float, typer.Option(min=0.001, help="GB/s to the device")] = 25.0,
    rows: Annotated[int, typer.Option(min=1, help="requests of a trace answered together")] = 1,
    time_limit: Annotated[float, typer.Option(min=1, help="seconds for the integer program")] = 20.0,
    results: Annotated[Path | None, typer.Option(help="slots and comparison [default: beside the plan]")] = None,
) -> None:
    """A format for every expert: least damage at an average number of bits (for quantize --plan).

    With --trace also the slots of every layer: least damage and expected link time together, in no more bytes than one
    format of --average-bits for all.
    """
    try:
        choices = [Format.parse(name.strip()) for name in formats.split(",")]
        measured = _measured(model, choices, samples, _scale_rule(scales), errors)
        if traces:
            options = JointOptions(
                traces, held_out or [], expert_memory, link_weight, damage_share, link, rows, time_limit
            )
            decided, found = plan_jointly(model, measured, choices, average_bits, options, console)
            _write(output, decided)
            beside = results or output.with_suffix(".slots.json")
            _write(beside, found)
            console.print(f"formats: {output}; slots and comparison: {beside}", highlight=False)
            return
        choice = choose(measured, average_bits)
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    _write(output, choice.to_plan())
    console.print(_summary(choice, measured))
    console.print(f"summed damage {choice.damage:.4f}; all alike: {_alike(measured)}", highlight=False)
    console.print(f"{output}: {choice.average_bits:.2f} bits on average", highlight=False)


def _scale_rule(name: str) -> ScaleRule:
    rules: dict[str, ScaleRule] = {"absmax": "absmax", "mse": "mse"}
    if name not in rules:
        raise ExpertFlowError(f"scales {name!r} are not known: use {' or '.join(rules)}")
    return rules[name]


def _measured(
    model: Path, formats: list[Format], samples: int, scales: ScaleRule, errors: Path | None
) -> list[ExpertErrors]:
    """Errors read from ``errors`` if they were measured so, else measured now and written there."""
    head: dict[str, Any] = {
        "model": model.resolve().name,
        "formats": [form.name for form in formats],
        "weights": weights_digest(model),
        "samples": samples,
        "method": "rtn",
        "scales": scales,
    }
    if errors is not None and errors.exists():
        return _read_errors(errors, head)
    with Progress(console=console) as bar:
        row = bar.add_task("measuring layers", total=None)
        measured = measure_errors(
            model,
            generated_samples(samples),
            formats,
            lambda done, total: bar.update(row, completed=done, total=total),
            scales,
        )
    if errors is not None:
        _write(errors, errors_to_json(head, measured))
    return measured


def _read_errors(path: Path, head: dict[str, Any]) -> list[ExpertErrors]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExpertFlowError(f"{path} is not JSON ({error}): delete it and measure again") from error
    measured = errors_from_json(value)
    other = [name for name in head if value.get(name) != head[name]]
    if other:
        name = other[0]
        raise ExpertFlowError(
            f"{path} was measured with {name} = {value.get(name)!r}, this run has {head[name]!r}: "
            "delete it to measure again, or name another --errors"
        )
    return measured


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _summary(choice: Choice, measured: list[ExpertErrors]) -> Table:
    """How many experts of each layer got which format."""
    names = sorted({form.name for expert in measured for form in expert.damage})
    table = Table("layer", *names, title="experts by format", title_justify="left")
    for layer in sorted({layer for layer, _ in choice.formats}):
        counts = Counter(form.name for (at, _), form in choice.formats.items() if at == layer)
        table.add_row(str(layer), *(str(counts[name] or "") for name in names))
    return table


def _alike(measured: list[ExpertErrors]) -> str:
    """Summed damage if every expert had the same format."""
    whole: dict[str, float] = defaultdict(float)
    for expert in measured:
        for form, damage in expert.damage.items():
            whole[form.name] += damage
    return ", ".join(f"{name} {whole[name]:.4f}" for name in sorted(whole))


if __name__ == "__main__":
    app(prog_name="python -m calibration")
