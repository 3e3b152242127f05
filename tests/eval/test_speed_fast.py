"""The fast path under a trace: what it keeps and moves is what the trace asks for, whatever the weights route."""

import json

import pytest
import torch
from typer.testing import CliRunner

from eval.__main__ import app
from eval.speed.bench import Bench, find_target
from eval.speed.drawn import Predictions
from eval.speed.fast import OURS, TraceRunner
from eval.speed.measure import prompt_tokens
from eval.speed.systems import Setting
from eval.speed.traces import synthetic
from expertflow_quant.offload.resolve import SlotBook

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


def test_hits_are_those_of_the_caches_rule_on_the_trace(bench):
    counters, runner = decoded(bench, 0.75, 1)
    _, decode, _ = routes_of(bench, 1)
    hits, misses = 0, 0
    for layer, pools in enumerate(runner._runner.resident.plan):
        ((_, slots),) = pools
        book = SlotBook(list(range(slots)), [0] * slots, [0] * slots, [0] * bench.routes.experts)
        for step, routed in enumerate(decode[:, layer], start=1):
            outcome = book.resolve(set(routed.flatten().tolist()), step)
            hits, misses = hits + len(outcome.hits), misses + len(outcome.misses)
    assert misses > 0
    assert (counters.hits, counters.misses) == (hits, misses)
    assert counters.bytes_moved == misses * runner._runner.resident.store.layers[0].nbytes[0]


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


def test_guesses_cost_bytes_and_leave_fewer_misses(bench):
    setting = Setting("75%", int(bench.expert_bytes * 0.75), 1, PROMPT, STEPS, 0)
    _, decode, prompt = routes_of(bench, 1)
    found = {}
    for name, predictions in (
        ("none", None),
        ("good", Predictions(0.9, 0.9, "")),
        ("wrong", Predictions(0.2, 0.1, "")),
    ):
        runner = TraceRunner(bench, setting, 1 if predictions else 0, predictions)
        runner.prefill(prompt_tokens(setting, bench), prompt)
        runner.reset_counters()
        for step in decode:
            runner.step(step)
        found[name] = runner.counters()
    assert found["good"].misses < found["none"].misses
    assert found["wrong"].bytes_moved > found["none"].bytes_moved


def test_the_command_runs_both(tmp_path):
    out = tmp_path / "fast.json"
    arguments = ["Qwen3-30B-A3B", "--tiny", "--device", "cpu", "--prompt", "12", "--new-tokens", "4", "--warm", "2"]
    names = [spec.name for spec in OURS]
    outcome = CliRunner().invoke(app, ["speed", *arguments, "--systems", ",".join(names), "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    figures = json.loads(out.read_text())["figures"]
    assert [figure["system"] for figure in figures] == names
    assert all(figure["refused"] is None and figure["decode"]["tokens_per_s"] > 0 for figure in figures)
