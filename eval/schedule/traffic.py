"""Mixed traffic from recorded traces: who arrives when, what is foretold of each, and what batches of them touch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.miss_curves import measure_curves
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.trace import GENERATED, PROMPT_TEXT, RoutingTrace, Step, grouped_requests
from expertflow_quant.runtime.schedule import predicted_path, prompt_path, word_path

FIGURES = ("whole_batch_step", "batch", "step", "loads_per_token", "steps")
"""Per layer: distinct experts in a batch's first decode step, which all of its requests take; in all decode steps of a
batch together; in a decode step; experts that steps want, for a generated token. ``steps``: decode steps of all."""


@dataclass(frozen=True)
class Touched:
    """``figures`` as FIGURES names them, and by share of resident experts the ``hit_rate`` of a least recently used
    cache and its ``misses`` in a layer for a generated token."""

    figures: dict[str, float]
    hit_rate: dict[str, float]
    misses: dict[str, float]


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """All items of ``traces``, one trace after the other; items without a generated token, which no decode step sees,
    are left out. Raises ExpertFlowError for none, or for traces of models with other layers or experts."""
    sizes = {(trace.layers, trace.num_experts, trace.top_k) for trace in traces}
    if len(sizes) != 1:
        raise ExpertFlowError(
            f"{len(traces)} traces with (layers, experts, top k) {sorted(sizes)}: give traces of one and the same model"
        )
    answered = [t.of_items([i for i in range(t.items) if bool((t.kind[t.rows(i)] == GENERATED).any())]) for t in traces]
    first = [0]
    for trace in answered:
        first.append(first[-1] + trace.items)
    return RoutingTrace.of(
        torch.cat([trace.token_ids for trace in answered]),
        torch.cat([trace.kind for trace in answered]),
        torch.cat([trace.item + begin for trace, begin in zip(answered, first, strict=False)]),
        torch.cat([trace.experts.int() for trace in answered]),
        traces[0].num_experts,
        [task for trace in answered for task in trace.tasks],
    )


def known_paths(trace: RoutingTrace, learned: PathPredictor | None = None) -> dict[str, Tensor]:
    """Paths bool [items, L, E] by which requests can be grouped.

    ``task``: every expert for the first task and none for others, so that only the tasks are told apart; ``words``:
    those of the prompt; ``predicted`` by a trained predictor that reads the prompt; ``prompt``: foretold by the
    prompt's routes, which are known once it has run; ``oracle``: those of the generated tokens themselves.
    """
    shape = (trace.items, trace.layers, trace.num_experts)
    kinds = sorted(set(trace.tasks))
    task = torch.zeros(shape, dtype=torch.bool)
    prompt, oracle = torch.zeros_like(task), torch.zeros_like(task)
    for item in range(trace.items):
        rows = trace.rows(item)
        generated = trace.kind[rows] == GENERATED
        if bool(generated.all()):
            raise ExpertFlowError(f"item {item} has no prompt: record the trace with prompts")
        share = kinds.index(trace.tasks[item]) / max(len(kinds) - 1, 1)
        task[item, :, : round(share * trace.num_experts)] = True
        prompt[item] = prompt_path(trace.experts[rows][~generated], trace.num_experts)
        answer = trace.experts[rows][generated].long()
        oracle[item].scatter_(1, answer.transpose(0, 1).flatten(1), True)
    found = {"task": task, "words": words_of(trace)}
    if learned is not None:
        found["predicted"] = predicted_by(learned, trace)
    return found | {"prompt": prompt, "oracle": oracle}


def words_of(trace: RoutingTrace) -> Tensor:
    """bool [items, 1, places]: which words the prompts have."""
    rows = [trace.rows(item) for item in range(trace.items)]
    return torch.stack([word_path(trace.token_ids[part][trace.kind[part] == PROMPT_TEXT]) for part in rows])


def predicted_by(predictor: PathPredictor, trace: RoutingTrace) -> Tensor:
    """bool [items, L, E]: the paths that a predictor foretells of prompts."""
    scores, rows = predictor.scores_for(trace), [trace.rows(item) for item in range(trace.items)]
    return torch.stack([predicted_path(scores[p][trace.kind[p] != GENERATED], trace.top_k) for p in rows])


def touched(trace: RoutingTrace, batches: Sequence[Sequence[int]], shares: Sequence[float]) -> Touched:
    """What decoding ``batches`` of items, one after the other, touches."""
    per_batch = [list(grouped_requests(trace, [batch])) for batch in batches]
    steps = [step for of_batch in per_batch for step in of_batch]
    wanted = [sum(map(len, step)) / trace.layers for step in steps]
    tokens = int((trace.kind == GENERATED).sum())
    figures = {
        "whole_batch_step": _mean([_distinct(of_batch[:1]) for of_batch in per_batch]),
        "batch": _mean([_distinct(of_batch) for of_batch in per_batch]),
        "step": _mean(wanted),
        "loads_per_token": sum(wanted) / tokens,
        "steps": float(len(steps)),
    }
    missed = measure_curves(steps, trace.num_experts).misses.double().sum((0, 1)) * len(steps) / trace.layers
    slots = {f"{share:.0%}": max(1, int(share * trace.num_experts)) for share in shares}
    return Touched(
        figures,
        {name: 1 - float(missed[count]) / sum(wanted) for name, count in slots.items()},
        {name: float(missed[count]) / tokens for name, count in slots.items()},
    )


def _distinct(steps: Sequence[Step]) -> float:
    """Distinct experts in a layer over all ``steps``."""
    return sum(len({expert for step in steps for expert in step[layer]}) for layer in range(len(steps[0]))) / len(
        steps[0]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
