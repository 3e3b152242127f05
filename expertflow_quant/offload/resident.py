"""Experts that stay on the device between steps, with a controller that needs no host: what a captured step calls.

A layer's step is ``resolve`` (who lies where, who comes), ``fill`` (bytes), then the product, which reads each expert
at ``addresses``: its slot, or the host's record where it has none. Nothing here is counted or decided on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import FIELD_ALIGNMENT, RECORD_ALIGNMENT
from expertflow_quant.kernels import LayoutTable
from expertflow_quant.offload import fill, resolve
from expertflow_quant.offload.layer_policy import LayerPolicy
from expertflow_quant.offload.layer_slots import Pools
from expertflow_quant.offload.policy import Scores
from expertflow_quant.offload.resident_tables import ABSENT, LayerTables, ResidentTables
from expertflow_quant.offload.stats import CacheStats, LayerStats
from expertflow_quant.offload.store import ExpertStore


class ResidentExperts:
    """Slots on ``device`` as planned by ``plan_layer_slots``, over the records of ``store``, which it keeps alive.

    All slots are free at first; every slot starts on a 256-byte boundary. ``tables`` has each layer's record layouts
    as kernels read them, with the row of each expert. ``begin_step``, ``resolve``, ``fill`` and ``prefetch`` only
    launch work on the current stream and can be captured in a CUDA graph; calls for one layer must be ordered by
    the caller, calls for different layers may run at the same time. ``policy`` decides who makes room, "static" by the
    ``shares`` of a recorded run (``popularity``), from which counts may start too: layer_policy.py. Raises
    ExpertFlowError where a GPU could not read the store's records, for a plan of another model, and for a policy that
    is not known or lacks shares.
    """

    def __init__(
        self,
        store: ExpertStore,
        plan: Sequence[Pools],
        device: torch.device | str,
        policy: str = "lru",
        shares: Scores | None = None,
    ) -> None:
        self.store, self.device = store, torch.device(device)
        if self.device.type == "cuda" and not store.pinned:
            raise ExpertFlowError(
                f"not all records are pinned, so {self.device} cannot read them: make the store with pin=True and "
                "host_memory for all of them"
            )
        self._offsets, slot_bytes = _offsets(plan)
        self._slots = _aligned(slot_bytes, self.device)
        base = self._slots.data_ptr()
        self._tables = ResidentTables(
            store.layers,
            plan,
            _host_addresses(store, self.device),
            [[base + start for start, _ in row] for row in self._offsets],
            self.device,
            policy,
            shares,
        )
        self._layers = [self._tables.layer(index) for index in range(len(store.layers))]
        self._whole = [False] * len(self._layers)
        self.tables = [LayoutTable.of(layouts, self.device) for layouts in store.layouts]

    def __deepcopy__(self, memo: object) -> "ResidentExperts":
        """A copied model shares the slots of the first."""
        return self

    @property
    def plan(self) -> tuple[Pools, ...]:
        return self._tables.plan

    @property
    def policy(self) -> LayerPolicy:
        """Who makes room."""
        return self._tables.policy

    @property
    def refuses(self) -> bool:
        """Whether the policy may leave an expert without a slot although one could be had."""
        return self.policy.refuses

    @property
    def address(self) -> Tensor:
        """int64 ``[L, E]``, padded: where each expert is read from now."""
        return self._tables.address

    @property
    def slot_of(self) -> Tensor:
        """int32 ``[L, E]``, padded: each expert's slot, ABSENT where it has none."""
        return self._tables.slot_of

    def addresses(self, layer: int) -> Tensor:
        """int64 ``[experts of the layer]``: a view of ``address``."""
        rows = self._layers[layer]
        return rows.address[: rows.experts]

    def layer(self, layer: int) -> LayerTables:
        """The controller's own tables of a layer."""
        return self._layers[layer]

    def begin_step(self) -> None:
        """The uses that follow are later than all before; an operation on the device."""
        self._tables.step.add_(1)

    def resolve(self, layer: int, ids: Tensor, count: bool = True, keep_current: bool = False) -> None:
        """Give the missing experts among ``ids`` slots, and say what ``fill`` has to copy: see ``resolve.resolve``.

        Where all experts are resident this only counts, and with ``count=False`` launches nothing.
        """
        rows = self._layers[layer]
        if not self._whole[layer]:
            resolve.resolve(rows, ids, count, keep_current)
        elif count and not keep_current:
            resolve.count_hits(rows, ids)

    def fill(self, layer: int, ahead: int = 0) -> None:
        """Copy the records that the last ``resolve`` of ``layer`` gave slots to; ``ahead``: see ``fill.fill``."""
        if not self._whole[layer]:
            fill.fill(self._layers[layer], ahead)

    def prefetch(self, layer: int, ids: Tensor) -> None:
        """Bring experts that will probably be used in this step, in place of none that was used in it already.

        For a stream beside the computation. Counts no requests; an expert that is used later is a hit.
        """
        self.choose(layer, ids)
        self.fill(layer, ahead=1)

    def choose(self, layer: int, ids: Tensor) -> None:
        """The first half of ``prefetch``: slots for ``ids``, for ``fill`` to follow on whatever stream waits for it."""
        self.resolve(layer, ids, count=False, keep_current=True)

    def all_resident(self, layer: int) -> bool:
        """Whether every expert of ``layer`` has a slot for good: it has room for all, and was preloaded."""
        return self._whole[layer]

    def preload(self) -> None:
        """Fill each pool with the layer's first experts of its size, those worth most before all others, in place of
        what is there; uncounted."""
        layers = zip(self.store.layers, self.plan, self._tables.rate.tolist(), strict=True)
        owners = [_first_experts(records.nbytes, pools, worth) for records, pools, worth in layers]
        for layer, row in enumerate(owners):
            for slot, expert in enumerate(row):
                self.slot_tensor(layer, slot).copy_(self.store.record(layer, expert), non_blocking=True)
        self._tables.place(owners)
        self._whole = [len(row) == rows.experts for row, rows in zip(owners, self._layers, strict=True)]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # whatever stream comes next sees the records

    def slot_tensor(self, layer: int, slot: int) -> Tensor:
        """The bytes of a slot, uint8 ``[nbytes]``."""
        start, nbytes = self._offsets[layer][slot]
        return self._slots[start : start + nbytes]

    def resident_experts(self) -> list[list[int]]:
        """The experts of each layer that have a slot, ascending; waits for the device."""
        return [[expert for expert, slot in enumerate(row) if slot != ABSENT] for row in self.slot_of.tolist()]

    @property
    def stats(self) -> CacheStats:
        """Counts since the last reset: a request is one distinct expert of one ``resolve``. Waits for the device.

        ``bytes_moved`` includes the misses that were read from the host without a slot, and what was prefetched.
        Waiting is not seen from the host: ``stall_seconds`` is 0.
        """
        rows = self._tables.counters.tolist()
        layers = tuple(LayerStats(hits, misses) for hits, misses, _, _ in rows)
        return CacheStats(
            hits=sum(layer.hits for layer in layers),
            misses=sum(layer.misses for layer in layers),
            bytes_moved=sum(moved + prefetched for _, _, moved, prefetched in rows),
            layers=layers,
        )

    @property
    def prefetched_bytes(self) -> int:
        """The part of ``bytes_moved`` that ``prefetch`` moved; waits for the device."""
        return int(self._tables.counters[:, 3].sum())

    def reset_stats(self) -> None:
        """Count from zero again; what is resident stays."""
        self._tables.counters.zero_()

    @property
    def device_bytes(self) -> int:
        """Bytes that the slots take on the device, as planned."""
        return sum(nbytes * slots for pools in self.plan for nbytes, slots in pools)

    @property
    def table_bytes(self) -> int:
        """Bytes of the controller's own tables on the device."""
        return self._tables.device_bytes


