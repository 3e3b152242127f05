"""Profiles of captured steps: groups of kernels, interval arithmetic, trace files, and what is said without a GPU."""

import ast
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity
from typer.testing import CliRunner

import expertflow_quant
from eval.__main__ import app
from eval.report import make_console
from eval.speed import plots, profiling
from eval.speed.bench import Bench, find_target
from eval.speed.ceilings import Ceilings
from eval.speed.measure import Run
from eval.speed.profile import FILL, KERNELS, Event, group_of, length, parts, profile_figures, read_events, union
from eval.speed.profile_table import profile_tables, refusals
from eval.speed.systems import Counters, Setting, SystemSpec, Timing
from eval.speed.traces import synthetic
from expertflow_quant.formats import ExpertFlowError

TINY = ["Qwen3-30B-A3B", "--tiny", "--prompt", "12", "--new-tokens", "4", "--warm", "2", "--profile"]
SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda s: (s[0], s[0] + s[1])), max_size=12)


def kernels_in_sources():
    """Functions under @triton.jit by name, those launched on a grid, and those that others call."""
    jitted, launched, called = set(), set(), set()
    for path in Path(expertflow_quant.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                jitted.add(node.name)
            elif isinstance(node, ast.Call):
                on_grid = isinstance(node.func, ast.Subscript)
                name = ast.unparse(node.func.value if on_grid else node.func).rsplit(".", 1)[-1]
                (launched if on_grid else called).add(name)
    return jitted, jitted & launched, jitted & called


def test_every_kernel_that_is_launched_has_a_group_and_no_group_names_another():
    jitted, launched, called = kernels_in_sources()
    assert {"_fill", "_resolve", "gate_up_kernel", "split_kernel"} <= launched
    assert jitted == launched | called, "a kernel that is launched in a way that this test does not see"
    named = [name for names in KERNELS.values() for name in names]
    assert sorted(named) == sorted(launched)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_fill", "fill"),
        ("Memcpy HtoD (Pinned -> Device)", "fill"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("Memset (Device)", "other"),
        ("_overflow", "control"),
        ("topk_kernel", "control"),
        ("down_kernel", "experts"),
        ("join_kernel", "attention"),
        ("triton_red_fused_mm_3", "dense"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT", "dense"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>(cublasGemvParamsEx)", "dense"),
        ("void at::native::elementwise_kernel<128, 4, at::native::FillFunctor<long>>(int)", "other"),
    ],
)
def test_names_of_a_trace_find_their_groups(name, group):
    assert group_of(name) == group


@given(SPANS, SPANS)
def test_unions_are_those_of_every_moment_by_itself(link, others):
    def moments(spans):
        return {moment for begin, end in spans for moment in range(begin, end)}

    found = union(link)
    assert all(before[1] < after[0] for before, after in pairwise(found))
    assert moments(found) == moments(link)
    assert length(found) == len(moments(link))
    events = [Event("_fill", *span) for span in link] + [Event("down_kernel", *span) for span in others]
    if not events:
        return
    profile = profile_figures(events, 1)
    a, b = moments(link), moments(others)
    wall = max(e.end for e in events) - min(e.begin for e in events)
    wanted = {
        "ms": wall,
        "link_busy_ms": len(a),
        "others_busy_ms": len(b),
        "both_ms": len(a & b),
        "idle_ms": wall - len(a | b),
    }
    assert {name: profile[name] * 1e3 for name in wanted} == pytest.approx(wanted, abs=0.11)
    assert sum(parts(profile).values()) == pytest.approx(profile["ms"], abs=1e-3)


