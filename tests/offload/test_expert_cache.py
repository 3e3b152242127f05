"""The cache over real bytes: what a slot holds is the record, at any budget; the counts are right."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import ExpertShape, RecordLayout
from expertflow_quant.formats.spec import Format
from expertflow_quant.offload.budget import BudgetError
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.stats import CacheStats, LayerStats
from expertflow_quant.offload.store import ExpertStore

SHAPE = ExpertShape(32, 16)
FORMATS = ("bf16", "int4-g16", "int2-g16", "int3-g16-asym")


@dataclass
class FakeLayer:
    layouts: list[RecordLayout]
    top_k: int = 2
    module: str = "model.experts"
    shape: ExpertShape = SHAPE


@dataclass
class FakeReader:
    """Records of random bytes in memory."""

    layers: list[FakeLayer]
    records: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    asked: list[tuple[int, int]] = field(default_factory=list)
    broken: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)
        for index, layer in enumerate(self.layers):
            for expert, layout in enumerate(layer.layouts):
                self.records[index, expert] = torch.randint(
                    0, 256, (layout.nbytes,), dtype=torch.uint8, generator=generator
                )

    def record(self, layer, expert):
        self.asked.append((layer, expert))
        if (layer, expert) in self.broken:
            raise OSError("disk on fire")
        return self.records[layer, expert]


def reader(layers=2, experts=6, formats=FORMATS, top_k=2):
    return FakeReader(
        [
            FakeLayer(
                [RecordLayout(SHAPE, Format.parse(formats[(layer + e) % len(formats)])) for e in range(experts)],
                top_k,
            )
            for layer in range(layers)
        ]
    )


def cache_of(source, share=0.0, device="cpu"):
    store = ExpertStore(source, pin=device != "cpu")
    smallest = ExpertCache(store, store.nbytes, "cpu").minimum_bytes
    return ExpertCache(store, smallest + int((store.nbytes - smallest) * share), device)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 5), min_size=1, unique=True)), max_size=20),
)
def test_slots_hold_the_records_and_counts_add_up(share, passes):
    source = reader()
    cache = cache_of(source, share)
    requests, moved = 0, 0
    for layer, experts in passes:
        for piece in cache.pieces(layer, experts):
            in_use = {(layer, expert) for expert in piece}
            for expert in piece:
                resident = cache.is_resident(layer, expert)
                cache.begin(layer, expert, in_use)
                moved += 0 if resident else source.records[layer, expert].numel()
                requests += 1
            for expert in piece:
                assert torch.equal(cache.finish(layer, expert), source.records[layer, expert])
    stats = cache.stats
    assert stats.requests == stats.hits + stats.misses == requests
    assert stats.bytes_moved == moved
    assert sum(layer.requests for layer in stats.layers) == requests
    assert sum(layer.misses for layer in stats.layers) == stats.misses


def test_views_are_the_fields_of_the_record_over_the_slot():
    source = reader()
    cache = cache_of(source)
    for layer, expert in [(0, 0), (1, 1), (0, 3), (0, 0), (1, 5), (0, 0)]:
        cache.begin(layer, expert)
        views = cache.finish_views(layer, expert)
        layout = source.layers[layer].layouts[expert]
        expected = layout.views(source.records[layer, expert])
        assert list(views) == list(layout.fields)
        for name, view in views.items():
            assert view.untyped_storage().data_ptr() == cache.finish(layer, expert).untyped_storage().data_ptr()
            assert torch.equal(view.view(torch.uint8), expected[name].view(torch.uint8))


def test_slot_bytes_stay_within_the_budget():
    store = ExpertStore(reader())
    cache = ExpertCache(store, store.nbytes * 3 // 4)
    assert cache.minimum_bytes <= cache.device_bytes <= store.nbytes * 3 // 4


def test_below_the_minimum_nothing_is_built():
    store = ExpertStore(reader())
    minimum = ExpertCache(store, store.nbytes).minimum_bytes
    assert ExpertCache(store, minimum).device_bytes == minimum
    with pytest.raises(BudgetError, match="raise --expert-memory"):
        ExpertCache(store, minimum - 1)


def test_a_full_budget_is_loaded_beforehand_and_never_misses():
    source = reader()
    cache = cache_of(source, 1.0)
    cache.preload()
    assert cache.stats == CacheStats(layers=(LayerStats(), LayerStats()))
    for key in source.records:
        assert torch.equal(cache.acquire(*key), source.records[key])
    assert (cache.stats.hits, cache.stats.misses, cache.stats.hit_rate) == (12, 0, 1.0)


def test_a_small_budget_is_filled_beforehand_with_every_layers_first():
    source = reader(formats=("int4-g16",))
    cache = cache_of(source, 0.2)
    cache.preload()
    resident = [key for key in sorted(source.records) if cache.is_resident(*key)]
    assert len(resident) == sum(size.slots for size in cache.classes)
    assert resident == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_resetting_counts_keeps_what_is_resident():
    cache = cache_of(reader())
    cache.acquire(0, 0)
    cache.reset_stats()
    assert cache.stats.requests == cache.stats.bytes_moved == 0
    assert cache.stats.stall_seconds == 0.0
    cache.acquire(0, 0)
    assert (cache.stats.hits, cache.stats.misses) == (1, 0)


def test_an_expert_in_use_keeps_its_slot():
    source = reader(formats=("int4-g16",), top_k=2)
    cache = cache_of(source)
    held = cache.acquire(0, 0)
    for expert in (1, 2, 3, 4):
        cache.acquire(0, expert, in_use={(0, 0)})
        assert torch.equal(held, source.records[0, 0])
    with pytest.raises(ExpertFlowError, match="slots"):
        cache.acquire(0, 5, in_use={(0, 0), (0, 4)})


def test_a_record_that_fails_to_load_is_not_resident():
    source = reader(formats=("int4-g16",))
    source.broken.add((0, 2))
    cache = cache_of(source)
    cache.acquire(0, 0)
    cache.acquire(0, 1)
    with pytest.raises(OSError, match="disk on fire"):
        cache.acquire(0, 2)
    assert not cache.is_resident(0, 2)
    source.broken.clear()
    assert torch.equal(cache.acquire(0, 2), source.records[0, 2])
    assert torch.equal(cache.acquire(0, 1), source.records[0, 1])


def test_the_host_reads_each_record_once():
    source = reader(formats=("int4-g16",))
    cache = cache_of(source)
    for _ in range(3):
        for expert in range(6):
            cache.acquire(0, expert)
    assert len(source.asked) == 6


@pytest.mark.cuda
@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 5), min_size=1, unique=True)), max_size=20))
def test_on_a_gpu_the_computation_sees_every_record_whole(passes):
    source = reader()
    cache = cache_of(source, 0.3, "cuda")
    seen, wanted = [], []
    for layer, experts in passes:
        for piece in cache.pieces(layer, experts):
            for expert in piece:
                cache.begin(layer, expert, {(layer, expert) for expert in piece})
            for expert in piece:
                seen.append(cache.finish(layer, expert).clone())
                wanted.append(source.records[layer, expert])
    assert all(torch.equal(got.cpu(), want) for got, want in zip(seen, wanted, strict=True))
    torch.cuda.synchronize()
    assert cache.stats.stall_seconds >= 0


@pytest.mark.cuda
def test_pinned_records_equal_the_source():
    source = reader()
    store = ExpertStore(source, pin=True)
    assert all(
        store.record(*key).is_pinned() and torch.equal(store.record(*key), source.records[key])
        for key in source.records
    )
