"""``python -m eval speed`` end to end on tiny shapes and on a checkpoint: systems, results file, table, plots."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

from eval.__main__ import app
from eval.speed import plots
from eval.speed.baselines import AccelerateSystem, CachedSystem
from eval.speed.bench import Bench, find_target
from eval.speed.bounds import Work, step_figures
from eval.speed.ceilings import Ceilings
from eval.speed.measure import Run, measure, prompt_tokens
from eval.speed.ours import fast_spec
from eval.speed.report import speed_tables
from eval.speed.systems import Counters, Setting
from eval.speed.traces import RouteSizes, load_trace, save_trace, synthetic

CPU = torch.device("cpu")
FAST = ["--prompt", "12", "--new-tokens", "4", "--warm", "2", "--device", "cpu"]
ALL = ["accelerate", "lru-bf16", "on-demand", "lru", "all-resident"]


def speed(*arguments):
    outcome = CliRunner().invoke(app, ["speed", *map(str, arguments)])
    return outcome.exit_code, outcome.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All systems at two budgets and batch sizes, one layer of two for accelerate."""
    out = tmp_path_factory.mktemp("speed") / "run.json"
    several = ["--resident", "25%", "--resident", "75%", "--batch", "1", "--batch", "2", "--baseline-layers", "1"]
    code, output = speed(
        "Qwen3-30B-A3B",
        "--tiny",
        "--out",
        out,
        *FAST,
        *several,
        "--save-routes",
        out.parent / "r.npz",
        "--systems",
        ",".join(ALL),
    )
    assert code == 0, output
    return out, json.loads(out.read_text()), output


def row(results, system, resident="any", batch=1):
    wanted = {"system": system, "resident": resident, "batch": batch}
    found = [f for f in results["figures"] if wanted.items() <= f.items()]
    assert len(found) == 1
    return found[0]


def test_the_file_says_how_it_was_made_and_has_a_row_for_every_system_and_setting(run):
    _, results, _ = run
    assert (results["kind"], results["schema"]) == ("speed", 1)
    assert {"command", "device", "packages", "git"} <= set(results["made"])
    assert {"torch", "accelerate", "triton"} <= set(results["made"]["packages"])
    assert min(v for v in results["ceilings"].values() if v is not None) > 0
    assert results["trace"]["origin"]["kind"] == "synthetic"
    counts = {name: sum(f["system"] == name for f in results["figures"]) for name in ALL}
    assert counts == {"accelerate": 2, "lru-bf16": 4, "on-demand": 2, "lru": 4, "all-resident": 2}


def test_figures_fit_each_other(run):
    _, results, _ = run
    for figure in results["figures"]:
        if figure["refused"]:
            continue
        decode, prefill = figure["decode"], figure["prefill"]
        assert decode["steps"] == 4
        assert decode["tokens_per_s"] == pytest.approx(figure["batch"] / decode["step_ms"]["mean"] * 1e3, rel=1e-3)
        assert decode["step_ms"]["p10"] <= decode["step_ms"]["median"] <= decode["step_ms"]["p90"]
        assert decode["bytes_per_token"] * figure["batch"] == pytest.approx(decode["bytes_moved"], abs=2)
        link = decode["bytes_moved"] / (results["ceilings"]["link_gbs"] * 1e9)
        assert decode["bound_s"]["link"] == pytest.approx(link, rel=1e-3)
        assert decode["share_of"]["link"] == pytest.approx(link / (decode["step_ms"]["mean"] / 1e3), rel=1e-3)
        assert prefill["ttft_s"] in prefill["repeats_s"]
        assert figure["requests"]["per_s"] > 0


