"""The token scheduler at work: mixed questions answered by a real engine in batches, in every order of admission."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import expertflow_quant
from eval.schedule.measure import ARRIVAL, in_turn, interleaved, interval
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.runtime.answers import Generation
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.foretell import Foreteller
from expertflow_quant.runtime.schedule import admission_order
from expertflow_quant.samples import Item, make_items

KINDS = ("chart", "document")
FIGURES = ("distinct_experts", "hit_rate", "bytes_per_token", "tokens_per_second")


@dataclass(frozen=True)
class Traffic:
    """``items`` questions of each kind, ``rows`` answered together, over ``seeds`` orders of arrival; experts in
    ``expert_memory`` of the device."""

    items: int
    rows: int
    seeds: int
    expert_memory: str


def measure_at_work(
    checkpoint: Path,
    traffic: Traffic,
    patience: Sequence[int],
    learned: Path | None,
    progress: Callable[[], None],
) -> list[dict[str, Any]]:
    """An entry for order of arrival, then one for each foretold path and patience: means of FIGURES over the orders of
    arrival, their relative change against arrival on the same orders (95 %, Student's t), and what foretelling takes,
    which is not in the tokens/s: a server does it while others are answered."""
    engine = expertflow_quant.load(checkpoint, traffic.expert_memory, fast=False)
    asked = [item for kind in KINDS for item in make_items(kind, "test", traffic.items)]
    known = foretold(engine, asked, learned)
    arrivals = [interleaved(len(asked), seed) for seed in range(traffic.seeds)]
    _answered(engine, [asked[: traffic.rows]])  # what a first call makes is not timed
    baseline = []
    for order in arrivals:
        baseline.append(_answered(engine, [[asked[at] for at in batch] for batch in in_turn(order, traffic.rows)]))
        progress()
    found = [{"paths": ARRIVAL, "patience": 0, "figures": _means(baseline)}]
    for name, (paths, milliseconds) in known.items():
        for allowed in patience:
            results = []
            for seed, order in enumerate(arrivals):
                batches = admission_order(paths[order], traffic.rows, allowed, seed)
                results.append(_answered(engine, [[asked[order[place]] for place in batch] for batch in batches]))
                progress()
            change = {
                name: interval([mine[name] / other[name] - 1 for mine, other in zip(results, baseline, strict=True)])
                for name in FIGURES
            }
            entry = {"paths": name, "patience": allowed, "figures": _means(results), "change": change}
            found.append(entry | {"foretelling_ms": round(milliseconds, 2)})
    return found


def foretold(engine: Engine, asked: Sequence[Item], learned: Path | None) -> dict[str, tuple[Tensor, float]]:
    """Paths of all questions by their words and by a trained predictor, and milliseconds for one."""
    top_k = engine.model.expert_store.layers[0].top_k
    ways = {"words": Foreteller(engine, top_k)}
    if learned is not None:
        ways["predicted"] = Foreteller(engine, top_k, PathPredictor.load(learned))
    found = {}
    for name, way in ways.items():
        started = time.process_time()
        paths = torch.stack([way(item.messages) for item in asked])
        found[name] = paths, 1000 * (time.process_time() - started) / len(asked)
    return found


def _answered(engine: Engine, batches: Sequence[Sequence[Item]]) -> dict[str, float]:
    """FIGURES of answering ``batches``, one after the other; seconds are those of the processor (one thread), which
    other work on the machine does not disturb."""
    engine.reset_stats()
    tokens, distinct = 0, []
    started = time.process_time()
    for batch in batches:
        answers = engine.stream_many([item.messages for item in batch], [item.max_new_tokens for item in batch])
        tokens += sum(found.completion_tokens for _, found in answers if isinstance(found, Generation))
        if engine.distinct_experts is not None:
            distinct.append(engine.distinct_experts)
    seconds, stats = time.process_time() - started, engine.stats
    return {
        "distinct_experts": sum(distinct) / len(distinct),
        "hit_rate": stats.hit_rate,
        "bytes_per_token": stats.bytes_moved / tokens,
        "tokens_per_second": tokens / seconds,
    }


def _means(results: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(result[name] for result in results) / len(results) for name in FIGURES}
