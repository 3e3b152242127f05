"""lmms-eval's stock tasks beside our own scores: files, joining, the command. The harness itself is played here."""

import json
import math
import sys
from dataclasses import replace

import pytest
import typer
from helpers import public_files as public
from pyarrow import parquet
from typer.testing import CliRunner

from eval.data.errors import DataError
from eval.data.load import file_task
from eval.endpoint import Endpoint
from eval.harness import compare
from eval.harness.command import lmms
from eval.harness.files import CHARTQA_FEATURES, DOCVQA_FEATURES, write_generated
from eval.harness.join import agreement, joined
from eval.harness.stock import CHARTQA_TASK, DOCVQA_TASK, HarnessError
from eval.harness.worker import sample, scores
from eval.judge import System
from eval.run import run
from eval.tasks import generated_task

CHARTS, DOCUMENTS = public.chart_questions(), public.document_questions()


@pytest.fixture
def paths(tmp_path):
    first, last = (public.lmms_lab_chartqa(part) for part in (CHARTS[:5], CHARTS[5:]))
    public.write_parquet(last, tmp_path / "ChartQA" / "data" / "test-00001-of-00002.parquet")
    public.write_parquet(first, tmp_path / "ChartQA" / "data" / "test-00000-of-00002.parquet")
    public.write_parquet(public.lmms_lab_chartqa(CHARTS[:1]), tmp_path / "ChartQA" / "data" / "train-0.parquet")
    public.write_parquet(public.lmms_lab_docvqa(DOCUMENTS), tmp_path / "DocVQA" / "DocVQA" / "validation-0.parquet")
    information = public.lmms_lab_infovqa(DOCUMENTS)
    public.write_parquet(information, tmp_path / "DocVQA" / "InfographicVQA" / "validation-0.parquet")
    return {"chartqa": tmp_path / "ChartQA", "docvqa": tmp_path / "DocVQA"}


def played(answer=lambda item: item.answers[0], wrong_by=0.0):
    """A harness that knows the items: ``answer`` gives what the model says, ``wrong_by`` is added to its scores."""

    def run_harness(model, data, limit=None):
        tasks = {}
        for stock, path in data.items():
            task = file_task(stock.data_set.name, path, limit)
            rows = [logged(stock, task, number, answer(item), wrong_by) for number, item in enumerate(task.items)]
            mean = sum(row["scores"][stock.score] for row in rows) / len(rows)
            tasks[stock.name] = {"scores": {stock.score: mean}, "samples": rows[::-1]}
        return {"version": "played", "tasks": tasks}

    return run_harness


def logged(stock, task, number, prediction, wrong_by=0.0):
    item = task.items[number]
    score = task.metric.score(prediction, item.answers) + wrong_by
    row = {"document": number, "prompt": item.prompt, "prediction": prediction, "error": None}
    return row | {"scores": {stock.score: score}, "prompt_tokens": 9, "completion_tokens": 3}


def test_the_stock_tasks_read_the_files_that_our_tasks_read(paths):
    charts, documents = CHARTQA_TASK.override(paths["chartqa"]), DOCVQA_TASK.override(paths["docvqa"])
    assert (charts["task"], charts["dataset_path"], charts["dataset_name"]) == ("chartqa", "parquet", None)
    (files,) = charts["dataset_kwargs"].values()
    assert [path.rsplit("/", 1)[1] for path in files["test"]] == [f"test-0000{i}-of-00002.parquet" for i in (0, 1)]
    read = [row["question"] for path in files["test"] for row in parquet.read_table(path).to_pylist()]
    assert read == [item.question for item in file_task("chartqa", paths["chartqa"]).items]
    (files,) = documents["dataset_kwargs"].values()
    assert [path.rsplit("/", 2)[1:] for path in files["validation"]] == [["DocVQA", "validation-0.parquet"]]


def test_one_file_a_glob_and_a_saved_folder_are_taken(paths, tmp_path):
    def files(path):
        ((split, names),) = CHARTQA_TASK.override(path)["dataset_kwargs"]["data_files"].items()
        assert split == "test"
        return [name.rsplit("/", 1)[1] for name in names]

    assert files(paths["chartqa"] / "data" / "test-00001-of-00002.parquet") == ["test-00001-of-00002.parquet"]
    assert files(paths["chartqa"] / "**" / "test-*.parquet") == [f"test-0000{i}-of-00002.parquet" for i in (0, 1)]
    saved = public.write_saved_splits({"test": public.lmms_lab_chartqa(CHARTS)}, tmp_path / "saved")
    assert files(saved) == [f"data-0000{i}-of-00002.arrow" for i in (0, 1)]
    assert CHARTQA_TASK.override(saved)["dataset_path"] == "arrow"


