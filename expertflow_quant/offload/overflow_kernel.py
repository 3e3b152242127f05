# mypy: disable-error-code="no-untyped-def"
"""The kernel of ``OverflowRoom.bring``: one program that deals places out to the experts that found no slot."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from expertflow_quant.offload.resident_tables import LayerTables
from expertflow_quant.offload.resolve_kernel import power, tile, wanted_experts, warps

if TYPE_CHECKING:
    from expertflow_quant.offload.overflow import OverflowRoom


def launch_overflow(room: "OverflowRoom", layer: LayerTables, ids: Tensor) -> None:
    """Places, addresses and the todo list in one launch; the ids were checked."""
    experts = power(layer.experts)
    _overflow[(1,)](
        ids,
        layer.address,
        layer.host_address,
        layer.slot_of,
        layer.nbytes,
        room.place_address,
        room.address,
        room.todo_src,
        room.todo_dst,
        room.todo_nbytes,
        room.todo_count,
        ids.numel(),
        layer.experts,
        room.places,
        TILE=tile(ids.numel(), experts),
        EXPERTS=experts,
        num_warps=warps(experts),
    )


@triton.jit(do_not_specialize=["pairs", "experts", "places"], do_not_specialize_on_alignment=["ids"])
def _overflow(
    ids,
    address,
    host_address,
    slot_of,
    nbytes,
    place_address,
    found,
    todo_src,
    todo_dst,
    todo_nbytes,
    todo_count,
    pairs,
    experts,
    places,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    real = expert < experts
    late = (wanted_experts(ids, pairs, experts, TILE, EXPERTS) > 0) & (
        tl.load(slot_of + expert, mask=real, other=0) < 0
    )
    place = tl.cumsum(late.to(tl.int32), 0) - 1
    gets = late & (place < places)
    there = tl.load(place_address + place, mask=gets, other=0)
    here = tl.load(address + expert, mask=real, other=0)
    tl.store(found + expert, tl.where(gets, there, here), mask=real)
    tl.store(todo_src + place, tl.load(host_address + expert, mask=gets, other=0), mask=gets)
    tl.store(todo_dst + place, there, mask=gets)
    tl.store(todo_nbytes + place, tl.load(nbytes + expert, mask=gets, other=0), mask=gets)
    tl.store(todo_count, tl.sum(gets.to(tl.int32)))
