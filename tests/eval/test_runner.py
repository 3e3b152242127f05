"""The runner and its file, on a fake engine: no model is loaded."""

import dataclasses
import io
import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import eval.runner
from eval.metrics import ANLS, RELAXED_ACCURACY
from eval.records import ResultsError, ResultsFile, read_results
from eval.runner import batches, progress_bar, progress_line, run_tasks
from eval.tasks import Task, generated_task, generated_tasks


@dataclass(frozen=True)
class FakeItem:
    id: str
    answers: tuple[str, ...] = ("yes",)
    max_new_tokens: int = 16
    kind: str = "value"
    family: str = "bar"
    image_key: str = "k"

    @property
    def question(self) -> str:
        return f"Question {self.id}?"

    @property
    def prompt(self) -> str:
        return self.question

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": self.question}]}]


@dataclass
class FakeEngine:
    """Answers "yes"; fails on a batch with one of ``bad``; is interrupted at call number ``dies_at``."""

    bad: set[str] = field(default_factory=set)
    dies_at: int = 0
    calls: list[list[str]] = field(default_factory=list)
    stats: Any = field(default_factory=lambda: SimpleNamespace(hits=0, misses=0))

    def generate(self, conversations, max_new_tokens=32):
        asked = [messages[0]["content"][0]["text"].split()[1][:-1] for messages in conversations]
        self.calls.append(asked)
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        if self.bad & set(asked):
            raise RuntimeError("cannot read this image")
        self.stats = SimpleNamespace(hits=self.stats.hits + 3, misses=self.stats.misses + 1)
        return [SimpleNamespace(text="yes", prompt_tokens=7, image_tokens=4, completion_tokens=2) for _ in asked]


def task(ids: str, **changes) -> Task:
    return Task("chart", "charts", RELAXED_ACCURACY, [FakeItem(i, **changes) for i in ids], "fake")


def test_batches_keep_order_and_never_mix_tasks_or_token_limits():
    mixed = [FakeItem(i, max_new_tokens=limit) for i, limit in zip("abcde", (16, 16, 16, 32, 32), strict=True)]
    tasks = [Task("chart", "charts", RELAXED_ACCURACY, mixed, "fake"), task("fg")]
    assert [[i.id for i in b.items] for b in batches(tasks, 2)] == [["a", "b"], ["c"], ["d", "e"], ["f", "g"]]
    with pytest.raises(ValueError, match="batch size 0"):
        list(batches(tasks, 0))


def test_every_item_is_recorded_with_its_score_and_counts(tmp_path):
    asked = [task("ab"), Task("document", "documents", ANLS, [FakeItem("c", ("yess", "no"))], "fake")]
    file = ResultsFile.open(tmp_path / "run.jsonl", {"seed": 0})
    with progress_bar() as bar:
        results = run_tasks(FakeEngine(), asked, 32, file, bar=bar)
    assert [(r.id, r.task, r.score) for r in results] == [
        ("a", "chart", 1.0),
        ("b", "chart", 1.0),
        ("c", "document", 0.75),
    ]
    assert results[0].prediction == "yes"
    assert (results[0].prompt_tokens, results[0].image_tokens, results[0].completion_tokens) == (7, 4, 2)
    assert results[0].seconds == results[1].seconds > 0
    assert file.counters == {"hits": 6, "misses": 2}
    assert read_results(tmp_path / "run.jsonl") == ({"seed": 0}, results)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(tmp_path, monkeypatch):
    def said(name):
        console = Console(file=io.StringIO(), width=100)
        with progress_bar(console) as bar:
            run_tasks(FakeEngine(), [task("abcd")], 2, ResultsFile.open(tmp_path / f"{name}.jsonl", {}), bar=bar)
        return [line for line in console.file.getvalue().splitlines() if " items, " in line]

    assert said("short") == []
    monkeypatch.setattr(eval.runner, "LOG_SECONDS", 0.0)
    first, last = said("long")
    assert re.fullmatch(r"long: 2 of 4 items, \d+\.\d\d a second, about 0 min left", first)
    assert last.startswith("long: 4 of 4 items")
    assert progress_line("x", 100, 700, 0.5) == "x: 100 of 700 items, 0.50 a second, about 20 min left"


