"""Slots without bytes: how many each size class gets, and which expert lies in which slot.

Everything here is ids and counts, so that a recorded trace can be replayed without a model or a device.
Records of equal size share a class; a class has its own slots and its own policy, because a slot fits only
its own size.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.budget import BudgetError, format_bytes, format_bytes_up
from expertflow_quant.offload.policy import Key, Policy


@dataclass(frozen=True)
class LayerRecords:
    """One MoE layer: bytes of each expert's record, and how many experts a token is routed to."""

    nbytes: tuple[int, ...]
    top_k: int

    def __post_init__(self) -> None:
        if not self.nbytes or min(self.nbytes) <= 0:
            raise ExpertFlowError(f"records of {self.nbytes} bytes: a layer needs experts, each of at least one byte")
        if not 1 <= self.top_k <= len(self.nbytes):
            raise ExpertFlowError(f"top_k {self.top_k} must be between 1 and the layer's {len(self.nbytes)} experts")


@dataclass(frozen=True)
class SizeClass:
    """Slots for records of ``nbytes``: how many there are, for how many records, and how few would do; ``layer``: the
    only layer that they serve, None for all."""

    nbytes: int
    records: int
    minimum: int
    slots: int
    layer: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.slots <= self.records:
            raise ExpertFlowError(f"{self}: slots must lie between the minimum and the number of records")


@dataclass(frozen=True)
class Placement:
    """Where a requested expert lies: slot ``slot`` of class ``size_class``; ``hit`` if it was resident
    already, otherwise its bytes must be copied in, over those of ``evicted`` if a record had to go."""

    size_class: int
    slot: int
    hit: bool
    evicted: Key | None = None


def plan_slots(layers: Sequence[LayerRecords], budget_bytes: int) -> tuple[SizeClass, ...]:
    """Size classes, smallest record first, that fit into ``budget_bytes``.

    Every class has at least one token's working set: the most experts of that size that one token can meet in
    a layer. What is left goes to the classes in proportion to the bytes of all their records, and whole slots
    that still fit go to the class whose records are least covered. Raises BudgetError when the minimum does
    not fit.
    """
    classes = _minimum_classes(layers)
    minimum = sum(size.nbytes * size.minimum for size in classes)
    if budget_bytes < minimum:
        raise BudgetError(_too_small(layers, budget_bytes, minimum))
    slots = _proportional(classes, budget_bytes - minimum)
    left = budget_bytes - sum(size.nbytes * count for size, count in zip(classes, slots, strict=True))
    while True:
        growing = [
            (slots[i] / size.records, i)
            for i, size in enumerate(classes)
            if slots[i] < size.records and size.nbytes <= left
        ]
        if not growing:
            break
        chosen = min(growing)[1]
        slots[chosen] += 1
        left -= classes[chosen].nbytes
    return tuple(
        SizeClass(size.nbytes, size.records, size.minimum, count) for size, count in zip(classes, slots, strict=True)
    )


def minimum_bytes(layers: Sequence[LayerRecords]) -> int:
    """Bytes of the smallest cache that is exact: one token's working set in every size class."""
    return sum(size.nbytes * size.minimum for size in _minimum_classes(layers))


def _minimum_classes(layers: Sequence[LayerRecords]) -> list[SizeClass]:
    records: dict[int, int] = {}
    minimum: dict[int, int] = {}
    for layer in layers:
        for nbytes in set(layer.nbytes):
            count = layer.nbytes.count(nbytes)
            records[nbytes] = records.get(nbytes, 0) + count
            minimum[nbytes] = max(minimum.get(nbytes, 0), min(layer.top_k, count))
    return [SizeClass(nbytes, records[nbytes], minimum[nbytes], minimum[nbytes]) for nbytes in sorted(records)]


