"""`quantize`: a transformers model folder in, a checkpoint out, with a progress bar and a table at the
end."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.cli.tables import coverage_table, error_note, layer_table, rare_note, size
from expertflow_quant.formats.errors import ExpertFlowError

if TYPE_CHECKING:
    from expertflow_quant.pipeline.batches import CalibrationSample
    from expertflow_quant.pipeline.observe import ObserveOptions
    from expertflow_quant.pipeline.quantize import QuantizeReport

DEFAULT_FORMAT = "int4-g32"
INTERRUPTED = 130
RATE_SECONDS = 1800.0  # rate and time left count the pauses in which a layer is observed

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a transformers Mixture-of-Experts model.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint; new, or an unfinished one.")]
Method = Annotated[str, typer.Option(help="awq or gptq, which calibrate, or rtn: rounding to nearest.")]
FormatName = Annotated[
    str | None,
    typer.Option("--format", help="int2, int3, int4 or int8 with -g32 (any dividing size) or -channel; nf4-g64; bf16."),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="JSON with a format per expert, instead of --format.")]
Samples = Annotated[
    Path | None, typer.Option(help="Calibration items: a folder or parquet; generated ones by default.")
]
NumSamples = Annotated[int, typer.Option(min=1, help="How many calibration items are used.")]
Pool = Annotated[
    int | None,
    typer.Option(min=1, help="Choose them from so many, to reach rare experts; by default the first ones are taken."),
]
Seed = Annotated[int, typer.Option(help="Of the generated calibration items.")]
TextShare = Annotated[
    float | None,
    typer.Option(help="Text tokens' part of the weight beside image tokens, 0.9 by default; 0: by their number."),
]
Scales = Annotated[str, typer.Option(help="How a group's range is found: absmax, or mse (searched).")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is in OUT.")]


def register(app: typer.Typer) -> None:
    """Adds the command `quantize`."""
    app.command("quantize")(quantize)


def quantize(
    model: Model,
    out: Out,
    method: Method = "awq",
    format_name: FormatName = None,
    plan: PlanFile = None,
    samples: Samples = None,
    num_samples: NumSamples = 128,
    pool: Pool = None,
    seed: Seed = 0,
    text_share: TextShare = None,
    scales: Scales = "absmax",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Quantize every expert of MODEL. Stopped at any point and run again, it goes on where it was."""
    chosen = _plan(format_name, plan)
    console = Console(stderr=True)
    with console.status("loading libraries"):
        from expertflow_quant.models.device import pick_device
        from expertflow_quant.pipeline.methods import MethodOptions, check_method
        from expertflow_quant.pipeline.quantize import quantize_model

    check_method(method)
    options = MethodOptions(scales=scales)  # type: ignore[arg-type]  # checked there
    calibrates = method != "rtn" or samples is not None
    if not calibrates:
        _refuse_unused(pool, text_share)

    def chosen_samples() -> "list[CalibrationSample]":
        found = _samples(samples, pool or num_samples, seed)
        return found if pool is None else _balanced(model, found, num_samples, device)

    try:
        with _progress(console) as bar:
            task = bar.add_task("reading", total=None)
            report = quantize_model(
                model,
                out,
                method=method,
                plan=chosen,
                samples=chosen_samples() if calibrates else None,
                options=options,
                observe=_observe(text_share) if calibrates else None,
                device=pick_device(device),
                overwrite=overwrite,
                progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
            )
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from the last finished layer in {out}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    _show(report)


class _Rate(ProgressColumn):
    """Experts per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} experts/s" if task.speed else "", style="progress.data.speed")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=RATE_SECONDS,
    )


def _plan(format_name: str | None, plan: Path | None) -> Plan:
    if format_name is not None and plan is not None:
        raise ExpertFlowError("--format and --plan were both given: a plan names its own default: give either")
    return Plan.load(plan) if plan is not None else Plan.uniform(format_name or DEFAULT_FORMAT)


def _refuse_unused(pool: int | None, text_share: float | None) -> None:
    """Of calibration, where there is none."""
    for name, value in (("--pool", pool), ("--text-share", text_share)):
        if value is not None:
            raise ExpertFlowError(
                f"{name} {value} was given, but rtn calibrates on nothing: leave it out, take awq or gptq, or give "
                "--samples to measure rtn's errors on"
            )


def _observe(text_share: float | None) -> "ObserveOptions":
    from expertflow_quant.pipeline.observe import ObserveOptions

    return ObserveOptions() if text_share is None else ObserveOptions(text_share=text_share or None)


def _samples(path: Path | None, count: int, seed: int) -> "list[CalibrationSample]":
    from expertflow_quant.pipeline.samples_io import generated_samples, load_samples

    return generated_samples(count, seed) if path is None else load_samples(path, count)


def _balanced(model: Path, pool: "list[CalibrationSample]", wanted: int, device: str) -> "list[CalibrationSample]":
    from expertflow_quant.models.device import pick_device
    from expertflow_quant.pipeline.balance import balanced_samples
    from expertflow_quant.pipeline.stream import ModelStream

    return balanced_samples(ModelStream(model), pool, wanted, pick_device(device))


def _show(report: "QuantizeReport") -> None:
    console = Console()
    console.print(layer_table(report.manifest))
    if (covered := coverage_table(report.manifest)) is not None:
        console.print(covered)
    console.print(error_note(report.manifest), highlight=False)
    if (note := rare_note(report.manifest)) is not None:
        console.print(note, style="yellow", highlight=False)
    resumed = f", {report.layers_resumed} layers kept from an earlier run" if report.layers_resumed else ""
    console.print(
        f"{size(report.expert_bytes)} of experts in {report.folder} after {report.seconds:.1f} s{resumed}",
        highlight=False,
        soft_wrap=True,
    )
