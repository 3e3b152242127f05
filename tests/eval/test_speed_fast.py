"""The fast path under a trace: what it keeps and moves is what the trace asks for, whatever the weights route."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from eval.__main__ import app
from eval.speed import fast
from eval.speed.bench import Bench, find_target
from eval.speed.drawn import Predictions
from eval.speed.fast import OURS, TraceRunner
from eval.speed.measure import prompt_tokens
from eval.speed.systems import Setting
from eval.speed.traces import synthetic
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.policies.by_layer import by_layer
from expertflow_quant.offload.simulator import replay

CPU = torch.device("cpu")
PROMPT, STEPS = 10, 12


@pytest.fixture(scope="module")
def bench():
    return Bench(find_target("Qwen3-30B-A3B", None, True, None, 0), CPU)


def routes_of(bench, rows):
    trace = synthetic(bench.routes, steps=STEPS, rows=rows, prompt=PROMPT, skew=0.6, stickiness=0.5, seed=3)
    return trace, torch.from_numpy(trace.decode).long(), torch.from_numpy(trace.prompt_routes()).long()


def decoded(bench, share, rows, ahead=0):
    """Counters of the decode steps, and the runner, after a prompt."""
    setting = Setting(f"{share:.0%}", int(bench.expert_bytes * share), rows, PROMPT, STEPS, 0)
    _, decode, prompt = routes_of(bench, rows)
    runner = TraceRunner(bench, setting, ahead)
    runner.prefill(prompt_tokens(setting, bench), prompt)
    runner.reset_counters()
    for step in decode:
        runner.step(step)
    return runner.counters(), runner


@pytest.mark.parametrize("policy", ["lru", "lfu", "predictive"])
def test_hits_are_those_of_the_host_s_policy_on_the_trace(bench, policy):
    counters, runner = decoded(replace(bench, policy=policy), 0.75, 1)
    _, decode, _ = routes_of(bench, 1)
    resident = runner._runner.resident
    layers, budget = resident.store.layers, resident.device_bytes
    assert plan_layer_slots(layers, budget) == resident.plan
    steps = [[set(routed.flatten().tolist()) for routed in step] for step in decode]
    found = replay(steps, layers, budget, by_layer(policy), slots="layers", preload=True)
    assert found.misses > 0
    assert (counters.hits, counters.misses) == (found.hits, found.misses)
    assert counters.bytes_moved == found.bytes_moved


def test_nothing_moves_where_all_experts_are_resident(bench):
    for rows in (1, 2):
        counters, _ = decoded(bench, 1.0, rows)
        assert (counters.bytes_moved, counters.misses) == (0, 0)
        assert counters.hits > 0


def test_an_oracle_leaves_no_misses_and_moves_the_same_bytes(bench):
    without, _ = decoded(bench, 0.75, 1)
    told, _ = decoded(bench, 0.75, 1, ahead=1)
    assert told.misses == 0
    assert told.bytes_moved >= without.bytes_moved > 0


def test_guesses_cost_bytes_and_leave_fewer_misses(bench, monkeypatch):
    """Not in the first layers, which a predictor's guess does not reach in time."""
    setting = Setting("75%", int(bench.expert_bytes * 0.75), 1, PROMPT, STEPS, 0)
    _, decode, prompt = routes_of(bench, 1)
    found = {}
    for name, first, predictions in (
        ("none", 0, None),
        ("good", 0, Predictions(0.9, 0.9, "")),
        ("wrong", 0, Predictions(0.2, 0.1, "")),
        ("late", fast.FIRST, Predictions(0.9, 0.9, "")),
    ):
        monkeypatch.setattr(fast, "FIRST", first)
        runner = TraceRunner(bench, setting, 1 if predictions else 0, predictions)
        runner.prefill(prompt_tokens(setting, bench), prompt)
        runner.reset_counters()
        for step in decode:
            runner.step(step)
        found[name] = runner.counters()
    assert found["good"].misses < found["none"].misses
    assert found["wrong"].bytes_moved > found["none"].bytes_moved
    assert found["late"] == found["none"]


def test_the_command_runs_both(tmp_path):
    out = tmp_path / "fast.json"
    arguments = ["Qwen3-30B-A3B", "--tiny", "--device", "cpu", "--prompt", "12", "--new-tokens", "4", "--warm", "2"]
    names = [spec.name for spec in OURS]
    outcome = CliRunner().invoke(
        app, ["speed", *arguments, "--policy", "predictive", "--systems", ",".join(names), "--out", str(out)]
    )
    assert outcome.exit_code == 0, outcome.output
    results = json.loads(out.read_text())
    assert results["settings"]["policy"] == "predictive"
    figures = results["figures"]
    assert [figure["system"] for figure in figures] == names
    assert all(figure["refused"] is None and figure["decode"]["tokens_per_s"] > 0 for figure in figures)