def test_memory_decides_what_is_moved(run):
    _, results, _ = run
    target = results["target"]
    record = target["expert_bytes"] / (target["layers"] * target["experts"])
    resident, nothing = row(results, "all-resident"), row(results, "on-demand")
    assert resident["decode"]["hit_rate"] == 1.0
    assert resident["decode"]["bytes_moved"] == resident["prefill"]["bytes_moved"] == 0
    assert resident["device_expert_bytes"] == target["expert_bytes"]
    assert nothing["decode"]["hit_rate"] == 0.0
    assert nothing["decode"]["bytes_moved"] == target["layers"] * target["top_k"] * record
    small, large = row(results, "lru", "25%"), row(results, "lru", "75%")
    assert small["device_expert_bytes"] == target["expert_bytes"] // 4
    assert small["saved_against_bf16"] > large["saved_against_bf16"]
    assert 0 <= small["decode"]["hit_rate"] <= large["decode"]["hit_rate"] <= 1
    assert row(results, "lru-bf16", "75%")["expert_bytes"] == target["bf16_expert_bytes"]


def test_a_setting_that_does_not_fit_is_a_row_that_says_why(run):
    _, results, output = run
    refused = row(results, "lru-bf16", "25%")
    assert "raise --expert-memory" in refused["refused"]
    assert "decode" not in refused
    assert "not run: lru-bf16 at 25%" in output


def test_fewer_layers_are_named_and_scaled(run):
    _, results, output = run
    figure = row(results, "accelerate", batch=2)
    assert (figure["layers"], figure["whole_layers"]) == (1, 2)
    scaled = figure["scaled"]
    assert (scaled["measured_layers"], scaled["layers"]) == (1, 2)
    assert scaled["ttft_s"] == pytest.approx(2 * figure["prefill"]["ttft_s"])
    assert scaled["tokens_per_s"] == pytest.approx(figure["decode"]["tokens_per_s"] / 2, rel=1e-3)
    assert "1 as 2" in output
    assert row(results, "lru", "25%")["scaled"] is None


def test_the_table_has_every_row_and_the_trace_is_told(run):
    _, results, output = run
    for name in ALL:
        assert name in output
    assert "hits of an LRU" in output
    for table in speed_tables(results):
        assert table.row_count == len(results["figures"]) + 2  # the scaled ones


def test_plots_are_drawn_with_the_run_and_again_from_its_file(run):
    out, _, _ = run
    picture = out.with_suffix(".png")
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert len(first) > 20_000
    picture.unlink()
    assert CliRunner().invoke(plots.app, [str(out)]).exit_code == 0
    assert picture.read_bytes() == first
    other = out.with_name("other.json")
    other.write_text("{}")
    assert CliRunner().invoke(plots.app, [str(other)]).exit_code == 1


@pytest.mark.parametrize("about", [4.02, 0.25, 1e-5, 3e6])
def test_axes_narrower_than_a_decade_have_plain_numbers_on_them(run, about):
    results = copy.deepcopy(run[1])
    results["figures"] = (figure,) = [next(each for each in results["figures"] if not each["refused"])]
    figure["decode"]["tokens_per_s"] = figure["decode"]["bound_tokens_per_s"]["bound"] = about
    figure["prefill"]["ttft_s"] = figure["prefill"]["bound_s"]["bound"] = about
    drawn = plots.speed_figure(results)
    drawn.canvas.draw()
    for axes in drawn.axes:
        first, last = axes.get_xlim()
        seen = [tick for tick in axes.get_xticklabels(which="both") if first <= tick.get_position()[0] <= last]
        labels = [tick.get_text().rstrip("%").replace("\N{MINUS SIGN}", "-") for tick in seen]
        assert len([float(each) for each in labels if each]) >= 1


def test_saved_routes_run_again_and_move_the_same_bytes(run, tmp_path):
    out, results, _ = run
    again = tmp_path / "again.json"
    code, output = speed(
        "Qwen3-30B-A3B",
        "--tiny",
        "--out",
        again,
        *FAST,
        "--trace",
        out.parent / "r.npz",
        "--systems",
        "lru",
        "--batch",
        "2",
    )
    assert code == 0, output
    found = json.loads(again.read_text())
    assert found["trace"]["origin"]["kind"] == "recorded"
    assert [f["system"] for f in found["figures"]] == ["lru"]
    before, after = (row(r, "lru", "25%", 2)["decode"] for r in (results, found))
    assert (before["bytes_moved"], before["hit_rate"]) == (after["bytes_moved"], after["hit_rate"])


