"""Which records are pinned, where they lie, and what is left of them in the page cache."""

import ctypes
import os
import sys
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import ExpertShape, RecordLayout
from expertflow_quant.formats.spec import Format
from expertflow_quant.offload import host_memory, store
from expertflow_quant.offload.host_memory import HOST_RESERVE_BYTES, available_bytes, plan_slabs, release
from expertflow_quant.offload.store import ExpertStore

FORMATS = ("int4-g16", "bf16", "int2-g16")


@dataclass
class Layer:
    layouts: list[RecordLayout]
    top_k: int = 1
    module: str = "experts"
    shape: ExpertShape = field(default_factory=lambda: ExpertShape(32, 16))


class Source:
    """Records of random bytes, in one piece of memory like a mapped file."""

    def __init__(self, layers=3, experts=5, shape=None, formats=FORMATS, memory=torch.clone):
        shape = shape or ExpertShape(32, 16)
        layouts = [RecordLayout(shape, Format.parse(name)) for name in formats]
        self.layers = [
            Layer([layouts[(at + index) % len(layouts)] for index in range(experts)]) for at in range(layers)
        ]
        sizes = [layout.nbytes for layer in self.layers for layout in layer.layouts]
        generator = torch.Generator().manual_seed(0)
        whole = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, generator=generator)
        self.whole, self.memory = whole, memory(whole)
        self.keys = [(layer, expert) for layer in range(layers) for expert in range(experts)]
        self.starts = dict(zip(self.keys, [sum(sizes[:index]) for index in range(len(sizes))]))
        self.sizes = dict(zip(self.keys, sizes))

    def record(self, layer, expert):
        start = self.starts[layer, expert]
        return self.memory[start : start + self.sizes[layer, expert]]

    def truth(self, key):
        return self.whole[self.starts[key] : self.starts[key] + self.sizes[key]]


class Allocator:
    def __init__(self, refuse_after=None):
        self.slabs, self.refuse_after = [], refuse_after

    def __call__(self, nbytes):
        if len(self.slabs) == self.refuse_after:
            raise RuntimeError("CUDA error: out of memory")
        self.slabs.append(torch.empty(nbytes, dtype=torch.uint8))
        return self.slabs[-1]

    def holds(self, tensor):
        return any(
            slab.data_ptr() <= tensor.data_ptr() and tensor.data_ptr() + tensor.numel() <= slab.data_ptr() + len(slab)
            for slab in self.slabs
        )


@given(st.lists(st.integers(1, 5000), max_size=60), st.sampled_from([1, 2**10, 2**14, 2**28]))
def test_slabs_are_powers_of_two_that_hold_all_records_and_little_else(sizes, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_memory, "SLAB_BYTES", most)
        slabs = plan_slabs(sizes)
    assert sum(slab.records for slab in slabs) == len(sizes)
    left = list(sizes)
    for slab in slabs:
        held, left = left[: slab.records], left[slab.records :]
        assert held
        assert slab.nbytes & (slab.nbytes - 1) == 0
        assert sum(held) <= slab.nbytes
        assert not left or sum(held) + left[0] > slab.nbytes
    waste = sum(slab.nbytes for slab in slabs) - sum(sizes)
    whole = max(most, 8 * max(sizes, default=0))
    assert waste <= sum(sizes) // 4 + 2 * max(sizes, default=0) + (whole // 8 if slabs else 0)


def test_records_of_a_real_model_waste_little():
    for record, count in [(2_580_480, 6144), (88_080_384, 256), (352_321_536, 256)]:
        slabs = plan_slabs([record] * count)
        assert sum(slab.nbytes for slab in slabs) < 1.1 * record * count
        assert max(slab.nbytes for slab in slabs) <= 2**32


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1.5), st.booleans(), st.randoms(use_true_random=False))
def test_what_fits_is_pinned_and_all_records_stay_right(share, by_popularity, random):
    source, allocator, progress = Source(), Allocator(), []
    total = sum(source.sizes.values())
    room = int(total * share)
    popularity = [[random.random() for _ in range(5)] for _ in range(3)] if by_popularity else None
    made = ExpertStore(
        source,
        pin=True,
        host_memory=room,
        popularity=popularity,
        on_progress=lambda *done: progress.append(done),
        allocate=allocator,
    )
    pinned = [key for key in source.keys if made.is_pinned(*key)]
    assert sum(len(slab) for slab in allocator.slabs) <= room
    assert made.pinned_bytes == sum(source.sizes[key] for key in pinned)
    assert made.pinned == (len(pinned) == len(source.keys))
    assert made.nbytes == total
    for key in source.keys:
        assert torch.equal(made.record(*key), source.truth(key))
        assert allocator.holds(made.record(*key)) == (key in pinned)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1:] == ([(made.pinned_bytes, made.pinned_bytes)] if pinned else [])


def test_neighbours_lie_one_after_the_other_unless_a_slab_ends(monkeypatch):
    source, allocator = Source(layers=4, experts=8), Allocator()
    monkeypatch.setattr(host_memory, "SLAB_BYTES", 1)
    made = ExpertStore(source, pin=True, host_memory=2**30, allocate=allocator)
    assert len(allocator.slabs) > 1
    breaks = sum(
        made.record(*one).data_ptr() + source.sizes[one] != made.record(*other).data_ptr()
        for one, other in zip(source.keys, source.keys[1:])
    )
    assert breaks == len(allocator.slabs) - 1


