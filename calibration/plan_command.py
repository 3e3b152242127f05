"""``python -m calibration plan MODEL -o PLAN``: a format for every expert within a budget, and with traces the slots
of every layer."""

import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from calibration.plan import Choice, ExpertErrors, Size, choose, choose_damage, choose_within, code_bits, record_size
from calibration.plan_options import JointOptions, plan_jointly
from calibration.plan_plot import save_plot
from calibration.sensitivity_command import (
    Wanted,
    describe,
    generated_source,
    measure,
    parse_formats,
    scale_rule,
    writable,
)
from calibration.sensitivity_file import Sensitivity
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.formats import BF16, ExpertFlowError, Format
from expertflow_quant.offload.budget import format_bytes, parse_budget
from expertflow_quant.pipeline.methods import check_method
from expertflow_quant.pipeline.samples_io import generated_samples
from expertflow_quant.pipeline.stream import ModelStream

AVERAGE_BITS = 3.0

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Budget:
    """One of three: ``bits`` of codes a weight on average, ``nbytes`` of all records (as text, or a share of bf16's),
    or ``damage``: a number, or the name of a format whose damage for all experts may be done."""

    bits: float | None = None
    nbytes: str | None = None
    damage: str | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise ExpertFlowError(
                f"a plan has one budget, got {' and '.join(given) or 'none'}: give --average-bits, --bytes or --damage"
            )
        if self.bits is not None and not (math.isfinite(self.bits) and self.bits > 0):
            raise ExpertFlowError(f"--average-bits {self.bits} is no number of bits: give 2 to 16")

    def decide(self, experts: Sequence[ExpertErrors], size: Size) -> Choice:
        """``size``: bytes of records."""
        if self.bits is not None:
            return choose(experts, self.bits)
        if self.nbytes is not None:
            whole = sum(size(expert, BF16) for expert in experts)
            room = parse_budget(self.nbytes, round(whole), "--bytes", "all records in bf16")
            return choose_within(experts, size, room, f"{format_bytes(room)} of records")
        return choose_damage(experts, size, self._most(experts))

    def _most(self, experts: Sequence[ExpertErrors]) -> float:
        text = self.damage or ""
        try:
            most = float(text)
        except ValueError:
            form = Format.parse(text)
        else:
            if not (math.isfinite(most) and most >= 0):
                raise ExpertFlowError(f"--damage {text} is no damage: give 0 or more, or a format")
            return most
        if any(form not in expert.damage for expert in experts):
            raise ExpertFlowError(f"--damage {form} was not measured: add it to --formats, or give a number")
        return sum(expert.damage[form] for expert in experts)


def plan(
    model: Annotated[Path, typer.Argument(help="folder of the model in its own full precision")],
    output: Annotated[Path, typer.Option("--output", "-o", help="plan file to write")],
    average_bits: Annotated[
        float | None, typer.Option(help="budget: of the codes, over all weights; 3 by default")
    ] = None,
    nbytes: Annotated[str | None, typer.Option("--bytes", help="budget: all records, 12MiB or 20% of bf16's")] = None,
    damage: Annotated[
        str | None, typer.Option(help="budget: most damage, or a format whose damage may be done")
    ] = None,
    formats: Annotated[str, typer.Option(help="formats to choose from")] = "int2-g32,int3-g32,int4-g32",
    sensitivity: Annotated[Path | None, typer.Option(help="measured before; written if it is not there")] = None,
    samples: Annotated[int, typer.Option(min=1, help="generated items, where it is measured now")] = 64,
    scales: Annotated[str, typer.Option(help="how rounding finds a group's range: absmax or mse")] = "absmax",
    method: Annotated[str, typer.Option(help="that the plan is for: awq's records hold an input scale")] = "gptq",
    traces: Annotated[list[Path] | None, typer.Option("--trace", help="recorded: plan slots and link time too")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="recorded: compare plans on these")] = None,
    expert_memory: Annotated[str, typer.Option(help="with --trace: device bytes for experts")] = "25%",
    link_weight: Annotated[float, typer.Option(min=0, help="worth of link time; damage has 1")] = 1.0,
    damage_share: Annotated[float, typer.Option(min=0, help="most damage, of that of one format for all")] = 1.0,
    link: Annotated[float, typer.Option(min=0.001, help="GB/s to the device")] = 25.0,
    rows: Annotated[int, typer.Option(min=1, help="requests of a trace answered together")] = 1,
    time_limit: Annotated[float, typer.Option(min=1, help="seconds for the integer program")] = 20.0,
    results: Annotated[Path | None, typer.Option(help="what was decided, as JSON; by default beside the plan")] = None,
) -> None:
    """A format for every expert: least damage in a budget, or fewest bytes at a damage (for quantize --plan).

    With --trace also the slots of every layer: least damage and expected link time together, in no more bytes than one
    format of --average-bits for all. A plot of bits by layer and expert goes beside the plan.
    """
    try:
        check_method(method)
        writable(output)
        choices = parse_formats(formats)
        none = average_bits is None and nbytes is None and damage is None
        budget = Budget(AVERAGE_BITS if none else average_bits, nbytes, damage)
        measured = read_or_measure(model, choices, samples, scales, sensitivity)
        errors = measured.chosen(sensitivity or Path("the measurement"), choices)
        if traces:
            if nbytes is not None or damage is not None:
                raise ExpertFlowError("a plan with --trace has its own limits: give --average-bits alone")
            options = JointOptions(
                traces, held_out or [], expert_memory, link_weight, damage_share, link, rows, time_limit
            )
            assert budget.bits is not None
            decided, found = plan_jointly(model, errors, choices, budget.bits, options, console)
        else:
            decided, found = _plan_formats(model, errors, budget, method == "awq")
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    beside = results or output.with_suffix(".slots.json" if traces else ".decision.json")
    found |= {"command": shlex.join(["python", "-m", "calibration", *sys.argv[1:]])}
    _write(output, decided)
    _write(beside, found | {"sensitivity": describe(measured.origin)})
    plot = output.with_suffix(".png")
    save_plot(Plan.parse(decided), errors, plot)
    console.print(f"formats: {output}; what was decided: {beside}; bits by layer and expert: {plot}", highlight=False)


