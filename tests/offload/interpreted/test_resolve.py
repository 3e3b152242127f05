"""The resolve kernel and its twin leave the same tables behind, whatever is asked of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.layer_policy import LAYER_POLICIES
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.resident_tables import MOST, ResidentTables
from expertflow_quant.offload.resolve import count_hits, resolve, resolve_reference
from expertflow_quant.offload.slots import LayerRecords

SIZES = (256, 512, 768)


def tables_of(layers, plan, device, policy="lru"):
    """Tables with addresses that nobody reads, and shares with equals among them."""
    host = [[2**40 + (layer * 1000 + e) * 4096 for e in range(len(each.nbytes))] for layer, each in enumerate(layers)]
    slots = [[2**44 + (layer * 1000 + s) * 4096 for s in range(MOST)] for layer in range(len(layers))]
    counts = [sum(count for _, count in pools) for pools in plan]
    shares = [[e * 7 % 5 / 5 for e in range(len(each.nbytes))] for each in layers]
    told = None if policy == "lfu" else shares
    slots = [row[:n] for row, n in zip(slots, counts, strict=True)]
    return ResidentTables(layers, plan, host, slots, device, policy, told)


def assert_same(ours, twin):
    for name, value in vars(twin).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(ours, name).cpu(), value), name


class Pair:
    """The kernel's tables on a device and the twin's on the CPU, asked the same."""

    def __init__(self, layers, plan, device, policy="lru"):
        self.ours, self.twin = (tables_of(layers, plan, each, policy) for each in (device, "cpu"))
        self.device = device

    def begin_step(self):
        self.ours.step.add_(1)
        self.twin.step.add_(1)

    def resolve(self, layer, ids, count=True, keep_current=False):
        before = self.twin.slot_of[layer].tolist()
        resolve(self.ours.layer(layer), ids.to(self.device), count, keep_current)
        resolve_reference(self.twin.layer(layer), ids, count, keep_current)
        assert_same(self.ours, self.twin)
        after = self.ours.slot_of[layer].tolist()
        assert all(after[e] == before[e] for e in self.experts(layer, ids) if before[e] >= 0), "in use, yet evicted"

    def experts(self, layer, ids):
        return {e for e in ids.flatten().tolist() if 0 <= e < len(self.twin.layers[layer].nbytes)}


@st.composite
def models(draw):
    layers, plan = [], []
    for _ in range(draw(st.integers(1, 2))):
        nbytes = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=12)))
        layers.append(LayerRecords(nbytes, 1))
        plan.append(tuple((size, draw(st.integers(0, nbytes.count(size)))) for size in sorted(set(nbytes))))
    return layers, tuple(plan)


@st.composite
def calls(draw):
    """(layer, ids, mode, whether a step begins); ids up to 14 of 12 experts at most, so some are sentinels."""
    top_k = draw(st.integers(1, 3))
    ids = draw(st.lists(st.integers(0, 13), min_size=top_k, max_size=5 * top_k))
    ids = torch.tensor(ids[: len(ids) // top_k * top_k], dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    mode = draw(st.sampled_from(({}, {"count": False}, {"keep_current": True})))
    return draw(st.integers(0, 1)), ids.view(-1, top_k), mode, draw(st.booleans())


@settings(max_examples=45, deadline=None)
@given(
    model=models(), sequence=st.lists(calls(), min_size=1, max_size=8), policy=st.sampled_from(sorted(LAYER_POLICIES))
)
def test_kernel_and_twin_agree(model, sequence, policy, device):
    pair = Pair(*model, device, policy)
    for layer, ids, mode, begins in sequence:
        if begins:
            pair.begin_step()
        pair.resolve(layer % len(model[0]), ids, **mode)


@pytest.mark.parametrize(
    ("experts", "share", "tokens", "top_k", "policy"),
    [
        (128, 0.25, 1, 8, "lru"),
        (128, 0.25, 1, 8, "lfu"),
        (128, 0.25, 32, 8, "lru"),
        (128, 0.5, 5, 8, "predictive"),
        (60, 0.5, 5, 4, "static"),
        (512, 1.0, 32, 16, "lru"),
        (512, 0.5, 32, 22, "lru"),
        (512, 0.5, 9, 22, "lfu"),
    ],
)
def test_at_real_widths(experts, share, tokens, top_k, policy, device):
    generator = torch.Generator().manual_seed(experts + tokens)
    layers = [LayerRecords(tuple(SIZES[e % 7 // 3] for e in range(experts)), top_k)]
    pair = Pair(layers, plan_layer_slots(layers, int(sum(layers[0].nbytes) * share)), device, policy)
    for _ in range(3):
        pair.begin_step()
        popular = torch.rand(tokens, experts, generator=generator) ** torch.linspace(0.2, 5, experts)
        pair.resolve(0, popular.topk(top_k).indices[:, : top_k // 2].contiguous(), keep_current=True)
        pair.resolve(0, popular.topk(top_k).indices)
    assert pair.twin.counters[0, 0] > 0
    assert pair.twin.counters[0, 1] > 0


def test_a_step_that_wrapped_does_not_disturb_sizes(device):
    layers = [LayerRecords((256, 256, 512, 512), 1)]
    pair = Pair(layers, (((256, 1), (512, 1)),), device)
    for step in (2**31 - 2, 2**31 - 1, -(2**31), -(2**31) + 1):
        for tables in (pair.ours, pair.twin):
            tables.step.fill_(step)
        resolve(pair.ours.layer(0), torch.tensor([[step % 2, 2 + step % 2]], device=device))
        assert pair.ours.owner[0, :2].tolist() == [step % 2, 2 + step % 2]


@pytest.mark.parametrize("policy", ["lfu", "predictive"])
def test_rates_agree_after_many_steps_and_when_the_counter_wraps(policy, device):
    pair = Pair([LayerRecords((256,) * 20, 1)], (((256, 5),),), device, policy)
    for start in (0, 3000, 10**7, 2**31 - 4):
        for tables in (pair.ours, pair.twin):
            tables.step.fill_(start)
        for step in range(8):
            pair.resolve(0, torch.tensor([[step % 3, 5 + step]]))
            pair.begin_step()
    assert float(pair.twin.rate.max()) < 1


def test_hits_are_counted_once_per_expert(device):
    layers = [LayerRecords((256,) * 20, 1)]
    tables = tables_of(layers, (((256, 20),),), device)
    count_hits(tables.layer(0), torch.tensor([[3, 19], [3, 20], [7, 511]], device=device))
    count_hits(tables.layer(0), torch.tensor([[3]], device=device, dtype=torch.int32))
    assert tables.counters.tolist() == [[4, 0, 0, 0]]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(2, 2), "pass int32 or int64"),
        (torch.zeros(4, dtype=torch.int64), "pass int32 or int64"),
        (torch.zeros(2, 4, dtype=torch.int64).t(), "contiguous"),
        (torch.zeros(129, 8, dtype=torch.int64), "at most 1024 are resolved at once, so stream the layer"),
    ],
)
def test_ids_that_cannot_be_are_refused(ids, said, device):
    layers = [LayerRecords((256,) * 4, 1)]
    tables = tables_of(layers, (((256, 1),),), device)
    with pytest.raises(ExpertFlowError, match=said):
        resolve(tables.layer(0), ids.to(device))
