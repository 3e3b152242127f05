"""The device side: slots that hold some of the records, filled on demand, exact at any budget.

A record's bytes are the same in the store and in a slot, so a miss is one copy. ``begin`` starts it,
``finish`` makes the computation wait for it (copies.py). Which expert goes is the table's affair (slots.py),
never decided here.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from expertflow_quant.offload.ahead import FetchAhead
from expertflow_quant.offload.copies import make_copies
from expertflow_quant.offload.policy import LRU, Key, Policy, Progress
from expertflow_quant.offload.slots import ExpertTable, Placement, SizeClass, plan_slots
from expertflow_quant.offload.stats import CacheStats, LayerStats
from expertflow_quant.offload.store import ExpertStore

Place = tuple[int, int]
"""(size class, slot)."""


class ExpertCache:
    """Slots on ``device`` worth at most ``budget_bytes``, over the records of ``store``.

    ``policy`` makes one policy per size class; they watch ``progress``, which ``begin_layer`` moves on. ``classes``:
    the slots, by default those that all layers share; ``ahead``: records that may be fetched beside each layer's
    computation, if a step's scores expect them. Raises BudgetError, before anything is allocated, when the budget is
    below ``minimum_bytes``. One thread at a time.
    """

    def __init__(
        self,
        store: ExpertStore,
        budget_bytes: int,
        device: torch.device | str = "cpu",
        policy: Callable[[], Policy] = LRU,
        progress: Progress | None = None,
        classes: Sequence[SizeClass] | None = None,
        ahead: float = 0.0,
    ) -> None:
        self.store = store
        self.progress = progress or Progress([len(layer.nbytes) for layer in store.layers])
        shared = plan_slots(store.layers, budget_bytes) if classes is None else classes
        self.minimum_bytes = sum(size.nbytes * size.minimum for size in shared)
        self._table = ExpertTable(store.layers, shared, policy)
        largest = max(max(layer.nbytes) for layer in store.layers)
        self._ahead = FetchAhead(store.layers, self.progress, ahead * largest)
        self._slots = [list(_buffer(size, device).unbind()) for size in self.classes]
        self.device = self._slots[0][0].device
        self._place_of: dict[Key, Place] = {}
        self._views: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        self._copies = make_copies(self.device)
        self.reset_stats()

    def __deepcopy__(self, memo: object) -> "ExpertCache":
        """A copied model shares the cache of the first."""
        return self

    @property
    def classes(self) -> tuple[SizeClass, ...]:
        return self._table.classes

    @property
    def device_bytes(self) -> int:
        """Bytes that the slots take on the device."""
        return sum(size.nbytes * size.slots for size in self.classes)

    @property
    def stats(self) -> CacheStats:
        layers = tuple(LayerStats(*counts) for counts in zip(self._hits, self._misses, strict=True))
        ahead = self._ahead.moved - self._ahead_before
        moved = self._moved + ahead
        return CacheStats(sum(self._hits), sum(self._misses), moved, self._copies.stall_seconds(), layers, ahead)

    def reset_stats(self) -> None:
        """Count from zero again; what is resident stays."""
        self._hits = [0] * len(self.store.layers)
        self._misses = [0] * len(self.store.layers)
        self._moved, self._ahead_before = 0, self._ahead.moved
        self._copies.reset()

    def is_resident(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._table

    def pieces(self, layer: int, experts: Iterable[int]) -> list[list[int]]:
        """``experts`` of one layer in runs that fit the slots, resident ones first (ExpertTable.pieces)."""
        return self._table.pieces(layer, experts)

    def preload(self) -> None:
        """Fill the slots with each layer's first experts, uncounted; a full budget then never misses."""
        layers = self.store.layers
        free = [size.slots for size in self.classes]
        for expert in range(max(len(layer.nbytes) for layer in layers)):
            for layer in (index for index, records in enumerate(layers) if expert < len(records.nbytes)):
                size_class = self._table.class_of((layer, expert))
                if free[size_class]:
                    free[size_class] -= 1
                    self._load((layer, expert), ())
                    self.finish(layer, expert)
        self._copies.reset()

    def begin_layer(self, layer: int, experts: Collection[int]) -> None:
        """``layer`` is about to ask for these distinct experts; one that is not further on begins a new step."""
        if layer <= self.progress.layer or self.progress.step < 0:
            self.progress.begin_step()
        self.progress.begin_layer(layer, experts)

    def fetch_ahead(self, experts: Collection[int]) -> None:
        """Start copies of what later layers are expected to want: the present one has asked for ``experts``, all that
        it needs, and computes next."""
        self._ahead.after(experts, self._offer)

    def begin(self, layer: int, expert: int, in_use: Collection[Key] = ()) -> None:
        """Ask for an expert: a miss starts its copy; experts in ``in_use`` keep their slots.

        Raises ExpertFlowError when every slot of the expert's size is in use.
        """
        if self._load((layer, expert), in_use):
            self._misses[layer] += 1
            self._moved += self.store.layers[layer].nbytes[expert]
        else:
            self._hits[layer] += 1

    def finish(self, layer: int, expert: int) -> Tensor:
        """The slot of an expert asked for, uint8 ``[nbytes]``, arrived; valid until it is evicted."""
        size_class, slot = self._arrived(layer, expert)
        return self._slots[size_class][slot]

    def finish_views(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Like ``finish``, as the record's named fields over the slot's memory."""
        size_class, slot = self._arrived(layer, expert)
        layout = self.store.layout(layer, expert)
        seen = (size_class, slot, id(layout))  # the store keeps one object per layout, as long as itself
        views = self._views.get(seen)
        if views is None:
            views = self._views[seen] = layout.views(self._slots[size_class][slot])
        return views

    def acquire(self, layer: int, expert: int, in_use: Collection[Key] = ()) -> Tensor:
        """``begin`` and ``finish`` in one."""
        self.begin(layer, expert, in_use)
        return self.finish(layer, expert)

    def _arrived(self, layer: int, expert: int) -> Place:
        key = (layer, expert)
        self._copies.finish(key)
        return self._place_of[key]

    def _load(self, key: Key, in_use: Collection[Key]) -> bool:
        """Make ``key`` resident or on its way; whether a copy was needed."""
        placement = self._table.place(key, in_use)
        if not placement.hit:
            self._fill(key, placement)
        return not placement.hit

    def _offer(self, layer: int, expert: int, in_use: Collection[Key]) -> bool:
        placement = self._table.offer((layer, expert), in_use)
        if placement is not None:
            self._fill((layer, expert), placement)
        return placement is not None

    def _fill(self, key: Key, placement: Placement) -> None:
        if placement.evicted is not None:
            self._copies.forget(placement.evicted)
            del self._place_of[placement.evicted]
        slot = self._slots[placement.size_class][placement.slot]
        try:
            self._copies.start(key, slot, self.store.record(*key))
        except BaseException:
            self._table.drop(key)
            raise
        self._place_of[key] = (placement.size_class, placement.slot)


def _buffer(size: SizeClass, device: torch.device | str) -> Tensor:
    return torch.empty(size.slots, size.nbytes, dtype=torch.uint8, device=device)
