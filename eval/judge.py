"""Judge one system: load it, ask it everything, keep what it answered and what it cost."""

import gc
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from eval.endpoint import Endpoint, EndpointEngine
from eval.metrics import METRICS_VERSION
from eval.provenance import device_name, model_fingerprint, short_path, versions
from eval.records import ItemResult, ResultsFile, read_results
from eval.runner import Answerer, Batch, answer_batch, run_tasks
from eval.tasks import Task

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class System:
    """A model to be judged: a checkpoint of ours under an expert memory, any plain transformers model, or, where
    there is an ``endpoint``, whatever answers there (then ``path`` is only a name).

    ``name`` is the stem of its files, ``label`` what tables call it.
    """

    name: str
    label: str
    path: Path
    expert_memory: str = "100%"
    endpoint: Endpoint | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether its experts are offloaded; a plain model has everything on the device."""
        return self.endpoint is None and (self.path / MANIFEST).is_file()

    @property
    def fingerprint(self) -> str:
        """What tells this model from another: a digest of its files, or the address and the name there."""
        if self.endpoint is not None:
            return f"{self.endpoint.model or 'first model'} at {self.endpoint.url}"
        return model_fingerprint(self.path)


@dataclass(frozen=True)
class Judgement:
    """What a system answered and what it cost. Bytes of experts; seconds of answering."""

    system: System
    results: tuple[ItemResult, ...]
    counters: dict[str, float]
    expert_bytes: int
    device_expert_bytes: int

    @property
    def seconds(self) -> float:
        """Time spent answering, prefills included, loading and scoring not."""
        return sum(result.seconds for result in self.results)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens by the time spent answering, prefills included."""
        return sum(result.completion_tokens for result in self.results) / max(self.seconds, 1e-9)

    @property
    def hit_rate(self) -> float | None:
        """Share of requested experts that were resident; None for a system without a cache."""
        requests = self.counters.get("hits", 0) + self.counters.get("misses", 0)
        return self.counters["hits"] / requests if requests and self.system.is_checkpoint else None

    @property
    def failures(self) -> int:
        """Items that ended in an error and so scored 0."""
        return sum(result.error is not None for result in self.results)

    def of_task(self, task: str) -> list[ItemResult]:
        """The results of one task, in order."""
        return [result for result in self.results if result.task == task]

    def mean(self, task: str) -> float:
        """Mean score of one task, failures as 0."""
        scores = [result.score for result in self.of_task(task)]
        return sum(scores) / len(scores)

    def by_kind(self, task: str) -> dict[str, tuple[float, int]]:
        """Mean score and number of items of each kind of question, most frequent first."""
        scores: dict[str, list[float]] = defaultdict(list)
        for result in self.of_task(task):
            scores[result.kind].append(result.score)
        ordered = sorted(scores.items(), key=lambda pair: (-len(pair[1]), pair[0]))
        return {kind: (sum(values) / len(values), len(values)) for kind, values in ordered}

    def to_json(self) -> dict[str, Any]:
        """The summary that goes into results files; the items lie beside it, one JSON line each."""
        tasks = list(dict.fromkeys(result.task for result in self.results))
        return {
            "name": self.system.name,
            "label": self.system.label,
            "path": self.system.endpoint.url if self.system.endpoint else short_path(self.system.path),
            "expert_memory": self.system.expert_memory if self.system.is_checkpoint else None,
            "expert_bytes": self.expert_bytes,
            "device_expert_bytes": self.device_expert_bytes,
            "hit_rate": self.hit_rate,
            "cache": self.counters if self.system.is_checkpoint else None,
            "tokens_per_second": round(self.tokens_per_second, 3),
            "seconds": round(self.seconds, 3),
            "failures": self.failures,
            "scores": {task: self.mean(task) for task in tasks},
            "items": {task: len(self.of_task(task)) for task in tasks},
            "scores_by_kind": {
                task: {kind: {"mean": mean, "items": n} for kind, (mean, n) in self.by_kind(task).items()}
                for task in tasks
            },
        }


def require_models(systems: Sequence[System]) -> None:
    """Raises ValueError for a path that holds no model, before hours are spent on the systems before it."""
    for system in systems:
        _ = system.fingerprint


def open_engine(system: System, device: str) -> Answerer:
    """Load a system with the library, or connect to its endpoint."""
    import expertflow_quant

    if system.endpoint is not None:
        return EndpointEngine(system.endpoint)
    if system.is_checkpoint:
        return expertflow_quant.load(system.path, expert_memory=system.expert_memory, device=device)
    return expertflow_quant.Engine.from_plain(system.path, device=device)


def judge(
    system: System,
    tasks: Sequence[Task],
    folder: Path,
    *,
    batch_size: int = 32,
    device: str = "cpu",
    bar: Progress | None = None,
) -> Judgement:
    """Ask ``system`` all items; its answers go to ``folder/NAME.jsonl``, where an interrupted run goes on."""
    settings = settings_of(system, tasks, batch_size, device)
    file = ResultsFile.open(folder / f"{system.name}.jsonl", settings)
    if len(file.results) == sum(len(task.items) for task in tasks) and _costs_path(folder, system).is_file():
        return load_judgement(system, folder)
    engine = open_engine(system, device)
    answer_batch(engine, Batch(tasks[0], tuple(tasks[0].items[:1])))  # warm up; not recorded
    run_tasks(engine, tasks, batch_size, file, bar=bar)
    costs = expert_costs(engine, system) | {"counters": file.counters}
    _costs_path(folder, system).write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
    del engine
    gc.collect()
    return load_judgement(system, folder)


def expert_costs(engine: Any, system: System) -> dict[str, Any]:
    """Bytes of all experts as they are stored, and of those on the device as they are loaded."""
    stored, loaded = int(engine.expert_bytes), int(engine.device_expert_bytes)
    if not system.is_checkpoint and system.endpoint is None:
        config = json.loads((system.path / "config.json").read_text(encoding="utf-8"))
        own = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
        if own and (now := getattr(getattr(engine, "model", None), "dtype", None)):
            stored = stored * getattr(torch, own).itemsize // now.itemsize
    return {"expert_bytes": stored, "device_expert_bytes": loaded}


def load_judgement(system: System, folder: Path) -> Judgement:
    """What ``judge`` left in ``folder``."""
    costs = json.loads(_costs_path(folder, system).read_text(encoding="utf-8"))
    _, results = read_results(folder / f"{system.name}.jsonl")
    return Judgement(system, tuple(results), **costs)


def settings_of(system: System, tasks: Sequence[Task], batch_size: int, device: str) -> dict[str, Any]:
    """Everything that can change an answer or a score; results of different settings never mix in one
    file."""
    return {
        "model": system.fingerprint,
        "expert_memory": system.expert_memory if system.is_checkpoint else None,
        "items": {task.name: len(task.items) for task in tasks},
        "tasks": [task.description for task in tasks],
        "batch_size": batch_size,
        "device": None if system.endpoint else device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "metrics_version": METRICS_VERSION,
    }


def _costs_path(folder: Path, system: System) -> Path:
    return folder / f"{system.name}.costs.json"