def read_or_measure(
    model: Path, formats: Sequence[Format], samples: int, scales: str, path: Path | None
) -> Sensitivity:
    """The sensitivity in ``path``, checked against the model; else measured now, and kept there if it is given."""
    if path is not None and path.exists():
        found = Sensitivity.load(path)
        stream = ModelStream(model)
        found.check_model(path, model, [layer.experts for layer in stream.layers])
        stream.close()
        return found
    wanted = Wanted(formats, generated_samples(samples), generated_source(0), scales=scale_rule(scales))
    found = measure(model, wanted)
    if path is not None:
        found.save(path)
    return found


def _plan_formats(
    model: Path, errors: Sequence[ExpertErrors], budget: Budget, input_scale: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    stream = ModelStream(model)
    size = record_size([layer.shape for layer in stream.layers], input_scale)
    stream.close()
    choice = budget.decide(errors, size)
    by_key = {(expert.layer, expert.expert): expert for expert in errors}
    total = sum(size(by_key[key], form) for key, form in choice.formats.items())
    alike = {form: _all_in(errors, form, size) for form in sorted(errors[0].damage, key=lambda form: form.bits)}
    console.print(_summary(choice, errors))
    bits = sum(code_bits(by_key[key], form) for key, form in choice.formats.items())
    console.print(
        f"{choice.average_bits:.2f} bits of codes on average, {8 * total / (bits / choice.average_bits):.2f} with "
        f"scales: {format_bytes(round(total))}; summed damage {choice.damage:.4g}",
        highlight=False,
    )
    beside = ", ".join(f"{form} {lost:.4g} in {format_bytes(round(size_))}" for form, (lost, size_) in alike.items())
    console.print(f"all alike: {beside}", highlight=False)
    decided = {
        "budget": {name: value for name, value in vars(budget).items() if value is not None},
        "average_bits": choice.average_bits,
        "record_bytes": round(total),
        "damage": choice.damage,
        "all_alike": {form.name: {"damage": lost, "record_bytes": round(nb)} for form, (lost, nb) in alike.items()},
        "experts_by_format": _counts(choice),
    }
    return choice.to_plan(), decided


def _all_in(errors: Sequence[ExpertErrors], form: Format, size: Size) -> tuple[float, float]:
    return sum(expert.damage[form] for expert in errors), sum(size(expert, form) for expert in errors)


def _counts(choice: Choice) -> list[dict[str, int]]:
    layers = sorted({layer for layer, _ in choice.formats})
    found = [Counter(form.name for (at, _), form in choice.formats.items() if at == layer) for layer in layers]
    return [dict(sorted(counts.items())) for counts in found]


def _summary(choice: Choice, measured: Sequence[ExpertErrors]) -> Table:
    """How many experts of each layer got which format."""
    names = sorted({form.name for expert in measured for form in expert.damage})
    table = Table("layer", *names, title="experts by format", title_justify="left")
    for layer, counts in enumerate(_counts(choice)):
        table.add_row(str(layer), *(str(counts.get(name, "")) for name in names))
    return table


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
