"""Experts of mixed formats with random records, and what a routed pair gives, worked out slowly in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats import NF4_VALUES, ExpertShape, Format, RecordLayout, pack_codes
from expertflow_quant.kernels.gate import Gate
from expertflow_quant.kernels.table import LayoutTable


def silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def clamped_gate(gate_up: Tensor) -> Tensor:
    """One that no kernel fuses: gate and up rows alternate."""
    gate, up = gate_up[..., ::2].clamp(max=2.0), gate_up[..., 1::2].clamp(-2.0, 2.0)
    return gate * torch.sigmoid(1.7 * gate) * (up + 1)


SILU = Gate(silu_gate, "silu")
CLAMPED = Gate(clamped_gate)
RELU = Gate(functional.relu)


@dataclass
class RandomExperts:
    """Expert e of format ``names[e % len(names)]``, "+" at the end of a name asking for an input scale."""

    names: Sequence[str]
    experts: int
    shape: ExpertShape
    device: str = "cpu"
    records: list[Tensor] = field(init=False)
    layouts: list[RecordLayout] = field(init=False)
    plain: list[dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.names) * 1000 + self.experts)
        made = [self._expert(self.names[e % len(self.names)], generator) for e in range(self.experts)]
        self.layouts, self.records, self.plain = (list(column) for column in zip(*made, strict=True))

    def _expert(self, name: str, generator: torch.Generator) -> tuple[RecordLayout, Tensor, dict[str, Tensor]]:
        layout = RecordLayout(self.shape, Format.parse(name.rstrip("+")), input_scale=name.endswith("+"))
        fields: dict[str, Tensor] = {}
        plain: dict[str, Tensor] = {}
        for matrix, (rows, columns) in self.shape.matrices.items():
            own, plain[matrix] = _matrix(layout.format, rows, columns, generator)
            fields |= {f"{matrix}.{part}": value for part, value in own.items()}
            if self.shape.has_bias:
                fields[f"{matrix}.bias"] = (0.3 * torch.randn(rows, generator=generator)).bfloat16()
                plain[f"{matrix}.bias"] = fields[f"{matrix}.bias"].double()
        if layout.input_scale:
            fields["gate_up.input_scale"] = (torch.rand(self.shape.hidden, generator=generator) + 0.5).half()
            plain["input_scale"] = fields["gate_up.input_scale"].double()
        return layout, layout.pack(fields).to(self.device), plain

    @property
    def addresses(self) -> Tensor:
        return torch.tensor([record.data_ptr() for record in self.records], dtype=torch.int64, device=self.device)

    def table(self) -> tuple[LayoutTable, Tensor]:
        return LayoutTable.of(self.layouts, self.device)

    def slow(self, expert: int, row: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """float64 ``[H]``: the expert applied to one row."""
        plain = self.plain[expert]
        x = row.double().cpu() * plain.get("input_scale", torch.ones(()))
        inner = gate(plain["gate_up"] @ x + plain.get("gate_up.bias", torch.zeros(())))
        return plain["down"] @ inner + plain.get("down.bias", torch.zeros(()))

    def slow_rows(self, hidden: Tensor, ids: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """float64 ``[P, H]``; nan for sentinels."""
        rows = torch.full((ids.numel(), self.shape.hidden), float("nan"), dtype=torch.float64)
        for pair, expert in enumerate(ids.flatten().tolist()):
            if 0 <= expert < self.experts:
                rows[pair] = self.slow(expert, hidden[pair // ids.shape[1]], gate)
        return rows


def _matrix(form: Format, rows: int, columns: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Fields of one matrix and the float64 weights that they stand for."""
    if not form.has_codes:
        weight = (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()
        return {"weight": weight}, weight.double()
    groups = form.groups(columns)
    codes = torch.randint(0, form.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = ((torch.rand(rows, groups, generator=generator) + 0.5) / (form.levels * columns**0.5)).half()
    zeros = torch.full((rows, groups), form.levels // 2, dtype=torch.uint8)
    fields = {"codes": pack_codes(codes, form.bits), "scales": scales}
    if not form.symmetric:
        zeros = torch.randint(0, form.levels, (rows, groups), generator=generator, dtype=torch.uint8)
        fields["zeros"] = zeros
    group = torch.arange(columns) // (columns // groups)
    if form.kind == "nf":
        return fields, torch.tensor(NF4_VALUES).double()[codes.int()] * scales.double()[:, group]
    return fields, (codes.double() - zeros.double()[:, group]) * scales.double()[:, group]
