"""``python -m eval run``: files in, scores, damaged rows, failures and the noise floor out."""

import dataclasses
import io
import json
from types import SimpleNamespace

import pytest
from helpers import public_files as public
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("pyarrow")

import eval.judge
from eval.__main__ import app
from eval.data.load import file_task
from eval.endpoint import Endpoint
from eval.judge import System, judge
from eval.noise import noise_floor
from eval.systems import system_named
from eval.tasks import generated_tasks
from expertflow_quant.formats import ExpertFlowError

CHARTS, DOCUMENTS = public.chart_questions(), public.document_questions()
GOLD = {(q.text, Image.open(io.BytesIO(q.image)).tobytes()): q.answers[0] for q in (*CHARTS, *DOCUMENTS)}


class FakeEngine:
    """Knows every gold; in a batch of one it misspells numbers, and "break" in a question breaks it."""

    expert_bytes = device_expert_bytes = 0

    def generate(self, conversations, max_new_tokens=32):
        answers = []
        for messages in conversations:
            image, text = messages[0]["content"]
            question = text["text"].split("\nAnswer the question")[0]
            if "break" in question:
                raise RuntimeError("broken")
            gold = GOLD[question, image["image"].tobytes()]
            text = gold.replace("0.57", "57") + " " if len(conversations) == 1 else gold
            answers.append(SimpleNamespace(text=text, prompt_tokens=9, image_tokens=4, completion_tokens=2))
        return answers


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(eval.judge, "open_engine", lambda system, device: FakeEngine())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    broken = [
        dataclasses.replace(CHARTS[6], text="break it?"),
        dataclasses.replace(CHARTS[7], image=b"no image", image_name="x.png"),
    ]
    public.write_parquet(public.lmms_lab_chartqa([*CHARTS[:6], *broken]), tmp_path / "c" / "data" / "test-0.parquet")
    public.write_parquet(public.lmms_lab_docvqa(DOCUMENTS), tmp_path / "d" / "DocVQA" / "validation-0.parquet")
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)], env={"COLUMNS": "200"})


def test_files_are_asked_and_scored_and_what_is_wrong_is_named(files):
    arguments = [f"tiny={files / 'model'}", "--task", "chartqa", "--chartqa-path", files / "c", "--task", "docvqa"]
    arguments += ["--docvqa-path", files / "d", "--out", files / "out", "--batch-size", 4, "--noise-batch-size", 1]
    outcome = invoke(*arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "1 damaged rows of 8 score 0" in outcome.output
    assert "chartqa-7: its image of 8 bytes cannot be decoded" in outcome.output
    assert "chartqa-6: RuntimeError: broken" in outcome.output
    written = json.loads((files / "out" / "results.json").read_text())
    assert [s["name"] for s in written["systems"]] == ["tiny", "tiny-batch1"]
    assert written["systems"][0]["scores"] == {"chartqa": 0.75, "docvqa": 1.0}
    assert written["systems"][0]["scores_by_kind"]["chartqa"]["human"] == {"mean": 1.0, "items": 4}
    assert list(written["tasks"][0]["damaged"]) == ["chartqa-7"]
    chart, document = written["noise_floor"]
    assert (chart["items"], chart["predictions_changed"], chart["scores_changed"]) == (8, 4, 1)
    assert (document["predictions_changed"], document["scores_changed"]) == (6, 0)
    assert chart["difference"] == pytest.approx(-1 / 8)
    lines = (files / "out" / "tiny.jsonl").read_text().splitlines()
    item = json.loads(lines[1])
    assert {"prediction", "score", "image_key", "prompt_tokens", "completion_tokens", "seconds"} <= item.keys()
    assert invoke(*arguments).exit_code == 0  # everything is there already
    assert (files / "out" / "tiny.jsonl").read_text().splitlines() == lines


def test_tasks_default_to_the_files_given(files):
    outcome = invoke(files / "model", "--docvqa-path", files / "d", "--out", files / "out", "--limit", 2)
    assert outcome.exit_code == 0, outcome.output
    assert json.loads((files / "out" / "results.json").read_text())["systems"][0]["items"] == {"docvqa": 2}


def test_errors_are_said_without_a_traceback(files):
    for arguments, message in [
        (["--task", "chartqa"], "chartqa needs its files"),
        (["--chartqa-path", files / "nowhere"], "lmms-lab/ChartQA"),
        ([], "no task is named"),
        (["--docvqa-path", files / "d"], "batch_size = 2, this run has 32"),
    ]:
        invoke(files / "model", "--docvqa-path", files / "d", "--batch-size", 2, "--out", files / "out")
        outcome = invoke(files / "model", *arguments, "--out", files / "out")
        assert outcome.exit_code == 1
        assert message in outcome.output
        assert "Traceback" not in outcome.output
    outcome = invoke(files / "no model", "--task", "chart", "--out", files / "other")
    assert "give the folder of a model" in outcome.output


def test_a_noise_floor_wants_the_same_items(files):
    system, tasks = System("a", "a", files / "model"), [file_task("docvqa", files / "d")]
    whole = judge(system, tasks, files / "one", batch_size=4)
    (floor,) = noise_floor(whole, whole, tasks, (4, 4))
    assert (floor.predictions_changed, floor.scores_changed, floor.largest) == (0, 0, 0)
    with pytest.raises(ExpertFlowError, match="ask both the same tasks"):
        noise_floor(whole, dataclasses.replace(whole, results=whole.results[1:]), tasks, (4, 1))


def test_a_real_model_answers_files_as_it_answers_what_they_were_made_of(small_int4, tmp_path):
    """Parquet and back changes no pixel and no prompt, so every prediction is the same."""
    (chart, _), count = generated_tasks(4), 4
    questions = [
        dataclasses.replace(q, text=item.question, answers=list(item.answers), image=public.png(item.image))
        for q, item in zip(public.chart_questions(count), chart.items, strict=True)
    ]
    path = public.write_parquet(public.lmms_lab_chartqa(questions), tmp_path / "test-0.parquet")
    system = System("int4", "int4", small_int4, "25%")
    made = judge(system, [chart], tmp_path / "made", batch_size=2)
    read = judge(system, [file_task("chartqa", path)], tmp_path / "read", batch_size=2)
    assert made.failures == read.failures == 0
    assert [r.prediction for r in made.results] == [r.prediction for r in read.results]
    assert [r.prompt_tokens for r in made.results] == [r.prompt_tokens for r in read.results]


def test_systems_are_named_as_paths_or_addresses(tmp_path):
    folder = system_named(str(tmp_path / "m o"), "25%")
    assert (folder.name, folder.label, folder.expert_memory, folder.endpoint) == ("m-o", "m o", "25%", None)
    assert system_named(f"int4={tmp_path}", "1MiB").label == "int4"
    served = system_named("base=http://host:8000/v1#org/model", "25%")
    assert (served.label, served.endpoint) == ("base", Endpoint("http://host:8000/v1", "org/model"))
    assert served.fingerprint == "org/model at http://host:8000/v1"
    assert system_named("http://host:8000/v1", "25%").name == "host-8000-v1"
    with pytest.raises(ExpertFlowError, match="makes no file name"):
        system_named(f"??={tmp_path}", "25%")
