"""Judging with the library's own engine on an untrained model: the seams fit, the counters count."""

from typer.testing import CliRunner

from eval.comparison import compare
from eval.identical import MINIMUM, app, check_budgets, first_items
from eval.judge import System, judge
from eval.tasks import generated_tasks

TASKS = generated_tasks(3)


def test_checkpoint_and_plain_model_are_judged_alike(small_moe, small_int4, tmp_path):
    ours = judge(System("int4", "int4", small_int4, "25%"), TASKS, tmp_path, batch_size=2)
    plain = judge(System("plain", "plain", small_moe), TASKS, tmp_path, batch_size=2)
    assert ours.failures == plain.failures == 0
    assert 0 < ours.hit_rate < 1
    assert ours.counters["bytes_moved"] == ours.counters["misses"] * ours.expert_bytes / 96
    assert ours.device_expert_bytes <= 0.25 * ours.expert_bytes
    assert plain.expert_bytes == 96 * 3 * 256 * 96 * 2  # as stored: bf16
    assert plain.device_expert_bytes == 2 * plain.expert_bytes  # as loaded on the CPU: float32
    result = ours.results[0]
    assert result.prompt_tokens > result.image_tokens > 0
    assert 0 < result.completion_tokens <= 16
    assert {c.task for c in compare(ours, plain, 0.01)} == {"chart", "document"}


def test_tokens_are_the_same_at_every_expert_memory(small_int4):
    items = first_items(TASKS, 3)
    assert [item.task for item in items] == ["chart", "document", "chart"]
    report = check_budgets(small_int4, items, ["25%", MINIMUM])
    assert report["items"] == 3
    assert {name: found["identical"] for name, found in report["budgets"].items()} == {"25%": 3, MINIMUM: 3}
    alone = report["budgets"]["25%"]["alone"]
    assert 0 < alone["hit_rate"] < 1 < alone["tokens_per_second"]
    assert report["budgets"][MINIMUM]["bytes"] < report["budgets"]["25%"]["bytes"]


def test_the_command_says_so_and_fails_where_they_differ(small_int4, monkeypatch):
    found = {"bytes": 10, "identical": 2, "alone": {"hit_rate": 0.5}}
    report = {"budgets": {"25%": found, MINIMUM: found}}
    monkeypatch.setattr("eval.identical.check_budgets", lambda *arguments: report)
    outcome = CliRunner().invoke(app, [str(small_int4), "--items", "2"])
    assert outcome.exit_code == 0
    assert "2 / 2" in outcome.output
    found["identical"] = 1
    assert CliRunner().invoke(app, [str(small_int4), "--items", "2"]).exit_code == 1
