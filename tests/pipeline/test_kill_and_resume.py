"""Killed at random moments and run again, a run ends with the bytes of one that nobody disturbed."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny

from expertflow_quant.checkpoint import CheckpointReader, CheckpointWriter, ResumeError
from expertflow_quant.checkpoint.files import hash_file
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observe import Observations
from expertflow_quant.pipeline.quantize import QuantizeReport, quantize_model
from expertflow_quant.pipeline.stream import ModelStream

FAMILY = "qwen3_vl_moe"
HELD_UP = 0.01  # seconds an expert takes longer in a process that will be killed

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(),
    reason="processes are forked, or each would take seconds",
)


def run(
    model: Path,
    out: Path,
    method: str,
    overwrite: bool = False,
    progress: Callable[..., Any] = lambda *told: None,
) -> QuantizeReport:
    stream = ModelStream(model)
    batches = [tiny.model_inputs(FAMILY, rows=4, seed=seed) for seed in range(2)]
    observations = None if method == "rtn" else Observations(stream, CalibrationData.from_batches(batches))
    return quantize_model(
        stream,
        out,
        method=method,
        plan="int4-g16",
        observations=observations,
        overwrite=overwrite,
        progress=progress,
    )


def run_and_kill(model: Path, out: Path, method: str, seconds: float) -> bool:
    """A run in a process of its own, its experts held up a little, ended by SIGKILL after so many seconds.

    False when it came to its own end before that.
    """
    delayed = {"progress": lambda *told: time.sleep(HELD_UP)}
    process = multiprocessing.get_context("fork").Process(target=run, args=(model, out, method), kwargs=delayed)
    process.start()
    process.join(seconds)
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    built = tiny.tiny_model(FAMILY)
    built.save_pretrained(folder)
    tiny.save_processor(FAMILY, folder)
    return folder


@needs_fork
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_killed_and_run_again(method: str, model: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    run(model, tmp_path / "whole", method)
    usual = time.monotonic() - started + 16 * HELD_UP
    wanted, out = tree(tmp_path / "whole"), tmp_path / "killed"
    moments = random.Random(method)
    killed = [run_and_kill(model, out, method, moments.uniform(0.05, 1.1) * usual) for _ in range(8)]
    assert any(killed)
    if tree(out) != wanted:
        run(model, out, method)
    assert tree(out) == wanted
    CheckpointReader(out).verify(full=True)


def test_killed_after_every_single_write(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, without chance: stop at the n-th rename, for every n, each time going on from where it
    was."""
    run(model, tmp_path / "whole", "rtn")
    wanted = tree(tmp_path / "whole")
    rename = os.replace

    class Killed(BaseException):
        pass

    for before in (True, False):
        out, renames = tmp_path / f"stopped-{before}", 0

        def stop_here(source: str, target: str, before: bool = before) -> None:
            nonlocal renames
            renames += 1
            if not before:
                rename(source, target)
            if renames >= 2 or not before:
                raise Killed
            rename(source, target)

        for _ in range(40):
            renames = 0
            with monkeypatch.context() as patched:
                patched.setattr(os, "replace", stop_here)
                try:
                    run(model, out, "rtn")
                except Killed:
                    continue
                except ResumeError:
                    break
            break
        if tree(out) != wanted:
            run(model, out, "rtn")
        assert tree(out) == wanted


def test_finished_layers_are_not_done_again(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    write_layer = CheckpointWriter.write_layer

    def fail_at_the_second(self: CheckpointWriter, layer: int, *args: Any) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return write_layer(self, layer, *args)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "write_layer", fail_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", "gptq")
    told: list[tuple[int, int, str]] = []
    report = run(model, tmp_path / "out", "gptq", progress=lambda *what: told.append(what))
    assert report.layers_resumed == 1
    assert told[0] == (8, 16, "observing")
    assert [done for done, *_ in told[1:]] == list(range(9, 17))
    assert report.manifest == run(model, tmp_path / "whole", "gptq").manifest


def test_other_arguments_are_refused_and_named(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, out, "gptq")
    with pytest.raises(ResumeError, match="method was gptq, now rtn") as caught:
        run(model, out, "rtn")
    assert "--overwrite" in str(caught.value)
    run(model, out, "rtn", overwrite=True)
    run(model, tmp_path / "fresh", "rtn")
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_changed_model_is_refused(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, folder)
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out, "rtn")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(ResumeError, match=r"file model\.safetensors was \[\d+, \d+\], now"):
        run(folder, out, "rtn")


def interrupted(*args: Any) -> Any:
    raise KeyboardInterrupt
