"""What is compared: a policy, with the predictions it is given and whether records are fetched ahead by them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eval.cache.workload import Scores, Workload, affinity_scores, calibrated, joined, oracle_scores
from expertflow_quant.offload.policies.affinity import Affinity, fit_affinity
from expertflow_quant.offload.policies.belady import Belady, Future, Requests
from expertflow_quant.offload.policies.frequency import LFU, Popular, popularity
from expertflow_quant.offload.policies.predictive import Predictive
from expertflow_quant.offload.policies.scan import ScanResistant
from expertflow_quant.offload.policy import LRU, Policy, Progress
from expertflow_quant.offload.predict_frequency import Frequency, TokenTable
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.predict_previous import PreviousToken
from expertflow_quant.offload.sight import Sight, sight_path
from expertflow_quant.offload.trace import RoutingTrace

BELADY = "Belady"
LRU_NAME = "LRU"


@dataclass(frozen=True)
class Contender:
    """``name``; ``make`` a policy; ``scores`` of every step, or none; ``ahead``: fetch by them; ``predictor``."""

    name: str
    make: Callable[[Progress], Policy]
    scores: Scores | None = field(default=None, repr=False)
    ahead: bool = False
    predictor: str | None = None


@dataclass(frozen=True)
class Case:
    """One trace answered in one way, and the trace of the same tasks that everything is fitted on."""

    workload: Workload
    trace: RoutingTrace
    path: Path
    fit: RoutingTrace
    predictors: tuple[Path, ...] = ()

    @property
    def experts(self) -> list[int]:
        return [self.trace.num_experts] * self.trace.layers


def predictions(case: Case, requests: Requests, fitted: Requests) -> dict[str, Scores]:
    """Scores of every step by each predictor, from what is known before the step; "oracle" knows it."""
    found = {
        "affinity": affinity_scores(requests, case.experts, fit_affinity(fitted, case.experts, forget=0.0)),
    }
    counted = Frequency.fit(case.fit.generated())
    for predictor in (counted, PreviousToken(counted), TokenTable.fit(case.fit.generated())):
        chances = calibrated(case.fit, predictor.scores_for(case.fit))(predictor.scores_for(case.trace))
        found[predictor.name] = case.workload.scores(case.trace, chances)
    shares = popularity(fitted, case.experts)
    found["affinity and token table"] = joined(found["affinity"], found[TokenTable.name], shares)
    for folder in case.predictors:
        trained = PathPredictor.load(folder)
        beside = sight_path(case.path)
        seen = Sight.load(beside) if trained.basis is not None and beside.exists() else None
        found[trained.name] = case.workload.scores(case.trace, torch.sigmoid(trained.scores_for(case.trace, seen)))
    return found | {"oracle": oracle_scores(requests, case.trace.num_experts)}


def contenders(case: Case, requests: Requests, fitted: Requests, guesses: dict[str, Scores]) -> list[Contender]:
    """Belady and LRU first; ``fitted``: the same workload of the trace to fit on."""
    future, table = Future(requests), fit_affinity(fitted, case.experts)
    shares = popularity(fitted, case.experts)

    def predictive(progress: Progress) -> Policy:
        return Predictive(progress, Affinity(progress, table))

    plain = [
        Contender(BELADY, lambda progress: Belady(progress, future)),
        Contender(LRU_NAME, lambda progress: LRU()),
        Contender("LRU, scan-resistant", ScanResistant),
        Contender("LFU, decayed", LFU),
        Contender("static popularity", lambda progress: Popular(shares)),
        Contender("predictive, online rates", Predictive),
        Contender("predictive", predictive),
        Contender("predictive, told the step", predictive, guesses["affinity"], predictor="affinity"),
        Contender("predictive, told the step", predictive, guesses["oracle"], predictor="oracle"),
        Contender("LRU + ahead", lambda progress: LRU(), guesses["affinity"], True, "affinity"),
    ]
    return plain + [Contender("predictive + ahead", predictive, scores, True, name) for name, scores in guesses.items()]


def fit_for(trace: RoutingTrace, fits: Sequence[RoutingTrace]) -> RoutingTrace:
    """The first of ``fits`` that has the tasks of ``trace`` and no others. Raises ValueError when there is none."""
    tasks = set(trace.tasks)
    for fit in fits:
        if set(fit.tasks) == tasks and (fit.layers, fit.num_experts) == (trace.layers, trace.num_experts):
            return fit
    raise ValueError(f"no --fit trace of the tasks {', '.join(sorted(tasks))} and of this model: record one")
