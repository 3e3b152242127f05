"""The command that records routes, on a tiny model, and the committed traces against the shipped model."""

from pathlib import Path

import pytest
import torch
from helpers import tiny
from typer.testing import CliRunner

import expertflow_quant
from calibration.__main__ import app
from calibration.trace_command import record
from expertflow_quant import ExpertFlowError
from expertflow_quant.offload.trace import GENERATED, PROMPT_IMAGE, PROMPT_TEXT, RoutingTrace
from expertflow_quant.samples import make_items

ROOT = Path(__file__).resolve().parents[2]
TRACES = ROOT / "calibration" / "traces"
MODEL = ROOT / "calibration" / "shipped" / "moe"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped") / "int4"
    expertflow_quant.quantize_model(MODEL, folder, method="rtn", plan="int4-g32")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny model with room for the generated questions."""
    folder = tmp_path_factory.mktemp("plain")
    model = tiny.tiny_model("qwen3_vl_moe")
    model.config.text_config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    tiny.save_processor("qwen3_vl_moe", folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


def test_the_command_records_both_tasks(plain, tmp_path):
    out = tmp_path / "new" / "routes.safetensors"
    result = run(plain, "--items", 2, "--seed", 3, "--out", out)
    assert result.exit_code == 0, result.output
    trace = RoutingTrace.load(out)
    assert trace.tasks == ("charts", "charts", "documents", "documents")
    assert trace.meta["model"] == plain.name
    assert trace.meta["formats"] == "full precision"
    assert trace.meta["items"] == "generated, test split, seed 3, 2 of each task"
    assert trace.weights.shape == trace.experts.shape
    for task in ("charts", "documents"):
        kinds = trace.of_task(task).kind
        counts = [int((kinds == kind).sum()) for kind in (PROMPT_TEXT, PROMPT_IMAGE, GENERATED)]
        assert min(counts) > 0
        shown = next(line for line in result.output.splitlines() if task in line)
        assert [cell.strip() for cell in shown.strip("│| ").split("│")] == [task, "2", *map(str, counts)]
    assert str(out) in result.output


def test_split_seed_and_weights_are_as_asked(plain, tmp_path):
    out = tmp_path / "routes.safetensors"
    result = run(plain, "--task", "charts", "--items", 1, "--split", "train", "--no-weights", "--out", out)
    assert result.exit_code == 0, result.output
    trace = RoutingTrace.load(out)
    assert trace.tasks == ("charts",)
    assert trace.weights.shape == (*trace.experts.shape[:2], 0)
    engine = expertflow_quant.Engine.from_plain(plain)
    item = make_items("chart", "train", 1)[0]
    answer = engine.generate([item.messages], item.max_new_tokens)[0]
    assert trace.token_ids[trace.kind == GENERATED].tolist() == list(answer.token_ids[:-1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "maps"], "task 'maps' is not known: use charts, documents, both"),
        (["--split", "dev"], "split 'dev' is not known: use train, calibration, test"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_what_is_not_known_is_refused_and_nothing_is_written(plain, tmp_path, options, said):
    result = run(plain, "--items", 1, "--out", tmp_path / "routes.safetensors", *options)
    assert result.exit_code == 1
    assert said in result.output
    assert not list(tmp_path.iterdir())


def test_folders_without_a_model_or_without_experts_are_refused(tmp_path):
    assert "holds no config.json" in run(tmp_path, "--items", 1, "--out", tmp_path / "routes").output
    with pytest.raises(ExpertFlowError, match="no experts module"):
        record(MODEL.with_name("dense"), "charts", 1)


@pytest.mark.parametrize("task", ["charts", "documents"])
def test_committed_traces_are_whole(task):
    held, train = (RoutingTrace.load(TRACES / f"{task}{end}.safetensors") for end in ("", "-train"))
    assert (held.items, train.items) == (128, 256)
    assert (held.weights.shape[-1], train.weights.shape[-1]) == (2, 0)
    for trace, split in ((held, "test"), (train, "train")):
        assert (trace.layers, trace.top_k, trace.num_experts) == (6, 2, 16)
        assert set(trace.tasks) == {task}
        assert (trace.meta["model"], trace.meta["formats"], trace.meta["method"]) == ("moe", "int4-g32", "rtn")
        assert split in trace.meta["items"]
        assert all((trace.kind[trace.rows(item)] == PROMPT_IMAGE).sum() == 144 for item in range(trace.items))
    sums = held.weights.float().sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=2e-3)
    assert (held.weights.diff(dim=-1) <= 0).all()


def test_committed_traces_are_small():
    committed = [file for file in TRACES.iterdir() if ".sight." not in file.name]  # those are made anew
    assert sum(file.stat().st_size for file in committed) < 4 << 20


@pytest.mark.parametrize("task", ["charts", "documents"])
def test_committed_traces_are_what_the_shipped_model_does(checkpoint, task):
    """Pictures differ in their letters' edges between versions of FreeType, so few routes may."""
    found = record(checkpoint, task, 3)
    committed = RoutingTrace.load(TRACES / f"{task}.safetensors").of_items([0, 1, 2])
    assert found.meta["formats"] == committed.meta["formats"]
    prompts = found.kind != GENERATED
    wanted = committed.kind != GENERATED
    assert torch.equal(found.token_ids[prompts], committed.token_ids[wanted])
    assert torch.equal(found.kind[prompts], committed.kind[wanted])
    same = (found.experts[prompts].sort(-1).values == committed.experts[wanted].sort(-1).values).float().mean()
    assert float(same) > 0.95