def test_what_the_stock_task_cannot_read_is_refused(tmp_path):
    other = public.write_parquet(public.m4_chartqa(CHARTS), tmp_path / "test-0.parquet")
    with pytest.raises(HarnessError, match=r"no column answer, question, type.*lmms-lab/ChartQA"):
        CHARTQA_TASK.override(other)
    with pytest.raises(HarnessError, match=r"reads nothing else: give parquet"):
        CHARTQA_TASK.override(public.write_chartqa_json(CHARTS, tmp_path / "json"))


def test_documents_are_joined_by_their_number_and_scores_compared_to_the_last_bit(paths):
    task = file_task("docvqa", paths["docvqa"])
    texts = [answers[0] if i % 2 else answers[0][:-1] + "~" for i, answers in enumerate(i.answers for i in task.items)]
    rows = [logged(DOCVQA_TASK, task, number, text) for number, text in enumerate(texts)]
    items = joined(DOCVQA_TASK, task, rows[::-1])
    assert [(item.id, item.prediction) for item in items] == [(i.id, t) for i, t in zip(task.items, texts, strict=True)]
    assert all(item.bit_equal and item.same_prompt for item in items)
    assert 0 < items[0].score < 1
    rows[0]["scores"]["anls"] = math.nextafter(rows[0]["scores"]["anls"], 1)
    found = agreement(joined(DOCVQA_TASK, task, rows))
    assert (found["items"], found["bit_equal_scores"]) == (len(rows), len(rows) - 1)
    assert found["scores"] == {"zero": 0, "between": len(rows) // 2, "one": len(rows) // 2}
    assert [item["id"] for item in found["different"]] == [task.items[0].id]
    assert len(joined(DOCVQA_TASK, task, rows[:2])) == 2
    for other in (rows[1:], [*rows, *rows]):
        with pytest.raises(HarnessError, match="same rows in the same order"):
            joined(DOCVQA_TASK, task, other)


def test_what_could_not_be_asked_scores_0_with_its_reason(paths):
    task = file_task("chartqa", paths["chartqa"])
    row = logged(CHARTQA_TASK, task, 0, task.items[0].answers[0]) | {"error": "too long"}
    (item,) = joined(CHARTQA_TASK, task, [row])
    assert (item.score, item.harness_score, item.error, item.bit_equal) == (0.0, 1.0, "too long", False)


def test_what_the_harness_logs_is_read():
    class Model:
        failures = {("chartqa", 1): "too long"}  # noqa: RUF012

    row = {
        "doc_id": 0,
        "doc": {"type": "human_test", "question": "How much?", "answer": "54"},
        "target": "54",
        "arguments": ["How much?\nAnswer", {"max_new_tokens": 16, "until": ["\n\n"]}, 0, "chartqa", "test"],
        "resps": [["54 "]],
        "filtered_resps": ["54"],
        "token_counts": [{"input_tokens": 171, "output_tokens": 3}],
        "doc_hash": "f00",
        "relaxed_overall": 1.0,
        "relaxed_human_split": 1,
    }
    found = sample(Model(), "chartqa", row)
    assert found == {
        "document": 0,
        "prompt": "How much?\nAnswer",
        "prediction": "54",
        "scores": {"relaxed_overall": 1.0, "relaxed_human_split": 1},
        "prompt_tokens": 171,
        "completion_tokens": 3,
        "error": None,
    }
    assert sample(Model(), "chartqa", row | {"doc_id": 1, "token_counts": [None]})["error"] == "too long"
    means = {"alias": "chartqa", "anls,none": 0.5, "anls_stderr,none": "N/A", "anls_stderr_clt,none": 0.1}
    assert scores(means) == {"anls": 0.5}


def asked(*arguments, command=lmms):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_both_scores_of_every_item(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "require_harness", lambda: None)
    monkeypatch.setattr(compare, "run_harness", played(lambda item: "54"))
    (tmp_path / "model").mkdir()
    out = tmp_path / "out.json"
    given = [tmp_path / "model", "--out", out, "--chartqa-path", paths["chartqa"], "--docvqa-path", paths["docvqa"]]
    outcome = asked(*given)
    assert outcome.exit_code == 0, outcome.output
    results = json.loads(out.read_text())
    assert results["made"]["lmms_eval"] == "played"
    assert [(task["stock_task"], task["items"]) for task in results["tasks"]] == [("chartqa", 8), ("docvqa_val", 6)]
    assert all(task["bit_equal_scores"] == task["same_prompts"] == task["items"] for task in results["tasks"])
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [(line["task"], line["document"]) for line in lines] == [
        *(("chartqa", i) for i in range(8)),
        *(("docvqa", i) for i in range(6)),
    ]
    assert all(line["score"] == line["harness_score"] and line["bit_equal"] for line in lines)
    monkeypatch.setattr(compare, "run_harness", played(wrong_by=1e-16))
    assert asked(*given, "--limit", 3).exit_code == 0  # one part in 10^16 more than 1 is 1
    monkeypatch.setattr(compare, "run_harness", played(wrong_by=1e-15))
    outcome = asked(*given, "--limit", 3)
    assert outcome.exit_code == 1
    assert "differ" in outcome.output
    assert json.loads(out.read_text())["tasks"][0]["bit_equal_scores"] == 0


def test_the_run_command_asks_the_harness_too(paths, tmp_path, small_moe, monkeypatch):
    monkeypatch.setattr(compare, "require_harness", lambda: None)
    monkeypatch.setattr(compare, "run_harness", played())
    given = [small_moe, "--out", tmp_path / "out", "--chartqa-path", paths["chartqa"], "--docvqa-path", paths["docvqa"]]
    outcome = asked(*given, "--limit", 3, "--harness", "lmms-eval", command=run)
    assert outcome.exit_code == 0, outcome.output
    assert "lmms-eval played on the same files" in outcome.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())["harness"]
    assert [task["items"] for task in found["tasks"]] == [3, 3]
    assert [task["harness_scores"] for task in found["tasks"]] == [{"relaxed_overall": 1.0}, {"anls": 1.0}]
    ours = found["tasks"][0]["asked_by_us"]
    assert ours["same_predictions"] < 3  # an untrained model does not say what the played one does
    assert "differ: see lmms-eval.jsonl" in outcome.output
    assert len((tmp_path / "out" / "lmms-eval.jsonl").read_text().splitlines()) == 6
    outcome = asked(*given, "--max-pixels", 100, "--harness", "lmms-eval", command=run)
    assert outcome.exit_code == 1
    assert "leave out --max-pixels or --harness" in outcome.output
    table = public.write_tsv(CHARTS, tmp_path / "ChartQA_TEST.tsv")
    given = [small_moe, "--out", tmp_path / "tsv", "--chartqa-path", table]
    outcome = asked(*given, "--harness", "lmms-eval", command=run)
    assert outcome.exit_code == 1
    assert "lmms-eval's task chartqa reads nothing else" in outcome.output.replace("\n", " ")
    assert not (tmp_path / "tsv").exists()  # said before our own evaluator asked anything


