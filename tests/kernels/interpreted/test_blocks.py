"""The plan of a grouped product: kernel and PyTorch twin against a plain loop over pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.kernels.blocks import (
    Blocks,
    Sorted,
    block_bound,
    blocks_of,
    blocks_reference,
    plan_blocks,
    sort_pairs,
)


def looped(ids: Tensor, num_experts: int, block_tokens: int, wanted: list[int]) -> list[tuple[int, list[int]]]:
    """(expert, pairs) of every block, in order."""
    flat = ids.flatten().tolist()
    blocks = []
    for expert in wanted:
        pairs = [pair for pair, routed in enumerate(flat) if routed == expert < num_experts]
        blocks += [(expert, pairs[at : at + block_tokens]) for at in range(0, len(pairs), block_tokens)]
    return blocks


def as_listed(blocks: Blocks) -> list[tuple[int, list[int]]]:
    order = blocks.order.tolist()
    rows = zip(blocks.expert.tolist(), blocks.start.tolist(), blocks.end.tolist(), strict=True)
    listed = [(expert, order[start:end]) for expert, start, end in rows]
    used = [block for block in listed if block[0] >= 0]
    assert listed[len(used) :] == [(-1, [])] * (len(listed) - len(used)), "unused blocks come last and are empty"
    return used


@st.composite
def routed(draw: st.DrawFn) -> tuple[Tensor, int]:
    experts = draw(st.integers(1, 40))
    tokens, top_k = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    highest = draw(st.integers(0, experts + 1))  # few distinct experts make blocks overflow
    values = st.integers(-1, highest)
    ids = draw(st.lists(values, min_size=tokens * top_k, max_size=tokens * top_k))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.tensor(ids, dtype=dtype).view(tokens, top_k), experts


@settings(max_examples=25, deadline=None)
@given(case=routed(), block_tokens=st.sampled_from([16, 32, 64]))
def test_few_pairs_are_sorted_and_cut(device: str, case: tuple[Tensor, int], block_tokens: int) -> None:
    ids, experts = case
    blocks = plan_blocks(ids.to(device), experts, block_tokens)
    assert as_listed(blocks) == looped(ids, experts, block_tokens, list(range(experts)))
    assert sorted(blocks.order.tolist()) == list(range(ids.numel()))
    assert torch.equal(blocks.order.cpu(), sort_pairs(ids, experts).order)


@settings(max_examples=25, deadline=None)
@given(case=routed(), data=st.data(), block_tokens=st.sampled_from([16, 32]))
def test_subsets_are_cut_from_one_sort(
    device: str, case: tuple[Tensor, int], data: st.DataObject, block_tokens: int
) -> None:
    ids, experts = case
    wanted = data.draw(st.lists(st.integers(0, experts - 1), unique=True, max_size=experts))
    padded = [*wanted[:1], -1, *wanted[1:], -1]
    pairs = sort_pairs(ids.to(device), experts)
    subset = torch.tensor(padded, dtype=torch.int32, device=device)
    blocks = blocks_of(pairs, block_tokens, subset)
    assert as_listed(blocks) == looped(ids, experts, block_tokens, wanted)
    twin = blocks_reference(pairs, block_tokens, subset)
    assert [t.tolist() for t in (blocks.expert, blocks.start, blocks.end)] == [
        t.tolist() for t in (twin.expert, twin.start, twin.end)
    ]


def test_many_pairs_go_the_long_way(device: str) -> None:
    ids = torch.randint(0, 9, (300, 2), generator=torch.Generator().manual_seed(0))
    blocks = plan_blocks(ids.to(device), 8, 64)
    assert as_listed(blocks) == looped(ids, 8, 64, list(range(8)))


def test_without_tokens_or_subset_there_are_no_blocks(device: str) -> None:
    none = torch.empty(0, 2, dtype=torch.int64, device=device)
    assert as_listed(plan_blocks(none, 4, 16)) == []
    pairs = sort_pairs(torch.zeros(3, 2, dtype=torch.int64, device=device), 4)
    assert as_listed(blocks_of(pairs, 16, torch.empty(0, dtype=torch.int32, device=device))) == []


@pytest.mark.parametrize(("pairs", "experts", "block"), [(1, 8, 16), (100, 8, 16), (37, 37, 16), (64, 1, 64)])
def test_the_bound_is_reached(device: str, pairs: int, experts: int, block: int) -> None:
    """As many experts as there can be with one pair in their last block need every block."""
    occurring = min(pairs, experts)
    ids = torch.tensor([*range(occurring), *[0] * (pairs - occurring)]).view(-1, 1)
    blocks = plan_blocks(ids.to(device), experts, block)
    assert len(as_listed(blocks)) == blocks.expert.shape[0] == block_bound(pairs, experts, block)


@pytest.mark.parametrize(
    ("ids", "block"),
    [(torch.zeros(4, dtype=torch.int64), 16), (torch.zeros(4, 2), 16), (torch.zeros(4, 2, dtype=torch.int64), 24)],
)
def test_wrong_arguments_are_refused(device: str, ids: Tensor, block: int) -> None:
    with pytest.raises(ExpertFlowError, match=r"ids are|use one of"):
        plan_blocks(ids.to(device), 4, block)


def test_subsets_of_another_type_are_refused(device: str) -> None:
    pairs = sort_pairs(torch.zeros(3, 2, dtype=torch.int64, device=device), 4)
    assert isinstance(pairs, Sorted)
    with pytest.raises(ExpertFlowError, match="int32"):
        blocks_of(pairs, 16, torch.zeros(2, dtype=torch.int64, device=device))