def test_a_failing_item_scores_zero_and_costs_only_itself(tmp_path):
    engine = FakeEngine(bad={"b"})
    results = run_tasks(engine, [task("abcd")], 4, ResultsFile.open(tmp_path / "run.jsonl", {}))
    assert [r.score for r in results] == [1.0, 0.0, 1.0, 1.0]
    assert results[1].error == "RuntimeError: cannot read this image"
    assert [r.error for r in results if r.id != "b"] == [None] * 3
    assert engine.calls == [["a", "b", "c", "d"], ["a"], ["b"], ["c"], ["d"]]


def test_too_few_answers_are_failures_not_shifted_answers(tmp_path):
    engine = FakeEngine()
    engine.generate = lambda conversations, max_new_tokens=32: []
    results = run_tasks(engine, [task("ab")], 2, ResultsFile.open(tmp_path / "run.jsonl", {}))
    assert [r.error for r in results] == ["RuntimeError: the engine gave 0 answers to 1 conversations"] * 2


def test_a_killed_run_goes_on_with_the_batches_it_would_have_had(tmp_path):
    path, asked = tmp_path / "run.jsonl", [task("abcde")]
    with pytest.raises(KeyboardInterrupt):
        run_tasks(FakeEngine(dies_at=2), asked, 2, ResultsFile.open(path, {"seed": 0}))
    with path.open("a") as file:
        file.write('{"id": "c", "task": "ch')  # the kill cut a line in two
    engine = FakeEngine()
    file = ResultsFile.open(path, {"seed": 0})
    results = run_tasks(engine, asked, 2, file)
    assert engine.calls == [["c", "d"], ["e"]]
    assert file.counters == {"hits": 9, "misses": 3}
    whole = run_tasks(FakeEngine(), asked, 2, ResultsFile.open(tmp_path / "whole.jsonl", {"seed": 0}))
    assert [dataclasses.replace(r, seconds=0) for r in results] == [dataclasses.replace(r, seconds=0) for r in whole]
    again = FakeEngine()
    assert run_tasks(again, asked, 2, ResultsFile.open(path, {"seed": 0})) == results
    assert again.calls == []


@pytest.mark.parametrize("damage", ["no progress", "progress ahead", "garbled line"])
def test_a_damaged_record_is_begun_again_not_trusted(tmp_path, damage):
    path, asked = tmp_path / "run.jsonl", [task("ab")]
    run_tasks(FakeEngine(), asked, 1, ResultsFile.open(path, {}))
    progress = path.with_suffix(".progress.json")
    if damage == "no progress":
        progress.unlink()
    elif damage == "progress ahead":
        progress.write_text(json.dumps({"items": 3, "counters": {}}))
    else:
        path.write_text(path.read_text().replace('"kind"', '"king"', 1))
    assert ResultsFile.open(path, {}).results == []


def test_results_of_other_settings_are_refused_with_the_remedy(tmp_path):
    path = tmp_path / "run.jsonl"
    ResultsFile.open(path, {"batch_size": 32, "seed": 0})
    with pytest.raises(ResultsError, match=r"batch_size = 32, this run has 16.*choose another --out"):
        ResultsFile.open(path, {"batch_size": 16, "seed": 0})
    path.write_text("no json\n")
    with pytest.raises(ResultsError, match="no results file"):
        ResultsFile.open(path, {})


def test_generated_tasks_are_held_out_and_fingerprinted():
    chart, document = generated_tasks(6)
    assert {item.split for item in (*chart.items, *document.items)} == {"test"}
    assert (chart.metric, document.metric) == (RELAXED_ACCURACY, ANLS)
    assert chart.description["images"] == 3
    assert chart.fingerprint == generated_task("chart", 6).fingerprint
    assert chart.fingerprint != generated_task("chart", 6, seed=1).fingerprint
    shorter = [dataclasses.replace(chart.items[0], answers=("other",)), *chart.items[1:]]
    assert chart.fingerprint != dataclasses.replace(chart, items=shorter).fingerprint


def test_tasks_that_cannot_be_judged_are_refused():
    with pytest.raises(ValueError, match="two items of one id"):
        task("aa")
    with pytest.raises(ValueError, match="has no items"):
        task("")
    with pytest.raises(ValueError, match="use one of chart, document"):
        generated_task("poem", 1)
