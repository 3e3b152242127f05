"""``python -m calibration sensitivity MODEL --out FILE``: what every expert loses in every format, measured once.

The shipped model's (eval/results/curves.md says which ways of measuring were compared)::

    python -m calibration sensitivity calibration/shipped/moe --out sensitivity.json --samples 256
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from calibration.measure import measure_errors
from calibration.plan import ExpertErrors
from calibration.sensitivity import Checkpoints, Rounded, Settings, measure_sensitivity
from calibration.sensitivity_file import Origin, Sensitivity, weights_digest
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.models.device import pick_device
from expertflow_quant.models.processor import load_processor
from expertflow_quant.pipeline.batches import CalibrationSample, answered_batches, samples_digest
from expertflow_quant.pipeline.samples_io import generated_samples, load_samples
from expertflow_quant.pipeline.stream import ModelStream
from expertflow_quant.pipeline.teacher import Teacher
from expertflow_quant.quantize import ScaleRule

FORMATS = "int2-g32,int3-g32,int4-g32,int8-g32"
PREDICTIONS, OUTPUTS = "predictions", "outputs"

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, and how."""

    formats: Sequence[Format]
    samples: Sequence[CalibrationSample]
    source: str
    at: str = PREDICTIONS
    settings: Settings = field(default_factory=Settings)
    scales: ScaleRule = "absmax"
    quantized: Sequence[Path] = ()
    device: str = "cpu"

    def origin(self, model: Path, method: str) -> Origin:
        """As it stands in the file."""
        how = {"at": self.at} | (asdict(self.settings) if self.at == PREDICTIONS else {})
        return Origin(
            model={"name": model.resolve().name, "weights": weights_digest(model)},
            samples={
                "source": self.source,
                "count": len(self.samples),
                "digest": samples_digest(self.samples),
            },
            measure=how,
            method=method,
            scales=self.scales,
            formats=self.formats,
            made={
                "command": shlex.join(["python", "-m", "calibration", *sys.argv[1:]]),
                "packages": {"torch": torch.__version__, "transformers": transformers.__version__},
            },
        )


def sensitivity(
    model: Annotated[Path, typer.Argument(help="folder of the model in its own full precision")],
    out: Annotated[Path, typer.Option("--out", "-o", help="sensitivity file to write")],
    formats: Annotated[str, typer.Option(help="formats to measure")] = FORMATS,
    samples: Annotated[int, typer.Option(min=1, help="calibration items")] = 128,
    source: Annotated[
        Path | None, typer.Option("--from", help="their folder or parquet; generated ones by default")
    ] = None,
    at: Annotated[
        str, typer.Option(help="predictions (the model in memory), or outputs (layer by layer, never all of it)")
    ] = PREDICTIONS,
    quantized: Annotated[
        list[Path] | None, typer.Option(help="checkpoints, one for each format, instead of rounding")
    ] = None,
    temperature: Annotated[float, typer.Option(help="by which predictions are softened")] = Settings.temperature,
    probes: Annotated[int, typer.Option(min=1, help="backward passes a batch")] = Settings.probes,
    scales: Annotated[str, typer.Option(help="how rounding finds a group's range: absmax or mse")] = "absmax",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    seed: Annotated[int, typer.Option(help="of the generated items and the probes")] = 0,
) -> None:
    """Measure each expert's loss in each format, for `plan --sensitivity`."""
    try:
        writable(out)
        if out.exists():
            raise ExpertFlowError(f"{out} was measured before: delete it to measure again, or name another file")
        settings = Settings(temperature, probes, seed)
        asked = generated_samples(samples, seed) if source is None else load_samples(source, samples)
        named = source.name if source is not None else generated_source(seed)
        wanted = Wanted(
            parse_formats(formats), asked, named, at, settings, scale_rule(scales), quantized or (), device
        )  # fmt: skip
        found = measure(model, wanted)
        found.save(out)
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    console.print(_table(found))
    console.print(f"{out}: {len(found.experts)} experts in {len(found.origin.formats)} formats", highlight=False)


