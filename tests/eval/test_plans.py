"""Plans of equal bytes are made and compared as they say, on the untrained architecture."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import expertflow_quant
from eval.__main__ import app
from eval.plans.contenders import by_use, named
from eval.plans.measure import ItemFigures, logprobs_after
from eval.plans.report import differences, figures
from eval.tasks import generated_tasks
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.offload.trace import GENERATED, RoutingTrace

NARROW, MIDDLE, WIDE = (Format.parse(f"int{bits}-g32") for bits in (2, 3, 4))


def used(times, layers=6):
    """A trace in which expert e of every layer is used ``times[e]`` times, one at a time."""
    experts = torch.tensor([expert for expert, count in enumerate(times) for _ in range(count)])
    routes = experts.view(-1, 1, 1).expand(-1, layers, 1)
    return RoutingTrace.of(
        [0] * len(experts), [GENERATED] * len(experts), [0] * len(experts), routes, len(times), ["a"]
    )


def test_the_plan_by_use_widens_the_most_used_third():
    plan = by_use([used([5, 1, 4, 0, 2, 3], 1), used([0, 0, 0, 0, 4, 0], 1)], NARROW, MIDDLE, WIDE)
    assert [plan.format(0, expert) for expert in range(6)] == [WIDE, NARROW, MIDDLE, NARROW, WIDE, MIDDLE]
    with pytest.raises(ExpertFlowError, match="one and the same model"):
        by_use([used([1]), used([1, 1])], NARROW, MIDDLE, WIDE)


def test_options_name_files_that_are_there(tmp_path):
    (tmp_path / "a.json").touch()
    assert named([f"x={tmp_path / 'a.json'}"], "plan") == {"x": tmp_path / "a.json"}
    for value in ("x", "=a", f"x={tmp_path}/no.json"):
        with pytest.raises(ExpertFlowError, match="no NAME=FILE"):
            named([value], "plan")


def drawn(seed, moved=100):
    """Items of two tasks, two questions an image."""
    draw = np.random.default_rng(seed)
    return [
        ItemFigures(task, f"{task}{at // 2}", float(draw.random() < 0.9), draw.random(), int(draw.integers(1, 9)),
                    moved=int(draw.integers(50, 150)) * moved, steps=int(draw.integers(0, 9)),
                    device={"equal shares": int(draw.integers(1, 100))})
        for task in ("chart", "document") for at in range(40)
    ]  # fmt: skip


def test_figures_and_differences():
    base, mine = drawn(0), drawn(1)
    found = figures(base)
    assert found["scores"]["chart"] == np.mean([item.score for item in base[:40]])
    assert found["bytes_per_token"] == sum(item.moved for item in base) / sum(item.tokens for item in base)
    same = differences(base, base)
    assert all(same[name] == {"mean": 0, "lower": 0, "upper": 0} for name in same if name != "scores")
    half = [replace(item, moved=item.moved // 2) for item in base]
    change = differences(half, base)["bytes_per_token"]
    assert (change["mean"], change["lower"]) == pytest.approx((-0.5, -0.5), abs=1e-3)
    apart = differences(mine, base)["bytes_per_token"]
    assert apart["mean"] == pytest.approx(figures(mine)["bytes_per_token"] / found["bytes_per_token"] - 1, abs=1e-4)
    planned = [replace(item, device=item.device | {"planned slots": 2 * item.device["equal shares"]}) for item in base]
    assert differences(planned, base)["device_bytes_per_step, planned slots"]["mean"] == pytest.approx(1)


def test_an_interval_of_a_ratio_is_that_of_resampled_images():
    base, mine = drawn(2), drawn(3)
    found = differences(mine, base)["bytes_per_token"]
    pairs = [list(zip(mine[at : at + 2], base[at : at + 2])) for at in range(0, len(base), 2)]
    draw, changes = np.random.default_rng(0), []
    for _ in range(2000):
        chosen = [pair for at in draw.integers(0, len(pairs), len(pairs)) for pair in pairs[at]]
        rate = [sum(pair[of].moved for pair in chosen) / sum(pair[of].tokens for pair in chosen) for of in (0, 1)]
        changes.append(rate[0] / rate[1] - 1)
    assert (found["lower"], found["upper"]) == pytest.approx(np.quantile(changes, [0.025, 0.975]), abs=0.06)


def test_full_precisions_answer_is_followed_token_by_token(small_int4):
    engine = expertflow_quant.load(small_int4)
    item = generated_tasks(1, 0)[0].items[0]
    answer = engine.generate([item.messages], 6)[0].token_ids
    logprobs = logprobs_after(engine, item, torch.tensor(answer))
    assert logprobs.argmax(-1).tolist() == list(answer)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(len(answer)))


def test_the_command_compares_plans(small_moe, tmp_path):
    plan = {"default": "int3-g32", "layers": {"0": {"3": "int2-g32", "4": "int4-g32"}}}
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    used([1] * 16).save(tmp_path / "trace.safetensors")
    command = ["plans", str(small_moe), "--plan", f"mine={tmp_path / 'mine.json'}", "--items", "1"]
    command += ["--trace", str(tmp_path / "trace.safetensors"), "--out", str(tmp_path / "plans.json")]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    results = json.loads((tmp_path / "plans.json").read_text())
    assert [entry["name"] for entry in results["plans"]] == ["uniform int3-g32", "frequency", "mine"]
    assert len({entry["device_bytes"] for entry in results["plans"]}) == 1
    assert len({entry["record_bytes"] for entry in results["plans"]}) == 1
    for entry in results["plans"]:
        assert entry["figures"]["kl"] > 0
        assert entry["figures"]["bytes_per_token"] > 0
    assert set(results["plans"][2]["change"]["scores"]) == {"chart", "document"}
    assert (tmp_path / "plans.png").stat().st_size > 1000