def trace_file(path, events):
    """``events``: category, name, beginning, duration; beside them what a trace also holds."""
    rows = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}]
    rows += [{"ph": "X", "cat": "cpu_op", "name": "aten::copy_", "ts": 0.0, "dur": 9e6, "pid": 1, "tid": 1}]
    rows += [{"ph": "X", "cat": "gpu_user_annotation", "name": "ProfilerStep#1", "ts": 0.0, "dur": 9e6}]
    rows += [
        {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": 7, "args": {"stream": 7}}
        for category, name, ts, dur in events
    ]
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": rows}))
    return path


def test_a_trace_file_gives_the_times_of_a_step(tmp_path):
    path = trace_file(
        tmp_path / "trace.json",
        [
            ("kernel", "down_kernel", 6000.5, 2000.0),
            ("kernel", "_resolve", 1000.5, 1000.0),
            ("kernel", "_fill", 2000.5, 3000.0),
            ("kernel", "triton_poi_fused_add_0", 4000.5, 1500.0),
            ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 7000.5, 4000.0),
            ("gpu_memset", "Memset (Device)", 11000.5, 0.0),
        ],
    )
    events = read_events(path)
    assert [event.name for event in events][:3] == ["_resolve", "_fill", "triton_poi_fused_add_0"]
    found = profile_figures(events, 2)
    assert (found["steps"], found["ms"], found["link_busy_ms"], found["others_busy_ms"]) == (2, 5.0, 3.5, 2.25)
    assert (found["both_ms"], found["idle_ms"]) == (1.0, 0.25)
    assert found["groups"]["fill"] == {"ms": 3.5, "kernels": 1.0}
    assert found["groups"]["dense"] == {"ms": 0.75, "kernels": 0.5}
    assert found["groups"]["attention"] == {"ms": 0.0, "kernels": 0.0}
    assert found["largest"][0] == {
        "name": "Memcpy HtoD (Pinned -> Device)", "group": FILL, "ms": 2.0, "kernels": 0.5
    }  # fmt: skip


def test_a_trace_without_kernels_is_refused(tmp_path):
    with pytest.raises(ExpertFlowError, match="saw no kernel"):
        read_events(trace_file(tmp_path / "trace.json", []))


class Multiplying:
    """A system whose step is one product; ``fails``: where it does not go on."""

    layers = 2

    def __init__(self, fails=()):
        self.log, self.fails = [], fails

    def __getattr__(self, name):
        def call(*given):
            self.log.append(name)
            if name in self.fails:
                raise RuntimeError("CUDA error: an illegal address\nand more lines")

        return call

    def decode(self, routes, limit_seconds):
        self.__getattr__("decode")()
        for _ in routes:
            torch.mm(torch.ones(4, 4), torch.ones(4, 4))
        return Timing([0.1] * len(routes))

    def counters(self):
        return Counters(bytes_moved=8_000_000)


@pytest.fixture(scope="module")
def bench():
    return Bench(find_target("Qwen3-30B-A3B", None, True, None, 0), torch.device("cpu"))


def kept_products(monkeypatch):
    """What ``record`` would read: the products of the trace that torch.profiler wrote, as kernels."""

    def read(path):
        rows = json.loads(path.read_text())["traceEvents"]
        return [Event("_fill", r["ts"], r["ts"] + r["dur"]) for r in rows if r["name"] == "aten::mm"]

    monkeypatch.setattr(profiling, "read_events", read)


@pytest.mark.parametrize(("given", "watched"), [(9, 4), (5, 4), (3, 2), (1, 1)])
def test_the_profile_is_of_the_steps_after_one_that_settles(given, watched, monkeypatch):
    kept_products(monkeypatch)
    routes = torch.zeros(given, 2, 1, 2, dtype=torch.int64)
    events, steps = profiling.record(Multiplying(), routes, [ProfilerActivity.CPU], 60)
    assert len(events) == steps == watched


def test_a_profiled_system_is_warmed_up_and_its_own_bytes_give_the_bound(bench, monkeypatch):
    kept_products(monkeypatch)
    monkeypatch.setattr(profiling, "ACTIVITIES", ((ProfilerActivity.CPU,),))
    system, run = Multiplying(), Run(bench, Ceilings(50.0, None, None, 1, 1, 1), 60)
    trace = synthetic(bench.routes, steps=8, rows=1, prompt=5)
    found = profiling.profile_steps(system, Setting("50%", 1, 1, 5, 6, 2), trace, run)
    assert system.log == ["prefill", "decode", "decode", "reset_counters", "decode"]
    assert (found["steps"], found["bytes_moved"], found["link_bound_ms"]) == (4, 2_000_000, 0.04)