def writable(file: Path) -> None:
    """Make the folder of ``file``. Raises ExpertFlowError where nothing can be written, before anything is measured."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExpertFlowError(f"cannot write {file} ({error.strerror}): choose a folder that can be written") from error
    if file.is_dir():
        raise ExpertFlowError(f"{file} is a folder: name a file in it")


def measure(model: Path, wanted: Wanted) -> Sensitivity:
    """Measures as ``wanted``, with a progress bar. Raises ExpertFlowError for what does not fit together."""
    if wanted.at not in (PREDICTIONS, OUTPUTS):
        raise ExpertFlowError(f"{wanted.at!r} is no place to measure at: use {PREDICTIONS} or {OUTPUTS}")
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True,
    ) as bar:  # fmt: skip
        row = bar.add_task(f"measuring at {wanted.at}", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(row, completed=done, total=total)

        if wanted.at == OUTPUTS:
            if wanted.quantized:
                raise ExpertFlowError(f"--quantized needs --at {PREDICTIONS}: at {OUTPUTS} experts are rounded")
            errors = measure_errors(model, wanted.samples, wanted.formats, advance, wanted.scales)
            return Sensitivity(wanted.origin(model, "rtn"), errors)
        stream = ModelStream(model)
        given: Checkpoints | None = Checkpoints(wanted.quantized) if wanted.quantized else None
        if given is not None:
            given.check_model(stream)
        teacher = Teacher(model, pick_device(wanted.device))
        batches = answered_batches(load_processor(model), wanted.samples)
        formats = given.formats if given else list(wanted.formats)
        quantized = given or Rounded(teacher, formats, wanted.scales)
        found = measure_sensitivity(stream, teacher, batches, quantized, formats, wanted.settings, advance)
        stream.close()
    origin = wanted.origin(model, quantized.method)
    origin = Origin(**{**vars(origin), "formats": formats})
    origin = Origin(**{**vars(origin), "measure": {**origin.measure, "answer_tokens": found.answer_tokens}})
    return Sensitivity(origin, found.experts, found.text_share)


def generated_source(seed: int) -> str:
    """How the file names generated samples."""
    return f"generated, calibration split, seed {seed}"


def parse_formats(names: str) -> list[Format]:
    """A comma-separated list."""
    return [Format.parse(name.strip()) for name in names.split(",")]


def scale_rule(name: str) -> ScaleRule:
    """Raises ExpertFlowError for a rule that there is not."""
    rules: dict[str, ScaleRule] = {"absmax": "absmax", "mse": "mse"}
    if name not in rules:
        raise ExpertFlowError(f"scales {name!r} are not known: use {' or '.join(rules)}")
    return rules[name]


def _table(found: Sensitivity) -> Table:
    """Each layer's summed damage in each format, and its text share."""
    formats = found.origin.formats
    unit = "nats an answer token" if found.origin.measure["at"] == PREDICTIONS else "shares of the layer's output"
    table = Table("layer", *(form.name for form in formats), title=f"summed damage, {unit}", title_justify="left")
    if found.text_share:
        table.add_column("text share", justify="right")
    for layer in sorted({expert.layer for expert in found.experts}):
        of_layer = [expert for expert in found.experts if expert.layer == layer]
        share = [f"{found.text_share[layer]:.2f}"] if found.text_share else []
        table.add_row(str(layer), *(f"{_sum(of_layer, form):.3g}" for form in formats), *share)
    table.add_section()
    table.add_row("all", *(f"{_sum(found.experts, form):.3g}" for form in formats))
    return table


def _sum(experts: Sequence[ExpertErrors], form: Format) -> float:
    return sum(expert.damage[form] for expert in experts)


def describe(origin: Origin) -> dict[str, Any]:
    """What a plan's results say of the measurement."""
    return {name: value for name, value in asdict(origin).items() if name != "formats"}
