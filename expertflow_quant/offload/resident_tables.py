"""What the controller knows, as tensors on the device: where each expert is read, who lies in which slot, since when.

One row per layer, padded to the largest layer. Kernels and their twins get one layer's rows as ``LayerTables``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.layer_policy import LayerPolicy, first_worth, layer_policy
from expertflow_quant.offload.layer_slots import Pools
from expertflow_quant.offload.policy import Scores
from expertflow_quant.offload.slots import LayerRecords

ABSENT = -1
"""Slot of an expert that has none, owner and stamp of a slot that is free."""

MOST = 512
"""Experts and slots of a layer that the resolve kernel takes."""

MOST_IDS = 1024
"""Ids of one call: 32 tokens that are each routed to 32 experts."""

AGES = 4094
"""Steps since the last use beyond which equals under a ranked policy go by the number of their slots."""

COUNTERS = ("hits", "misses", "bytes", "prefetched bytes")
ROW = 16  # rows start on 16-byte boundaries, so that Triton compiles one kernel for all layers


@dataclass(frozen=True)
class LayerTables:
    """The rows of one layer with ``experts`` experts and ``slots`` slots in ``pools`` pools; all are views.

    Padded to at least ``experts``: address, host_address int64; slot_of, pool_of_expert, nbytes int32.
    Padded to at least ``slots``: owner, stamp, pool_of_slot int32; slot_address int64.
    The slots of a pool are neighbours, pools ascend: pool_start int32 ``[>= pools]`` is each pool's first slot.
    To be copied by ``fill``: the first todo_count ``[1]`` entries of todo_src, todo_dst int64, todo_nbytes int32.
    ``counters`` int64 ``[4]``: COUNTERS. ``step`` int32 ``[1]`` is that of all layers.
    ``policy`` says who goes. Padded to at least ``experts``: rate float32, each expert's as of its last use in step
    used_at int32. decay float32 ``[ages]`` is of all layers.
    """

    experts: int
    slots: int
    pools: int
    policy: LayerPolicy
    step: Tensor
    address: Tensor
    host_address: Tensor
    slot_of: Tensor
    pool_of_expert: Tensor
    nbytes: Tensor
    owner: Tensor
    stamp: Tensor
    pool_of_slot: Tensor
    slot_address: Tensor
    pool_start: Tensor
    todo_src: Tensor
    todo_dst: Tensor
    todo_nbytes: Tensor
    todo_count: Tensor
    counters: Tensor
    rate: Tensor
    used_at: Tensor
    decay: Tensor


class ResidentTables:
    """The tables of all layers on ``device``, all slots free.

    ``host_addresses`` names each expert's record, ``slot_addresses`` each slot's memory in the order of the plan's
    pools. ``policy``: see layer_policy.py, with the ``shares`` of ``first_worth``. Raises ExpertFlowError for a layer
    with more than MOST experts, a plan that is not of these layers, or a policy that is not known or lacks shares.
    """

    def __init__(
        self,
        layers: Sequence[LayerRecords],
        plan: Sequence[Pools],
        host_addresses: Sequence[Sequence[int]],
        slot_addresses: Sequence[Sequence[int]],
        device: torch.device | str,
        policy: str = "lru",
        shares: Scores | None = None,
    ) -> None:
        _check(layers, plan)
        self.policy = layer_policy(policy)
        self.layers, self.plan = tuple(layers), tuple(plan)
        experts = max(len(layer.nbytes) for layer in layers)
        slots = max(sum(count for _, count in pools) for pools in plan)
        self._rows = {"experts": padded(experts), "slots": padded(slots)}
        self._device = torch.device(device)

        sizes = [[nbytes for nbytes, _ in pools] for pools in plan]
        self.host_address = self._table("experts", host_addresses, torch.int64)
        self.address = self.host_address.clone()
        self.slot_of = self._table("experts", [], torch.int32)
        self.nbytes = self._table("experts", [layer.nbytes for layer in layers], torch.int32)
        self.pool_of_expert = self._table(
            "experts",
            [[own.index(nbytes) for nbytes in layer.nbytes] for own, layer in zip(sizes, layers, strict=True)],
            torch.int32,
        )
        self.owner = self._table("slots", [], torch.int32)
        self.stamp = self._table("slots", [], torch.int32)
        self.slot_address = self._table("slots", slot_addresses, torch.int64)
        pool_of_slot = [[pool for pool, (_, count) in enumerate(pools) for _ in range(count)] for pools in plan]
        self.pool_of_slot = self._table("slots", pool_of_slot, torch.int32)
        self.pool_start = self._table("experts", [_starts(pools) for pools in plan], torch.int32)
        self.todo_src = self._table("slots", [], torch.int64)
        self.todo_dst = self._table("slots", [], torch.int64)
        self.todo_nbytes = self._table("slots", [], torch.int32)
        self.todo_count = torch.zeros(len(layers), dtype=torch.int32, device=device)
        self.counters = torch.zeros(len(layers), len(COUNTERS), dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        rates = first_worth(self.policy, [len(layer.nbytes) for layer in layers], shares)
        self.rate = self._table("experts", rates, torch.float32)
        self.used_at = self._table("experts", [], torch.int32)
        self.decay = torch.tensor(self.policy.decay, dtype=torch.float32, device=device)

    def layer(self, index: int) -> LayerTables:
        """Views of the rows of one layer."""
        pools = self.plan[index]
        return LayerTables(
            experts=len(self.layers[index].nbytes),
            slots=sum(count for _, count in pools),
            pools=len(pools),
            policy=self.policy,
            step=self.step,
            address=self.address[index],
            host_address=self.host_address[index],
            slot_of=self.slot_of[index],
            pool_of_expert=self.pool_of_expert[index],
            nbytes=self.nbytes[index],
            owner=self.owner[index],
            stamp=self.stamp[index],
            pool_of_slot=self.pool_of_slot[index],
            slot_address=self.slot_address[index],
            pool_start=self.pool_start[index],
            todo_src=self.todo_src[index],
            todo_dst=self.todo_dst[index],
            todo_nbytes=self.todo_nbytes[index],
            todo_count=self.todo_count[index : index + 1],
            counters=self.counters[index],
            rate=self.rate[index],
            used_at=self.used_at[index],
            decay=self.decay,
        )

    def place(self, owners: Sequence[Sequence[int]]) -> None:
        """Say that slot s of layer l holds expert ``owners[l][s]``, or ABSENT, last used before the first step."""
        self.owner.copy_(self._host("slots", owners, torch.int32))
        stamps = [[ABSENT if expert == ABSENT else 0 for expert in row] for row in owners]
        self.stamp.copy_(self._host("slots", stamps, torch.int32))
        slot_of = self._host("experts", [], torch.int32)
        address, slot_address = self.host_address.cpu().clone(), self.slot_address.cpu()
        for layer, row in enumerate(owners):
            for slot, expert in enumerate(row):
                if expert != ABSENT:
                    slot_of[layer, expert] = slot
                    address[layer, expert] = slot_address[layer, slot]
        self.slot_of.copy_(slot_of)
        self.address.copy_(address)
        self.todo_count.zero_()

    @property
    def device_bytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def _host(self, row: str, values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        table = torch.full((len(self.layers), self._rows[row]), ABSENT, dtype=dtype)
        for index, entries in enumerate(values):
            table[index, : len(entries)] = torch.tensor(entries, dtype=dtype)
        return table

    def _table(self, row: str, values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        return self._host(row, values, dtype).to(self._device)


def padded(count: int) -> int:
    return max(ROW, -(-count // ROW) * ROW)


def _starts(pools: Pools) -> list[int]:
    counts = [count for _, count in pools]
    return [sum(counts[:pool]) for pool in range(len(pools))]


def _check(layers: Sequence[LayerRecords], plan: Sequence[Pools]) -> None:
    if not layers or len(layers) != len(plan):
        raise ExpertFlowError(
            f"a plan of {len(plan)} layers for {len(layers)} MoE layers: plan the slots of this model"
        )
    for index, (layer, pools) in enumerate(zip(layers, plan, strict=True)):
        if len(layer.nbytes) > MOST:
            raise ExpertFlowError(
                f"layer {index} has {len(layer.nbytes)} experts: the device's cache takes at most {MOST}, "
                "so run without the graph path"
            )
        records = [(nbytes, layer.nbytes.count(nbytes)) for nbytes in sorted(set(layer.nbytes))]
        right = [nbytes for nbytes, _ in pools] == [nbytes for nbytes, _ in records]
        if not right or not all(0 <= slots <= most for (_, slots), (_, most) in zip(pools, records, strict=True)):
            raise ExpertFlowError(
                f"layer {index} has (bytes, records) {records}, its slots were planned as {pools}: "
                "plan the slots of this model with plan_layer_slots"
            )
