"""One system at one setting: prefills, then decode steps on the trace's routes, and what bounds them."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.speed.bench import Bench
from eval.speed.bounds import pass_figures, step_figures
from eval.speed.ceilings import Ceilings
from eval.speed.systems import Counters, Setting, System, SystemSpec, Timing
from eval.speed.trace_stats import distinct_per_step, used_experts
from eval.speed.traces import Trace
from expertflow_quant.formats import ExpertFlowError

PREFILLS = 3
"""Prefills that are timed, after one that is not, where the time limit allows."""

SLOW = 10
"""A first prefill, which may wait for a compiler, counts itself only if it took so many times the limit."""


@dataclass(frozen=True)
class Run:
    """What all systems of a run share."""

    bench: Bench
    ceilings: Ceilings
    limit_seconds: float


def measure(spec: SystemSpec, system: System, setting: Setting, trace: Trace, run: Run) -> dict[str, Any]:
    """The figures of a setting as JSON; ``trace`` has the setting's rows and prompt, and steps enough.

    A setting that the system refuses, or that does not fit into the device, is a row that says so.
    """
    head = _head(spec, setting, run.bench)
    try:
        system.prepare(setting)
        return {**head, "refused": None, **_figures(system, setting, trace, run)}
    except (ExpertFlowError, torch.OutOfMemoryError) as error:
        return {**head, "refused": str(error).splitlines()[0]}


def refused(spec: SystemSpec, setting: Setting, bench: Bench, error: Exception) -> dict[str, Any]:
    """The row of a setting whose system could not be built."""
    return {**_head(spec, setting, bench), "refused": str(error).splitlines()[0]}


def prompt_tokens(setting: Setting, bench: Bench) -> Tensor:
    """Random prompts, int64 ``[batch, prompt]``, without the ids that stand for images and videos."""
    config = bench.target.shape.config
    vocabulary = int(config.get_text_config().vocab_size)
    special = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    plain = torch.tensor([token for token in range(min(vocabulary, 10_000)) if token not in special])
    generator = torch.Generator().manual_seed(bench.seed)
    picked = torch.randint(len(plain), (setting.batch, setting.prompt), generator=generator)
    return plain[picked].to(bench.device)


def _head(spec: SystemSpec, setting: Setting, bench: Bench) -> dict[str, Any]:
    return {
        "system": spec.name,
        "title": spec.title,
        "resident": "any" if spec.any_budget else setting.resident,
        "batch": setting.batch,
        "prompt": setting.prompt,
        "whole_layers": bench.target.shape.whole_layers,
    }


def _figures(system: System, setting: Setting, trace: Trace, run: Run) -> dict[str, Any]:
    seconds, prefill_counters = _prefills(system, setting, trace, run)
    timing, counters = _decodes(system, setting, trace, run)
    ttft = statistics.median(seconds)
    return {
        "layers": system.layers,
        "expert_bytes": system.expert_bytes,
        "device_expert_bytes": system.device_expert_bytes,
        "saved_against_bf16": round(1 - system.device_expert_bytes / run.bench.sizes.bf16_expert_bytes, 5),
        "peak_reserved_bytes": run.bench.peak_reserved_bytes(),
        "prefill": _prefill_figures(system, setting, trace, run, seconds, prefill_counters),
        "decode": _decode_figures(system, setting, trace, run, timing, counters),
        "requests": _requests(setting, run, ttft, timing, prefill_counters, counters),
        "scaled": _scaled(system.layers, run.bench, ttft, statistics.fmean(timing.steps), setting.batch),
    }


def _prefills(system: System, setting: Setting, trace: Trace, run: Run) -> tuple[list[float], Counters]:
    tokens = prompt_tokens(setting, run.bench)
    routes = torch.from_numpy(trace.prompt_routes())[: system.layers].to(run.bench.device, torch.int64)
    seconds: list[float] = []
    begun = time.perf_counter()
    for turn in range(1 + PREFILLS):
        system.reset_counters()
        seconds.append(system.prefill(tokens, routes))
        if turn and time.perf_counter() - begun + seconds[-1] > run.limit_seconds:
            break
        if not turn and seconds[0] > SLOW * run.limit_seconds:
            return seconds, system.counters()
    return seconds[1:], system.counters()


def _decodes(system: System, setting: Setting, trace: Trace, run: Run) -> tuple[Timing, Counters]:
    routes = torch.from_numpy(trace.decode)[:, : system.layers].to(run.bench.device, torch.int64)
    if setting.warm:
        system.decode(routes[: setting.warm], run.limit_seconds)
    system.reset_counters()
    timing = system.decode(routes[setting.warm : setting.warm + setting.new_tokens], run.limit_seconds)
    return timing, system.counters()


def _prefill_figures(
    system: System, setting: Setting, trace: Trace, run: Run, seconds: Sequence[float], counters: Counters
) -> dict[str, Any]:
    distinct = used_experts(trace.prefill[:, : system.layers].swapaxes(0, 1), trace.experts).sum(axis=1).mean()
    sizes = run.bench.sizes_of(system.layers)
    work = sizes.prefill_work(
        moved=counters.bytes_moved,
        distinct=float(distinct),
        record=system.expert_bytes / sizes.experts,
        rows=setting.batch,
        prompt=setting.prompt,
        item=run.bench.dtype.itemsize,
    )
    ttft = statistics.median(seconds)
    absent = max(0, system.expert_bytes - system.device_expert_bytes)
    floor = absent / (run.ceilings.link_gbs * 1e9)
    return {
        "ttft_s": ttft,
        "repeats_s": list(seconds),
        "tokens_per_s": setting.batch * setting.prompt / ttft,
        "distinct_experts": round(float(distinct), 2),
        "hit_rate": counters.hit_rate,
        "not_resident_bytes": absent,
        "times_not_resident_over_link": ttft / floor if floor else None,
        **pass_figures(ttft, work, run.ceilings),
    }


def _decode_figures(
    system: System, setting: Setting, trace: Trace, run: Run, timing: Timing, counters: Counters
) -> dict[str, Any]:
    steps = len(timing.steps)
    routes = trace.decode[setting.warm : setting.warm + steps, : system.layers]
    distinct = distinct_per_step(routes, trace.experts)
    sizes = run.bench.sizes_of(system.layers)
    work = sizes.decode_work(
        moved=counters.bytes_moved / steps,
        distinct=distinct,
        record=system.expert_bytes / sizes.experts,
        rows=setting.batch,
        context=setting.prompt + setting.warm + (steps + 1) / 2,
        item=run.bench.dtype.itemsize,
    )
    return {
        "hit_rate": counters.hit_rate,
        "distinct_experts": round(distinct, 3),
        **step_figures(timing.steps, setting.batch, work, run.ceilings),
    }


def _requests(
    setting: Setting, run: Run, ttft: float, timing: Timing, prefill: Counters, decode: Counters
) -> dict[str, Any]:
    """Answers of ``new_tokens``, the prompt's own next token the first of them, ``batch`` at a time: per second, and
    the bound of the bytes moved. Steps that the time limit cut off count as the average of those that ran."""
    following = setting.new_tokens - 1
    seconds = ttft + following * statistics.fmean(timing.steps)
    moved = prefill.bytes_moved + following * decode.bytes_moved / len(timing.steps)
    at_least = moved / (run.ceilings.link_gbs * 1e9)
    return {
        "answer_tokens": setting.new_tokens,
        "per_s": setting.batch / seconds,
        "link_bound_per_s": setting.batch / at_least if at_least else None,
        "share_of_link_bound": at_least / seconds,
    }


def _scaled(layers: int, bench: Bench, ttft: float, step: float, rows: int) -> dict[str, Any] | None:
    """What all layers would take if each took what these did; None when all of them ran. The part that is not in the
    layers is scaled with them, so the true figures are a little better."""
    shape = bench.target.shape
    measured = shape.layers * layers // len(bench.layers)
    if measured == shape.whole_layers:
        return None
    factor = shape.whole_layers / measured
    return {
        "layers": shape.whole_layers,
        "measured_layers": measured,
        "ttft_s": ttft * factor,
        "step_ms": 1e3 * step * factor,
        "tokens_per_s": rows / (step * factor),
    }
