"""Experts of a prefill, streamed past the computation, against the plain experts function."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers.records import random_record, silu_gate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import ExpertShape, RecordLayout
from expertflow_quant.formats.spec import Format
from expertflow_quant.kernels.gate import Gate
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.staging import StagingRing
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime.experts import LayerExperts, attach, experts_forward
from expertflow_quant.runtime.streamed import StreamedExperts, StreamOptions, expected_coverage

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 64, 48, 8, 2, 3
MIXES = {
    "int4": ("int4-g16",),
    "bf16": ("bf16",),
    "mixed": ("int4-g16", "bf16", "int3-g16-asym", "int8-channel", "int2-g16"),
    "mixed, scaled, biased": ("int2-g16-asym", "int4-g16", "bf16"),
    "int3, no gate": ("int3-g16",),
}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@dataclass
class FakeLayer:
    layouts: list[RecordLayout]
    top_k: int = TOP_K
    module: str = "model.experts"

    @property
    def shape(self):
        return self.layouts[0].shape


class FakeReader:
    """Random experts in memory, one piece for all, as a shard is."""

    def __init__(self, layers, seed=0):
        self.layers = layers
        generator = torch.Generator().manual_seed(seed)
        records = [random_record(layout, generator) for layer in layers for layout in layer.layouts]
        pieces = iter(torch.split(torch.cat(records), [record.numel() for record in records]))
        self.records = [[next(pieces) for _ in layer.layouts] for layer in layers]

    def record(self, layer, expert):
        return self.records[layer][expert]


class PoisonedRing(StagingRing):
    """Spoils what is released, so that a late reader shows."""

    def release(self, chunk):
        self.room(chunk.position).fill_(0xFF)
        super().release(chunk)


class World:
    """A model's experts on ``device``: the records, and the plain path over them."""

    def __init__(self, mix, device, layers=LAYERS):
        special = "scaled" in mix
        shape = ExpertShape(HIDDEN, INTERMEDIATE, has_gate="no gate" not in mix, has_bias=special)
        parsed = [Format.parse(name) for name in MIXES[mix]]
        formats = [[parsed[(layer + e) % len(parsed)] for e in range(EXPERTS)] for layer in range(layers)]
        made = [
            FakeLayer([RecordLayout(shape, each, input_scale=special and each.has_codes) for each in row])
            for row in formats
        ]
        self.device, self.shape = device, shape
        self.store = ExpertStore(FakeReader(made), pin=device == "cuda")
        self.slot_bytes = max(max(layer.nbytes) for layer in self.store.layers)
        self.gate = Gate(self._act, "silu" if shape.has_gate else None)
        self._module = SimpleNamespace(
            training=False, num_experts=EXPERTS, has_gate=shape.has_gate, _apply_gate=self._act, act_fn=self._act
        )
        self._cache = ExpertCache(self.store, self.store.nbytes, device)

    def _act(self, inner):
        return silu_gate(inner) if self.shape.has_gate else functional.relu(inner)

    def plain(self, layer, hidden, ids, weights):
        attach(self._module, LayerExperts(cache=self._cache, layer=layer))
        return experts_forward(self._module, hidden, ids, weights)

    def resident(self, share, seed=0):
        """About ``share`` of all bytes in slots: not the first experts only, but some that were routed."""
        plan = plan_layer_slots(self.store.layers, max(1, int(share * self.store.nbytes)))
        resident = ResidentExperts(self.store, plan, self.device)
        resident.preload()
        generator = torch.Generator().manual_seed(seed)
        for layer in range(len(self.store.layers)):
            resident.begin_step()
            resident.resolve(layer, torch.randperm(EXPERTS, generator=generator)[:2].view(1, 2).to(self.device))
            resident.fill(layer)
        return resident

    def streamed(self, share=0.25, slots=4, chunk=2, seed=0, **options):
        ring = PoisonedRing(self.device, slots, self.slot_bytes, chunk)
        return StreamedExperts(self.resident(share, seed), self.store, ring, StreamOptions(**options))

    def inputs(self, tokens, seed=0, top_k=TOP_K, dtype=torch.float32):
        """One (hidden, ids, weights) for each layer."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in self.store.layers:
            weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k)
            hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
            made.append(tuple(each.to(self.device) for each in (hidden, ids, weights)))
        return made

    def run(self, streamed, inputs, tokens=None, valid=None):
        streamed.begin(inputs[0][0].shape[0] if tokens is None else tokens)
        return [streamed.layer(layer, self.gate, *each, valid) for layer, each in enumerate(inputs)]

    def wanted(self, inputs):
        return [self.plain(layer, *each) for layer, each in enumerate(inputs)]


def equal(ones, others):
    return all(map(torch.equal, ones, others))


def close(ones, others, **tolerance):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.fixture(scope="module")
def world(device):
    return World("mixed", device)


@pytest.mark.parametrize("multiply", ["in kernel", "on load"])
@pytest.mark.parametrize("mix", MIXES)
def test_equals_the_plain_path_for_every_mixture_of_formats(mix, multiply, device):
    world = World(mix, device)
    inputs = world.inputs(13)
    wanted = world.wanted(inputs)
    for share, stage in itertools.product((0.0, 0.25, 1.0), ("ahead", "on demand")):
        streamed = world.streamed(share, multiply=multiply, stage=stage)
        close(world.run(streamed, inputs), wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    chunk=st.integers(1, EXPERTS),
    positions=st.integers(1, 3),
    tokens=st.integers(0, 12),
    stage=st.sampled_from(["ahead", "on demand"]),
    multiply=st.sampled_from(["in kernel", "on load"]),
    decoded=st.integers(0, 2 * EXPERTS),
    seed=st.integers(0, 99),
)
def test_nothing_that_only_moves_bytes_changes_a_bit(
    world, share, chunk, positions, tokens, stage, multiply, decoded, seed
):
    inputs = world.inputs(tokens, seed)
    full = world.run(world.streamed(1.0, multiply=multiply), inputs)
    options = {"stage": stage, "multiply": multiply, "dense_bytes": decoded * 3 * INTERMEDIATE * HIDDEN * 4}
    streamed = world.streamed(share, chunk * positions, chunk, seed, **options)
    for _ in range(2):
        assert equal(world.run(streamed, inputs), full)
    close(full, world.wanted(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("multiply", ["in kernel", "on load"])
def test_tokens_in_parts_give_the_same(world, multiply):
    inputs = world.inputs(11)
    whole = world.run(world.streamed(multiply=multiply), inputs)
    token = TOP_K * INTERMEDIATE * 4
    for room in (1, 2 * token, 4 * token - 1, 10 * token):
        close(world.run(world.streamed(multiply=multiply, part_bytes=room), inputs), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", ["ahead", "on demand"])
def test_padding_is_zero_and_changes_no_other_token(world, stage):
    inputs = world.inputs(9)
    valid = torch.tensor([True, False, True, True, False, False, True, True, False], device=world.device)
    for hidden, _, _ in inputs:
        hidden[~valid] = torch.nan
    got = world.run(world.streamed(stage=stage), inputs, int(valid.sum()), valid)
    alone = [tuple(each[valid] for each in layer) for layer in inputs]
    close([out[valid] for out in got], world.wanted(alone), rtol=1e-4, atol=1e-4)
    assert not any(out[~valid].any() for out in got)


def test_padding_brings_no_expert_on_demand(world):
    inputs = [(hidden, torch.full_like(ids, 5), weights) for hidden, ids, weights in world.inputs(4)]
    for _, ids, _ in inputs:
        ids[0] = torch.tensor([2, 3])
    valid = torch.tensor([True, False, False, False], device=world.device)
    streamed = world.streamed(0.0, stage="on demand")
    world.run(streamed, inputs, 1, valid)
    assert streamed.stats.experts_streamed == 2 * LAYERS
    assert streamed.stats.bytes_streamed == sum(layer.nbytes[2] + layer.nbytes[3] for layer in world.store.layers)


@pytest.mark.parametrize("stage", ["ahead", "on demand"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_no_expert_add_nothing(world, stage, dtype):
    inputs = world.inputs(6)
    for _, ids, _ in inputs:
        ids[::2, 1] = EXPERTS
        ids[3] = torch.tensor([EXPERTS + 7, -1])
    kept = [
        (hidden, ids.clamp(0, EXPERTS - 1), weights.where((ids >= 0) & (ids < EXPERTS), 0.0))
        for hidden, ids, weights in inputs
    ]
    got = world.run(world.streamed(stage=stage), [(hidden, ids.to(dtype), w) for hidden, ids, w in inputs])
    close(got, world.wanted(kept), rtol=1e-4, atol=1e-4)
    assert not any(out[3].any() for out in got)


def test_16_bit_hidden_states_stay_16_bit(world):
    for dtype in (torch.bfloat16, torch.float16):
        inputs = world.inputs(7, dtype=dtype)
        wanted = world.wanted(inputs)
        for multiply in ("in kernel", "on load"):
            got = world.run(world.streamed(multiply=multiply), inputs)
            assert all(out.dtype == dtype for out in got)
            close(got, wanted, rtol=0.03, atol=0.1)


def test_all_missing_bytes_are_counted_once_a_pass(world):
    streamed = world.streamed(0.25, stage="ahead")
    resident, addresses = streamed._resident.resident_experts(), streamed._resident.address.clone()
    missing = [set(range(EXPERTS)) - set(experts) for experts in resident]
    for _ in range(2):
        world.run(streamed, world.inputs(5))
        stats = streamed.stats
        assert stats.experts_resident == sum(map(len, resident)) > 0
        assert stats.experts_streamed == sum(map(len, missing)) > 0
        assert stats.bytes_streamed == sum(
            layer.nbytes[expert] for layer, gone in zip(world.store.layers, missing, strict=True) for expert in gone
        )
    assert torch.equal(streamed._resident.address, addresses), "others go on reading where they did"


def test_on_demand_only_routed_experts_cross_the_link(world):
    inputs = world.inputs(2)
    streamed = world.streamed(0.25, stage="on demand")
    resident = streamed._resident.resident_experts()
    world.run(streamed, inputs)
    routed = [set(ids.flatten().tolist()) - set(there) for (_, ids, _), there in zip(inputs, resident, strict=True)]
    assert streamed.stats.experts_streamed == sum(map(len, routed))


def test_coverage_is_what_even_routes_meet():
    experts, tokens = 4, 3
    pairs = list(itertools.combinations(range(experts), 2))
    met = [len(set().union(*routes)) / experts for routes in itertools.product(pairs, repeat=tokens)]
    assert expected_coverage(experts, 2, tokens) == pytest.approx(sum(met) / len(met))
    assert expected_coverage(128, 8, 16) == pytest.approx(0.64, abs=0.01)


def test_few_tokens_are_served_on_demand_many_ahead(world):
    streamed = world.streamed()
    chosen = []
    for tokens in (1, 10, 11, 500):  # with 2 of 8 experts, 1 - 0.75 ** n passes 0.95 between 10 and 11
        streamed.begin(tokens)
        chosen.append(streamed.ahead)
    assert chosen == [False, False, True, True]


def test_an_interrupted_pass_leaves_nothing_behind(world):
    streamed, inputs = world.streamed(stage="ahead"), world.inputs(5)
    wanted = world.run(streamed, inputs)
    streamed.begin(5)
    streamed.layer(0, world.gate, *inputs[0])
    assert equal(world.run(streamed, inputs), wanted)


def test_residents_may_change_between_passes(world):
    streamed, inputs = world.streamed(stage="ahead"), world.inputs(5)
    wanted = world.run(streamed, inputs)
    before = streamed._resident.resident_experts()
    streamed._resident.begin_step()
    for layer in range(LAYERS):
        absent = sorted(set(range(EXPERTS)).difference(before[layer]))
        streamed._resident.resolve(layer, torch.tensor([absent], device=world.device))
        streamed._resident.fill(layer)
    assert streamed._resident.resident_experts() != before
    assert equal(world.run(streamed, inputs), wanted)


def test_layers_out_of_order_are_refused(world):
    streamed, inputs = world.streamed(), world.inputs(5)
    with pytest.raises(ExpertFlowError, match="call begin"):
        streamed.layer(0, world.gate, *inputs[0])
    streamed.begin(5)
    with pytest.raises(ExpertFlowError, match="next in this pass is layer 0 of 3"):
        streamed.layer(1, world.gate, *inputs[1])
    world.run(streamed, inputs)
    with pytest.raises(ExpertFlowError, match="next in this pass is layer 3 of 3"):
        streamed.layer(3, world.gate, *inputs[0])


def test_a_ring_on_another_device_is_refused(world):
    with pytest.raises(ExpertFlowError, match="staged on meta"):
        StreamedExperts(world.resident(0.25), world.store, StagingRing("meta", 2, world.slot_bytes, 1))


def test_scratch_grows_with_tokens_and_is_bounded_in_between():
    world = World("int4", "cpu")
    room = 32 * TOP_K * INTERMEDIATE * 2
    streamed = world.streamed(multiply="in kernel", part_bytes=room)
    # past the tokens that fit, only rows, results and plans grow
    grown = streamed.scratch_bytes(2000) - streamed.scratch_bytes(1000)
    assert grown == 1000 * (TOP_K * (HIDDEN * 2 + 128) + 2 * HIDDEN * 2)
    expert = 3 * INTERMEDIATE * HIDDEN * 2
    for most, experts in ((1, 1), (expert * 5 // 2, 2), (expert * 100, EXPERTS)):
        dense = world.streamed(multiply="on load", part_bytes=room, dense_bytes=most)
        assert dense.scratch_bytes(1000) - streamed.scratch_bytes(1000) == experts * expert


def test_many_tokens_are_multiplied_dense_unless_records_are_dense_already():
    matrices = {}
    for mix in ("int4", "bf16"):
        streamed = World(mix, "cpu").streamed(dense_tokens=100)
        forced = World(mix, "cpu").streamed(multiply="in kernel")
        for tokens, dtype in itertools.product((399, 400), (torch.bfloat16, torch.float16)):
            extra = streamed.scratch_bytes(tokens, dtype) - forced.scratch_bytes(tokens, dtype)
            matrices[mix, tokens, dtype] = extra // (3 * INTERMEDIATE * HIDDEN * 2)
    assert {case for case, count in matrices.items() if count} == {
        ("int4", 400, torch.bfloat16),
        ("int4", 400, torch.float16),
        ("bf16", 400, torch.float16),
    }


@pytest.mark.cuda
@pytest.mark.parametrize("multiply", ["in kernel", "on load"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_on_a_gpu_a_tiny_ring_gives_the_same_bits_twenty_times(slots, multiply):
    world = World("mixed", "cuda", layers=16)
    inputs = world.inputs(40)
    streamed = world.streamed(0.25, slots, 1, stage="ahead", multiply=multiply)
    first = world.run(streamed, inputs)
    close(first, world.wanted(inputs), rtol=1e-4, atol=1e-4)
    for _ in range(20):
        assert equal(world.run(streamed, inputs), first)


@pytest.mark.cuda
@pytest.mark.parametrize("multiply", ["in kernel", "on load"])
def test_on_a_gpu_layers_ahead_wait_for_nothing(multiply):
    world = World("mixed", "cuda")
    streamed, inputs = world.streamed(stage="ahead", multiply=multiply), world.inputs(40)
    world.run(streamed, inputs)
    streamed.begin(40)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer, each in enumerate(inputs):
            streamed.layer(layer, world.gate, *each)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("multiply", ["in kernel", "on load"])
@pytest.mark.parametrize("mix", ["int4", "int3, no gate"])
@pytest.mark.parametrize("tokens", [100, 20000])
def test_on_a_gpu_scratch_stays_within_its_bound(tokens, mix, multiply):
    world = World(mix, "cuda")
    streamed, inputs = world.streamed(multiply=multiply, part_bytes=2**20), world.inputs(tokens, dtype=torch.bfloat16)
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        streamed.begin(tokens)
        for layer, each in enumerate(inputs):
            streamed.layer(layer, world.gate, *each)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak <= streamed.scratch_bytes(tokens, torch.bfloat16, fused=world.gate.fused is not None)
