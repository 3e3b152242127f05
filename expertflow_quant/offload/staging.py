"""A ring of room on the device that records pass through once: what a prefill streams and does not keep.

The host asks for copies far ahead and never waits: on CUDA they run on a stream of their own, a chunk of records
starts when the computation has released the chunk that lay in the same place, and the computation waits for a
chunk when it needs it, all by events. A chunk's records are packed one after the other, so records that are
neighbours in host memory arrive in one copy: a large copy reaches more of the link than one per record.
"""

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import RECORD_ALIGNMENT


class Chunk:
    """Records that were staged together. ``addresses`` int64 ``[n]`` on the device: where each of them lies, to be
    read by work that was enqueued between ``wait`` and ``release``."""

    def __init__(self, ring: "StagingRing", position: int, addresses: Tensor, nbytes: int) -> None:
        self.position = position
        self.addresses = addresses
        self.nbytes = nbytes
        self._ring = ring

    def wait(self) -> None:
        """Let later work of the current stream run only when the records are there."""
        self._ring.wait(self)

    def release(self) -> None:
        """Work enqueued so far on the current stream was the last to read the records."""
        self._ring.release(self)


class StagingRing:
    """``slots`` slots of ``slot_bytes`` on ``device``, used ``chunk`` at a time, in turn.

    ``slot_bytes`` is the size of the largest record. Raises ExpertFlowError for sizes that make no ring. One thread,
    and one compute stream at a time.
    """

    def __init__(self, device: torch.device | str, slots: int, slot_bytes: int, chunk: int) -> None:
        if chunk < 1 or slots < chunk or slots % chunk:
            raise ExpertFlowError(f"{slots} staging slots in chunks of {chunk}: slots must be a multiple of the chunk")
        if slot_bytes < 1 or slot_bytes % RECORD_ALIGNMENT:
            raise ExpertFlowError(
                f"staging slots of {slot_bytes} bytes: records are multiples of {RECORD_ALIGNMENT} bytes, "
                "give the size of the largest"
            )
        self.chunk = chunk
        self.slot_bytes = slot_bytes
        self.positions = slots // chunk
        self._rooms = torch.empty(self.positions, chunk * slot_bytes, dtype=torch.uint8, device=device)
        self.device = self._rooms.device
        self._mixed = torch.empty(self.positions, chunk, dtype=torch.int64, device=device)
        self._tables: dict[int, Tensor] = {}
        self._held: list[Chunk | None] = [None] * self.positions
        self._next = 0
        self._stream = self._copy_stream()
        self._arrived: list[torch.cuda.Event | None] = [None] * self.positions
        self._released: list[torch.cuda.Event | None] = [None] * self.positions

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots."""
        return self._rooms.numel()

    @property
    def has_room(self) -> bool:
        """Whether ``stage`` may be called: the oldest chunk was released (by the host's order of calls)."""
        return self._held[self._next] is None

    @property
    def places(self) -> Tensor:
        """All of it, uint8 ``[slots, slot_bytes]``: for work on the compute stream while nothing is staged."""
        return self._rooms.view(-1, self.slot_bytes)

    def room(self, position: int) -> Tensor:
        """The bytes at ``position`` of the ring, uint8 ``[chunk * slot_bytes]``."""
        return self._rooms[position]

    def stage(self, records: Sequence[Tensor]) -> Chunk:
        """Begin to copy ``records`` (uint8 ``[nbytes]`` each, in host memory) to the next place of the ring.

        From pinned memory the host goes on at once; from other memory it waits for the copy, and for the release
        of the place. Raises ExpertFlowError for records that do not fit, or when the ring has no room.
        """
        sizes = [record.numel() for record in records]
        self._check(records, sizes)
        return self.stage_runs(contiguous_runs(records), sizes, records[0].is_pinned())

    def stage_runs(self, runs: Sequence[Tensor], sizes: Sequence[int], pinned: bool) -> Chunk:
        """``stage`` of records of ``sizes`` that ``runs`` hold one after the other, all pinned or none: for callers who
        know their records and whose host has little time. Raises ExpertFlowError when the ring has no room."""
        if not self.has_room:
            raise ExpertFlowError(f"all {self.positions} chunks of the staging ring are in use: release the oldest")
        position = self._next
        room, at = self.room(position), 0
        uniform = self._table(sizes[0])[position, : len(sizes)] if len(set(sizes)) == 1 else None
        with self._copying():
            released = self._released[position]
            if self._stream is not None and released is not None:
                self._stream.wait_event(released)
            for run in runs:
                nbytes = run.numel()
                room[at : at + nbytes].copy_(run, non_blocking=pinned)
                at += nbytes
            addresses = self._upload_addresses(position, sizes) if uniform is None else uniform
            if self._stream is not None:
                self._arrived[position] = self._stream.record_event()
        chunk = self._held[position] = Chunk(self, position, addresses, at)
        self._next = (position + 1) % self.positions
        return chunk

    def wait(self, chunk: Chunk) -> None:
        """See ``Chunk.wait``."""
        self._check_held(chunk)
        arrived = self._arrived[chunk.position]
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

    def release(self, chunk: Chunk) -> None:
        """See ``Chunk.release``; chunks may be released in any order."""
        self._check_held(chunk)
        if self._stream is not None:
            self._released[chunk.position] = torch.cuda.current_stream(self.device).record_event()
        self._held[chunk.position] = None

    def reset(self) -> None:
        """Release every chunk that is still held, after a pass that did not come to its end."""
        for chunk in self._held:
            if chunk is not None:
                self.release(chunk)

    def _copy_stream(self) -> torch.cuda.Stream | None:
        if self.device.type != "cuda":
            return None
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may have been another tensor's
        for tensor in (self._rooms, self._mixed):
            tensor.record_stream(stream)
        return stream

    def _copying(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _table(self, nbytes: int) -> Tensor:
        """Addresses of records that are all of ``nbytes``, ``[positions, chunk]``: computed on the device, once."""
        table = self._tables.get(nbytes)
        if table is None:
            first, room = self._rooms.data_ptr(), self._rooms.shape[1]
            rooms = torch.arange(first, first + self.positions * room, room, device=self.device)
            slots = torch.arange(0, self.chunk * nbytes, nbytes, device=self.device)
            table = self._tables[nbytes] = rooms.unsqueeze(1) + slots
        return table

    def _upload_addresses(self, position: int, sizes: Sequence[int]) -> Tensor:
        """Addresses of records of ``sizes``, on the copy stream: a small copy that the computation asks for would
        queue behind the large ones."""
        first = self.room(position).data_ptr()
        starts = list(itertools.accumulate(sizes[:-1], initial=first))
        host = torch.tensor(starts, dtype=torch.int64, pin_memory=self._stream is not None)
        return self._mixed[position, : len(sizes)].copy_(host, non_blocking=True)

    def _check(self, records: Sequence[Tensor], sizes: list[int]) -> None:
        if not 1 <= len(records) <= self.chunk:
            raise ExpertFlowError(f"{len(records)} records in a chunk: stage 1 to {self.chunk} at a time")
        for record, size in zip(records, sizes):
            if record.dtype != torch.uint8 or record.stride() != (1,) or record.device.type != "cpu":
                raise ExpertFlowError(
                    f"a record of {record.dtype}, stride {record.stride()} on {record.device} cannot be staged: "
                    "give uint8 in one piece in host memory"
                )
            if not 0 < size <= self.slot_bytes or size % RECORD_ALIGNMENT:
                raise ExpertFlowError(
                    f"a record of {size} bytes does not fit a staging slot of {self.slot_bytes}, which holds "
                    f"multiples of {RECORD_ALIGNMENT}: make the ring for the largest record"
                )

    def _check_held(self, chunk: Chunk) -> None:
        if self._held[chunk.position] is not chunk:
            raise ExpertFlowError("this chunk was released: stage its records again")


def contiguous_runs(records: Sequence[Tensor]) -> list[Tensor]:
    """``records`` (uint8 ``[n]``) as few tensors as possible with the same bytes in the same order: neighbours in
    one storage become one view."""
    runs: list[Tensor] = []
    first, start, length = None, 0, 0
    for record in records:
        pointer = record.data_ptr()
        if first is not None and pointer == start + length and _same_storage(first, record):
            length += record.numel()
            continue
        if first is not None:
            runs.append(first.as_strided((length,), (1,)))
        first, start, length = record, pointer, record.numel()
    if first is not None:
        runs.append(first.as_strided((length,), (1,)))
    return runs


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
