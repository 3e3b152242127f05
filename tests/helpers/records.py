"""Random expert records, and what kernels take to read them: addresses, rows of a layout table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats import ExpertShape, Format, RecordLayout
from expertflow_quant.kernels.reference import expert_weights
from expertflow_quant.kernels.table import LayoutTable


def silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def random_record(layout: RecordLayout, generator: torch.Generator) -> Tensor:
    """A record of random codes whose weights have a deviation of about a tenth; scales differ from group to group."""
    spread = layout.format.levels if layout.format.is_int else 1
    fields = {}
    for name, field in layout.fields.items():
        if name.endswith(".codes"):
            value = torch.randint(0, 256, field.shape, generator=generator)
        elif name.endswith(".zeros"):
            value = torch.randint(0, spread, field.shape, generator=generator)
        elif name.endswith(".scales"):
            value = (torch.rand(field.shape, generator=generator) + 0.5) / spread / 3
        elif name.endswith(".input_scale"):
            value = torch.rand(field.shape, generator=generator) + 0.5
        else:
            value = torch.randn(field.shape, generator=generator) / 10
        fields[name] = value.to(field.dtype)
    return layout.pack(fields)


@dataclass(frozen=True)
class Layer:
    """One record per expert, in memory of ``device``; the records live as long as this does."""

    layouts: tuple[RecordLayout, ...]
    records: tuple[Tensor, ...]
    device: str

    @classmethod
    def random(
        cls, shape: ExpertShape, formats: Sequence[str], device: str, input_scale: bool = False, seed: int = 0
    ) -> "Layer":
        """Expert e has format ``formats[e]``, and an input scale if asked for and its format can have one."""
        generator = torch.Generator().manual_seed(seed)
        parsed = [Format.parse(name) for name in formats]
        layouts = tuple(RecordLayout(shape, form, input_scale and form.has_codes) for form in parsed)
        return cls(layouts, tuple(random_record(layout, generator).to(device) for layout in layouts), device)

    def arguments(self) -> tuple[Tensor, Tensor, LayoutTable]:
        """addresses, row_of and table, on the device."""
        table, row_of = LayoutTable.of(self.layouts, self.device)
        return torch.tensor([record.data_ptr() for record in self.records], device=self.device), row_of, table

    def exact(self, expert: int, hidden: Tensor) -> Tensor:
        """silu_gate expert in float64 on the CPU, ``[n, H]`` from ``[n, H]``; its weights are decoded in float32."""
        layout, record = self.layouts[expert], self.records[expert].cpu()
        weights = expert_weights(layout.views(record), layout, torch.float32)
        x = hidden.cpu().double() * (1 if weights.input_scale is None else weights.input_scale.double())
        bias = [None if part is None else part.double() for part in (weights.gate_up_bias, weights.down_bias)]
        inner = silu_gate(functional.linear(x, weights.gate_up.double(), bias[0]))
        return functional.linear(inner, weights.down.double(), bias[1])
