"""Dequantization on load equals the reference bit by bit, and the weights that codes stand for."""

import pytest
import torch
from helpers.routed_experts import RandomExperts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError, ExpertShape, RecordLayout
from expertflow_quant.kernels import expert_weights
from expertflow_quant.kernels.unpack import unpack_records, unpack_reference

SHAPE = ExpertShape(hidden=48, intermediate=40, has_bias=True)
EVERY = (
    *("int4-g8", "bf16", "int3-g8-asym", "int2-channel+", "int8-g8-asym+", "int4-channel-asym", "int3-channel"),
    *("nf4-g8+", "nf4-channel"),
)


def empty(count: int, shape: ExpertShape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Dense matrices to fill."""
    return {
        name: torch.full((count, *size), float("nan"), dtype=dtype, device=device)
        for name, size in shape.matrices.items()
    }


def rounded(record: Tensor, layout: RecordLayout, name: str, dtype: torch.dtype, device: str) -> Tensor:
    """A matrix of the reference. Triton's interpreter cuts float32 down to bfloat16 where a GPU rounds."""
    if device == "cpu" and dtype == torch.bfloat16:
        exact: Tensor = getattr(expert_weights(layout.views(record), layout, torch.float32), name)
        return (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
    return getattr(expert_weights(layout.views(record), layout, dtype), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", [*[(name,) for name in EVERY], EVERY], ids=[*EVERY, "mixed"])
def test_records_are_decoded_bit_by_bit(device: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
    experts = RandomExperts(names, max(2, len(names)), SHAPE, device)
    table, row_of = experts.table()
    dense = empty(experts.experts, SHAPE, dtype, device)
    unpack_records(experts.addresses, row_of, table, **dense)
    for index, (record, layout) in enumerate(zip(experts.records, experts.layouts, strict=True)):
        for name in dense:
            assert torch.equal(dense[name][index].cpu(), rounded(record.cpu(), layout, name, dtype, device))
        exact = experts.plain[index]["down"]
        torch.testing.assert_close(dense["down"][index].double().cpu(), exact, rtol=1e-2, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(
    hidden=st.integers(1, 9),
    intermediate=st.integers(1, 9),
    gate=st.booleans(),
    name=st.sampled_from(["int2-g8", "int3-channel", "int4-g8-asym", "int8-channel-asym", "nf4-g8"]),
)
def test_any_size(device: str, hidden: int, intermediate: int, gate: bool, name: str) -> None:
    shape = ExpertShape(hidden * 8, intermediate * 8, has_gate=gate)
    experts = RandomExperts([name, "bf16"], 3, shape, device)
    table, row_of = experts.table()
    dense = empty(3, shape, torch.float32, device)
    unpack_records(experts.addresses, row_of, table, **dense, tall=16, wide=32)
    for index, plain in enumerate(experts.plain):
        for name in dense:
            torch.testing.assert_close(dense[name][index].double().cpu(), plain[name], rtol=1e-6, atol=0)


def test_some_records_in_any_order(device: str) -> None:
    experts = RandomExperts(EVERY, 7, SHAPE, device)
    table, row_of = experts.table()
    chosen = torch.tensor([6, 0, 3], device=device)
    dense = empty(3, SHAPE, torch.float32, device)
    unpack_records(experts.addresses[chosen], row_of[chosen], table, **dense)
    for index, expert in enumerate(chosen.tolist()):
        exact = experts.plain[expert]["gate_up"]
        torch.testing.assert_close(dense["gate_up"][index].double().cpu(), exact, rtol=1e-6, atol=0)


def test_the_twin() -> None:
    experts = RandomExperts(EVERY, 7, SHAPE)
    table, row_of = experts.table()
    dense = empty(7, SHAPE, torch.float32, "cpu")
    unpack_reference(experts.addresses, row_of, table, **dense)
    for index, plain in enumerate(experts.plain):
        torch.testing.assert_close(dense["gate_up"][index].double(), plain["gate_up"], rtol=1e-6, atol=0)


def test_wrong_arguments_are_refused(device: str) -> None:
    experts = RandomExperts(["int4-g8"], 2, SHAPE, device)
    table, row_of = experts.table()
    dense = empty(2, SHAPE, torch.float32, device)
    with pytest.raises(ExpertFlowError, match="int64"):
        unpack_records(experts.addresses.int(), row_of, table, **dense)
    with pytest.raises(ExpertFlowError, match="gate_up is"):
        unpack_records(experts.addresses[:1], row_of[:1], table, **dense)
    with pytest.raises(ExpertFlowError, match="down is"):
        unpack_records(experts.addresses, row_of, table, dense["gate_up"], dense["down"].half())
