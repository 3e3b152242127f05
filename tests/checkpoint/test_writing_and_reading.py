"""What is written is read back, byte for byte; whatever is damaged is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertflow_quant.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    ExpertEntry,
    Manifest,
    ResumeError,
)
from expertflow_quant.checkpoint import files as checkpoint_files
from expertflow_quant.checkpoint.tensors import PendingTensor, read_header, write_tensors
from expertflow_quant.formats import BF16, ExpertFlowError, ExpertShape, Format, RecordLayout

SHAPE = ExpertShape(64, 32)
FORMATS = (Format.parse("int4-g32"), BF16, Format.parse("int3-g32-asym"))
JOB = {"method": "rtn", "plan": "mixed"}


def random_bytes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def make_experts(seed: int, experts: int = 12) -> list[tuple[ExpertEntry, Tensor]]:
    made = []
    for expert in range(experts):
        layout = RecordLayout(SHAPE, form := FORMATS[expert % 3], input_scale=expert % 3 == 0)
        entry = ExpertEntry(form, layout.input_scale, layout.nbytes, expert, "routed", 0.25)
        made.append((entry, random_bytes(layout.nbytes, 100 * seed + expert)))
    return made


BACKBONE = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4).bfloat16(),
    "b": torch.tensor(3.5),
    "c.empty": torch.zeros(0, 4),
    "d.ids": torch.arange(5),
}


def write(folder: Path, layers: int = 2, **kwargs: Any) -> Manifest:
    writer = CheckpointWriter(folder, JOB)
    for layer in range(layers):
        writer.write_layer(layer, f"layers.{layer}.experts", SHAPE, 2, make_experts(layer))
    writer.write_backbone([PendingTensor.ready(name, value) for name, value in BACKBONE.items()], **kwargs)
    writer.write_json("config.json", {"model_type": "tiny"})
    return writer.finish("tiny", "tiny_moe", {"method": "rtn"})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_records_come_back_aligned_and_typed(tmp_path: Path) -> None:
    written = write(tmp_path)
    reader = CheckpointReader(tmp_path)
    reader.verify(full=True)
    assert reader.manifest == written
    assert [entry.module for entry in reader.layers] == ["layers.0.experts", "layers.1.experts"]
    for layer, entry in enumerate(reader.layers):
        for expert, (made, record) in enumerate(make_experts(layer)):
            read = reader.record(layer, expert)
            assert torch.equal(read, record)
            assert read.data_ptr() % 256 == 0
            layout = entry.layouts[expert]
            assert (layout.format, layout.input_scale) == (made.format, made.input_scale)
            assert set(layout.views(read)) == set(layout.fields)


def test_the_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    write(tmp_path)
    for name, value in load_file(tmp_path / "backbone.safetensors").items():
        assert torch.equal(value, BACKBONE[name])
        assert value.dtype == BACKBONE[name].dtype
    records = load_file(tmp_path / "experts/layer-00001.safetensors")
    assert list(read_header(tmp_path / "experts/layer-00001.safetensors")) == [f"expert.{e}" for e in range(12)]
    assert torch.equal(records["expert.11"], make_experts(1)[11][1])
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_large_backbone_lies_in_shards(tmp_path: Path) -> None:
    manifest = write(tmp_path, shard_bytes=30)
    names = [entry.file for entry in manifest.backbone]
    assert names == ["backbone-00001-of-00002.safetensors", "backbone-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "backbone.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(BACKBONE)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], BACKBONE[name])


def test_writing_into_a_mapped_record_never_reaches_the_file(tmp_path: Path) -> None:
    write(tmp_path)
    CheckpointReader(tmp_path).record(0, 0).zero_()
    CheckpointReader(tmp_path).verify(full=True)


def damage(path: Path, value: bytes | None, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    if value is None:
        path.write_bytes(content[:-1])
    else:
        content[at] ^= 0x55
        path.write_bytes(content)


def test_a_missing_or_short_file_is_named_on_opening(tmp_path: Path) -> None:
    write(tmp_path)
    victim = tmp_path / "experts" / "layer-00001.safetensors"
    damage(victim, None)
    with pytest.raises(CheckpointError, match=r"layer-00001\.safetensors has \d+ bytes, the manifest says \d+"):
        CheckpointReader(tmp_path)
    victim.unlink()
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing; .*layer-00001\.safetensors is missing"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["experts/layer-00000.safetensors", "backbone.safetensors", "config.json"])
def test_a_flipped_bit_is_found_by_full_verification(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    damage(tmp_path / name, b"", at=-2)
    reader = CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match=f"{Path(name).name} has sha256"):
        reader.verify(full=True)


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(format="other"), "'other'"),
        (lambda m: m.pop("layers"), "'layers' is missing"),
        (lambda m: m["layers"][1].pop("sha256"), r"layers\[1\]: 'sha256' is missing"),
        (lambda m: m["layers"][0].update(top_k=13), "top_k 13"),
        (lambda m: m["layers"][0].update(nbytes="many"), "nbytes is str"),
        (lambda m: m["layers"][0].update(sha256="z" * 64), "hex"),
        (lambda m: m["layers"][0]["experts"][3].update(format="int6-g32"), "int6-g32"),
        (lambda m: m["layers"][0]["experts"][3].update(nbytes=512), "expert 3: a record of int4-g32"),
        (lambda m: m["layers"][0]["experts"][3].update(coverage="guessed"), "guessed"),
        (lambda m: m["layers"][0].update(file="../outside.safetensors"), "refused"),
        (lambda m: m["layers"][0].update(file="/etc/passwd"), "refused"),
        (lambda m: m["layers"].reverse(), "layer 0 names the file experts/layer-0000"),
        (lambda m: m["backbone"][0].update(file="a/../../b"), "refused"),
        (lambda m: m["files"][0].update(file="..\\config.json"), "refused"),
        (lambda m: m["files"][0].update(file=""), "refused"),
    ],
)
def test_an_unsound_manifest_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ExpertFlowError, match=message) as caught:
        CheckpointReader(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_manifest_means_not_finished(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no finished expertflow checkpoint"):
        CheckpointReader(tmp_path)
    (tmp_path / "manifest.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match="not JSON"):
        CheckpointReader(tmp_path)


def test_records_where_the_manifest_does_not_expect_them(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    path = tmp_path / "experts/layer-00000.safetensors"
    experts = make_experts(0)
    experts[0], experts[1] = experts[1], experts[0]
    nbytes, sha256 = write_tensors(
        path, [PendingTensor.ready(f"expert.{e}", record) for e, (_, record) in enumerate(experts)]
    )
    assert nbytes == manifest.layers[0].file.nbytes
    edit(tmp_path, lambda m: m["layers"][0].update(sha256=sha256))
    reader = CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="expert 0 is"):
        reader.record(0, 0)
    with pytest.raises(CheckpointError, match="expert 0 is"):
        reader.verify(full=True)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0notjson!", b"\xff" * 64, b"\2\0\0\0\0\0\0\0{}extra"])
def test_a_file_that_is_no_safetensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        read_header(path)


def test_a_full_disk_names_the_file_and_leaves_no_half_file(tmp_path: Path, monkeypatch: Any) -> None:
    writer = CheckpointWriter(tmp_path / "out", JOB)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"layer-00000\.safetensors.*No space left on device"):
        writer.write_layer(0, "experts", SHAPE, 2, make_experts(0))
    assert not (tmp_path / "out/experts/layer-00000.safetensors").exists()
    monkeypatch.undo()
    again = CheckpointWriter(tmp_path / "out", JOB)
    assert again.finished_layer(0) is None


def test_resuming_takes_only_what_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    writer = CheckpointWriter(tmp_path / "out", JOB)
    for layer in range(2):
        writer.write_layer(layer, f"layers.{layer}.experts", SHAPE, 2, make_experts(layer))
    damage(tmp_path / "out/experts/layer-00001.safetensors", b"")
    again = CheckpointWriter(tmp_path / "out", JOB)
    assert again.finished_layer(0) is not None
    assert again.finished_layer(1) is None
    again.write_layer(1, "layers.1.experts", SHAPE, 2, make_experts(1))
    again.write_backbone([PendingTensor.ready(name, value) for name, value in BACKBONE.items()])
    again.write_json("config.json", {"model_type": "tiny"})
    again.finish("tiny", "tiny_moe", {"method": "rtn"})
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_another_job_is_told_what_differs(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path, JOB)
    with pytest.raises(ResumeError, match="plan was mixed, now int4") as caught:
        CheckpointWriter(tmp_path, {**JOB, "plan": "int4", "extra": 1})
    assert "extra was not set, now 1" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert "method" not in str(caught.value)
    CheckpointWriter(tmp_path, {**JOB, "plan": "int4"}, overwrite=True)
    with pytest.raises(ResumeError, match="plan was int4, now mixed"):
        CheckpointWriter(tmp_path, JOB)


def test_a_finished_checkpoint_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ResumeError, match="--overwrite"):
        CheckpointWriter(tmp_path, JOB)
    assert tree(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    CheckpointWriter(tmp_path, JOB, overwrite=True)
    assert set(tree(tmp_path)) == {".journal/job.json", "notes.txt"}


def test_overwriting_an_unfinished_run_of_the_same_job_goes_on(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, JOB)
    writer.write_layer(0, "experts", SHAPE, 2, make_experts(0))
    assert CheckpointWriter(tmp_path, JOB, overwrite=True).finished_layer(0) is not None
    assert CheckpointWriter(tmp_path, {"other": 1}, overwrite=True).finished_layer(0) is None


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ResumeError, match=r"thesis\.tex"):
            CheckpointWriter(tmp_path, JOB, overwrite)
    with pytest.raises(ResumeError, match="is a file"):
        CheckpointWriter(tmp_path / "thesis.tex", JOB)
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_run_stopped_after_its_manifest_is_finished(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, JOB)
    manifest = write(tmp_path.with_name("other"))
    assert writer.finished() is None
    manifest.save(tmp_path)
    assert CheckpointWriter(tmp_path, JOB).finished() == manifest
    assert not (tmp_path / ".journal").exists()
