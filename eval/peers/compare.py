"""The same experts quantized here and there, and what that does to their output."""

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from eval.peers.experts import SEQUENCE, Expert, write_llama
from expertflow_quant.formats import ExpertFlowError, ExpertShape, Format, RecordLayout
from expertflow_quant.kernels import ExpertWeights, expert_weights
from expertflow_quant.pipeline.methods import Job, LayerQuantizer, MethodOptions
from expertflow_quant.pipeline.observe import ExpertRows

TOLERANCE = 0.01
"""Our error may be above a peer's by so much."""
ROOT = Path(__file__).parents[2]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One method with settings here and in each peer (absent: it cannot). ``alike``: they mean the same everywhere, so
    that our errors must not be above a peer's."""

    name: str
    method: str
    format: str
    ours: MethodOptions
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    alike: bool = True


IN_ORDER = {
    "gptqmodel": {"damp_percent": 0.01, "desc_act": False, "act_group_aware": False},
    "llmcompressor": {"dampening_frac": 0.01, "actorder": None},
}
BY_SIZE = {
    "gptqmodel": {"damp_percent": 0.01, "desc_act": False, "act_group_aware": True},
    "llmcompressor": {"dampening_frac": 0.01, "actorder": "static"},
}
DEFAULTS: dict[str, dict[str, Any]] = {"gptqmodel": {}, "llmcompressor": {}}
PUBLISHED = MethodOptions(damp=0.01, act_order=False)
SORTED = MethodOptions(damp=0.01, act_order=True)
CASES = (
    Case("GPTQ, columns in order, dampening 0.01", "gptq", "int4-g32", PUBLISHED, IN_ORDER),
    Case("GPTQ, columns in order, dampening 0.01", "gptq", "int3-g32", PUBLISHED, IN_ORDER),
    Case("GPTQ, large columns first, dampening 0.01", "gptq", "int4-g32", SORTED, BY_SIZE),
    Case("GPTQ, large columns first, dampening 0.01", "gptq", "int3-g32", SORTED, BY_SIZE),
    Case("GPTQ, everybody's defaults", "gptq", "int4-g32", MethodOptions(), DEFAULTS, alike=False),
    Case("GPTQ, everybody's defaults", "gptq", "int3-g32", MethodOptions(), DEFAULTS, alike=False),
    Case("AWQ", "awq", "int4-g32-asym", MethodOptions(max_rows=1 << 20), DEFAULTS),
    Case("AWQ", "awq", "int4-g32", MethodOptions(max_rows=1 << 20), {"llmcompressor": {}}),
)


def compare(
    experts: Sequence[Expert], pythons: dict[str, str], folder: Path, progress: Progress, cases: Sequence[Case] = CASES
) -> list[dict[str, Any]]:
    """One entry for each case and expert: relative output errors, ours and each peer's.

    ``pythons``: the interpreter of each peer's environment. Raises ExpertFlowError with the end of what a peer said
    when it fails.
    """
    for index, expert in enumerate(experts):
        write_llama(expert, folder / f"expert-{index}")
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    for peer, python in pythons.items():
        progress(f"{peer}: {len(experts)} experts")
        for (case, expert), out in _run(peer, python, len(experts), folder, cases).items():
            found[peer, case, expert] = experts[expert].errors(**load_file(out))
    progress("ours")
    return [
        {
            "case": case.name,
            "alike": case.alike,
            "format": case.format,
            "options": {"ours": asdict(case.ours), **case.peers},
            "expert": expert.name,
            "tokens": len(expert.samples),
            "errors": {
                "ours": expert.errors(*_ours(expert, case)),
                **{peer: found[peer, at, index] for peer in case.peers if (peer, at, index) in found},
            },
        }
        for at, case in enumerate(cases)
        for index, expert in enumerate(experts)
    ]


def summary(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean errors over experts for each case and format, how far ours are above each peer's, and whether that is
    within TOLERANCE where settings are alike (None elsewhere)."""
    rows: list[dict[str, Any]] = []
    for key in dict.fromkeys((entry["case"], entry["format"]) for entry in entries):
        here = [entry for entry in entries if (entry["case"], entry["format"]) == key]
        same = [entry["errors"] for entry in here]
        row: dict[str, Any] = {"case": key[0], "format": key[1], "alike": here[0]["alike"]}
        for rows_name in ("samples", "unseen"):
            mean = {who: sum(errors[who][rows_name] for errors in same) / len(same) for who in same[0]}
            above = {who: mean["ours"] / error - 1 for who, error in mean.items() if who != "ours"}
            row[rows_name] = {"error": mean, "above": above}
        within = all(above <= TOLERANCE for above in row["samples"]["above"].values())
        row["passed"] = within if row["alike"] else None
        rows.append(row)
    return rows


def _run(peer: str, python: str, experts: int, folder: Path, cases: Sequence[Case]) -> dict[tuple[int, int], Path]:
    """Every case and expert that a peer can, in one process of its own: where its weights lie."""
    outs, jobs = {}, []
    for at, case in enumerate(cases):
        if peer not in case.peers:
            continue
        form = Format.parse(case.format)
        for expert in range(experts):
            outs[at, expert] = folder / f"{peer}-{at}-{expert}.safetensors"
            jobs.append(
                {
                    "model": str(folder / f"expert-{expert}"),
                    "method": case.method,
                    "bits": form.bits,
                    "group": form.group_size,
                    "symmetric": form.symmetric,
                    "options": case.peers[peer],
                    "out": str(outs[at, expert]),
                }
            )
    wanted = folder / f"{peer}.json"
    wanted.write_text(json.dumps({"sequence": SEQUENCE, "jobs": jobs}))
    done = subprocess.run(
        [python, "-m", f"eval.peers.in_{peer}", str(wanted)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ExpertFlowError(f"{peer} failed in {python}: {(done.stdout + done.stderr)[-2000:]}")
    return outs


def _ours(expert: Expert, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """norm, gate, up and down as they will run, from the record that the pipeline makes."""

    def gated(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    inner, hidden = expert.gate.shape
    rows = ExpertRows(expert.samples, torch.ones(len(expert.samples)), len(expert.samples), "routed")
    weights = ExpertWeights(torch.cat([expert.gate, expert.up]), expert.down)
    quantizer = LayerQuantizer(case.method, ExpertShape(hidden, inner), gated, case.ours)
    ((_, entry, record),) = quantizer.run(iter([Job(0, Format.parse(case.format), weights, rows)]))
    layout = RecordLayout(ExpertShape(hidden, inner), entry.format, entry.input_scale)
    made = expert_weights(layout.views(record), layout, torch.float32)
    norm = torch.ones(hidden) if made.input_scale is None else made.input_scale
    return norm, *made.gate_up.chunk(2), made.down