def _proportional(classes: Sequence[SizeClass], spare: int) -> list[int]:
    total = sum(size.nbytes * size.records for size in classes)
    return [min(size.records, size.minimum + spare * size.records // total) for size in classes]


def _too_small(layers: Sequence[LayerRecords], budget_bytes: int, minimum: int) -> str:
    # The message speaks of the layer whose experts need the most room for one token.
    def token_bytes(layer: LayerRecords) -> int:
        return sum(sorted(layer.nbytes)[-layer.top_k :])

    worst = max(range(len(layers)), key=lambda i: token_bytes(layers[i]))
    held = budget_bytes // max(layers[worst].nbytes)
    sizes = len({nbytes for layer in layers for nbytes in layer.nbytes})
    return (
        f"expert memory {format_bytes(budget_bytes)} holds {held} expert{'' if held == 1 else 's'}; "
        f"layer {worst} routes a token to {layers[worst].top_k} at once"
        + (f" and each of {sizes} record sizes needs slots of its own" if sizes > 1 else "")
        + f": raise --expert-memory to {format_bytes_up(minimum)} or use a smaller format"
    )


class SlotTable:
    """The slots of one size class: which expert lies where. Free slots go first; then the policy names
    victims."""

    def __init__(self, capacity: int, policy: Policy) -> None:
        self.capacity = capacity
        self._policy = policy
        self._slot_of: dict[Key, int] = {}
        self._free = list(reversed(range(capacity)))

    def __contains__(self, key: Key) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def place(self, key: Key, in_use: Collection[Key]) -> tuple[int, bool, Key | None]:
        """Slot of ``key``, whether it lay there already, and who was evicted for it. ``in_use`` is never
        evicted."""
        slot = self._slot_of.get(key)
        if slot is not None:
            self._policy.used(key)
            return slot, True, None
        slot, evicted = self._make_room(in_use)
        self._slot_of[key] = slot
        self._policy.used(key)
        return slot, False, evicted

    def offer(self, key: Key, in_use: Collection[Key]) -> tuple[int, Key | None] | None:
        """A slot for ``key``, which is only expected, and who was evicted for it; None if it has one already, or if
        the policy finds nobody outside ``in_use`` who is worth less."""
        if key in self._slot_of:
            return None
        if not self._free:
            victim = self._policy.victim(in_use)
            if victim is None or not self._policy.admits(key, victim):
                return None
        slot, _, evicted = self.place(key, in_use)
        return slot, evicted

    def drop(self, key: Key) -> None:
        """Forget ``key``: its slot is free again."""
        self._free.append(self._slot_of.pop(key))
        self._policy.removed(key)

    def _make_room(self, in_use: Collection[Key]) -> tuple[int, Key | None]:
        if self._free:
            return self._free.pop(), None
        victim = self._policy.victim(in_use)
        if victim is None:
            raise ExpertFlowError(
                f"all {self.capacity} slots of a size class are in use: process fewer experts together"
            )
        self.drop(victim)
        return self._free.pop(), victim


class ExpertTable:
    """All size classes of a model together: answers requests for experts with placements and counts
    nothing."""

    def __init__(
        self, layers: Sequence[LayerRecords], classes: Sequence[SizeClass], policy: Callable[[], Policy]
    ) -> None:
        index_of = {(size.layer, size.nbytes): index for index, size in enumerate(classes)}
        own = {size.layer for size in classes} - {None}
        self.classes = tuple(classes)
        self._class_of = [
            [index_of[at if at in own else None, nbytes] for nbytes in layer.nbytes] for at, layer in enumerate(layers)
        ]
        self._tables = [SlotTable(size.slots, policy()) for size in classes]

    def __contains__(self, key: Key) -> bool:
        return key in self._tables[self.class_of(key)]

    def class_of(self, key: Key) -> int:
        """Index of the size class of ``key``. Raises ExpertFlowError for an expert the model does not
        have."""
        layer, expert = key
        if not (0 <= layer < len(self._class_of) and 0 <= expert < len(self._class_of[layer])):
            raise ExpertFlowError(f"layer {layer}, expert {expert} is not in this model: it has {self._size_text()}")
        return self._class_of[layer][expert]

    def place(self, key: Key, in_use: Collection[Key]) -> Placement:
        """Give ``key`` a slot. Raises ExpertFlowError when every slot of its class holds an expert in use."""
        index = self.class_of(key)
        slot, hit, evicted = self._tables[index].place(key, in_use)
        return Placement(index, slot, hit, evicted)

    def offer(self, key: Key, in_use: Collection[Key]) -> Placement | None:
        """Give ``key`` a slot ahead of its use, if it has none and is worth one (``Policy.admits``)."""
        index = self.class_of(key)
        found = self._tables[index].offer(key, in_use)
        return None if found is None else Placement(index, found[0], False, found[1])

    def drop(self, key: Key) -> None:
        """Forget ``key``, whose bytes did not arrive."""
        self._tables[self.class_of(key)].drop(key)

    def pieces(self, layer: int, experts: Iterable[int]) -> list[list[int]]:
        """``experts`` of one layer cut into runs that fit the slots at once, resident ones first.

        Within a run every expert can be in use together; the misses of a run load while its hits are
        computed.
        """
        wanted = list(experts)
        resident = [expert for expert in wanted if (layer, expert) in self]
        missing = [expert for expert in wanted if (layer, expert) not in self]
        pieces: list[list[int]] = []
        free: list[int] = []
        for expert in resident + missing:
            index = self.class_of((layer, expert))
            if not free or not free[index]:
                pieces.append([])
                free = [size.slots for size in self.classes]
            pieces[-1].append(expert)
            free[index] -= 1
        return pieces

    def _size_text(self) -> str:
        return f"{len(self._class_of)} MoE layers of up to {max(map(len, self._class_of))} experts"
