"""``python -m eval predict TRACE...``: score every predictor on recorded traces.

The committed figures come from
::

    python -m eval predict calibration/traces/charts.safetensors calibration/traces/documents.safetensors \\
        --fit calibration/traces/charts-train.safetensors --fit calibration/traces/documents-train.safetensors \\
        --learned calibration/predictor/shipped/pictures --learned calibration/predictor/shipped/ids \\
        --learned calibration/predictor/shipped/charts --learned calibration/predictor/shipped/documents

with the traces' sights beside them, as calibration/predictor/README.md records them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from eval.plots import save
from eval.predict.plots import predictors_figure
from eval.predict.scores import quality, truth_of
from eval.provenance import provenance, short_path
from eval.report import make_console, write_json
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.predict_ahead import NextGate
from expertflow_quant.offload.predict_frequency import Frequency, TokenTable
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.predict_previous import PreviousToken
from expertflow_quant.offload.predictor import Predictor
from expertflow_quant.offload.sight import Sight, sight_path
from expertflow_quant.offload.trace import RoutingTrace

RESULTS = Path(__file__).parents[1] / "results" / "predictors.json"


@dataclass(frozen=True)
class Candidate:
    """A predictor and what it learned from: ``fitted`` names tasks; ``trained``: how, for one that is a network."""

    predictor: Predictor
    fitted: tuple[str, ...]
    trained: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        return f"{self.predictor.name} ({' + '.join(self.fitted)})"


def predict(
    traces: Annotated[list[Path], typer.Argument(help="held-out traces; a sight beside one is used")],
    fit: Annotated[list[Path] | None, typer.Option(help="training traces, for predictors that count")] = None,
    learned: Annotated[list[Path] | None, typer.Option(help="folders of trained predictors")] = None,
    resident: Annotated[float, typer.Option(min=0.0, max=1.0, help="share of experts that the LRU keeps")] = 0.25,
    out: Annotated[Path, typer.Option(help="results file; the plot is written beside it")] = RESULTS,
) -> None:
    """Recall and precision of every predictor at k, 1.5k and 2k, by task, kind of token, and on an LRU's misses."""
    console = make_console()
    try:
        held_out = [_with_sight(path) for path in traces]
        found = candidates([RoutingTrace.load(path) for path in fit or []], learned or [])
        results = score(found, held_out, resident)
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    head = provenance("eval", ["predict", *sys.argv[2:]], "cpu")
    write_json(out, {"provenance": head, "traces": [short_path(path) for path in traces], **results})
    save(predictors_figure(results), out.with_suffix(".png"))
    for line in table(results):
        console.print(line, highlight=False, soft_wrap=True)


def candidates(fit: Sequence[RoutingTrace], folders: Sequence[Path]) -> list[Candidate]:
    """Predictors that count, made from each task's training trace and from all together, then the trained ones."""
    by_task = {tuple(sorted(set(trace.tasks))): trace for trace in fit}
    if len(by_task) > 1:
        both = joined(list(by_task.values()))
        by_task[tuple(sorted(set(both.tasks)))] = both
    found = []
    for tasks, trace in by_task.items():
        prior = Frequency.fit(trace, by_kind=True)
        made: list[Predictor] = [Frequency.fit(trace), prior, TokenTable.fit(trace), PreviousToken(prior)]
        made += [PreviousToken(prior, in_turn=True), NextGate(prior), NextGate(prior, 2)]
        found += [Candidate(predictor, tasks) for predictor in made]
    for folder in folders:
        predictor = PathPredictor.load(folder)
        found.append(Candidate(predictor, tuple(predictor.trained.get("tasks", ["?"])), predictor.trained))
    if not found:
        raise ExpertFlowError("there is nothing to score: give --fit traces, --learned folders, or both")
    return found


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace of all items; gate weights are left out."""
    offsets = [sum(trace.items for trace in traces[:at]) for at in range(len(traces))]
    return RoutingTrace.of(
        torch.cat([trace.token_ids for trace in traces]),
        torch.cat([trace.kind for trace in traces]),
        torch.cat([trace.item + offset for trace, offset in zip(traces, offsets)]),
        torch.cat([trace.experts for trace in traces]),
        traces[0].num_experts,
        [task for trace in traces for task in trace.tasks],
    )


def score(
    found: Sequence[Candidate], held_out: Sequence[tuple[RoutingTrace, Sight | None]], resident: float
) -> dict[str, Any]:
    """Figures of every candidate on every trace; a predictor that needs a sight is left out where there is none."""
    results: dict[str, Any] = {"resident": resident, "tasks": {}, "predictors": {}}
    for trace, sight in held_out:
        task = " + ".join(sorted(set(trace.tasks)))
        truth, slots = truth_of(trace, resident)
        kinds = torch.bincount(trace.kind.long(), minlength=3).tolist()
        results["tasks"][task] = {"items": trace.items, "tokens": kinds, "lru_slots": slots, "top_k": trace.top_k}
        for candidate in found:
            if sight is None and _needs_sight(candidate.predictor):
                continue
            entry = results["predictors"].setdefault(
                candidate.label, {"fitted": list(candidate.fitted), "trained": candidate.trained, "on": {}}
            )
            entry["on"][task] = quality(
                candidate.predictor.scores_for(trace, sight), truth, isinstance(candidate.predictor, PathPredictor)
            )
    return results


def table(results: dict[str, Any]) -> list[str]:
    """One line for a predictor and task: recall at k by kind, then on the LRU's misses."""
    lines = []
    for label, entry in results["predictors"].items():
        for task, figures in entry["on"].items():
            recall = figures["recall"]["k"]
            shown = ", ".join(f"{kind} {value:.1%}" for kind, value in recall.items())
            named = figures["misses"]["2k"]["absent"]["recall"]
            lines.append(
                f"{label} on {task}: recall at k: {shown}; of misses {named if named is None else f'{named:.1%}'}"
            )
    return lines


def _needs_sight(predictor: Predictor) -> bool:
    return isinstance(predictor, NextGate) or (isinstance(predictor, PathPredictor) and predictor.basis is not None)


def _with_sight(path: Path) -> tuple[RoutingTrace, Sight | None]:
    trace, beside = RoutingTrace.load(path), sight_path(path)
    return trace, Sight.load(beside).check(trace) if beside.exists() else None
