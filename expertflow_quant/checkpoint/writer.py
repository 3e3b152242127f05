"""The checkpoint folder, and the writer that makes it layer by layer so that an interrupted run can go on.

The format, version 1. A checkpoint is a folder of JSON and safetensors files and nothing else::

    config.json                   the model's own, plus "quantization_config"
    tokenizer*, processor*, ...   the model's own small files, copied
    backbone.safetensors          every weight that is not an expert's, the model's own dtypes and names
    experts/layer-00000.safetensors, ...    one file per MoE layer, counted from 0 in model order
    manifest.json                 written last: a folder without it is not finished

A backbone over 4 GB lies in shards (backbone-00001-of-0000n.safetensors, backbone.safetensors.index.json).

A layer's file holds one tensor per expert, in order: name ``expert.<e>``, dtype U8, one dimension, the
expert's record. The header is padded so that the first record begins at a multiple of 256 bytes of the file,
and every record's size is a multiple of 256: a record can be read, mapped or copied to the device as it
lies. What is inside a record (codes, scales, zeros, input scale, biases, each on a 16-byte boundary) is
fixed by sizes and format alone: see ``formats.record.RecordLayout``. Weights are ``[out, in]``, codes are
bit streams along ``in`` (``formats.bits``), and ``W = (code - zero) * scale``, for nf4
``formats.NF4_VALUES[code] * scale``; with an input scale ``y = W @ (x * input_scale)``.

manifest.json::

    {"format": "expertflow-checkpoint", "version": 1,
     "model": {"id": folder name of the source, "type": model_type},
     "layers": [{"module": experts module in the model, "top_k": experts per token,
                 "file", "sha256", "nbytes",
                 "shape": {"hidden", "intermediate", "has_gate", "has_bias"},
                 "experts": [{"format": "int4-g32", "input_scale": bool, "nbytes",
                              "tokens", "text_tokens" if counted,
                              "coverage": "routed"|"closest"|"few"|"none", "error"}]}],
     "backbone": [{"file", "sha256", "nbytes"}], "files": [the other files, alike],
     "made": {method, plan, calibration, options, versions of the packages}}

No time, host or path is stored: equal input gives equal bytes. While a run is unfinished the folder
``.journal`` holds the job (all that decides the bytes), an entry for every finished file, and activations of the
calibration data behind the last finished layer; files appear under their names only whole.
"""

import contextlib
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from expertflow_quant.checkpoint.errors import CheckpointError, ResumeError
from expertflow_quant.checkpoint.files import hash_file, inner_path, json_bytes, write_durably
from expertflow_quant.checkpoint.journal import Journal
from expertflow_quant.checkpoint.lock import hold, release
from expertflow_quant.checkpoint.manifest import (
    EXPERTS_FOLDER,
    MANIFEST_FILE,
    ExpertEntry,
    FileEntry,
    LayerEntry,
    Manifest,
    file_from_json,
    layer_file,
    layer_from_json,
)
from expertflow_quant.checkpoint.tensors import PendingTensor, write_tensors
from expertflow_quant.formats.record import ExpertShape

BACKBONE_FILE = "backbone.safetensors"
BACKBONE_INDEX = BACKBONE_FILE + ".index.json"
SHARD_BYTES = 4 * 10**9


def record_name(expert: int) -> str:
    """The tensor name of an expert's record in its layer's file."""
    return f"expert.{expert}"


