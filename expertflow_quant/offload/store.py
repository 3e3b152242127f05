"""The host side: every record of a checkpoint, held once, in pinned memory when a device will read it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from expertflow_quant.formats.record import ExpertShape, RecordLayout
from expertflow_quant.offload.slots import LayerRecords

SLAB_BYTES = 256 * 2**20  # a power of two: the pinned allocator rounds every request up to one


class LayerSource(Protocol):
    """What the store needs to know of one MoE layer."""

    @property
    def module(self) -> str: ...
    @property
    def shape(self) -> ExpertShape: ...
    @property
    def top_k(self) -> int: ...
    @property
    def layouts(self) -> Sequence[RecordLayout]: ...


class RecordSource(Protocol):
    """Where records come from: a checkpoint's reader, or a fake in a test."""

    @property
    def layers(self) -> Sequence[LayerSource]: ...
    def record(self, layer: int, expert: int) -> Tensor:
        """The record of one expert, uint8 ``[nbytes]`` on the CPU."""
        ...


class ExpertStore:
    """All records of ``source``. Unpinned, they stay where the source has them (memory-mapped files) and are
    read when first asked for; pinned, they are copied once, here, into page-locked slabs."""

    def __init__(self, source: RecordSource, pin: bool = False) -> None:
        self._source = source
        same: dict[RecordLayout, RecordLayout] = {}
        self.layouts = [[same.setdefault(each, each) for each in layer.layouts] for layer in source.layers]
        self.layers = [
            LayerRecords(tuple(layout.nbytes for layout in layer.layouts), layer.top_k) for layer in source.layers
        ]
        self.nbytes = sum(sum(layer.nbytes) for layer in self.layers)
        self.pinned = pin
        self._records: list[list[Tensor | None]] = [[None] * len(layer.nbytes) for layer in self.layers]
        if pin:
            self._pin_all()

    def record(self, layer: int, expert: int) -> Tensor:
        """The record of one expert, uint8 ``[nbytes]`` in host memory."""
        record = self._records[layer][expert]
        if record is None:
            record = self._records[layer][expert] = self._source.record(layer, expert)
        return record

    def layout(self, layer: int, expert: int) -> RecordLayout:
        """How the record is laid out; experts laid out alike share one object."""
        return self.layouts[layer][expert]

    def _pin_all(self) -> None:
        slab, used = torch.empty(0, dtype=torch.uint8), 0
        left = self.nbytes
        for layer, records in enumerate(self._records):
            for expert, nbytes in enumerate(self.layers[layer].nbytes):
                if used + nbytes > slab.numel():
                    slab, used = _pinned(max(nbytes, min(left, SLAB_BYTES))), 0
                records[expert] = slab[used : used + nbytes].copy_(self._source.record(layer, expert))
                used += nbytes
                left -= nbytes


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