@pytest.mark.parametrize("name", ["Qwen3-VL-30B-A3B", "Mixtral-8x7B", "OLMoE", "gpt-oss-20b"])
def test_every_shape_runs(name, tmp_path):
    out = tmp_path / "run.json"
    code, output = speed(name, "--tiny", "--out", out, *FAST, "--systems", "lru,accelerate", "--resident", "60%")
    assert code == 0, output
    assert [f["refused"] for f in json.loads(out.read_text())["figures"]] == [None, None]


def test_a_checkpoint_runs_with_its_own_experts(small_int4, tmp_path):
    out = tmp_path / "run.json"
    code, output = speed(small_int4, "--out", out, *FAST, "--systems", "lru,on-demand,all-resident")
    assert code == 0, output
    results = json.loads(out.read_text())
    assert results["target"]["kind"] == "checkpoint"
    assert results["target"]["format"] == "as quantized"
    assert {f["refused"] for f in results["figures"]} == {None}
    assert row(results, "all-resident")["decode"]["hit_rate"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "neither a checkpoint"),
        (["OLMoE", "--tiny", "--systems", "lru,vllm"], "vllm"),
        (["OLMoE", "--tiny", "--resident", "much"], "cannot be read"),
        (["OLMoE", "--tiny", "--stickiness", "2"], "stickiness"),
        (["OLMoE", "--tiny", "--trace", "absent.npz"], "is no trace"),
        (["OLMoE", "--tiny", "--format", "int4-g128"], "does not divide"),
        (["OLMoE", "--tiny", "--device", "tpu"], "tpu"),
        (["OLMoE", "--tiny", "--policy", "fifo"], "policy 'fifo' is not known"),
    ],
)
def test_what_cannot_be_run_is_said_and_nothing_is_written(arguments, said, tmp_path):
    out = tmp_path / "run.json"
    code, output = speed(*arguments, "--out", out)
    assert code == 1
    assert said in output
    assert not out.exists()


def test_judging_needs_no_name_and_keeps_its_own():
    runner = CliRunner()
    for arguments in (["nowhere", "--against", "nowhere"], ["judge", "nowhere", "--against", "nowhere"]):
        outcome = runner.invoke(app, arguments)
        assert outcome.exit_code == 1
        assert "nowhere" in outcome.output
    assert runner.invoke(app, ["--help"]).output.count("speed") >= 1


def small_bench(**options):
    return Bench(find_target("Mixtral-8x7B", None, True, None, 0), CPU, **options)


def small_trace(bench, steps=6, rows=1, prompt=5):
    return synthetic(bench.routes, steps=steps, rows=rows, prompt=prompt, stickiness=0.5)


