"""From routed ids to addresses: who is resident, who gets a slot, who must go for it. Decides, and moves no bytes.

``resolve`` runs on the device without a host (resolve_kernel.py); ``SlotBook`` is the same rule in plain lists, the
kernel's ground truth and what runs on a CPU.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.kernels import use_triton
from expertflow_quant.offload.layer_policy import RECENT, single
from expertflow_quant.offload.resident_tables import ABSENT, AGES, MOST_IDS, LayerTables


def resolve(layer: LayerTables, ids: Tensor, count: bool = True, keep_current: bool = False) -> None:
    """Bring the tables of ``layer`` to where ``ids`` (int32 or int64 ``[T, K]``) are about to be used.

    Ids outside the layer's experts are ignored. Residents among ``ids`` are stamped with the step. Each missing
    expert, in the order of their numbers, takes a slot of its record's size: free ones first, then by oldest stamp,
    then by slot number; never one whose owner is among ``ids``. It is stamped, its address becomes the slot's, an
    evicted expert's becomes the host's again, and (host address, slot address, bytes) goes on the todo list, which
    starts empty at every call. A missing expert that finds no slot keeps its host address.

    Under a ranked policy (layer_policy.py) the missing experts come by their worth, greatest first, and slots by that
    of their owners, least first, before stamp (as far back as AGES steps) and number; an expert that the policy refuses
    a slot keeps its host address. What is asked for is a use, and counted before anything is decided.

    ``count``: distinct experts are counted as hits and misses, with the bytes of the misses. ``keep_current``: for
    a guess ahead of its use; slots stamped in this step are no victims, and only the bytes it moves are counted. It is
    no use, is never refused, and evicts what this step or the last one used after all else.
    Raises ExpertFlowError for ids of another dtype, in several pieces, or more than MOST_IDS.
    """
    check_ids(layer, ids)
    if use_triton(ids):
        from expertflow_quant.offload.resolve_kernel import launch_resolve

        launch_resolve(layer, ids, count, keep_current)
    else:
        resolve_reference(layer, ids, count, keep_current)


def count_hits(layer: LayerTables, ids: Tensor) -> None:
    """Count the distinct experts among ``ids`` as hits: all that is left to do where every expert has a slot."""
    check_ids(layer, ids)
    if use_triton(ids):
        from expertflow_quant.offload.resolve_kernel import launch_count_hits

        launch_count_hits(layer, ids)
    else:
        layer.counters[0] += len(wanted_experts(layer, ids))


def check_ids(layer: LayerTables, ids: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64) or ids.ndim != 2 or not ids.is_contiguous():
        raise ExpertFlowError(
            f"ids are {ids.dtype} {tuple(ids.shape)} with stride {ids.stride()}: pass int32 or int64 [T, K], contiguous"
        )
    if ids.numel() > MOST_IDS:
        raise ExpertFlowError(
            f"{ids.shape[0]} tokens of {ids.shape[1]} experts are {ids.numel()} ids: at most {MOST_IDS} are resolved "
            "at once, so stream the layer for this many tokens"
        )
    if ids.device != layer.address.device:
        raise ExpertFlowError(f"ids are on {ids.device}, the tables on {layer.address.device}: use one device")


@dataclass(frozen=True)
class Move:
    """``expert`` takes ``slot``, from which ``evicted`` goes; ABSENT if it was free."""

    expert: int
    slot: int
    evicted: int


@dataclass(frozen=True)
class Outcome:
    """What became of the experts wanted, in the order of their numbers; ``moves``, in the order of the decisions, are
    among ``misses``."""

    hits: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)


@dataclass
class SlotBook:
    """The slots of one layer: ``owner`` and ``stamp`` of each, and the pools (record sizes) of slots and experts."""

    owner: list[int]
    stamp: list[int]
    pool_of_slot: list[int]
    pool_of_expert: list[int]

    def resolve(
        self,
        wanted: Collection[int],
        step: int,
        keep_current: bool = False,
        worth: Sequence[float] | None = None,
        gain: float = inf,
    ) -> Outcome:
        """Mark the experts wanted as used in ``step``, and give slots to those that are missing. ``worth``: every
        expert's, under a ranked policy with ``gain``."""
        slot_of = {expert: slot for slot, expert in enumerate(self.owner) if expert != ABSENT}
        outcome = Outcome(
            hits=[expert for expert in sorted(wanted) if expert in slot_of],
            misses=[expert for expert in sorted(wanted) if expert not in slot_of],
        )
        victims = [
            slot
            for slot, expert in enumerate(self.owner)
            if expert not in wanted and not (keep_current and self.stamp[slot] == step)
        ]
        missing, cost = outcome.misses, [0.0] * len(self.owner)
        if worth is None:
            victims.sort(key=lambda slot: (self.stamp[slot], slot))  # free slots are stamped -1
        else:
            cost = [self._cost(slot, step, keep_current, worth) for slot in range(len(self.owner))]
            victims.sort(key=lambda slot: (cost[slot], -min(self._age(slot, step), AGES), slot))
            missing = sorted(missing, key=lambda expert: -worth[expert])
        for expert in outcome.hits:
            self.stamp[slot_of[expert]] = step
        for expert in missing:
            fitting = [slot for slot in victims if self.pool_of_slot[slot] == self.pool_of_expert[expert]]
            if fitting and (worth is None or keep_current or single(worth[expert] + gain) > cost[fitting[0]]):
                slot = fitting[0]
                victims.remove(slot)
                outcome.moves.append(Move(expert, slot, self.owner[slot]))
                self.owner[slot], self.stamp[slot] = expert, step
        return outcome

    def _age(self, slot: int, step: int) -> int:
        return (step - self.stamp[slot]) % 2**32

    def _cost(self, slot: int, step: int, keep_current: bool, worth: Sequence[float]) -> float:
        """What taking ``slot`` costs: its owner's worth, less than nothing where it is free."""
        if self.owner[slot] == ABSENT:
            return -1.0
        recent = keep_current and self._age(slot, step) <= 1
        return single(worth[self.owner[slot]] + RECENT) if recent else worth[self.owner[slot]]