@pytest.mark.parametrize("fails", [("prepare",), ("prefill", "close"), ("decode", "close")])
def test_what_fails_in_a_profile_is_its_reason_and_costs_nothing_else(bench, fails, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *given: self)  # there is no such device here
    monkeypatch.setattr(profiling, "prompt_tokens", lambda setting, bench: None)
    fake = SimpleNamespace(device=torch.device("cuda"))
    run = Run(fake, Ceilings(1, None, None, 1, 1, 1), 60)
    setting, trace = Setting("50%", 1, 1, 5, 6, 2), synthetic(bench.routes, steps=8, rows=1, prompt=5)
    systems = [Multiplying(fails), Multiplying(fails)]
    specs = [SystemSpec("graph", "ours", lambda bench: systems.pop(), captured=True), SystemSpec("lru", "an LRU", None)]
    row = {"title": "", "resident": "50%", "batch": 1, "prompt": 5, "refused": None}
    figures = [
        {**row, "system": "graph", "decode": {"step_ms": {"mean": 2.0}, "hit_rate": 0.5}},
        {**row, "system": "lru", "decode": {"step_ms": {"mean": 9.0}}},
        {**row, "system": "graph", "refused": "no room"},
        {**row, "system": "graph", "decode": {"step_ms": {"mean": 3.0}}},
    ]
    done = []
    profiling.profile_all(specs, [setting], trace, run, figures, make_console(), lambda: done.append(1))
    told = {"refused": "RuntimeError: CUDA error: an illegal address"}
    assert figures[0]["decode"] == {
        "step_ms": {"mean": 2.0}, "hit_rate": 0.5, "profile": {"step_ms": 2.0, **told}
    }  # fmt: skip
    assert figures[3]["decode"]["profile"] == {"step_ms": 3.0, **told}
    assert ("profile" in figures[1]["decode"], len(done), systems) == (False, 2, [])


def test_without_a_gpu_the_rows_of_captured_systems_say_so(tmp_path):
    out = tmp_path / "run.json"
    arguments = [*TINY, "--device", "cpu", "--systems", "lru,graph,graph-oracle", "--out", str(out)]
    outcome = CliRunner().invoke(app, ["speed", *arguments])
    assert outcome.exit_code == 0, outcome.output
    rows = {figure["system"]: figure["decode"] for figure in json.loads(out.read_text())["figures"]}
    assert "profile" not in rows["lru"]
    for name in ("graph", "graph-oracle"):
        assert "needs a GPU" in rows[name]["profile"]["refused"]
        assert rows[name]["profile"]["step_ms"] == rows[name]["step_ms"]["mean"] > 0
    assert "no profile: graph at 25%" in outcome.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.png"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A results file with two profiles and a row that has none, and its contents."""
    out = tmp_path_factory.mktemp("profiled") / "run.json"
    names = "lru,graph,graph-predicted,graph-oracle"
    assert (
        CliRunner().invoke(app, ["speed", *TINY, "--device", "cpu", "--systems", names, "--out", str(out)]).exit_code
        == 0
    )
    results = json.loads(out.read_text())
    spans = {"graph": (2000, 7300), "graph-oracle": (500, 5800)}
    for figure in results["figures"]:
        if figure["system"] in spans:
            begin, end = spans[figure["system"]]
            events = [
                Event("down_kernel", 0, 2400),
                Event("_fill", begin, end),
                Event("topk_kernel", end + 300, end + 900),
            ]
            found = {**profile_figures(events, 1), "bytes_moved": 0, "link_bound_ms": 5.3}
            figure["decode"]["profile"] = {"refused": None, "step_ms": 7.9, **found}
    out.write_text(json.dumps(results))
    return out, results


def test_tables_show_a_row_a_profile_and_why_others_have_none(profiled, capsys):
    _, results = profiled
    tables = profile_tables(results)
    assert [table.row_count for table in tables] == [2, 2]
    for table in tables:
        make_console().print(table)
    output = capsys.readouterr().out
    first = next(line.split() for line in output.splitlines() if line.lstrip().startswith("graph "))
    assert first == ["graph", "25%", "1", "12", "7.90", "8.20", "5.30", "4.90", "0.40", "2.60", "0.30"]
    assert "5.30 (1)" in output
    assert [line[:35] for line in refusals(results)] == ["no profile: graph-predicted at 25%:"]
    assert profile_tables({"figures": [row for row in results["figures"] if row["system"] == "lru"]}) == ()


def test_a_plot_of_the_profiles_is_drawn_from_the_file(profiled):
    out, _ = profiled
    assert CliRunner().invoke(plots.app, [str(out)]).exit_code == 0
    assert out.with_name("run-profile.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.cuda
def test_a_gpu_s_profile_adds_up(tmp_path):
    out = tmp_path / "run.json"
    outcome = CliRunner().invoke(app, ["speed", *TINY, "--systems", "graph,graph-oracle", "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    for figure in json.loads(out.read_text())["figures"]:
        found = figure["decode"]["profile"]
        assert found["refused"] is None
        assert found["steps"] == 3
        assert sum(parts(found).values()) == pytest.approx(found["ms"], abs=1e-3)
        for group in ("fill", "control", "experts", "attention", "dense"):
            assert found["groups"][group]["kernels"] > 0
    assert out.with_name("run-profile.png").exists()
