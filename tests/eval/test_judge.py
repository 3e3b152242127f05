"""Judging and comparing systems, the results file, the plots and the command, on fake engines."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

import eval.judge
from eval.__main__ import app
from eval.comparison import compare
from eval.judge import System, judge, load_judgement
from eval.plots import comparison_figure, judgement_figure, save
from eval.provenance import git_state, model_fingerprint, provenance
from eval.records import ResultsError
from eval.report import comparisons_table, fine_points, mebibytes, points, systems_table
from eval.tasks import generated_tasks

TASKS = generated_tasks(16)
GOLD = {(item.image.tobytes(), item.prompt): item.answers[0] for task in TASKS for item in task.items}


class FakeEngine:
    """Knows the answers to all but every ``wrong_every``-th question that it is asked."""

    def __init__(self, wrong_every: int) -> None:
        self.wrong_every, self.asked = wrong_every, 0
        self.expert_bytes, self.device_expert_bytes = 4 << 20, 1 << 20
        self.stats = SimpleNamespace(hits=0, misses=0, bytes_moved=0, stall_seconds=0.0)

    def generate(self, conversations, max_new_tokens=32):
        answers = []
        for messages in conversations:
            self.asked += 1
            right = self.asked % self.wrong_every
            image, prompt = messages[0]["content"]
            text = GOLD[image["image"].tobytes(), prompt["text"]] if right else "no idea"
            answers.append(SimpleNamespace(text=text, prompt_tokens=60, image_tokens=36, completion_tokens=3))
        self.stats = SimpleNamespace(
            hits=self.stats.hits + 9, misses=self.stats.misses + 1, bytes_moved=0, stall_seconds=0.0
        )
        return answers


@pytest.fixture
def systems(tmp_path, monkeypatch):
    """A checkpoint and plain models, empty but for a config that says how often each is wrong."""
    folders = {}
    for name, wrong_every in (("out", 4), ("plain", 8), ("dense", 2)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps({"wrong_every": wrong_every}))
    (folders["out"] / "manifest.json").write_text("{}")
    opened = []

    def open_engine(system, device):
        opened.append(system.name)
        return FakeEngine(json.loads((system.path / "config.json").read_text())["wrong_every"])

    monkeypatch.setattr(eval.judge, "open_engine", open_engine)
    return SimpleNamespace(
        quantized=System("quantized", "int4", folders["out"], "25%"),
        plain=System("against", "bf16", folders["plain"]),
        folders=folders,
        opened=opened,
    )


def test_a_judgement_is_kept_and_not_made_twice(systems, tmp_path):
    first = judge(systems.quantized, TASKS, tmp_path / "r", batch_size=8)
    assert first.mean("chart") == 0.75
    assert first.hit_rate == 0.9  # the warm-up is not counted
    assert first.counters["hits"] == 4 * 9
    assert (first.expert_bytes, first.device_expert_bytes, first.failures) == (4 << 20, 1 << 20, 0)
    assert judge(systems.quantized, TASKS, tmp_path / "r", batch_size=8) == first
    assert load_judgement(systems.quantized, tmp_path / "r") == first
    assert systems.opened == ["quantized"]


def test_other_settings_are_refused(systems, tmp_path):
    judge(systems.quantized, TASKS, tmp_path / "r", batch_size=8)
    with pytest.raises(ResultsError, match="batch_size = 8"):
        judge(systems.quantized, TASKS, tmp_path / "r", batch_size=4)
    (systems.folders["out"] / "config.json").write_text('{"wrong_every": 5}')
    with pytest.raises(ResultsError, match="results of model ="):
        judge(systems.quantized, TASKS, tmp_path / "r", batch_size=8)


def test_comparison_is_paired_and_wants_the_same_items(systems, tmp_path):
    ours, theirs = (judge(s, TASKS, tmp_path / "r", batch_size=16) for s in (systems.quantized, systems.plain))
    chart, document = compare(ours, theirs, 0.01)
    assert (chart.task, document.task) == ("chart", "document")
    assert chart.difference.mean == pytest.approx(0.75 - 0.875)
    assert chart.difference.worse == 2
    assert chart.same_predictions == 14
    assert chart.to_json()["verdict"] == chart.verdict
    with pytest.raises(ValueError, match="judge both with the same tasks"):
        compare(ours, replace(theirs, results=theirs.results[:-1]), 0.01)


def test_plain_systems_have_no_hit_rate_and_tables_show_a_dash(systems, tmp_path):
    plain = judge(systems.plain, TASKS, tmp_path / "r")
    assert plain.hit_rate is None
    assert plain.to_json()["expert_memory"] is None
    assert systems_table([plain], TASKS).row_count == 1
    failing = replace(plain, results=(replace(plain.results[0], error="x"), *plain.results[1:]))
    assert "bf16: 1" in str(systems_table([failing], TASKS).caption)


def test_figures_are_drawn_and_repeat_byte_for_byte(systems, tmp_path):
    ours, theirs = (judge(s, TASKS, tmp_path / "r") for s in (systems.quantized, systems.plain))
    dense = replace(theirs, system=System("dense", "dense", systems.folders["dense"]), expert_bytes=0)
    comparisons = compare(ours, theirs, 0.01) + compare(dense, theirs, 0.02)
    for name in ("a.png", "b.png"):
        save(comparison_figure([theirs, ours, dense], comparisons, TASKS), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    save(judgement_figure([ours, theirs, dense], TASKS), tmp_path / "kinds.png")
    assert Image.open(tmp_path / "kinds.png").size[0] > 1000
    assert comparisons_table(comparisons, TASKS).row_count == 4


def test_the_command_writes_table_json_lines_and_plot(systems, tmp_path):
    folders, results = systems.folders, tmp_path / "results"
    arguments = [str(folders["out"]), "--against", str(folders["plain"]), "--dense", str(folders["dense"])]
    arguments += ["--items", "16", "--out", str(results), "--noise-floor"]
    outcome = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert outcome.exit_code == 0, outcome.output
    assert "original" in outcome.output
    written = json.loads((results / "results.json").read_text())
    assert [s["name"] for s in written["systems"]] == ["quantized", "against", "dense", "against-again"]
    assert written["systems"][0]["scores"]["chart"] == 0.75
    assert len(written["comparisons"]) == 6
    assert written["made"]["command"].startswith("python -m eval")
    assert {"margin", "lower", "upper", "verdict", "standard_error"} <= written["comparisons"][0].keys()
    assert len((results / "dense.jsonl").read_text().splitlines()) == 33
    assert (results / "accuracy.png").stat().st_size > 10_000


def test_the_command_says_what_is_wrong_without_a_traceback(systems, tmp_path):
    arguments = [str(tmp_path / "nowhere"), "--against", str(systems.folders["plain"]), "--items", "2"]
    outcome = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "r")], env={"COLUMNS": "300"})
    assert outcome.exit_code == 1
    assert "give the folder of a model" in outcome.output
    assert "Traceback" not in outcome.output


def test_fingerprint_sees_a_changed_weight(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(3 << 20)
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = model_fingerprint(tmp_path)
    assert model_fingerprint(Path(shutil.copytree(tmp_path, tmp_path.with_name("copy")))) == before
    weights[-1] = 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(tmp_path) != before


def test_provenance_names_command_versions_and_commit(tmp_path):
    made = provenance("eval", ["OUT", "--out", "a b"], "cpu")
    assert made["command"] == "python -m eval OUT --out 'a b'"
    assert made["packages"]["torch"]
    assert git_state(tmp_path) is None


def test_numbers_for_people():
    assert [points(x) for x in (0.0123, -0.0123, 0.0004, -0.0004, 0.0)] == [
        "+1.2",
        "-1.2",
        "0.0",
        "0.0",
        "0.0",
    ]
    assert [fine_points(x) for x in (0.01, -0.00984, -0.00001)] == ["+1.00", "-0.98", "0.00"]
    assert (mebibytes(3 << 19), mebibytes(0)) == ("1.50", "-")
