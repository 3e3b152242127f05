"""Experts of a step that found no slot: they lie in borrowed room until their layer is computed.

Many rows may want more of a layer's experts than it has slots. Read from host memory by the products themselves, such
a record would cross the link in small pieces, and once for every block of tokens; so it is copied first, like any
other, to room that nobody needs during a step: the staging ring of the prefill. It is nobody's slot and holds the
next layer's experts a moment later. What finds no room there either is read from the host.
"""

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import RECORD_ALIGNMENT
from expertflow_quant.kernels import use_triton
from expertflow_quant.offload import fill
from expertflow_quant.offload.layer_slots import Pools
from expertflow_quant.offload.resident_tables import ABSENT, LayerTables, padded
from expertflow_quant.offload.resolve import check_ids, wanted_experts
from expertflow_quant.offload.slots import LayerRecords


class OverflowRoom:
    """``room`` uint8 ``[places, place_bytes]`` on the device, contiguous: a place for each expert that has no slot.

    ``bring`` only launches work and can be captured in a CUDA graph. All calls must be ordered, those of different
    layers too: what one brought is overwritten by the next. Raises ExpertFlowError for room that is not aligned.
    """

    def __init__(self, room: Tensor, most_experts: int) -> None:
        if room.ndim != 2 or not room.is_contiguous() or room.shape[1] % RECORD_ALIGNMENT:
            raise ExpertFlowError(
                f"overflow room {tuple(room.shape)} with stride {room.stride()}: give uint8 [places, place_bytes], "
                f"contiguous, places of multiples of {RECORD_ALIGNMENT} bytes"
            )
        self._room = room  # kept alive
        places, nbytes = room.shape
        first, device = room.data_ptr(), room.device
        self.places, self.place_bytes = places, nbytes
        self.place_address = torch.arange(first, first + places * nbytes, nbytes, dtype=torch.int64, device=device)
        self.address = torch.zeros(padded(most_experts), dtype=torch.int64, device=device)
        self.todo_src = torch.zeros(padded(places), dtype=torch.int64, device=device)
        self.todo_dst = torch.zeros_like(self.todo_src)
        self.todo_nbytes = torch.zeros(padded(places), dtype=torch.int32, device=device)
        self.todo_count = torch.zeros(1, dtype=torch.int32, device=device)

    def bring(self, layer: LayerTables, ids: Tensor) -> Tensor:
        """Addresses int64 ``[experts of the layer]`` for the product over ``ids`` (int32 or int64 ``[T, K]``), after
        ``layer`` was resolved for them: the first experts among ``ids`` without a slot, in the order of their numbers,
        take the places and are copied there; all others are where ``layer`` has them. Counts nothing: ``resolve``
        has. Valid until the next call."""
        check_ids(layer, ids)
        if use_triton(ids):
            from expertflow_quant.offload.overflow_kernel import launch_overflow

            launch_overflow(self, layer, ids)
        else:
            overflow_reference(self, layer, ids)
        fill.fill(self)
        return self.address[: layer.experts]


def overflow_reference(room: OverflowRoom, layer: LayerTables, ids: Tensor) -> None:
    """The decision of ``OverflowRoom.bring``, on tensors of any device."""
    room.address[: layer.experts] = layer.address[: layer.experts]
    slots = layer.slot_of.tolist()
    late = [expert for expert in sorted(wanted_experts(layer, ids)) if slots[expert] == ABSENT][: room.places]
    for place, expert in enumerate(late):
        room.address[expert] = room.place_address[place]
        room.todo_src[place] = layer.host_address[expert]
        room.todo_dst[place] = room.place_address[place]
        room.todo_nbytes[place] = layer.nbytes[expert]
    room.todo_count[0] = len(late)


def may_overflow(records: LayerRecords, pools: Pools, rows: int) -> bool:
    """Whether ``rows`` tokens can want more experts of one record size than the layer has slots for."""
    wanted = rows * records.top_k
    return any(slots < min(records.nbytes.count(nbytes), wanted) for nbytes, slots in pools)
