"""Experts with random records for tests of the device's cache, and what must hold of it at any time."""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from expertflow_quant.formats.record import ExpertShape, RecordLayout
from expertflow_quant.formats.spec import Format
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.store import ExpertStore

SHAPE = ExpertShape(32, 16)
FORMATS = ("int4-g16", "bf16", "int2-g16")
"""Of three record sizes."""


@cache
def layout(format: str) -> RecordLayout:
    return RecordLayout(SHAPE, Format.parse(format))


@dataclass
class Layer:
    layouts: list[RecordLayout]
    top_k: int = 1
    module: str = "model.experts"
    shape: ExpertShape = SHAPE


@dataclass
class Source:
    """Records of random bytes in memory."""

    layers: list[Layer]
    records: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for index, layer in enumerate(self.layers):
            for expert, each in enumerate(layer.layouts):
                self.records[index, expert] = torch.randint(
                    0, 256, (each.nbytes,), dtype=torch.uint8, generator=generator
                )

    def record(self, layer: int, expert: int) -> Tensor:
        return self.records[layer, expert]


def store_of(formats: list[list[str]], device: str = "cpu") -> ExpertStore:
    """A store whose layer l has one expert for each of ``formats[l]``, pinned for a GPU."""
    return ExpertStore(Source([Layer([layout(each) for each in layer]) for layer in formats]), pin=device != "cpu")


def routed(experts: list[int], device: str = "cpu") -> Tensor:
    """ids ``[T, 1]``."""
    return torch.tensor(experts, dtype=torch.int64, device=device).view(-1, 1)


def check_tables(resident: ResidentExperts) -> None:
    """Slots have one owner at most, of their own size; an address is that of the slot, or the host's."""
    slot_of, address = resident.slot_of.tolist(), resident.address.tolist()
    for layer, records in enumerate(resident.store.layers):
        taken = [slot for slot in slot_of[layer] if slot >= 0]
        assert len(taken) == len(set(taken))
        for expert, nbytes in enumerate(records.nbytes):
            slot = slot_of[layer][expert]
            if slot < 0:
                assert address[layer][expert] == resident.store.record(layer, expert).data_ptr()
            else:
                room = resident.slot_tensor(layer, slot)
                assert address[layer][expert] == room.data_ptr()
                assert room.numel() == nbytes
                assert room.data_ptr() % 256 == 0


def check_bytes(resident: ResidentExperts) -> None:
    """Every slot in use holds the record of its owner."""
    for layer, row in enumerate(resident.slot_of.tolist()):
        for expert, slot in enumerate(row):
            if slot >= 0:
                assert torch.equal(resident.slot_tensor(layer, slot).cpu(), resident.store.record(layer, expert))
