"""What a cache is asked for: a trace step by step, and the tokens of each step, so that predictions can be joined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.policies.affinity import Affinity, AffinityTable
from expertflow_quant.offload.policies.belady import Requests
from expertflow_quant.offload.policy import Progress
from expertflow_quant.offload.trace import GENERATED, Phase, RoutingTrace

Scores = list[list[list[float]]]
"""Of every step the chance that it uses each expert, [steps][layers][experts]."""

CALIBRATION_BINS = 64
LEAST_CHANCE = 0.005


@dataclass(frozen=True)
class Workload:
    """How items are answered: ``rows`` together; ``phase`` decode: generated tokens only, all: prompts too."""

    name: str
    rows: int
    phase: Phase

    def steps(self, trace: RoutingTrace) -> list[Tensor]:
        """The rows of ``trace`` that run in each step, in the order of ``trace.grouped_requests``."""
        steps: list[Tensor] = []
        for first in range(0, trace.items, self.rows):
            parts = [trace.rows(item) for item in range(first, min(first + self.rows, trace.items))]
            tokens = [torch.arange(part.start, part.stop) for part in parts]
            answers = [rows[trace.kind[rows] == GENERATED] for rows in tokens]
            prompts = torch.cat([rows[trace.kind[rows] != GENERATED] for rows in tokens])
            steps += [prompts] if self.phase == "all" and len(prompts) else []
            longest = max(map(len, answers))
            steps += [torch.cat([answer[at : at + 1] for answer in answers]) for at in range(longest)]
        return steps

    def requests(self, trace: RoutingTrace) -> list[list[list[int]]]:
        """Of every step, layer by layer, the distinct experts it wants."""
        paths = trace.paths()
        found = [[layer.nonzero().flatten().tolist() for layer in paths[rows].any(0)] for rows in self.steps(trace)]
        if not found:
            raise ExpertFlowError("the trace has no generated tokens: record longer answers")
        return found

    def prefills(self, trace: RoutingTrace) -> list[bool]:
        """Whether each step is a prompt's."""
        return [bool((trace.kind[rows] != GENERATED).any()) for rows in self.steps(trace)]

    def scores(self, trace: RoutingTrace, chances: Tensor) -> Scores:
        """Chances [N, L, E] of tokens joined by step: an expert is used unless no token of the step uses it."""
        return [(1 - (1 - chances[rows]).prod(0)).tolist() for rows in self.steps(trace)]


WORKLOADS = (
    Workload("decode", 1, "decode"),
    Workload("prompts and decode", 1, "all"),
    Workload("decode, 8 rows", 8, "decode"),
)


def calibrated(fit: RoutingTrace, fitted: Tensor) -> Callable[[Tensor], Tensor]:
    """Turns a predictor's scores into chances: the share of the experts with about this score that were used, in the
    generated tokens of ``fit``, whose scores are ``fitted`` [N, L, E]."""
    kept = fit.kind == GENERATED
    score, order = fitted[kept].flatten().sort(stable=True)
    used = fit.paths()[kept].flatten()[order].float()
    bins = [part for part in torch.arange(len(score)).chunk(CALIBRATION_BINS) if len(part)]
    edges = torch.stack([score[part[-1]] for part in bins[:-1]])
    share = torch.stack([used[part].mean() for part in bins])

    def chances(scores: Tensor) -> Tensor:
        return share[torch.searchsorted(edges.contiguous(), scores.contiguous())]

    return chances


def joined(first: Scores, second: Scores, prior: Sequence[Sequence[float]]) -> Scores:
    """Two predictions from different signs as one: their log-odds added, less those of ``prior``, which both hold."""

    def odds(chances: Tensor) -> Tensor:
        return chances.clamp(LEAST_CHANCE, 1 - LEAST_CHANCE).logit()

    base = odds(torch.tensor(prior))
    joint: Scores = torch.sigmoid(odds(torch.tensor(first)) + odds(torch.tensor(second)) - base).tolist()
    return joint


def oracle_scores(requests: Requests, experts: int) -> Scores:
    """The truth."""
    return [[[float(expert in set(wanted)) for expert in range(experts)] for wanted in step] for step in requests]


def affinity_scores(requests: Requests, experts: Sequence[int], table: AffinityTable) -> Scores:
    """What ``table``, fitted for the next step alone, expects of each step from the steps before it."""
    progress = Progress(experts)
    affinity = Affinity(progress, table)
    scores: Scores = []
    for step in requests:
        scores.append([[affinity.rate((layer, e)) for e in range(count)] for layer, count in enumerate(experts)])
        progress.begin_step()
        for layer, wanted in enumerate(step):
            progress.begin_layer(layer, wanted)
    return scores


def recall(requests: Requests, scores: Scores, names: int) -> float:
    """Share of the requests that are among a layer's ``names`` best scores."""
    hits = total = 0
    for step, chances in zip(requests, scores, strict=True):
        for wanted, row in zip(step, chances, strict=True):
            best = sorted(range(len(row)), key=lambda expert: -row[expert])[:names]
            hits, total = hits + len(set(best) & set(wanted)), total + len(wanted)
    return hits / total