def wanted_experts(layer: LayerTables, ids: Tensor) -> set[int]:
    """The distinct experts of ``layer`` among ``ids``."""
    return {expert for expert in ids.flatten().tolist() if 0 <= expert < layer.experts}


def resolve_reference(layer: LayerTables, ids: Tensor, count: bool, keep_current: bool) -> None:
    """``resolve`` by a SlotBook, on tensors of any device."""
    book = SlotBook(
        layer.owner[: layer.slots].tolist(),
        layer.stamp[: layer.slots].tolist(),
        layer.pool_of_slot[: layer.slots].tolist(),
        layer.pool_of_expert[: layer.experts].tolist(),
    )
    wanted, worth = wanted_experts(layer, ids), None
    if layer.policy.ranked:
        worth = worth_of(layer, set() if keep_current else wanted)
    outcome = book.resolve(wanted, int(layer.step), keep_current, worth, layer.policy.gain)
    layer.owner[: layer.slots] = torch.tensor(book.owner, dtype=torch.int32)
    layer.stamp[: layer.slots] = torch.tensor(book.stamp, dtype=torch.int32)
    for place, move in enumerate(outcome.moves):
        if move.evicted != ABSENT:
            layer.slot_of[move.evicted] = ABSENT
            layer.address[move.evicted] = layer.host_address[move.evicted]
        layer.slot_of[move.expert] = move.slot
        layer.address[move.expert] = layer.slot_address[move.slot]
        layer.todo_src[place] = layer.host_address[move.expert]
        layer.todo_dst[place] = layer.slot_address[move.slot]
        layer.todo_nbytes[place] = layer.nbytes[move.expert]
    layer.todo_count[0] = len(outcome.moves)
    _count(layer, outcome, count, keep_current)


def worth_of(layer: LayerTables, used: Collection[int]) -> list[float]:
    """What each expert of ``layer`` is worth in this step, when those in ``used`` have been counted."""
    ages = (layer.step - layer.used_at).to(torch.int64) % 2**32
    worth = layer.rate * layer.decay[ages.clamp(max=len(layer.decay) - 1)]
    if used:
        worth[list(used)] += layer.policy.use
        layer.rate[list(used)], layer.used_at[list(used)] = worth[list(used)], layer.step
    return worth[: layer.experts].tolist()


def _count(layer: LayerTables, outcome: Outcome, count: bool, keep_current: bool) -> None:
    def nbytes(experts: list[int]) -> int:
        return int(layer.nbytes[experts].sum())

    if keep_current:
        layer.counters[3] += nbytes([move.expert for move in outcome.moves])
    elif count:
        layer.counters[0] += len(outcome.hits)
        layer.counters[1] += len(outcome.misses)
        layer.counters[2] += nbytes(outcome.misses)
