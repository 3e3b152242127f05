"""The ring of pinned buffers, against a device that does its copies as late as it may."""

import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.copies import StreamCopies
from expertflow_quant.offload.disk_ring import DiskRing


def plain(nbytes):
    return torch.empty(nbytes, dtype=torch.uint8)


def noise(nbytes, seed=0):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class LazyDevice:
    """Copies in the order asked for, and only when someone waits: a buffer overwritten too early shows."""

    def __init__(self):
        self.waiting = []
        self.lock = threading.Lock()
        self.enqueued = 0

    def upload(self, slot, pinned):
        with self.lock:
            self.enqueued += 1
            self.waiting.append((self.enqueued, slot, pinned))
            return Mark(self, self.enqueued)

    def run(self, until=None):
        with self.lock:
            while self.waiting and (until is None or self.waiting[0][0] <= until):
                _, slot, pinned = self.waiting.pop(0)
                slot.copy_(pinned)


class Mark:
    def __init__(self, device, number):
        self.device, self.number = device, number

    def synchronize(self):
        self.device.run(self.number)


class GatedDevice(LazyDevice):
    """Nothing is copied before ``gate`` opens."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def run(self, until=None):
        assert self.gate.wait(30)
        super().run(until)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 200), st.integers(1, 3)
)
def test_every_record_arrives_whole_however_late_the_device_copies(sizes, slots, slot_bytes, readers):
    ring, device = DiskRing(slots, slot_bytes, readers, plain), LazyDevice()
    records = [noise(size, seed) for seed, size in enumerate(sizes)]
    targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    sent = [ring.send(record, target, device.upload) for record, target in zip(records, targets)]
    for done, record, target in zip(sent, records, targets):
        done.result(30).synchronize()
        assert torch.equal(target, record)
    assert device.enqueued == sum(-(-size // slot_bytes) for size in sizes)
    ring.close()


def test_reading_goes_on_while_uploads_wait_and_stops_when_no_buffer_is_free():
    ring, device = DiskRing(2, 64, 2, plain), GatedDevice()
    records, targets = [noise(64, seed) for seed in range(3)], torch.zeros(3, 64, dtype=torch.uint8)
    sent = [ring.send(record, target, device.upload) for record, target in zip(records, targets.unbind())]
    for done in sent[:2]:
        done.result(30)  # read and enqueued, though the device did nothing so far
    time.sleep(0.05)
    assert not sent[2].done()
    device.gate.set()
    sent[2].result(30).synchronize()
    assert torch.equal(targets, torch.stack(records))
    ring.close()


def test_what_an_upload_raises_reaches_the_caller_and_frees_the_buffer():
    ring, device = DiskRing(1, 64, 1, plain), LazyDevice()
    record, target = noise(150), torch.zeros(150, dtype=torch.uint8)

    def broken(slot, pinned):
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        ring.send(record, target, broken).result(30)
    ring.send(record, target, device.upload).result(30).synchronize()
    assert torch.equal(target, record)
    ring.close()


def test_a_record_that_no_thread_took_up_can_be_cancelled():
    ring, device = DiskRing(1, 64, 1, plain), GatedDevice()
    target = torch.zeros(128, dtype=torch.uint8)
    first = ring.send(noise(128), target, device.upload)  # its second piece waits for the buffer
    second = ring.send(noise(64), torch.zeros(64, dtype=torch.uint8), device.upload)
    assert second.cancel()
    device.gate.set()
    first.result(30).synchronize()
    with pytest.raises(CancelledError):
        second.result()
    assert device.enqueued == 2
    ring.close()


def test_threads_end_with_the_ring():
    before = set(threading.enumerate())
    ring, device = DiskRing(1, 64, 1, plain), LazyDevice()
    ring.send(noise(8), torch.zeros(8, dtype=torch.uint8), device.upload).result(30)
    (thread,) = set(threading.enumerate()) - before
    del ring
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("sizes", [(0, 64, 1), (2, 0, 1), (2, 64, 0)])
def test_a_ring_of_nothing_is_refused(sizes):
    with pytest.raises(ExpertFlowError, match="at least 1 of each"):
        DiskRing(*sizes, allocate=plain)


@pytest.mark.parametrize(
    ("record", "slot", "part"),
    [
        (torch.zeros(8), torch.zeros(8), "float32.*give uint8"),
        (torch.zeros(16, dtype=torch.uint8)[::2], torch.zeros(8, dtype=torch.uint8), "stride"),
        (torch.zeros(8, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8), "8 bytes does not fill a slot of 9"),
        (torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), "0 bytes does not fill"),
    ],
)
def test_what_cannot_pass_is_refused(record, slot, part):
    ring = DiskRing(1, 64, 1, plain)
    with pytest.raises(ExpertFlowError, match=part):
        ring.send(record, slot, LazyDevice().upload)
    ring.close()


@pytest.fixture
def copies(monkeypatch):
    """The CUDA copies over a gated device, every record unpinned."""
    device, now = GatedDevice(), SimpleNamespace(record=lambda stream: None)
    stream = SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda mark: mark.synchronize())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: now)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    monkeypatch.setattr("expertflow_quant.offload.copies.stream_upload", lambda stream: device.upload)
    monkeypatch.setattr("expertflow_quant.offload.copies.DiskRing", lambda: DiskRing(1, 64, 1, plain))
    made = StreamCopies(torch.device("cuda"))
    made.device = device
    return made


def test_the_computation_waits_for_the_last_piece_of_a_record(copies):
    record, slot = noise(150), torch.zeros(150, dtype=torch.uint8)
    copies.start((0, 0), slot, record)
    copies.device.gate.set()
    copies.finish((0, 0))
    assert torch.equal(slot, record)
    copies.finish((0, 0))  # nothing is under way any more
    assert copies._read == {}


def test_nothing_is_enqueued_for_a_slot_after_its_record_was_forgotten(copies):
    records, slot = [noise(150, 1), noise(150, 2), noise(150, 3)], torch.zeros(150, dtype=torch.uint8)
    copies.start((0, 0), slot, records[0])  # its second piece waits for the only buffer
    copies.start((0, 1), slot, records[1])  # waits for the only thread
    threading.Timer(0.05, copies.device.gate.set).start()
    copies.forget((0, 1))
    copies.forget((0, 0))
    assert copies.device.enqueued == 3
    copies.start((0, 2), slot, records[2])
    copies.finish((0, 2))
    assert torch.equal(slot, records[2])
    assert copies.device.enqueued == 6


def test_a_failed_read_fails_every_finish_until_it_is_forgotten(copies):
    def broken(*args):
        raise OSError("disk on fire")

    copies._ring._send = broken
    copies.start((0, 0), torch.zeros(64, dtype=torch.uint8), noise(64))
    for _ in range(2):
        with pytest.raises(OSError, match="disk on fire"):
            copies.finish((0, 0))
    copies.forget((0, 0))
    copies.finish((0, 0))


@pytest.mark.cuda
@settings(max_examples=10, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=24), st.integers(0, 3))
def test_on_a_gpu_pinned_and_mapped_records_mix_and_slots_are_reused(pinned, seed):
    copies, size = StreamCopies(torch.device("cuda")), 9 * 2**20  # three pieces each
    slots = torch.empty(3, size, dtype=torch.uint8, device="cuda")
    records = [noise(size, seed + index) for index in range(4)]
    seen, wanted = [], []
    for index, is_pinned in enumerate(pinned):
        record, key = records[index % 4], (0, index)
        if index >= 3:
            copies.forget((0, index - 3))
        copies.start(key, slots[index % 3], record.pin_memory() if is_pinned else record)
        if index % 5 != 4:  # some are forgotten while they are under way
            copies.finish(key)
            seen.append(slots[index % 3].sum(dtype=torch.int64))
            wanted.append(int(record.sum(dtype=torch.int64)))
    assert [int(total) for total in seen] == wanted
    torch.cuda.synchronize()
    assert copies.stall_seconds() >= 0