def _offsets(plan: Sequence[Pools]) -> tuple[list[list[tuple[int, int]]], int]:
    """(start, bytes) of each layer's slots in one buffer, and the buffer's bytes."""
    end, rows = 0, []
    for pools in plan:
        row = []
        for nbytes, slots in pools:
            for _ in range(slots):
                row.append((end, nbytes))
                end += -(-nbytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
        rows.append(row)
    return rows, end


def _aligned(nbytes: int, device: torch.device) -> Tensor:
    whole = torch.empty(nbytes + RECORD_ALIGNMENT, dtype=torch.uint8, device=device)
    skipped = -whole.data_ptr() % RECORD_ALIGNMENT
    return whole[skipped : skipped + nbytes]


def _host_addresses(store: ExpertStore, device: torch.device) -> list[list[int]]:
    addresses = [
        [store.record(layer, expert).data_ptr() for expert in range(len(records.nbytes))]
        for layer, records in enumerate(store.layers)
    ]
    odd = next((each for row in addresses for each in row if each % FIELD_ALIGNMENT), None)
    if device.type == "cuda" and odd is not None:
        raise ExpertFlowError(
            f"a record lies at address {odd}: kernels read {FIELD_ALIGNMENT} bytes at once, so records must start on "
            f"{FIELD_ALIGNMENT}-byte boundaries: make the store with pin=True"
        )
    return addresses


def _first_experts(nbytes: Sequence[int], pools: Pools, worth: Sequence[float]) -> list[int]:
    owners: list[int] = []
    for size, slots in pools:
        fitting = [expert for expert, each in enumerate(nbytes) if each == size]
        owners += sorted(fitting, key=lambda expert: -worth[expert])[:slots]
    return owners
