"""``eval compare``: names of systems, sizes and the matching rule, pictures, and the whole command on fake engines."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.public_files import chart_questions, lmms_lab_chartqa, write_parquet
from helpers.reports import make_report
from PIL import Image
from typer.testing import CliRunner

import eval.judge
from eval.__main__ import app
from eval.compare.changed import Answer, Card, cards, changed_questions, image_url
from eval.compare.command import write_report
from eval.compare.report import AGAIN, DENSE, JUDGED, OWN
from eval.compare.sizes import Matching, Size, match, parameters, size_of
from eval.compare.systems import contest, tasks_named
from eval.judge import Judgement, System
from eval.systems import system_named
from eval.tasks import generated_tasks
from expertflow_quant.formats import ExpertFlowError

TASKS = generated_tasks(16)
GOLD = {(item.image.tobytes(), item.prompt): item.answers[0] for task in TASKS for item in task.items}


class FakeEngine:
    """Knows all answers but those of every ``wrong_every``-th question that it is asked."""

    expert_bytes, device_expert_bytes = 4 << 20, 1 << 20

    def __init__(self, wrong_every: int) -> None:
        self.wrong_every, self.asked = wrong_every, 0

    def generate(self, conversations, max_new_tokens=32):
        answers = []
        for messages in conversations:
            self.asked += 1
            image, prompt = messages[0]["content"]
            text = GOLD[image["image"].tobytes(), prompt["text"]] if self.asked % self.wrong_every else "no idea"
            answers.append(SimpleNamespace(text=text, prompt_tokens=60, image_tokens=36, completion_tokens=3))
        return answers


@pytest.fixture
def models(tmp_path, monkeypatch):
    for name, wrong_every in (("out", 4), ("plain", 8), ("dense", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"wrong_every": wrong_every}))
    read = lambda system: json.loads((system.path / "config.json").read_text())["wrong_every"]  # noqa: E731
    monkeypatch.setattr(eval.judge, "open_engine", lambda system, device: FakeEngine(read(system)))
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "300"})


def test_one_command_judges_all_and_writes_everything(models):
    out = models / "results"
    systems = [f"int4={models / 'out'}", "--self", f"bf16={models / 'plain'}", "--dense", str(models / "dense")]
    done = run(*systems, "--items", "16", "--out", out, "--noise-floor", "--batch-size", "8")
    assert done.exit_code == 0, done.output
    assert "int4 against bf16 (own full precision), every task" in done.output
    written = json.loads((out / "compare.json").read_text())
    assert [(s["label"], s["role"]) for s in written["systems"]] == [
        ("int4", JUDGED), ("bf16", OWN), ("dense", DENSE), ("bf16 again", AGAIN),
    ]  # fmt: skip
    assert [(p["system"], p["baseline"], p["margin"]) for p in written["pairs"]] == [
        ("int4", "bf16", 0.01), ("int4", "dense", 0.02), ("bf16", "dense", 0.02), ("bf16 again", "bf16", 0.01),
    ]  # fmt: skip
    assert written["systems"][0]["scores"]["chart"] == 0.75
    assert written["systems"][0]["size"] is None  # the fake models have no config that transformers knows
    assert len(written["comparisons"]) == 8
    assert written["made"]["command"].startswith("python -m eval")
    assert "## int4 against bf16, by kind and split" in (out / "compare.md").read_text()
    assert (out / "compare.html").read_text().startswith("<!doctype html>")
    assert Image.open(out / "compare.png").size[0] > 1000
    assert run(*systems, "--items", "16", "--out", out, "--noise-floor", "--batch-size", "8").exit_code == 0
    assert json.loads((out / "compare.json").read_text())["pairs"] == written["pairs"]  # nothing was asked again


def test_brackets_in_a_label_are_brackets(models):
    """rich takes "[red]" for a colour, drops it, and ends at a "[/x]" that closes nothing."""
    systems = [f"int4 [/x]={models / 'out'}", "--self", f"bf16 [red]={models / 'plain'}"]
    done = run(*systems, "--items", "16", "--out", models / "results")
    assert done.exit_code == 0, done.output
    assert "int4 [/x] - bf16 [red]" in done.output
    assert "int4 [/x] against bf16 [red]" in done.output


def test_dollars_in_a_label_are_no_formula(models):
    """matplotlib reads what is between two as one, and ends where it cannot."""
    systems = [rf"int4 $\x$={models / 'out'}", "--self", f"bf16={models / 'plain'}"]
    done = run(*systems, "--items", "8", "--out", models / "results")
    assert done.exit_code == 0, done.output
    assert Image.open(models / "results" / "compare.png").size[0] > 1000


@pytest.mark.parametrize(("given", "lacks"), [("self", "dense"), ("dense", "self")])
def test_a_comparison_that_was_not_made_is_said(models, given, lacks):
    done = run(models / "out", f"--{given}", models / "plain", "--items", "8", "--out", models / "results")
    assert done.exit_code == 0, done.output
    pages = [(models / "results" / f"compare.{kind}").read_text() for kind in ("md", "html")]
    for text in (done.output, *pages):
        assert f"(--{lacks})" in text
        assert f"(--{given})" not in text


def test_a_baseline_that_answered_nothing_makes_no_system_superior(models, monkeypatch):
    class Broken:
        expert_bytes = device_expert_bytes = 0

        def generate(self, conversations, max_new_tokens=32):
            raise RuntimeError("it reads no pictures")

    broken = lambda system, device: Broken() if system.label == "dense" else FakeEngine(4)  # noqa: E731
    monkeypatch.setattr(eval.judge, "open_engine", broken)
    done = run(models / "out", "--dense", models / "dense", "--items", "16", "--out", models / "results")
    assert done.exit_code == 1
    assert "dense failed on all 32 items (the first: RuntimeError: it reads no pictures)" in done.output
    assert "delete dense.jsonl" in done.output


def test_half_a_surrogate_pair_in_an_answer_is_written(tmp_path):
    report = make_report(items=4)
    changed = replace(report.changed[0], answers=(Answer("int4 AWQ", "cut \ud83d here", 0.0, None),))
    report = replace(report, cards=[Card(None, (changed,))])
    write_report(report, tmp_path)
    assert r"cut \ud83d here" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_what_cannot_be_compared_is_said_without_a_traceback(models):
    alone = run(str(models / "out"), "--out", models / "r")
    twice = run(str(models / "out"), "--self", str(models / "out"), "--out", models / "r")
    missing = run(str(models / "out"), "--self", str(models / "plain"), "--out", models / "r", "--task", "chartqa")
    for outcome, words in ((alone, "give --self"), (twice, "LABEL=PATH"), (missing, "--task chartqa=FOLDER")):
        assert outcome.exit_code == 1
        assert words in outcome.output
        assert "Traceback" not in outcome.output
    typo = run(str(models / "out"), "--dense", str(models / "typo"), "--out", models / "r", "--items", "4")
    assert typo.exit_code == 1
    assert "typo holds no config.json" in typo.output
    assert not (models / "r").exists()  # said before the first system was asked


def test_names_of_systems(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert system_named(str(odd), "25%").path == odd
    named = system_named("int4 AWQ=some/where", "25%")
    assert (named.name, named.label, named.path) == ("int4-AWQ", "int4 AWQ", Path("some/where"))
    server = system_named("vllm=http://localhost:8000/v1#Qwen", "25%")
    assert (server.label, server.endpoint.url, server.endpoint.model) == ("vllm", "http://localhost:8000/v1", "Qwen")
    assert system_named("http://localhost:8000/v1#Qwen/VL", "25%").name == "Qwen-VL"
    with pytest.raises(ExpertFlowError, match="makes no file name"):
        system_named("//=x", "25%")
    with pytest.raises(ExpertFlowError, match="give --self"):
        contest(["a"], None, ["b"], "25%", ask_again=True)


def test_every_judged_system_meets_both_baselines():
    found = contest(["a", "b"], "own", ["d1", "d2"], "25%")
    pairs = [(system.label, baseline.label, margin) for system, baseline, margin in found.pairs]
    assert pairs[:2] == [("a", "own", 0.01), ("b", "own", 0.01)]
    assert {(s, b) for s, b, m in pairs if m == 0.02} == {(s, d) for s in ("a", "b", "own") for d in ("d1", "d2")}


def test_tasks_by_name():
    assert [task.name for task in tasks_named([], 4, 0)] == ["chart", "document"]
    assert [len(task.items) for task in tasks_named(["document"], 4, 0)] == [4]
    with pytest.raises(ExpertFlowError, match="poem"):
        tasks_named(["poem"], 4, 0)
    with pytest.raises(ExpertFlowError, match=r"chart is generated and reads no some/where: .*chartqa=some/where"):
        tasks_named(["chart=some/where"], 4, 0)
    with pytest.raises(ExpertFlowError, match="chartqa is given one and two"):
        tasks_named(["chartqa=one", "chartqa=two"], 4, 0)


def test_public_files_make_a_page_with_lines_by_split_and_a_damaged_row(models, monkeypatch):
    pytest.importorskip("pyarrow")
    questions = chart_questions(8)
    questions[3] = replace(questions[3], image=b"no picture")
    file = write_parquet(lmms_lab_chartqa(questions), models / "chartqa" / "test-00000-of-00001.parquet")

    class Right:
        expert_bytes = device_expert_bytes = 0

        def generate(self, conversations, max_new_tokens=32):
            answer = SimpleNamespace(text="Yes", prompt_tokens=9, image_tokens=4, completion_tokens=2)
            return [self.error or answer, *[answer] * (len(conversations) - 1)]

    Right.error = None
    Timeout = type("Timeout", (Right,), {"error": TimeoutError("too slow")})
    named = {"out": Right, "plain": Timeout}
    monkeypatch.setattr(eval.judge, "open_engine", lambda system, device: named[system.label]())
    out = models / "results"
    done = run(models / "out", "--self", models / "plain", "--task", f"chartqa={file}", "--out", out)
    assert done.exit_code == 0, done.output
    written = json.loads((out / "compare.json").read_text())
    (found,) = written["comparisons"]
    assert found["items"] == 8
    assert {g["name"]: g["items"] for g in found["groups"] if g["dimension"] == "split"} == {"human": 4, "augmented": 4}
    assert written["systems"][0]["failures"] == 1
    assert "1 damaged rows score 0" in (out / "compare.html").read_text()
    for name in ("compare.html", "compare.md"):
        text = (out / name).read_text()
        assert "Counted as 0: 1 damaged rows of ChartQA, 1 items that failed of plain." in text
    assert "chartqa-3: its image of 10 bytes cannot be decoded" in done.output


def test_parameters_are_those_of_the_weights(small_moe):
    from safetensors.torch import load_file

    weights = load_file(small_moe / "model.safetensors")
    total = sum(weight.numel() for weight in weights.values())
    experts = sum(weight.numel() for name, weight in weights.items() if ".experts." in name)
    assert experts > 0
    assert parameters(System("m", "m", small_moe)) == (total, total - experts * 14 // 16)


def test_sizes_of_a_checkpoint_count_what_is_on_the_device(small_moe, small_int4):
    plain = size_of(Judgement(System("p", "p", small_moe), (), {}, 0, 0))
    ours = size_of(Judgement(System("q", "q", small_int4, "25%"), (), {}, 0, 1000))
    assert (ours.total, ours.active) == (plain.total, plain.active)
    assert plain.stored == plain.device == (small_moe / "model.safetensors").stat().st_size
    assert ours.device < ours.stored < plain.stored
    assert plain.stored == pytest.approx(plain.total * torch.bfloat16.itemsize, rel=0.01)


def test_matching_names_the_rule_or_says_that_there_is_none():
    ours, small = Size(100, 40, 1000, 500), Size(42, 42, 84, 84)
    found = match(ours, small)
    assert found.matched == ["active parameters"]
    assert found.text == "active parameters (x 1.05)"
    assert Matching({"active": 2.0, "total": 0.5}).text == "none: active parameters x 2.00, all parameters x 0.50"
    assert match(None, small) is None


def test_pictures_are_shrunk_and_a_broken_one_is_none():
    item = TASKS[0].items[0]
    url = image_url(item, 64)
    kind, _, data = url.removeprefix("data:image/").partition(";base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (decoded.format.lower(), max(decoded.size)) == (kind, 64)

    class Broken:
        @property
        def messages(self):
            raise OSError("truncated")

    assert image_url(Broken(), 64) is None


def test_cards_show_first_what_changed_against_the_first_baseline(models):
    from eval.judge import judge

    sides = contest([str(models / "out")], str(models / "plain"), [str(models / "dense")], "25%")
    judged = [judge(system, TASKS, models / "r", batch_size=16) for system in sides.systems]
    changed = changed_questions(judged, [("out", "plain"), ("out", "dense")])
    assert {q.id for q in changed if 0 in q.changes} == {
        a.id for a, b in zip(judged[0].results, judged[1].results, strict=True) if a.score != b.score
    }
    shown = cards(changed, TASKS, 2, 32)
    assert len(shown) == 2
    assert all(0 in min(card.questions, key=lambda q: min(q.changes)).changes for card in shown)
    assert [a.label for a in changed[0].answers] == ["out", "plain", "dense"]
