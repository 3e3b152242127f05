"""One expert's bytes: which field lies where in its record, how to write one and how to look into one.

The same bytes lie on disk, in host memory and in a device slot, so everything here is offsets and views and
nothing is ever repacked. Fields follow each other in a fixed order, each on a 16-byte boundary; the end is
padded to a multiple of 256.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from expertflow_quant.formats.bits import packed_bytes
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.spec import Format

FIELD_ALIGNMENT = 16
RECORD_ALIGNMENT = 256
SCALE_DTYPE = torch.float16
WEIGHT_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of one expert: gate_up is ``[2 * intermediate, hidden]`` (``[intermediate, hidden]`` without a
    gate), down is ``[hidden, intermediate]``, both ``[out, in]``. Sizes below one raise ExpertFlowError."""

    hidden: int
    intermediate: int
    has_gate: bool = True
    has_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ExpertFlowError(f"expert {name} size {size!r} must be a whole number of at least 1")

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name to (out features, in features), in record order."""
        up_rows = 2 * self.intermediate if self.has_gate else self.intermediate
        return {"gate_up": (up_rows, self.hidden), "down": (self.hidden, self.intermediate)}


@dataclass(frozen=True)
class Field:
    """Where one tensor lies inside a record: byte offset, shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))


@dataclass(frozen=True)
class RecordLayout:
    """The layout of the record of one expert of ``shape`` in ``format``, with or without AWQ's input scale.

    Raises ExpertFlowError when the format cannot code these sizes or bf16 is asked to carry an input scale.
    """

    shape: ExpertShape
    format: Format
    input_scale: bool = False

    def __post_init__(self) -> None:
        for name, (_, in_features) in self.shape.matrices.items():
            try:
                self.format.validate_for(in_features)
            except ExpertFlowError as error:
                raise ExpertFlowError(f"{name} of {self.shape}: {error}") from None
        if self.input_scale and not self.format.has_codes:
            raise ExpertFlowError(f"{self.format.name} weights carry no input scale: set input_scale=False or use int8")

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Name to place, in the order in which they lie in the record."""
        fields: dict[str, Field] = {}
        end = 0
        for name, (shape, dtype) in self._tensors().items():
            fields[name] = Field(_round_up(end, FIELD_ALIGNMENT), shape, dtype)
            end = fields[name].offset + fields[name].nbytes
        return fields

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the record, padded to a multiple of 256."""
        last = list(self.fields.values())[-1]
        return _round_up(last.offset + last.nbytes, RECORD_ALIGNMENT)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The record, uint8 ``[nbytes]`` on the CPU, holding exactly the tensors that ``fields`` names.

        Codes are given packed (``pack_codes``). Gaps are zero, so equal tensors give equal bytes. Raises
        ExpertFlowError for a field that is missing, unknown, or of another shape or dtype.
        """
        self._check_names(tensors)
        record = torch.zeros(self.nbytes, dtype=torch.uint8)
        for name, view in self.views(record).items():
            tensor, field = tensors[name], self.fields[name]
            if tuple(tensor.shape) != field.shape or tensor.dtype != field.dtype:
                raise ExpertFlowError(
                    f"field {name} is {tensor.dtype} {tuple(tensor.shape)}, a record of {self.format.name} "
                    f"holds {field.dtype} {field.shape}: convert it before packing"
                )
            view.copy_(tensor)
        return record

    def views(self, record: Tensor) -> dict[str, Tensor]:
        """The fields of ``record`` (uint8 ``[nbytes]``, any device) as tensors over the same memory.

        Raises ExpertFlowError for another dtype, length or stride, or a start off a 16-byte boundary.
        """
        self._check_record(record)
        typed: dict[torch.dtype, Tensor] = {}
        views = {}
        for name, field in self.fields.items():
            whole = typed.get(field.dtype)
            if whole is None:
                whole = typed[field.dtype] = record.view(field.dtype)
            start = whole.storage_offset() + field.offset // field.dtype.itemsize
            views[name] = whole.as_strided(field.shape, field.strides, start)
        return views

    def _tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, (out_features, in_features) in self.shape.matrices.items():
            tensors |= self._matrix_tensors(name, out_features, in_features)
            if self.input_scale and name == "gate_up":
                tensors[f"{name}.input_scale"] = ((in_features,), SCALE_DTYPE)
            if self.shape.has_bias:
                tensors[f"{name}.bias"] = ((out_features,), WEIGHT_DTYPE)
        return tensors

    def _matrix_tensors(
        self, name: str, out_features: int, in_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if not self.format.has_codes:
            return {f"{name}.weight": ((out_features, in_features), WEIGHT_DTYPE)}
        groups = self.format.groups(in_features)
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            f"{name}.codes": ((out_features, packed_bytes(in_features, self.format.bits)), torch.uint8),
            f"{name}.scales": ((out_features, groups), SCALE_DTYPE),
        }
        if not self.format.symmetric:
            tensors[f"{name}.zeros"] = ((out_features, groups), torch.uint8)
        return tensors

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        missing = [name for name in self.fields if name not in tensors]
        unknown = [name for name in tensors if name not in self.fields]
        if missing or unknown:
            raise ExpertFlowError(
                f"a record of {self.format.name} holds {', '.join(self.fields)}: "
                f"missing {missing or 'none'}, unknown {unknown or 'none'}"
            )

    def _check_record(self, record: Tensor) -> None:
        if record.dtype != torch.uint8 or record.shape != (self.nbytes,) or record.stride() != (1,):
            raise ExpertFlowError(
                f"a record of {self.format.name} is {self.nbytes} uint8 in one piece, got {record.dtype} "
                f"{tuple(record.shape)} with stride {record.stride()}: pass the record as it was packed"
            )
        if record.storage_offset() % FIELD_ALIGNMENT:
            raise ExpertFlowError(
                f"the record starts at byte {record.storage_offset()} of its buffer: it must start at a "
                f"multiple of {FIELD_ALIGNMENT}, so place records {RECORD_ALIGNMENT} bytes apart"
            )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