class CheckpointWriter:
    """Writes one checkpoint; made again over an unfinished one with the same ``job``, it knows what is done.

    Raises ResumeError when the folder holds a finished checkpoint, an unfinished one of another job (both
    unless ``overwrite``), files that are not ours, or another run's work at this moment. An unfinished one of the same
    job is continued either way.
    """

    def __init__(self, folder: Path | str, job: Mapping[str, object], overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self._journal = Journal(self.folder)
        self._files: list[FileEntry] = []
        self._backbone: list[FileEntry] = []
        self._layers: dict[int, LayerEntry] = {}
        self._refuse_foreign()
        self._unlock = weakref.finalize(self, release, hold(self.folder))
        if overwrite and not self._journal.is_of(job):
            self._clear()
        if self._has_manifest and not self._journal.exists:
            self._journal.remove()
            raise ResumeError(
                f"{self.folder} holds a finished checkpoint, complete and ready for use: give --overwrite to "
                f"replace it or choose another folder"
            )
        self._journal.begin(job)

    @property
    def scratch(self) -> Path:
        """A folder in which the run may keep what it wants to find again when it goes on; gone in the end."""
        return self._journal.scratch

    def finished(self) -> Manifest | None:
        """The manifest, when an earlier run of this job wrote it but was stopped before it could tidy up."""
        if not self._has_manifest:
            return None
        manifest = Manifest.load(self.folder)
        self._journal.remove()
        self._unlock()
        return manifest

    def finished_layer(self, layer: int) -> LayerEntry | None:
        """The layer as an earlier run of this job wrote it, or None; a file that changed since counts as
        None."""
        noted = self._journal.entry(f"layer-{layer:05d}")
        entry = None if noted is None else layer_from_json(noted, self.folder)
        if entry is None or not self._intact(entry.file):
            return None
        self._layers[layer] = entry
        return entry

    def write_layer(
        self,
        layer: int,
        module: str,
        shape: ExpertShape,
        top_k: int,
        experts: Sequence[tuple[ExpertEntry, Tensor]],
    ) -> LayerEntry:
        """Writes one layer's records (uint8 ``[nbytes]`` each, by expert index), durably."""
        name = layer_file(layer)
        nbytes, sha256 = write_tensors(
            inner_path(self.folder, name),
            [PendingTensor.ready(record_name(index), record) for index, (_, record) in enumerate(experts)],
        )
        entry = LayerEntry(
            module, shape, top_k, FileEntry(name, sha256, nbytes), tuple(expert for expert, _ in experts)
        )
        self._journal.record(f"layer-{layer:05d}", entry.to_json())
        self._layers[layer] = entry
        return entry

    def write_backbone(self, tensors: Sequence[PendingTensor], shard_bytes: int = SHARD_BYTES) -> None:
        """Writes the weights that are not experts', in shards of at most ``shard_bytes`` (a tensor is
        never split)."""
        shards = _shards(tensors, shard_bytes)
        names = [BACKBONE_FILE]
        if len(shards) > 1:
            names = [f"backbone-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self._backbone = [self._write_shard(name, shard) for name, shard in zip(names, shards, strict=True)]
        if len(shards) > 1:
            weight_map = {pending.name: name for name, shard in zip(names, shards) for pending in shard}
            total = sum(pending.nbytes for pending in tensors)
            self.write_json(BACKBONE_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def write_json(self, name: str, value: object) -> None:
        """Writes a JSON file into the checkpoint."""
        self._write_file(name, json_bytes(value))

    def copy_file(self, source: Path) -> None:
        """Copies a (small) file of the model under its own name."""
        try:
            content = source.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {source}: {error.strerror or error}: restore the file") from error
        self._write_file(source.name, content)

    def finish(self, model_id: str, model_type: str, made: Mapping[str, object]) -> Manifest:
        """Writes the manifest over everything written so far, then drops the journal."""
        missing = [layer for layer in range(len(self._layers)) if layer not in self._layers]
        if missing or not self._backbone:
            raise CheckpointError(
                f"{self.folder}: layers {missing} or the backbone were never written: write them first"
            )
        layers = tuple(self._layers[layer] for layer in range(len(self._layers)))
        files = tuple(sorted(self._files, key=lambda entry: entry.file))
        manifest = Manifest(model_id, model_type, layers, tuple(self._backbone), files, made)
        manifest.save(self.folder)
        self._journal.remove()
        self._unlock()
        return manifest

    def _write_shard(self, name: str, shard: Sequence[PendingTensor]) -> FileEntry:
        noted = self._journal.entry(name)
        if noted is not None and self._intact(done := file_from_json(noted, self.folder)):
            return done
        nbytes, sha256 = write_tensors(inner_path(self.folder, name), shard)
        entry = FileEntry(name, sha256, nbytes)
        self._journal.record(name, entry.to_json())
        return entry

    def _write_file(self, name: str, content: bytes) -> None:
        self._journal.record(name, {"file": name})  # before it is there, so that starting anew can remove it
        nbytes, sha256 = write_durably(inner_path(self.folder, name), [content])
        self._files.append(FileEntry(name, sha256, nbytes))

    def _intact(self, entry: FileEntry) -> bool:
        path = inner_path(self.folder, entry.file)
        return path.is_file() and path.stat().st_size == entry.nbytes and hash_file(path) == entry.sha256

    @property
    def _has_manifest(self) -> bool:
        return (self.folder / MANIFEST_FILE).is_file()

    def _refuse_foreign(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ResumeError(f"{self.folder} is a file: choose a folder for the checkpoint")
        ours = self._has_manifest or self._journal.folder.is_dir()
        if self.folder.is_dir() and not ours and (found := sorted(path.name for path in self.folder.iterdir())):
            raise ResumeError(
                f"{self.folder} holds files that are not a checkpoint's ({', '.join(found[:3])}): choose an "
                f"empty folder"
            )

    def _clear(self) -> None:
        """Removes what a checkpoint consists of and nothing else; at any moment the folder is seen to be
        ours."""
        names: set[str] = set()
        with contextlib.suppress(CheckpointError):  # a damaged manifest is a reason to overwrite
            names = {entry.file for entry in Manifest.load(self.folder).all_files}
        names |= self._journal.noted_files()
        self._journal.forget()
        shutil.rmtree(self.folder / EXPERTS_FOLDER, ignore_errors=True)
        for path in [*self.folder.glob("backbone*"), *(inner_path(self.folder, name) for name in names)]:
            path.unlink(missing_ok=True)
        (self.folder / MANIFEST_FILE).unlink(missing_ok=True)


def _shards(tensors: Sequence[PendingTensor], shard_bytes: int) -> list[list[PendingTensor]]:
    shards: list[list[PendingTensor]] = [[]]
    room = shard_bytes
    for pending in tensors:
        if shards[-1] and pending.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(pending)
        room -= pending.nbytes
    return shards