def test_wishes_that_cannot_be_met_name_their_remedy(paths, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    outcome = asked(tmp_path, "--out", tmp_path / "out.json", "--generated", 2)
    assert outcome.exit_code == 1
    assert "pip install 'expertflow-quant[lmms]'" in outcome.output
    for wishes in ((), ("--generated", 2, "--chartqa-path", paths["chartqa"])):
        outcome = asked(tmp_path, "--out", tmp_path / "out.json", *wishes)
        assert outcome.exit_code == 1
        assert "--chartqa-path" in outcome.output
    broken = public.lmms_lab_chartqa([replace(CHARTS[0], image=b"no image"), CHARTS[1]])
    broken = public.write_parquet(broken, tmp_path / "broken.parquet")
    monkeypatch.setattr(compare, "require_harness", lambda: None)
    system = System("model", "model", tmp_path)
    with pytest.raises(HarnessError, match=r"1 of 2 rows of ChartQA are damaged \(first chartqa-0"):
        compare.require_comparable(system, [file_task("chartqa", broken)], {"chartqa": broken})
    with pytest.raises(HarnessError, match=r"give files with --chartqa-path or --docvqa-path"):
        compare.require_comparable(system, [generated_task("chart", 2)], {})
    server = System("served", "served", tmp_path, endpoint=Endpoint("http://127.0.0.1:1/v1"))
    with pytest.raises(HarnessError, match="served is a server"):
        compare.require_comparable(server, [file_task("chartqa", paths["chartqa"])], paths)
    with pytest.raises(DataError, match="nothing at"):
        file_task("chartqa", tmp_path / "nowhere")


def test_generated_files_have_the_public_schemas(tmp_path):
    written = write_generated(tmp_path, 4)
    for name, table, features in (
        ("chartqa", public.lmms_lab_chartqa(CHARTS), CHARTQA_FEATURES),
        ("docvqa", public.lmms_lab_docvqa(DOCUMENTS), DOCVQA_FEATURES),
    ):
        (path,) = written[name].rglob("*.parquet")
        found = parquet.read_schema(path)
        assert found.remove_metadata() == table.schema.remove_metadata()
        assert json.loads(found.metadata[b"huggingface"]) == json.loads(table.schema.metadata[b"huggingface"])
        assert json.loads(found.metadata[b"huggingface"])["info"]["features"] == features
        task = file_task(name, written[name])
        assert len(task.items) == 4
        assert len({item.image_key for item in task.items}) == 2


def test_altered_answers_bring_scores_of_every_size(tmp_path):
    asked, answered = write_generated(tmp_path / "altered", 40, altered=True), write_generated(tmp_path / "plain", 40)
    for name in asked:
        task, right = file_task(name, asked[name]), file_task(name, answered[name])
        found = [task.metric.score(r.answers[0], i.answers) for i, r in zip(task.items, right.items, strict=True)]
        assert set(found[::4]) == {1.0}
        assert {0.0, 1.0} <= set(found)
        assert any(0 < score < 1 for score in found) == (name == "docvqa")
