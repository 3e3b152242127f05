"""manifest.json: which files a checkpoint has, how every expert is coded, how it was made.

Its presence says that the checkpoint is finished. The folder's format is specified in ``checkpoint.writer``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.checkpoint.files import inner_path, json_bytes, read_json, write_durably
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import ExpertShape, RecordLayout
from expertflow_quant.formats.spec import Format

MANIFEST_FILE = "manifest.json"
EXPERTS_FOLDER = "experts"
FORMAT_NAME = "expertflow-checkpoint"
FORMAT_VERSION = 1
COVERAGES = ("routed", "closest", "few", "none")

T = TypeVar("T")


def layer_file(layer: int) -> str:
    """The name of a layer's file, relative to the checkpoint."""
    return f"{EXPERTS_FOLDER}/layer-{layer:05d}.safetensors"


@dataclass(frozen=True)
class FileEntry:
    """A file of the checkpoint: name relative to the folder, sha256 (hex) and size in bytes."""

    file: str
    sha256: str
    nbytes: int

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise CheckpointError(f"{self.file}: sha256 {self.sha256!r} is not 64 hex digits: restore the manifest")
        if self.nbytes < 0:
            raise CheckpointError(f"{self.file}: size {self.nbytes} is below 0: restore the manifest")

    def to_json(self) -> dict[str, object]:
        return {"file": self.file, "sha256": self.sha256, "nbytes": self.nbytes}


@dataclass(frozen=True)
class ExpertEntry:
    """How one expert is coded, and what calibration measured.

    ``error``: relative error of its output on its calibration rows (of its weights where there were no rows),
    ``|y_q - y| / |y|`` in the Frobenius norm. ``tokens``: calibration tokens routed to it, of which
    ``text_tokens`` are text, the others of images (None: not counted). ``coverage``:
    "routed" (calibrated on these), "closest" (too few: calibrated also on the tokens that came closest to
    choosing it), "few" (too few, and nothing to tell which others come close), "none" (no rows).
    """

    format: Format
    input_scale: bool
    nbytes: int
    tokens: int = 0
    coverage: str = "none"
    error: float = 0.0
    text_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.coverage not in COVERAGES:
            raise CheckpointError(f"coverage {self.coverage!r} is not known: use one of {', '.join(COVERAGES)}")
        if self.text_tokens is not None and not 0 <= self.text_tokens <= self.tokens:
            raise CheckpointError(f"{self.text_tokens} of {self.tokens} tokens are text: restore the manifest")
        if not (math.isfinite(self.error) and self.error >= 0 and self.tokens >= 0):
            raise CheckpointError(
                f"an expert's error {self.error} and token count {self.tokens} must be finite and not below "
                f"0: check the model's weights and the calibration items"
            )

    def to_json(self) -> dict[str, object]:
        return {
            "format": self.format.name,
            "input_scale": self.input_scale,
            "nbytes": self.nbytes,
            "tokens": self.tokens,
            "coverage": self.coverage,
            "error": float(f"{self.error:.6g}"),
            **({} if self.text_tokens is None else {"text_tokens": self.text_tokens}),
        }


@dataclass(frozen=True)
class LayerEntry:
    """One MoE layer: the experts module's name in the model, the experts' sizes, how many a token uses,
    its file."""

    module: str
    shape: ExpertShape
    top_k: int
    file: FileEntry
    experts: tuple[ExpertEntry, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= len(self.experts):
            raise CheckpointError(
                f"{self.module}: top_k {self.top_k} must lie between 1 and its {len(self.experts)} experts: "
                "restore the manifest"
            )
        for index, (layout, expert) in enumerate(zip(self.layouts, self.experts, strict=True)):
            if layout.nbytes != expert.nbytes:
                raise CheckpointError(
                    f"{self.module}, expert {index}: a record of {layout.format.name} has {layout.nbytes} "
                    f"bytes, the manifest says {expert.nbytes}: it was written by another layout version: "
                    f"quantize again"
                )

    @cached_property
    def layouts(self) -> list[RecordLayout]:
        """The record layout of every expert, by index. Experts coded alike share one object."""
        made: dict[tuple[Format, bool], RecordLayout] = {}
        return [
            made.setdefault(key, RecordLayout(self.shape, *key))
            for key in ((expert.format, expert.input_scale) for expert in self.experts)
        ]

    @property
    def record_bytes(self) -> int:
        """Bytes of all records of this layer."""
        return sum(expert.nbytes for expert in self.experts)

    def to_json(self) -> dict[str, object]:
        shape = self.shape
        return {
            "module": self.module,
            "shape": {
                "hidden": shape.hidden,
                "intermediate": shape.intermediate,
                "has_gate": shape.has_gate,
                "has_bias": shape.has_bias,
            },
            "top_k": self.top_k,
            **self.file.to_json(),
            "experts": [expert.to_json() for expert in self.experts],
        }


@dataclass(frozen=True)
class Manifest:
    """Everything a reader needs to know of a checkpoint. ``made`` says how it was made (free JSON, no time
    stamps)."""

    model_id: str
    model_type: str
    layers: tuple[LayerEntry, ...]
    backbone: tuple[FileEntry, ...]
    files: tuple[FileEntry, ...] = ()
    made: Mapping[str, object] = field(default_factory=dict)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts' records."""
        return sum(layer.record_bytes for layer in self.layers)

    @property
    def all_files(self) -> list[FileEntry]:
        """Every file that the manifest vouches for."""
        return [*self.files, *self.backbone, *(layer.file for layer in self.layers)]

    def to_json(self) -> dict[str, object]:
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "model": {"id": self.model_id, "type": self.model_type},
            "layers": [layer.to_json() for layer in self.layers],
            "backbone": [entry.to_json() for entry in self.backbone],
            "files": [entry.to_json() for entry in self.files],
            "made": dict(self.made),
        }

    def save(self, folder: Path | str) -> None:
        """Writes manifest.json into ``folder``, durably and last: from now on the checkpoint is finished."""
        write_durably(Path(folder) / MANIFEST_FILE, [json_bytes(self.to_json())])

    @classmethod
    def load(cls, folder: Path | str) -> "Manifest":
        """The manifest in ``folder``. Raises CheckpointError when it is missing, of another version or not
        sound."""
        path = Path(folder) / MANIFEST_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder} holds no {MANIFEST_FILE}, so it is no finished expertflow checkpoint: make one "
                f"with `expertflow-quant quantize MODEL OUT`, or run an interrupted one again"
            )
        value = read_json(path)
        try:
            return _manifest(value, Path(folder))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{path}: {reason}: restore the manifest or quantize again") from error


