"""lmms-eval itself on files in the public schemas: its scores are ours bit for bit. Needs the extra ``lmms``."""

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import lmms
from helpers import public_files as public
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.data.load import make_tasks
from eval.harness.compare import compare_with_harness
from eval.judge import System, judge
from eval.metrics import ANLS, RELAXED_ACCURACY
from expertflow_quant.pipeline.quantize import quantize_model

pytestmark = pytest.mark.skipif(
    not lmms.INSTALLED, reason="lmms-eval is not installed in this environment: pip install 'expertflow-quant[lmms]'"
)
NUMBERS = st.floats(allow_nan=True).map(repr) | st.integers(-100, 10_000).map(str)
TEXTS = (
    st.text()
    | st.text("abß %1.,e-\u0130\ufb03\n\t", max_size=12)
    | st.builds("{}{}{}".format, st.sampled_from(("", " ", "$")), NUMBERS, st.sampled_from(("", "%", "%%", " ")))
)
SHIPPED = Path(__file__).resolve().parents[2] / "calibration" / "shipped" / "moe"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The shipped model in 2 bits by rounding: it is wrong often enough to tell scores apart."""
    folder = tmp_path_factory.mktemp("checkpoints") / "int2"
    quantize_model(SHIPPED, folder, method="rtn", plan="int2-channel")
    return folder


def charts(count=24):
    return public.chart_questions(count)


def documents(count=24):
    """Golds close to the answers make similarities of every size."""
    made = public.document_questions(count)
    return [replace(q, answers=[(q.answers or [""])[0] + "ßx y" * (i % 3)]) if i % 2 else q for i, q in enumerate(made)]


def hub(folder):
    public.write_parquet(public.lmms_lab_chartqa(charts()[:10]), folder / "ChartQA" / "data" / "test-00000.parquet")
    public.write_parquet(public.lmms_lab_chartqa(charts()[10:]), folder / "ChartQA" / "data" / "test-00001.parquet")
    public.write_parquet(public.lmms_lab_docvqa(documents()), folder / "DocVQA" / "DocVQA" / "validation-0.parquet")
    return {"chartqa": folder / "ChartQA", "docvqa": folder / "DocVQA"}


def saved(folder):
    return {
        "chartqa": public.write_saved_splits({"test": public.lmms_lab_chartqa(charts())}, folder / "charts"),
        "docvqa": public.write_saved(public.lmms_lab_docvqa(documents()), folder / "documents", "validation"),
    }


@pytest.mark.parametrize(("layout", "model"), [(hub, "quantized"), (saved, "plain")])
def test_scores_are_ours_bit_for_bit(layout, model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    system = System("model", "model", checkpoint if model == "quantized" else SHIPPED, "50%")
    paths = layout(tmp_path)
    tasks = make_tasks(list(paths), paths)
    asked = judge(system, tasks, tmp_path / "asked", batch_size=8)
    version, tasks = compare_with_harness(system, paths, tasks, batch_size=8, device="cpu", asked=asked)
    assert version == importlib.metadata.version("lmms-eval")
    assert [len(task.items) for task in tasks] == [24, 24]
    for task in tasks:
        assert task.agrees
        for item, ours in zip(task.items, task.asked, strict=True):
            assert item.harness_score.hex() == item.score.hex() == float(ours.score).hex()
            assert item.prediction.strip() == ours.prediction.strip()
        assert task.scores[task.stock.score] == pytest.approx(task.mean, abs=1e-12)
    of_charts, of_documents = ({item.score for item in task.items} for task in tasks)
    assert of_charts == {0.0, 1.0}
    assert any(0 < score < 1 for score in of_documents)
    human = [item.score for item in tasks[0].items if item.family == "human"]
    assert tasks[0].scores["relaxed_human_split"] == pytest.approx(sum(human) / len(human), abs=1e-12)


@settings(max_examples=2000, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), st.booleans())
def test_metrics_are_those_of_the_installed_harness(prediction, answers, near):
    from lmms_eval.api.metrics import anls
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    if near:  # most random texts are too far apart to tell
        prediction = f"{prediction[:1]}{answers[0][1:]}"
    said = prediction.strip()  # by the task, before its metric sees it
    theirs = float(relaxed_correctness(said, answers[0]))
    assert float(RELAXED_ACCURACY.score(prediction, answers[:1])).hex() == theirs.hex()
    theirs = float(anls(answers, [said])["anls"])
    assert float(ANLS.score(prediction, answers)).hex() == theirs.hex()


def test_the_installed_package_registers_the_model(tmp_path):
    code = (
        "import importlib.metadata, sys\n"
        "if 'expertflow' not in importlib.metadata.entry_points(group='lmms_eval.models').names: sys.exit(77)\n"
        "from lmms_eval.models import get_model\n"
        "print(get_model('expertflow').__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("expertflow-quant is not installed here with its entry points")
    assert done.stdout.split()[-1] == "ExpertFlow", done.stderr


def test_nothing_is_asked_of_a_network(tmp_path, monkeypatch):
    """The worker ends without a result if anything opens a connection."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import os, socket\n"
        "def refuse(self, address):\n"
        "    if self.family != socket.AF_UNIX: print('connected to', address, flush=True); os._exit(3)\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(guard), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    system = System("model", "model", SHIPPED)
    paths = hub(tmp_path)
    read = make_tasks(list(paths), paths, limit=4)
    _, tasks = compare_with_harness(system, paths, read, batch_size=4, device="cpu", limit=4)
    assert [len(task.items) for task in tasks] == [4, 4]
