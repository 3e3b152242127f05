"""The grouped product: kernels and PyTorch twins against one pair after the other in float64."""

import pytest
import torch
from helpers.routed_experts import CLAMPED, RELU, SILU, RandomExperts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError, ExpertShape
from expertflow_quant.kernels.blocks import blocks_of, plan_blocks, sort_pairs
from expertflow_quant.kernels.gate import Gate
from expertflow_quant.kernels.grouped import Tiling, combine, grouped_dense, grouped_rows
from expertflow_quant.kernels.grouped_reference import (
    combine_reference,
    grouped_dense_reference,
    grouped_rows_reference,
    weights_at,
)
from expertflow_quant.kernels.unpack import unpack_records

SHAPE = ExpertShape(hidden=64, intermediate=40)
ODD = ExpertShape(hidden=48, intermediate=24, has_bias=True)
EVERY = (
    *("int4-g8", "bf16", "int3-g8-asym", "int2-channel+", "int8-g8-asym+", "int4-channel-asym", "int3-channel"),
    *("nf4-g8+", "nf4-channel"),
)
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random_hidden(tokens: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)


def random_ids(tokens: int, top_k: int, highest: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * 31 + top_k)
    return torch.randint(0, highest + 1, (tokens, top_k), generator=generator).to(device)


def check_rows(rows: Tensor, experts: RandomExperts, hidden: Tensor, ids: Tensor, gate: Gate) -> None:
    """Covered rows are right, the others as they were: nan."""
    expected = experts.slow_rows(hidden, ids, gate.apply)
    torch.testing.assert_close(
        rows.double().cpu(), expected, rtol=CLOSE[rows.dtype], atol=CLOSE[rows.dtype], equal_nan=True
    )


def product(
    experts: RandomExperts, hidden: Tensor, ids: Tensor, gate: Gate, block: int = 16, **options: Tiling
) -> Tensor:
    table, row_of = experts.table()
    blocks = plan_blocks(ids, experts.experts, block)
    rows = hidden.new_full((ids.numel(), hidden.shape[1]), float("nan"))
    return grouped_rows(hidden, blocks, experts.addresses, row_of, table, gate, rows, **options)


@pytest.mark.parametrize(
    "name",
    [
        "bf16",
        "int2-g8",
        "int3-g8-asym",
        "int4-g8",
        "int4-channel",
        "int8-g8-asym",
        "int4-g8-asym+",
        "nf4-g8",
        "nf4-channel+",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format(device: str, name: str, dtype: torch.dtype) -> None:
    experts = RandomExperts([name], 3, SHAPE, device)
    hidden, ids = random_hidden(9, 64, dtype, device), random_ids(9, 2, 3, device)
    check_rows(product(experts, hidden, ids, SILU), experts, hidden, ids, SILU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gate", [SILU, CLAMPED], ids=["fused", "applied"])
@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["even", "odd-bias"])
def test_formats_mixed_in_one_launch(device: str, dtype: torch.dtype, gate: Gate, shape: ExpertShape) -> None:
    experts = RandomExperts(EVERY, 9, shape, device)
    hidden, ids = random_hidden(14, shape.hidden, dtype, device), random_ids(14, 2, 9, device)
    check_rows(product(experts, hidden, ids, gate), experts, hidden, ids, gate)


def test_experts_without_a_gate(device: str) -> None:
    experts = RandomExperts(["int4-g8", "bf16"], 4, ExpertShape(64, 32, has_gate=False, has_bias=True), device)
    hidden, ids = random_hidden(6, 64, torch.float32, device), random_ids(6, 2, 3, device)
    check_rows(product(experts, hidden, ids, RELU), experts, hidden, ids, RELU)


@pytest.mark.parametrize("block", [16, 32])
def test_an_expert_with_more_tokens_than_a_block(device: str, block: int) -> None:
    experts = RandomExperts(["int4-g8", "int8-channel"], 8, SHAPE, device)
    ids = torch.tensor([[5, 9]] * 37 + [[5, 2]] * 4, device=device)  # two tokens short of a block, none for others
    hidden = random_hidden(41, 64, torch.float32, device)
    check_rows(product(experts, hidden, ids, SILU, block), experts, hidden, ids, SILU)


def test_other_tilings_give_the_same(device: str) -> None:
    experts = RandomExperts(["int4-g32", "int3-g32"], 5, ExpertShape(64, 96), device)
    hidden, ids = random_hidden(30, 64, torch.float32, device), random_ids(30, 2, 4, device)
    tiling = Tiling(wide=64, depth=16, num_warps=4, num_stages=2, group_blocks=3)
    check_rows(product(experts, hidden, ids, SILU, tiling=tiling), experts, hidden, ids, SILU)


def test_only_sentinels_write_nothing(device: str) -> None:
    experts = RandomExperts(["int4-g8"], 2, SHAPE, device)
    ids = torch.full((3, 2), 2, device=device)
    assert product(experts, random_hidden(3, 64, torch.float32, device), ids, SILU).isnan().all()


@settings(max_examples=8, deadline=None)
@given(tokens=st.integers(0, 20), top_k=st.integers(1, 3), count=st.integers(1, 6), data=st.data())
def test_any_routes(device: str, tokens: int, top_k: int, count: int, data: st.DataObject) -> None:
    experts = RandomExperts(["int4-g8", "bf16", "int2-g8"], count, ExpertShape(32, 16), device)
    flat = data.draw(st.lists(st.integers(0, count + 1), min_size=tokens * top_k, max_size=tokens * top_k))
    ids = torch.tensor(flat, dtype=torch.int64, device=device).view(tokens, top_k)
    hidden = random_hidden(tokens, 32, torch.float32, device)
    check_rows(product(experts, hidden, ids, SILU), experts, hidden, ids, SILU)


def test_chunks_of_experts_add_up_to_all(device: str) -> None:
    experts = RandomExperts(EVERY, 8, SHAPE, device)
    table, row_of = experts.table()
    hidden, ids = random_hidden(20, 64, torch.float32, device), random_ids(20, 2, 8, device)
    pairs = sort_pairs(ids, 8)
    rows = hidden.new_full((40, 64), float("nan"))
    for chunk in ([3, -1, 0], [1, 2, 7], [6, 5, 4]):
        blocks = blocks_of(pairs, 16, torch.tensor(chunk, dtype=torch.int32, device=device))
        grouped_rows(hidden, blocks, experts.addresses, row_of, table, SILU, rows)
    check_rows(rows, experts, hidden, ids, SILU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("int4-g8",), EVERY], ids=["plain", "scaled"])
@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["even", "odd-bias"])
def test_dense_weights(device: str, dtype: torch.dtype, names: tuple[str, ...], shape: ExpertShape) -> None:
    experts = RandomExperts(names, 8, shape, device)
    hidden, ids = random_hidden(15, shape.hidden, dtype, device), random_ids(15, 2, 8, device)
    present = [6, 1, 0, 7, 2, 4, 3]  # in the order of the dense arrays; expert 5 is absent
    gate_up = torch.stack([experts.plain[e]["gate_up"] for e in present]).to(device, dtype)
    down = torch.stack([experts.plain[e]["down"] for e in present]).to(device, dtype)
    index_of = torch.tensor([present.index(e) if e in present else -1 for e in range(8)], dtype=torch.int32)
    table, row_of = experts.table()
    rows = hidden.new_full((30, shape.hidden), float("nan"))
    blocks = plan_blocks(ids, 8, 16)
    rest = (experts.addresses, row_of, table, SILU)
    grouped_dense(hidden, blocks, gate_up, down, index_of.to(device), *rest, rows)
    check_rows(rows, experts, hidden, torch.where(ids == 5, 8, ids), SILU)


