"""Record layouts as numbers that a kernel can read: one row of int32 per distinct layout of a model's experts.

A kernel gets an address per expert, the row of its layout, and this table; so one launch serves experts of any
mixture of formats. Codes are read in units of eight, which fill whole bytes at every width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from expertflow_quant.formats import NF4_VALUES, ExpertFlowError, ExpertShape, Format, RecordLayout

UNIT = 8
"""Codes that are read together; groups must be multiples of it."""

ABSENT = -1
"""Offset of a field that a layout does not have."""

COLUMNS = (
    "bits",  # 2, 3, 4, 8, 16 for bf16, or 4 + LOOKED_UP for nf4: what kernels branch on
    "zero",  # 2 ** (bits - 1) where symmetric, 0 for bf16 and nf4, ABSENT where the record holds zeros
    "gate_up.codes",  # byte offsets in the record; of the weight itself for bf16
    "gate_up.scales",
    "gate_up.zeros",
    "gate_up.input_scale",
    "gate_up.bias",
    "gate_up.group_units",  # units of eight columns that share a scale
    "down.codes",
    "down.scales",
    "down.zeros",
    "down.bias",
    "down.group_units",
    "nbytes",  # of the record
)
VALUES = len(COLUMNS)
"""Where, in every row, the float32 bits of nf4's sixteen values begin."""

WIDTH = VALUES + len(NF4_VALUES)

LOOKED_UP = 16
"""Added to the bits of codes whose values kernels look up in the table."""


@dataclass(frozen=True)
class LayoutTable:
    """The distinct ``layouts`` of experts of one ``shape``; expert e uses the row that ``row_of`` names.

    ``rows`` is int32 ``[layouts, WIDTH]`` on ``device``. Raises ExpertFlowError for layouts of another shape, or a
    group that is no multiple of eight columns.
    """

    layouts: tuple[RecordLayout, ...]
    device: torch.device

    def __post_init__(self) -> None:
        if not self.layouts or len({layout.shape for layout in self.layouts}) != 1:
            raise ExpertFlowError("a layout table needs layouts of one expert shape: make one table per layer")
        for layout in self.layouts:
            for _, in_features in layout.shape.matrices.values():
                form = layout.format
                if form.has_codes and form.columns_per_group(in_features) % UNIT:
                    raise ExpertFlowError(
                        f"{form.name}: kernels read codes in eights, so a group must be a multiple of "
                        f"{UNIT} columns: quantize with {form.kind}{form.bits}-g{UNIT * 4} or -channel"
                    )

    @classmethod
    def of(cls, experts: Sequence[RecordLayout], device: torch.device | str) -> "tuple[LayoutTable, Tensor]":
        """The table of a layer whose expert e is laid out as ``experts[e]``, and int32 ``[E]``: each expert's row."""
        distinct = list(dict.fromkeys(experts))
        index = {layout: row for row, layout in enumerate(distinct)}
        target = torch.device(device)
        row_of = torch.tensor([index[layout] for layout in experts], dtype=torch.int32, device=target)
        return cls(tuple(distinct), target), row_of

    @property
    def shape(self) -> ExpertShape:
        return self.layouts[0].shape

    @property
    def widths(self) -> frozenset[int]:
        """The column ``bits`` of all rows: what a kernel must be compiled for."""
        return frozenset(width_of(layout.format) for layout in self.layouts)

    @property
    def has_zeros(self) -> bool:
        """Whether any layout stores zero points."""
        return any(not layout.format.symmetric for layout in self.layouts)

    @property
    def has_input_scale(self) -> bool:
        return any(layout.input_scale for layout in self.layouts)

    @cached_property
    def rows(self) -> Tensor:
        return torch.tensor([_row(layout) for layout in self.layouts], dtype=torch.int32, device=self.device)


def width_of(format: Format) -> int:
    """What kernels branch on: the bits of a code, with LOOKED_UP added where its value is looked up."""
    return format.bits + (LOOKED_UP if format.kind == "nf" else 0)


def _row(layout: RecordLayout) -> list[int]:
    fields, form = layout.fields, layout.format

    def offset(name: str) -> int:
        return fields[name].offset if name in fields else ABSENT

    values = {"bits": width_of(form), "nbytes": layout.nbytes}
    values["zero"] = 0 if not form.is_int else form.levels // 2 if form.symmetric else ABSENT
    for name, (_, in_features) in layout.shape.matrices.items():
        values[f"{name}.codes"] = offset(f"{name}.codes" if form.has_codes else f"{name}.weight")
        values[f"{name}.scales"] = offset(f"{name}.scales")
        values[f"{name}.zeros"] = offset(f"{name}.zeros")
        values[f"{name}.bias"] = offset(f"{name}.bias")
        values[f"{name}.group_units"] = form.columns_per_group(in_features) // UNIT if form.has_codes else 1
    values["gate_up.input_scale"] = offset("gate_up.input_scale")
    looked_up = torch.tensor(NF4_VALUES, dtype=torch.float32).view(torch.int32).tolist()
    return [*(values[column] for column in COLUMNS), *looked_up]
