"""Killed at any call that Python makes, and run again, a run ends with the same bytes; so does one whose disk was full
or whose model's files could not be read."""

import errno
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file

from expertflow_quant.checkpoint import CheckpointError, files
from expertflow_quant.checkpoint.files import hash_file
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observe import Observations
from expertflow_quant.pipeline.quantize import QuantizeReport, quantize_model
from expertflow_quant.pipeline.stream import ModelStream

FAMILY, LAYERS, EXPERTS, METHOD = "qwen3_vl_moe", 3, 8, "gptq"
MOMENTS, SEED = 12, 20
NAMED = (  # (function, how manieth call of it): every part of a run is killed at least once
    ("begin", 1),  # the journal
    ("write_backbone", 1),
    ("_bytes_of", 5),  # in the backbone's file
    ("_run_tower", 1),  # observing: the vision tower
    ("_run_block", 4),
    ("commit", 1),  # activations are there, but not yet noted
    ("put", 3),  # a block's weights
    ("record", 1),  # a file is there, but not yet noted
    ("write_layer", 1),
    ("drop", 1),
    ("finish", 1),
    ("rmtree", 1),  # all is written, the journal is removed
)

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked, or each would take seconds"
)


def run(model: Path, out: Path, progress: Callable[..., Any] | None = None) -> QuantizeReport:
    stream = ModelStream(model)
    data = CalibrationData.from_batches([tiny.model_inputs(FAMILY, rows=2, seed=seed) for seed in range(2)])
    observations = Observations(stream, data)
    return quantize_model(stream, out, method=METHOD, plan="int4-g16", observations=observations, progress=progress)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(tiny.TEXT, "num_hidden_layers", LAYERS)
        folder = tmp_path_factory.mktemp("model")
        tiny.tiny_model(FAMILY).save_pretrained(folder)
        yield folder


@pytest.fixture(scope="module")
def wanted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run(model, out := tmp_path_factory.mktemp("whole") / "out")
    return tree(out)


class Counter:
    """Counts the calls of a process's threads, of all functions or of one; kills it at one of them."""

    def __init__(self, kill_at: int | None = None, name: str | None = None) -> None:
        self.count, self._kill_at, self._name = 0, kill_at, name

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call" and (self._name is None or frame.f_code.co_name == self._name):
            self.count += 1
            if self.count == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def run(self, model: Path, out: Path) -> None:
        torch.set_num_threads(2)  # two batches side by side
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            run(model, out)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            torch.set_num_threads(1)


def killed(model: Path, out: Path, counter: Counter) -> bool:
    process = multiprocessing.get_context("fork").Process(target=counter.run, args=(model, out))
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def counted_calls(model: Path, out: Path) -> int:
    """In a process of its own: one with several threads cannot be forked again."""
    said = multiprocessing.get_context("fork").SimpleQueue()

    def count() -> None:
        counter = Counter()
        counter.run(model, out)
        said.put(counter.count)

    process = multiprocessing.get_context("fork").Process(target=count)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return int(said.get())


@needs_fork
def test_killed_at_any_call(model: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    count = counted_calls(model, tmp_path / "counted")
    assert tree(tmp_path / "counted") == wanted
    draw = random.Random(SEED)
    moments = [(int(draw.uniform(n, n + 1) / MOMENTS * count), None) for n in range(MOMENTS)]
    print(f"seed {SEED}: calls {[at for at, _ in moments]} of {count}, and {NAMED}")
    pairs = list(zip(moments, [(at, name) for name, at in NAMED], strict=True))
    ended = 0
    for number, pair in enumerate(pairs):  # killed, gone on with, killed again, gone on with to its end
        out = tmp_path / f"killed-{number}"
        ended += sum([killed(model, out, Counter(max(1, at), name)) for at, name in pair])
        if tree(out) != wanted:
            run(model, out)
        assert tree(out) == wanted, pair
    assert ended >= 20


class Disk:
    """Files that take so many more bytes in all, then the disk is full."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path: Any, mode: str = "r", **kwargs: Any) -> Any:
        return _File(open(path, mode, **kwargs), self)

    def temporary(self, **kwargs: Any) -> Any:
        return _File(tempfile.TemporaryFile(**kwargs), self)


class _File:
    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        nbytes = len(data)
        if nbytes > self._disk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._disk.room -= nbytes
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.close()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.75, 0.9, 0.995])
def test_a_full_disk(
    share: float, model: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_with(room: int, out: Path) -> int:
        disk, temporary = Disk(room), tempfile.TemporaryFile
        with monkeypatch.context() as patched:
            patched.setattr(files, "open", disk.open, raising=False)
            patched.setattr(tempfile, "TemporaryFile", lambda **kwargs: _File(temporary(**kwargs), disk))
            run(model, out)
        return room - disk.room

    total = run_with(1 << 40, tmp_path / "counted")
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="No space left on device: make room") as caught:
        run_with(int(share * total), out)
    assert str(out) in str(caught.value)
    assert not list(out.rglob("*.partial"))
    finished = len(list((out / ".journal").glob("layer-*.json")))
    assert run(model, out).layers_resumed == finished
    assert tree(out) == wanted


def test_a_shard_that_ends_early_while_it_is_read(model: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    path = model / "model.safetensors"
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)

    def cut(done: int, total: int, what: str) -> None:
        if done == EXPERTS:
            os.truncate(path, len(content) // 3)

    try:
        with pytest.raises(CheckpointError, match=r"cannot read model\.\S+ from .*model\.safetensors: the file ends"):
            run(model, tmp_path / "out", cut)
    finally:
        path.write_bytes(content)
        os.utime(path, ns=times)
    assert run(model, tmp_path / "out").layers_resumed == 1
    assert tree(tmp_path / "out") == wanted


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("victim", "named"),
    [
        ("model.language_model.layers.1.mlp.experts.down_proj", r"down_proj \(layer 1, expert 5\) in"),
        ("model.language_model.layers.1.self_attn.q_proj.weight", r"layers\.1\.self_attn\.q_proj\.weight"),
        ("model.visual.patch_embed.proj.weight", r"visual\.patch_embed\.proj\.weight"),
    ],
)
def test_weights_that_are_no_numbers_are_named(
    victim: str, named: str, value: float, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors[victim] = tensors[victim].clone()
    tensors[victim][5 if "experts" in victim else 0].reshape(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=named) as caught:
        run(folder, tmp_path / "out")
    assert "holds NaN or infinity" in str(caught.value)
    assert "download" in str(caught.value)
