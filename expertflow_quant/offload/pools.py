"""The two ways in which slots are shared, over ids alone: one pool per record size for all layers, as in ExpertCache,
and pools of each layer's own, as in ResidentExperts. Both take any policy.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from expertflow_quant.offload.layer_slots import Pools, plan_layer_slots
from expertflow_quant.offload.policy import Key, Policy, Ranked
from expertflow_quant.offload.slots import ExpertTable, LayerRecords, plan_slots

MakePolicy = Callable[[], Policy]


class Arrangement(Protocol):
    """Slots that answer requests and take what is fetched ahead."""

    def preload(self) -> None:
        """Fill free slots with each layer's first experts, as the runtime does before its first request."""

    def request(self, layer: int, experts: Collection[int]) -> list[int]:
        """Serve the distinct experts that a layer wants; those that were missing."""

    def missing(self, layer: int, experts: Collection[int]) -> list[int]:
        """Those among ``experts`` that are not resident; nothing moves."""

    def offer(self, layer: int, expert: int, in_use: Collection[Key]) -> bool:
        """Fetch an expert ahead of its use if it is worth a slot; whether it was fetched."""


class SharedPools:
    """ExpertCache's slots: every missing expert gets one, whatever layer had it before."""

    def __init__(self, layers: Sequence[LayerRecords], budget_bytes: int, make_policy: MakePolicy) -> None:
        self._layers = layers
        self._table = ExpertTable(layers, plan_slots(layers, budget_bytes), make_policy)

    def preload(self) -> None:
        free = [size.slots for size in self._table.classes]
        for expert in range(max(len(layer.nbytes) for layer in self._layers)):
            for layer in (index for index, records in enumerate(self._layers) if expert < len(records.nbytes)):
                index = self._table.class_of((layer, expert))
                if free[index]:
                    free[index] -= 1
                    self._table.place((layer, expert), ())

    def request(self, layer: int, experts: Collection[int]) -> list[int]:
        missing = []
        for piece in self._table.pieces(layer, sorted(experts)):
            in_use = {(layer, expert) for expert in piece}
            missing += [expert for expert in piece if not self._table.place((layer, expert), in_use).hit]
        return missing

    def missing(self, layer: int, experts: Collection[int]) -> list[int]:
        return [expert for expert in sorted(experts) if (layer, expert) not in self._table]

    def offer(self, layer: int, expert: int, in_use: Collection[Key]) -> bool:
        return self._table.offer((layer, expert), in_use) is not None


class LayerPools:
    """ResidentExperts' slots: a missing expert gets one of its layer and size, or is read where it lies.

    As in ``resolve.SlotBook``: nobody who is wanted now is evicted, missing experts come in the order of their numbers,
    and what one request used ages in the order of the slots. Under a ranked policy the missing ones come in the order
    of their ranks, and one that is worth less than whom it would replace is read where it lies.
    """

    def __init__(
        self,
        layers: Sequence[LayerRecords],
        budget_bytes: int,
        make_policy: MakePolicy,
        plan: Sequence[Pools] | None = None,
    ) -> None:
        self._layers = layers
        self._pools = [
            {nbytes: _Pool(slots, make_policy()) for nbytes, slots in pools}
            for pools in (plan_layer_slots(layers, budget_bytes) if plan is None else plan)
        ]

    def preload(self) -> None:
        for layer, (records, pools) in enumerate(zip(self._layers, self._pools, strict=True)):
            for size, pool in pools.items():
                pool.request([(layer, expert) for expert, each in enumerate(records.nbytes) if each == size])

    def request(self, layer: int, experts: Collection[int]) -> list[int]:
        missing: list[int] = []
        for size, pool in self._pools[layer].items():
            wanted = [(layer, expert) for expert in sorted(experts) if self._layers[layer].nbytes[expert] == size]
            missing += [expert for _, expert in pool.request(wanted)]
        return missing

    def missing(self, layer: int, experts: Collection[int]) -> list[int]:
        pools, nbytes = self._pools[layer], self._layers[layer].nbytes
        return [expert for expert in sorted(experts) if (layer, expert) not in pools[nbytes[expert]]]

    def offer(self, layer: int, expert: int, in_use: Collection[Key]) -> bool:
        return self._pools[layer][self._layers[layer].nbytes[expert]].offer((layer, expert), in_use)


class _Pool:
    def __init__(self, slots: int, policy: Policy) -> None:
        self._owner: list[Key | None] = [None] * slots
        self._policy = policy

    def __contains__(self, key: Key) -> bool:
        return key in self._owner

    def request(self, wanted: Sequence[Key]) -> list[Key]:
        """Those among ``wanted``, of this pool's size and in order, that were missing."""
        resident = set(self._owner)
        missing = [key for key in wanted if key not in resident]
        in_use = set(wanted)
        by_need = sorted(missing, key=self._policy.rank, reverse=True) if isinstance(self._policy, Ranked) else missing
        for key in by_need:
            self._place(key, in_use)
        for owner in self._owner:
            if owner in in_use:
                self._policy.used(owner)
        return missing

    def offer(self, key: Key, in_use: Collection[Key]) -> bool:
        if key in self._owner or not self._place(key, in_use):
            return False
        self._policy.used(key)
        return True

    def _place(self, key: Key, in_use: Collection[Key]) -> bool:
        if None in self._owner:
            self._owner[self._owner.index(None)] = key
            return True
        victim = self._policy.victim(in_use)
        if victim is None or not self._policy.admits(key, victim):
            return False
        self._policy.removed(victim)
        self._owner[self._owner.index(victim)] = key
        return True
