"""A ring of pinned buffers through which records that are not pinned reach a device.

A copy from a mapped file straight to a device runs at a fifth of the link's rate and makes the host wait. Here
threads copy a piece of the record into a pinned buffer and enqueue its upload, so that files are read while
earlier pieces are on the link. A buffer is used again only when the upload out of it is over.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.host_memory import copy_bytes
from expertflow_quant.offload.store import pinned_slab

SLOTS = 8
SLOT_BYTES = 4 * 2**20
"""Holds one record of Qwen3-30B-A3B in 4 bits (2.5 MB, which the link carries at 51 of its 55 GB/s)."""
READERS = 4
"""Threads. What is in memory one copies at about 10 GB/s; what is not comes from a disk two to three times as fast by
four as by one, and no faster by eight."""


class Done(Protocol):
    """A mark on a device's queue, as torch.cuda.Event is one."""

    def synchronize(self) -> None:
        """Return when the device has passed the mark."""


Upload = Callable[[Tensor, Tensor], Done]
"""Enqueues a copy of pinned bytes (second) to device memory (first); the mark behind it."""


@dataclass
class _Buffer:
    memory: Tensor
    uploaded: Done | None = None


class DiskRing:
    """``slots`` pinned buffers of ``slot_bytes``, filled by ``readers`` threads.

    Records longer than a buffer go in pieces. ``allocate(nbytes)`` gives the memory of all buffers. Raises
    ExpertFlowError for sizes below one. Any thread may call.
    """

    def __init__(
        self,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
        readers: int = READERS,
        allocate: Callable[[int], Tensor] = pinned_slab,
    ) -> None:
        if min(slots, slot_bytes, readers) < 1:
            raise ExpertFlowError(
                f"a ring of {slots} buffers of {slot_bytes} bytes with {readers} readers: give at least 1 of each"
            )
        self.slot_bytes = slot_bytes
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for memory in allocate(slots * slot_bytes)[: slots * slot_bytes].view(slots, slot_bytes).unbind():
            self._free.put(_Buffer(memory))
        self._threads = ThreadPoolExecutor(readers, thread_name_prefix="expertflow-disk")

    def send(self, record: Tensor, slot: Tensor, upload: Upload) -> "Future[Done]":
        """Begin to copy ``record`` (uint8 ``[n]`` in host memory) to ``slot`` (uint8 ``[n]`` on the device).

        ``upload`` is called from a thread of the ring, once for each piece in order, and must enqueue on one queue of
        the device. The result is the mark behind the last piece; it is known once the host has read the record and
        enqueued everything. What reading or uploading raised comes out there. A record can be cancelled until a
        thread takes it up. Raises ExpertFlowError when the sizes differ or ``record`` is not bytes in one piece.
        """
        if record.dtype != torch.uint8 or record.stride() != (1,) or record.device.type != "cpu":
            raise ExpertFlowError(
                f"a record of {record.dtype}, stride {record.stride()} on {record.device} cannot pass the ring: "
                "give uint8 in one piece in host memory"
            )
        if record.shape != slot.shape or not record.numel():
            raise ExpertFlowError(f"a record of {record.numel()} bytes does not fill a slot of {slot.numel()} bytes")
        return self._threads.submit(self._send, record, slot, upload)

    def close(self) -> None:
        """Wait until every record that was sent is enqueued; nothing can be sent afterwards."""
        self._threads.shutdown()

    def _send(self, record: Tensor, slot: Tensor, upload: Upload) -> Done:
        for start in range(0, record.numel(), self.slot_bytes):
            piece = slice(start, start + self.slot_bytes)
            last = self._send_piece(record[piece], slot[piece], upload)
        return last

    def _send_piece(self, piece: Tensor, target: Tensor, upload: Upload) -> Done:
        buffer = self._free.get()  # in the order in which they were uploaded: the first to be over comes first
        try:
            if buffer.uploaded is not None:
                buffer.uploaded.synchronize()
            pinned = buffer.memory[: piece.numel()]
            copy_bytes(pinned, piece)
            buffer.uploaded = upload(target, pinned)
            return buffer.uploaded
        finally:
            self._free.put(buffer)


def stream_upload(stream: torch.cuda.Stream) -> Upload:
    """Uploads on ``stream``; waiting for one leaves the processor to others."""

    def upload(slot: Tensor, pinned: Tensor) -> Done:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            slot.copy_(pinned, non_blocking=True)
            done.record(stream)
        return done

    return upload
