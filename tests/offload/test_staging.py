"""The staging ring: what a chunk's addresses point at is the records, until the chunk is released."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.staging import StagingRing, contiguous_runs

UNIT = 256
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class PoisonedRing(StagingRing):
    """Spoils what is released, so that a late reader shows."""

    def release(self, chunk):
        self.room(chunk.position).fill_(0xFF)
        super().release(chunk)


def slab(units, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 255, (units * UNIT,), dtype=torch.uint8, generator=generator)
    return data.pin_memory() if device == "cuda" else data


def cut(data, sizes):
    """Neighbouring records of ``sizes`` units from the start of ``data``."""
    return list(torch.split(data[: sum(sizes) * UNIT], [size * UNIT for size in sizes]))


def read(ring, chunk, records):
    """The bytes at a chunk's addresses, found through its place in the ring."""
    room = ring.room(chunk.position)
    starts = [address - room.data_ptr() for address in chunk.addresses.tolist()]
    return [room[start : start + record.numel()].cpu() for start, record in zip(starts, records, strict=True)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=12),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_addresses_point_at_the_records_until_release(chunks, positions, random):
    ring = PoisonedRing("cpu", 4 * positions, 3 * UNIT, 4)
    data = slab(12)
    held = []
    for sizes in chunks:
        records = cut(data, sizes)
        random.shuffle(records)
        if not ring.has_room:
            held.pop(0)[0].release()
        chunk = ring.stage(records)
        chunk.wait()
        held.append((chunk, records))
        assert chunk.nbytes == sum(sizes) * UNIT
        for other, wanted in held:
            assert all(map(torch.equal, read(ring, other, wanted), wanted))
            assert all(address % UNIT == ring.room(0).data_ptr() % UNIT for address in other.addresses.tolist())


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8), st.sets(st.integers(0, 7)), st.booleans())
@settings(max_examples=50, deadline=None)
def test_runs_hold_the_same_bytes_and_cannot_be_fewer(sizes, left_out, two_slabs):
    records = [record for index, record in enumerate(cut(slab(24), sizes)) if index not in left_out]
    kept = [index for index in range(len(sizes)) if index not in left_out]
    gaps = sum(second - first > 1 for first, second in itertools.pairwise(kept))
    expected = gaps + bool(kept)
    if two_slabs:
        records += cut(slab(4, seed=1), [2, 2])
        expected += 1
    runs = contiguous_runs(records)
    assert len(runs) == expected
    assert torch.equal(torch.cat([*runs, torch.empty(0, dtype=torch.uint8)]), torch.cat([*records, torch.empty(0)]))


def test_neighbours_in_other_storages_are_no_run():
    data = slab(4)
    whole = memoryview(data.numpy())
    one, other = torch.frombuffer(whole[:UNIT], dtype=torch.uint8), torch.frombuffer(whole[UNIT:], dtype=torch.uint8)
    assert one.data_ptr() + UNIT == other.data_ptr()
    assert [run.numel() for run in contiguous_runs([one, other])] == [UNIT, 3 * UNIT]


def test_the_order_of_release_is_free_but_the_oldest_makes_room():
    ring = StagingRing("cpu", 4, UNIT, 2)
    records = cut(slab(2), [1, 1])
    first, second = ring.stage(records), ring.stage(records)
    assert not ring.has_room
    second.release()
    assert not ring.has_room
    with pytest.raises(ExpertFlowError, match="all 2 chunks"):
        ring.stage(records)
    first.release()
    assert ring.has_room
    assert ring.stage(records).position == first.position


def test_reset_frees_what_an_interrupted_pass_held():
    ring = StagingRing("cpu", 2, UNIT, 1)
    chunk = ring.stage(cut(slab(1), [1]))
    ring.stage(cut(slab(1), [1]))
    ring.reset()
    assert ring.has_room
    with pytest.raises(ExpertFlowError, match="was released"):
        chunk.wait()


def test_a_released_chunk_is_over():
    ring = StagingRing("cpu", 1, UNIT, 1)
    chunk = ring.stage(cut(slab(1), [1]))
    chunk.release()
    again = ring.stage(cut(slab(1), [1]))
    for call in (chunk.wait, chunk.release):
        with pytest.raises(ExpertFlowError, match="was released"):
            call()
    again.wait()


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([], "0 records in a chunk: stage 1 to 2"),
        (cut(slab(3), [1, 1, 1]), "3 records in a chunk"),
        (cut(slab(3), [3]), "768 bytes does not fit a staging slot of 512"),
        ([torch.zeros(100, dtype=torch.uint8)], "100 bytes"),
        ([torch.zeros(64)], "float32"),
        ([torch.zeros(2 * UNIT, dtype=torch.uint8)[::2]], "stride"),
    ],
)
def test_records_that_do_not_fit_are_refused(records, match):
    ring = StagingRing("cpu", 2, 2 * UNIT, 2)
    with pytest.raises(ExpertFlowError, match=match):
        ring.stage(records)
    assert ring.has_room


@pytest.mark.parametrize(
    ("slots", "slot_bytes", "chunk", "match"),
    [(3, UNIT, 2, "multiple of the chunk"), (0, UNIT, 1, "0 staging slots"), (2, 100, 1, "100 bytes")],
)
def test_sizes_that_make_no_ring_are_refused(slots, slot_bytes, chunk, match):
    with pytest.raises(ExpertFlowError, match=match):
        StagingRing("cpu", slots, slot_bytes, chunk)


@pytest.mark.cuda
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("sizes", [[4000, 4000, 4000], [1000, 4000, 2000]])
def test_on_a_gpu_copies_wait_for_slow_readers_and_readers_for_copies(sizes, pinned):
    ring = PoisonedRing("cuda", 6, 4000 * UNIT, 3)
    slabs = [slab(sum(sizes), "cuda" if pinned else "cpu", seed) for seed in range(40)]
    seen, staged = [], []
    for data in slabs:
        if not ring.has_room:
            chunk = staged.pop(0)
            chunk.wait()
            torch.cuda._sleep(2_000_000)  # about a millisecond: the copy of the next chunk is asked for meanwhile
            seen.append(ring.room(chunk.position)[: chunk.nbytes].clone())
            chunk.release()
        staged.append(ring.stage(cut(data, sizes)))
    for chunk in staged:
        chunk.wait()
        seen.append(ring.room(chunk.position)[: chunk.nbytes].clone())
        chunk.release()
    assert all(torch.equal(got.cpu(), want) for got, want in zip(seen, slabs, strict=True))


@pytest.mark.cuda
def test_on_a_gpu_the_host_does_not_wait_for_pinned_copies():
    ring = StagingRing("cuda", 1, 4000 * UNIT, 1)
    records = cut(slab(4000, "cuda"), [4000])
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    busy = torch.cuda.current_stream().record_event()
    for _ in range(20):
        chunk = ring.stage(records)
        chunk.wait()
        chunk.release()
    assert not busy.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("device", DEVICES)
def test_addresses_are_right_for_any_mixture_of_sizes(device):
    ring = StagingRing(device, 8, 3 * UNIT, 4)
    for sizes in ([1, 1, 1, 1], [3, 1, 2], [2, 2], [3], [1, 3, 1, 3]):
        records = cut(slab(12, device), sizes)
        chunk = ring.stage(records)
        chunk.wait()
        assert all(torch.equal(got, want.cpu()) for got, want in zip(read(ring, chunk, records), records, strict=True))
        chunk.release()