def test_a_time_limit_stops_prefills_and_steps_but_not_before_the_second():
    bench = small_bench()
    run = Run(bench, Ceilings(1, None, None, 1, 1, 1), limit_seconds=0.0)
    setting = Setting("50%", bench.expert_bytes // 2, 1, 5, 4, 2)
    spec = fast_spec(lambda bench, setting: None)
    system = CachedSystem(bench, bench.target.format, "setting")
    found = measure(spec, system, setting, small_trace(bench), run)
    assert found["decode"]["steps"] == 2
    assert len(found["prefill"]["repeats_s"]) == 1
    system.close()


def test_a_cached_system_follows_the_trace_exactly():
    bench = small_bench()
    trace = small_trace(bench, steps=20)
    system = CachedSystem(bench, bench.target.format, "all")
    system.prepare(Setting("100%", bench.expert_bytes, 1, 5, 20, 0))
    system.prefill(torch.zeros(1, 5, dtype=torch.int64), torch.from_numpy(trace.prompt_routes()).long())
    system.reset_counters()
    assert len(system.decode(torch.from_numpy(trace.decode).long(), 60).steps) == 20
    counters = system.counters()
    assert (counters.hits, counters.misses) == (20 * 2 * 2, 0)  # steps, layers, experts of a token
    system.close()


def test_accelerate_gives_the_logits_of_the_model_that_is_not_offloaded():
    bench = small_bench()
    routes = torch.from_numpy(small_trace(bench).prompt_routes()).long()
    tokens = torch.arange(5)[None]
    found = []
    for offload in (True, False):
        if offload:
            system = AccelerateSystem(bench)
            eager = system._eager
        else:
            from eval.speed.baselines import EagerModel

            eager = EagerModel(bench.whole(2), CPU)
        eager.model.lm_head.register_forward_hook(lambda module, given, made: found.append(made))
        eager.prefill(tokens, routes)
    torch.testing.assert_close(*found)
    assert system.expert_bytes == bench.sizes.bf16_expert_bytes * 2  # float32 on the CPU


def test_prompts_hold_no_image_tokens():
    bench = Bench(find_target("Qwen3-VL-30B-A3B", 1, False, None, 0), CPU)
    bench.target.shape.config.image_token_id = 7
    tokens = prompt_tokens(Setting("25%", 1, 2, 40_000, 2, 0), bench)
    assert tokens.shape == (2, 40_000)
    assert 7 not in tokens
    assert 8 in tokens


class Scripted:
    """A runner that does nothing but count."""

    expert_bytes, device_expert_bytes = 1000, 100

    def __init__(self, log):
        self.log, self.moved = log, 0

    def prefill(self, tokens, routes):
        self.log.append(("prefill", tuple(tokens.shape), tuple(routes.shape)))
        self.moved += 500

    def step(self, routes):
        self.log.append(("step", tuple(routes.shape)))
        self.moved += 10

    def counters(self):
        return Counters(self.moved, 3, 1)

    def reset_counters(self):
        self.moved = 0

    def close(self):
        self.log.append(("close",))


def test_the_adapter_runs_a_runner_for_each_setting_and_gives_it_the_routes():
    bench, log = small_bench(), []
    spec = fast_spec(lambda bench, setting: Scripted(log))
    system = spec.build(bench)
    run = Run(bench, Ceilings(1, None, None, 1, 1, 1), limit_seconds=60)
    setting = Setting("50%", 500, 2, 5, 3, 1)
    found = measure(spec, system, setting, small_trace(bench, steps=4, rows=2), run)
    assert log[0] == ("prefill", (2, 5), (2, 10, 2))
    assert [entry[0] for entry in log] == ["prefill"] * 4 + ["step"] * 4
    assert log[-1] == ("step", (2, 2, 2))
    assert found["decode"]["bytes_moved"] == 10
    assert found["prefill"]["bytes_moved"] == 500
    assert found["decode"]["hit_rate"] == 0.75
    assert found["requests"]["answer_tokens"] == 3
    measure(spec, system, setting, small_trace(bench, steps=4, rows=2), run)
    assert log.count(("close",)) == 1
    system.close()
    assert log.count(("close",)) == 2


def test_steps_of_a_bound_system_reach_all_of_it():
    ceilings = Ceilings(10.0, None, None, 100.0, 1.0, 1.0)
    assert step_figures([0.1] * 3, 1, Work(1e9, 0, 0), ceilings)["share_of"]["link"] == 1.0


def test_a_trace_of_another_model_is_refused(tmp_path):
    save_trace(tmp_path / "r.npz", synthetic(RouteSizes(2, 8, 2), steps=6, rows=1, prompt=12))
    assert load_trace(tmp_path / "r.npz", RouteSizes(2, 8, 2), steps=6, rows=1, prompt=12).experts == 8
    code, output = speed("Mixtral-8x7B", "--tiny", "--trace", tmp_path / "r.npz", "--out", tmp_path / "o.json", *FAST)
    assert code == 1
    assert "record a trace of this model" in " ".join(output.split())


@pytest.mark.parametrize("limit", ["0", "-1", "nan"])
def test_a_time_limit_that_leaves_no_time_is_refused(limit, tmp_path):
    code, output = speed("OLMoE", "--tiny", "--time-limit", limit, "--out", tmp_path / "o.json", *FAST)
    assert code == 1
    assert "give more than 0" in " ".join(output.split())
