"""The host side: every record of a checkpoint, held once, in pinned memory when a device will read it.

Where the host's memory does not hold all of them, some are pinned and the others stay in the mapped files, from
where they reach a device through a ring (disk_ring.py).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import ExpertShape, RecordLayout
from expertflow_quant.offload.budget import format_bytes
from expertflow_quant.offload.host_memory import HOST_RESERVE_BYTES, available_bytes, plan_slabs, release
from expertflow_quant.offload.policy import Key
from expertflow_quant.offload.slots import LayerRecords


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


def pinned_slab(nbytes: int) -> Tensor:
    """Page-locked host memory, uint8 ``[nbytes]``; takes the next power of two."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


class ExpertStore:
    """All records of ``source``. Unpinned, they stay where the source has them (memory-mapped files) and are
    read when first asked for; pinned, they are copied once, here, into page-locked slabs.

    ``pin``: copy records into pinned memory, until ``host_memory`` bytes of it are taken (by default what is
    available but for HOST_RESERVE_BYTES). ``popularity``: per layer and expert, any number; who has more is pinned
    first. Without it the first layers are. Pinned records of a layer lie one after the other in expert order, where
    no slab ends between them. ``on_progress(done, total)`` is told the bytes pinned so far and in the end.
    ``allocate(nbytes)`` gives the slabs. Raises ExpertFlowError when the system refuses to pin.
    """

    def __init__(
        self,
        source: RecordSource,
        pin: bool = False,
        host_memory: int | None = None,
        *,
        popularity: Sequence[Sequence[float]] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        allocate: Callable[[int], Tensor] = pinned_slab,
    ) -> None:
        self.source = source
        same: dict[RecordLayout, RecordLayout] = {}
        self.layouts = [[same.setdefault(each, each) for each in layer.layouts] for layer in source.layers]
        self.layers = [
            LayerRecords(tuple(layout.nbytes for layout in layer.layouts), layer.top_k) for layer in source.layers
        ]
        self.nbytes = sum(sum(layer.nbytes) for layer in self.layers)
        self.pinned_bytes = 0
        self._records: list[list[Tensor | None]] = [[None] * len(layer.nbytes) for layer in self.layers]
        self._pinned: set[Key] = set()
        if pin:
            room = max(0, available_bytes() - HOST_RESERVE_BYTES) if host_memory is None else host_memory
            if room < 0:
                raise ExpertFlowError(f"host_memory {room} is below zero: give the bytes that may be pinned, or 0")
            self._pin(self._chosen(room, self._ranked(popularity)), allocate, on_progress)

    @property
    def pinned(self) -> bool:
        """Whether every record is in pinned memory."""
        return len(self._pinned) == sum(len(layer.nbytes) for layer in self.layers)

    def is_pinned(self, layer: int, expert: int) -> bool:
        """Whether this record is in pinned memory, so that a device can read it where it is."""
        return (layer, expert) in self._pinned

    def record(self, layer: int, expert: int) -> Tensor:
        """The record of one expert, uint8 ``[nbytes]`` in host memory."""
        record = self._records[layer][expert]
        if record is None:
            record = self._records[layer][expert] = self.source.record(layer, expert)
        return record

    def layout(self, layer: int, expert: int) -> RecordLayout:
        """How the record is laid out; experts laid out alike share one object."""
        return self.layouts[layer][expert]

    def _ranked(self, popularity: Sequence[Sequence[float]] | None) -> list[Key]:
        """All experts, the first to be pinned first."""
        keys = [(layer, expert) for layer, records in enumerate(self.layers) for expert in range(len(records.nbytes))]
        if popularity is None:
            return keys
        counts = [len(records.nbytes) for records in self.layers]
        if [len(layer) for layer in popularity] != counts:
            raise ExpertFlowError(
                f"popularity has {[len(layer) for layer in popularity]} numbers by layer, the model {counts} experts: "
                "give one for each expert, or none"
            )
        return sorted(keys, key=lambda key: -popularity[key[0]][key[1]])

    def _chosen(self, host_memory: int, ranked: Iterable[Key]) -> list[Key]:
        """Those of ``ranked`` whose slabs fit into ``host_memory``, in the order in which they are laid down."""
        chosen, used = [], 0
        for key in ranked:
            if used + self._size(key) <= host_memory:
                chosen.append(key)
                used += self._size(key)
        # Slabs end in room that holds no record: the last chosen go until the slabs fit, too.
        while (excess := self._slab_bytes(chosen) - host_memory) > 0:
            room = used - excess
            while chosen and used > room:
                used -= self._size(chosen.pop())
        return sorted(chosen)

    def _slab_bytes(self, keys: Iterable[Key]) -> int:
        return sum(slab.nbytes for slab in plan_slabs([self._size(key) for key in sorted(keys)]))

    def _pin(
        self,
        keys: Sequence[Key],
        allocate: Callable[[int], Tensor],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        sizes = [self._size(key) for key in keys]
        total, waiting = sum(sizes), iter(keys)
        for slab in plan_slabs(sizes):
            memory, used, copied = self._allocated(allocate, slab.nbytes), 0, []
            for layer, expert in itertools.islice(waiting, slab.records):
                nbytes = self._size((layer, expert))
                copied.append(self.source.record(layer, expert))
                self._records[layer][expert] = memory[used : used + nbytes].copy_(copied[-1])
                used += nbytes
                self._pinned.add((layer, expert))
                self.pinned_bytes += nbytes
                if on_progress is not None:
                    on_progress(self.pinned_bytes, total)
            release(copied)  # a slab at once: record by record, most pages would stay

    def _allocated(self, allocate: Callable[[int], Tensor], nbytes: int) -> Tensor:
        try:
            return allocate(nbytes)
        except RuntimeError as error:
            raise ExpertFlowError(
                f"the system refused to pin {format_bytes(nbytes)} of host memory after "
                f"{format_bytes(self.pinned_bytes)} of {format_bytes(self.nbytes)}: {error}: give host_memory="
                f"{self.pinned_bytes} bytes at most, so that the other experts stay in their files"
            ) from error

    def _size(self, key: Key) -> int:
        return self.layers[key[0]].nbytes[key[1]]