@pytest.mark.cuda
@pytest.mark.parametrize("gate", [SILU, CLAMPED], ids=["fused", "applied"])
def test_a_graph_follows_the_ids(gate: Gate) -> None:
    """Captured once with some routes, replayed with others: nothing in between looks at the host."""
    experts = RandomExperts(EVERY, 8, SHAPE, "cuda")
    table, row_of = experts.table()
    addresses = experts.addresses
    hidden, ids = random_hidden(24, 64, torch.float32, "cuda"), random_ids(24, 2, 8, "cuda")
    weights = torch.rand(24, 2, device="cuda")

    def step() -> Tensor:
        blocks = plan_blocks(ids, 8, 16)
        rows = hidden.new_empty(48, 64)
        return combine(grouped_rows(hidden, blocks, addresses, row_of, table, gate, rows), ids, weights, 8)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        summed = step()
    for highest in (8, 1, 5):
        ids.copy_(random_ids(24, 2, highest, "cuda"))
        graph.replay()
        terms = experts.slow_rows(hidden, ids, gate.apply).nan_to_num(0.0).view(24, 2, 64)
        expected = (weights.double().cpu()[..., None] * terms).sum(1)
        torch.testing.assert_close(summed.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_widths(block: int, dtype: torch.dtype) -> None:
    """Every shipped tiling, decoded in the kernel and on load: the two differ in nothing but the kernel."""
    experts = RandomExperts(["int4-g128", "int4-g128-asym", "int3-g64", "nf4-g64"], 4, ExpertShape(1024, 768), "cuda")
    table, row_of = experts.table()
    hidden, ids = random_hidden(400, 1024, dtype, "cuda"), random_ids(400, 2, 4, "cuda")
    rest = (experts.addresses, row_of, table, SILU)
    dense = {name: torch.empty(4, *size, dtype=dtype, device="cuda") for name, size in table.shape.matrices.items()}
    unpack_records(experts.addresses, row_of, table, **dense)
    index_of = torch.arange(4, dtype=torch.int32, device="cuda")
    blocks = plan_blocks(ids, 4, block)
    coded = grouped_rows(hidden, blocks, *rest, hidden.new_full((800, 1024), float("nan")))
    decoded = grouped_dense(hidden, blocks, *dense.values(), index_of, *rest, torch.full_like(coded, float("nan")))
    torch.testing.assert_close(coded, decoded, rtol=1e-2, atol=1e-2, equal_nan=True)
    chosen = torch.randperm(400)[:5]
    expected = experts.slow_rows(hidden[chosen], ids[chosen], SILU.apply)
    torch.testing.assert_close(
        coded.view(400, 2, 1024)[chosen].view(10, 1024).double().cpu(), expected, rtol=3e-2, atol=3e-2, equal_nan=True
    )


@pytest.mark.parametrize("gate", [SILU, CLAMPED], ids=["fused", "applied"])
def test_twins(gate: Gate) -> None:
    experts = RandomExperts(EVERY, 7, ODD)
    table, row_of = experts.table()
    hidden, ids = random_hidden(13, 48, torch.float32, "cpu"), random_ids(13, 2, 7, "cpu")
    blocks = plan_blocks(ids, 7, 16)
    rest = (experts.addresses, row_of, table, gate)
    rows = grouped_rows_reference(hidden, blocks, *rest, torch.full((26, 48), float("nan")))
    check_rows(rows, experts, hidden, ids, gate)
    own = [
        weights_at(record.data_ptr(), layout, torch.float32)
        for record, layout in zip(experts.records, experts.layouts, strict=True)
    ]
    dense = (
        torch.stack([w.gate_up for w in own]),
        torch.stack([w.down for w in own]),
        torch.arange(7, dtype=torch.int32),
    )
    again = grouped_dense_reference(hidden, blocks, *dense, *rest, torch.full((26, 48), float("nan")))
    assert torch.equal(again.nan_to_num(7.0), rows.nan_to_num(7.0))


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 9),
    top_k=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_combine(device: str, tokens: int, top_k: int, dtype: torch.dtype) -> None:
    ids = random_ids(tokens, top_k, 4, device)
    weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(1)).to(device)
    rows = random_hidden(tokens * top_k, 300, dtype, device)
    rows[(ids >= 3).flatten()] = float("nan")  # of sentinels
    summed = combine(rows, ids, weights, 3)
    expected = torch.zeros(tokens, 300, dtype=torch.float64)
    for pair, expert in enumerate(ids.flatten().tolist()):
        if expert < 3:
            expected[pair // top_k] += float(weights.flatten()[pair]) * rows[pair].double().cpu()
    assert summed.dtype == dtype
    torch.testing.assert_close(summed.double().cpu(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    torch.testing.assert_close(
        summed, combine_reference(rows, ids, weights, 3), rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6
    )


def test_combine_writes_where_it_is_told(device: str) -> None:
    ids, weights = torch.zeros(2, 1, dtype=torch.int32, device=device), torch.ones(2, 1, device=device)
    out = torch.zeros(2, 16, device=device)
    rows = random_hidden(2, 16, torch.float32, device)
    assert combine(rows, ids, weights, 1, out) is out
    assert torch.equal(out, rows)
    with pytest.raises(ExpertFlowError, match="one row per routed pair"):
        combine(rows[:1], ids, weights, 1)


@pytest.mark.parametrize("wrong", ["gate_up", "down", "index_of"])
def test_wrong_dense_weights_are_refused(device: str, wrong: str) -> None:
    experts = RandomExperts(["int4-g8"], 2, SHAPE, device)
    table, row_of = experts.table()
    ids = torch.zeros(3, 2, dtype=torch.int64, device=device)
    given = {name: torch.zeros(2, *size, device=device) for name, size in SHAPE.matrices.items()}
    given["index_of"] = torch.zeros(2, dtype=torch.int32, device=device)
    given[wrong] = given[wrong].double()
    hidden, rows = torch.zeros(3, 64, device=device), torch.zeros(6, 64, device=device)
    with pytest.raises(ExpertFlowError, match=f"{wrong} is torch.float64"):
        grouped_dense(hidden, plan_blocks(ids, 2, 16), *given.values(), experts.addresses, row_of, table, SILU, rows)


def test_tensors_of_two_devices_are_refused(device: str) -> None:
    experts = RandomExperts(["int4-g8"], 2, SHAPE, device)
    table, row_of = experts.table()
    blocks = plan_blocks(torch.zeros(3, 2, dtype=torch.int64, device=device), 2, 16)
    hidden, rows = torch.zeros(3, 64, device=device), torch.zeros(6, 64, device=device)
    with pytest.raises(ExpertFlowError, match="one device"):
        grouped_rows(hidden, blocks, experts.addresses.to("meta"), row_of, table, SILU, rows)


@pytest.mark.parametrize("wrong", ["hidden", "rows", "addresses"])
def test_wrong_arguments_are_refused(device: str, wrong: str) -> None:
    experts = RandomExperts(["int4-g8"], 2, SHAPE, device)
    table, row_of = experts.table()
    ids = torch.zeros(3, 2, dtype=torch.int64, device=device)
    given = {
        "hidden": torch.zeros(3, 64, device=device),
        "rows": torch.zeros(6, 64, device=device),
        "addresses": experts.addresses,
    }
    given[wrong] = given[wrong][:1] if wrong != "addresses" else given[wrong].int()
    with pytest.raises(ExpertFlowError, match=r"one row per|int64"):
        grouped_rows(given["hidden"], plan_blocks(ids, 2, 16), given["addresses"], row_of, table, SILU, given["rows"])
