"""A model larger than the memory it is allowed is quantized within it; what is watched is what the process holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval.__main__ import app
from eval.streaming import command
from eval.streaming.model import Sizes, write_model
from eval.streaming.watch import job_command, resident, watch
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.pipeline.stream import ModelStream

MIB = 1 << 20
SMALL = Sizes(layers=30, experts=8, hidden=512, intermediate=384, vocabulary=4096, heads=8, top_k=2)
ROOM = 144 * MIB  # beside two layers: what is imported on the way, work of the methods, heap that the C library keeps

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")


@needs_proc
def test_memory_holds_two_layers_and_not_the_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL, 0, lambda done, total: None)
    whole = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    allowed = 2 * SMALL.layer_bytes + ROOM
    assert whole > 1.5 * allowed
    job = job_command(tmp_path / "model", tmp_path / "out", "rtn", "int4-g32", 2, 2, 32, "cpu")
    watched = watch(job, threads=1, interval=0.01)
    summary = command.summary("rtn", watched, 0)
    begins = summary["layers_begin"]
    assert len(begins) == SMALL.layers
    # as it ends, torch for CUDA reads 130 MB of its libraries once more
    held = [(s["time"], s["rss"]) for s in watched.samples if s["time"] <= begins[-1]]
    peak = max(rss for _, rss in held)
    assert peak - summary["start_bytes"] < allowed
    assert peak < max(rss for time, rss in held if time < begins[5]) + SMALL.layer_bytes


def test_the_model_is_what_it_says(tmp_path: Path) -> None:
    sizes = Sizes(layers=2, experts=4, hidden=64, intermediate=32, vocabulary=96, heads=2, top_k=2)
    nbytes = write_model(tmp_path / "model", sizes, 3, lambda done, total: None)
    stream = ModelStream(tmp_path / "model")
    assert [(of.experts, of.top_k) for of in stream.layers] == [(4, 2)] * 2
    assert nbytes == sum(2 * parameter.numel() for parameter in stream.model.parameters())
    assert sizes.layer_bytes == sum(2 * p.numel() for p in stream.model.model.layers[0].parameters())
    assert stream.expert(1, 3).gate_up.float().std().item() == pytest.approx(0.02, rel=0.1)
    write_model(tmp_path / "again", sizes, 3, lambda done, total: None)
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@needs_proc
def test_the_command_writes_results_and_plot(tmp_path: Path) -> None:
    out = tmp_path / "streaming.json"
    arguments = ["streaming", "--out", str(out), "--tiny", "--layers", "2", "--batches", "1", "--rows", "1"]
    done = CliRunner().invoke(app, [*arguments, "--tokens", "8", "--method", "rtn", "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert results["runs"][0]["peak_bytes"] < results["limit_bytes"]
    assert out.with_suffix(".png").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streaming.json", "streaming.png"]


def test_the_folder_for_temporary_files_is_not_published() -> None:
    told = ["streaming", "--out", "x.json", "--folder", "/somewhere", "--threads", "2"]
    assert command._told(told) == ["streaming", "--out", "x.json", "--threads", "2"]
    assert command._told([]) == []


@needs_proc
def test_a_process_that_takes_memory_is_seen_to_take_it() -> None:
    lines = 'import json, time; x = bytearray(64 << 20); print(json.dumps({"what": "x"})); time.sleep(0.2)'
    watched = watch([sys.executable, "-c", lines], 1, interval=0.01)
    assert 64 * MIB < watched.peak < 128 * MIB
    assert watched.events == [{"what": "x"}]
    with pytest.raises(ExpertFlowError, match=r"failed \(3\)"):
        watch([sys.executable, "-c", "raise SystemExit(3)"], 1)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert resident(gone.pid) is None