def layer_from_json(value: object, folder: Path) -> LayerEntry:
    """A layer as ``LayerEntry.to_json`` wrote it. Raises KeyError, TypeError or ExpertFlowError when it is
    not sound."""
    layer = _typed(value, dict, "a layer")
    shape = _typed(layer["shape"], dict, "shape")
    return LayerEntry(
        module=_typed(layer["module"], str, "module"),
        shape=ExpertShape(shape["hidden"], shape["intermediate"], shape["has_gate"], shape["has_bias"]),
        top_k=_typed(layer["top_k"], int, "top_k"),
        file=file_from_json(layer, folder),
        experts=_each(layer["experts"], "experts", _expert),
    )


def file_from_json(value: object, folder: Path) -> FileEntry:
    """A file as ``FileEntry.to_json`` wrote it; a name that leaves the folder raises CheckpointError."""
    entry = _typed(value, dict, "a file")
    inner_path(folder, entry["file"])
    return FileEntry(entry["file"], _typed(entry["sha256"], str, "sha256"), _typed(entry["nbytes"], int, "nbytes"))


def _manifest(value: object, folder: Path) -> Manifest:
    top = _typed(value, dict, "the manifest")
    if top.get("format") != FORMAT_NAME or top.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"this is {top.get('format')!r} version {top.get('version')!r}, this build "
            f"reads {FORMAT_NAME!r} version {FORMAT_VERSION}: use a matching expertflow-quant or quantize "
            f"again"
        )
    model = _typed(top["model"], dict, "model")
    layers = _each(top["layers"], "layers", lambda layer: layer_from_json(layer, folder))
    for index, layer in enumerate(layers):
        if layer.file.file != layer_file(index):
            raise CheckpointError(
                f"layer {index} names the file {layer.file.file}, which must be {layer_file(index)}: "
                f"restore the manifest or quantize again"
            )
    return Manifest(
        model_id=_typed(model["id"], str, "model id"),
        model_type=_typed(model["type"], str, "model type"),
        layers=layers,
        backbone=_each(top["backbone"], "backbone", lambda entry: file_from_json(entry, folder)),
        files=_each(top["files"], "files", lambda entry: file_from_json(entry, folder)),
        made=_typed(top["made"], dict, "made"),
    )


def _expert(value: object) -> ExpertEntry:
    entry = _typed(value, dict, "an expert")
    return ExpertEntry(
        format=Format.parse(_typed(entry["format"], str, "format")),
        input_scale=_typed(entry["input_scale"], bool, "input_scale"),
        nbytes=_typed(entry["nbytes"], int, "nbytes"),
        tokens=_typed(entry.get("tokens", 0), int, "tokens"),
        coverage=_typed(entry.get("coverage", "none"), str, "coverage"),
        error=float(_typed(entry.get("error", 0.0), (int, float), "error")),
        text_tokens=_typed(entry["text_tokens"], int, "text_tokens") if "text_tokens" in entry else None,
    )


def _typed(value: object, kind: type[T] | tuple[type, ...], what: str) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ExpertFlowError(f"{what} is {type(value).__name__} {str(value)[:60]!r}, which does not belong there")
    return value  # type: ignore[return-value]


def _each(value: object, what: str, parse: Callable[[object], T]) -> tuple[T, ...]:
    entries: list[object] = _typed(value, list, what)
    parsed = []
    for index, entry in enumerate(entries):
        try:
            parsed.append(parse(entry))
        except KeyError as error:
            raise ExpertFlowError(f"{what}[{index}]: {error} is missing") from error
        except ExpertFlowError as error:
            raise type(error)(f"{what}[{index}]: {error}") from error
    return tuple(parsed)