def test_without_popularity_the_first_are_pinned_with_it_the_most_popular():
    source = Source(formats=("int4-g16",))
    size = source.sizes[0, 0]
    popularity = [[0.0] * 5, [0.0, 9.0, 0.0, 8.0, 7.0], [0.0, 0.0, 0.0, 0.0, 6.0]]
    by_order = ExpertStore(source, pin=True, host_memory=4 * size, allocate=Allocator())
    by_use = ExpertStore(source, pin=True, host_memory=4 * size, popularity=popularity, allocate=Allocator())
    assert size & (size - 1) or by_order.pinned_bytes == 4 * size
    assert [key for key in source.keys if by_order.is_pinned(*key)] == source.keys[: by_order.pinned_bytes // size]
    wanted = [(1, 1), (1, 3), (1, 4), (2, 4)][: by_use.pinned_bytes // size]
    assert [key for key in source.keys if by_use.is_pinned(*key)] == wanted
    assert wanted


def test_by_default_the_available_memory_is_the_bound(monkeypatch):
    source = Source()
    for available, pinned in [(HOST_RESERVE_BYTES + 2**20, True), (HOST_RESERVE_BYTES, False), (0, False)]:
        monkeypatch.setattr(store, "available_bytes", lambda available=available: available)
        made = ExpertStore(source, pin=True, allocate=Allocator())
        assert (made.pinned, made.pinned_bytes > 0) == (pinned, pinned)


def test_unpinned_nothing_is_copied():
    source = Source()
    made = ExpertStore(source)
    assert (made.pinned, made.pinned_bytes, made.is_pinned(0, 0)) == (False, 0, False)
    assert made.record(1, 1).data_ptr() == source.record(1, 1).data_ptr()


def test_refusals_name_what_to_do():
    source = Source()
    with pytest.raises(ExpertFlowError, match=r"popularity has \[1\] numbers by layer, the model \[5, 5, 5\]"):
        ExpertStore(source, pin=True, host_memory=0, popularity=[[1.0]], allocate=Allocator())
    with pytest.raises(ExpertFlowError, match="host_memory -1 is below zero"):
        ExpertStore(source, pin=True, host_memory=-1, allocate=Allocator())


def test_a_system_that_refuses_says_how_much_it_gave(monkeypatch):
    monkeypatch.setattr(host_memory, "SLAB_BYTES", 1)
    source, allocator = Source(experts=40), Allocator(refuse_after=1)
    with pytest.raises(ExpertFlowError, match=r"refused to pin .*out of memory.*give host_memory=(\d+)") as error:
        ExpertStore(source, pin=True, host_memory=2**30, allocate=allocator)
    remedy = int(str(error.value).split("host_memory=")[1].split()[0])
    made = ExpertStore(source, pin=True, host_memory=remedy, allocate=Allocator())
    assert 0 < made.pinned_bytes <= remedy


def test_available_memory_is_that_of_the_tightest_bound(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert available_bytes(tmp_path) > 0  # without a table: pages that are free now
    write("proc/meminfo", "MemTotal:  1000 kB\nMemAvailable:    600 kB\n")
    assert available_bytes(tmp_path) == 600 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", "1000\n")
    assert available_bytes(tmp_path) == 600 * 1024
    write("sys/fs/cgroup/memory.max", "5000\n")
    assert available_bytes(tmp_path) == 4000
    write("sys/fs/cgroup/memory.stat", "anon 500\ninactive_file 300\n")
    assert available_bytes(tmp_path) == 4300
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "2500\n")
    assert available_bytes(tmp_path) == 0


def test_releasing_changes_no_byte(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    mapped = torch.from_file(str(tmp_path / "file"), shared=False, size=2**14, dtype=torch.uint8)
    mapped[5000] = 7  # a page of its own from now on
    for memory in (mapped, torch.arange(2**14) % 251, mapped[:0]):
        before = memory.clone()
        release(memory.split(6000))
        assert torch.equal(memory, before)
    assert mapped[5000] == 7


def resident_pages(tensor):
    libc = ctypes.CDLL(None, use_errno=True)
    page = os.sysconf("SC_PAGE_SIZE")
    assert tensor.data_ptr() % page == 0
    pages = -(-tensor.numel() // page)
    found = (ctypes.c_ubyte * pages)()
    assert libc.mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel()), found) == 0
    return sum(each & 1 for each in found), pages


def test_a_pinned_record_leaves_the_page_cache(tmp_path):
    path = tmp_path / "records"

    def mapped(whole):
        with open(path, "wb") as file:
            file.write(whole.numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())  # a page that is not on the disk yet cannot go
        return torch.from_file(str(path), shared=False, size=whole.numel(), dtype=torch.uint8)

    source = Source(layers=1, experts=5, shape=ExpertShape(1024, 512), formats=("int4-g128",), memory=mapped)
    if sys.platform != "linux" or os.major(os.stat(path).st_dev) == 0 or not knows_pageout(source.memory):
        pytest.skip("needs Linux 5.4 or later and a folder on a disk of its own")
    source.memory.sum()
    before, pages = resident_pages(source.memory)
    assert before == pages
    made = ExpertStore(source, pin=True, host_memory=2**26, allocate=Allocator())
    assert made.pinned
    after, pages = resident_pages(source.memory)
    assert after < 0.05 * pages
    assert all(torch.equal(source.record(*key), source.truth(key)) for key in source.keys)


def knows_pageout(tensor):
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(4096), 21) == 0


@pytest.mark.cuda
def test_on_a_gpu_only_chosen_records_are_page_locked():
    source = Source()
    made = ExpertStore(source, pin=True, host_memory=sum(source.sizes.values()) // 2)
    assert 0 < made.pinned_bytes < made.nbytes
    for key in source.keys:
        assert made.record(*key).is_pinned() == made.is_pinned(*key)
        assert torch.equal(made.record(*key), source.truth(key))
