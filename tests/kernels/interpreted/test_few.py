"""The product for few tokens against its twin, and against float64."""

import pytest
import torch
from helpers.few_products import MIXED, SHAPE, SILU, error, routed, run, twin
from helpers.records import Layer, silu_gate
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats import ExpertFlowError, ExpertShape
from expertflow_quant.kernels.few import few_product
from expertflow_quant.kernels.gate import Gate


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_each_dtype_against_float64(dtype: torch.dtype, bound: float, device: str) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        bound *= 2  # the interpreter cuts float32 off to bfloat16 where a GPU rounds
    layer = Layer.random(ExpertShape(64, 48, has_bias=True), MIXED, device, input_scale=True)
    hidden, ids, weights = routed(layer, tokens=3, top_k=3)
    hidden, weights = hidden.to(dtype), weights.to(dtype)
    want = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(3):
        for expert, weight in zip(ids[token].tolist(), weights[token].double()):
            if expert < len(MIXED):
                want[token] += weight * layer.exact(expert, hidden[token : token + 1])[0]
    got = run(layer, hidden, ids, weights)
    assert got.dtype == dtype
    assert error(got, want) < bound


@pytest.mark.parametrize("formats", [["int4-g32"] * 4, ["int4-g32", "int8-g16", "int4-g32", "bf16"]])
def test_sentinels_add_nothing_and_all_of_the_output_is_written(formats: list[str], device: str) -> None:
    layer = Layer.random(SHAPE, formats, device)
    hidden, _, weights = routed(layer, tokens=3, top_k=2)
    ids = torch.tensor([[1, 4], [4, 4], [900, 3]], dtype=torch.int32)
    got = run(layer, hidden, ids, weights)
    assert not got[1].any()
    alone = run(layer, hidden[[0, 2]], torch.tensor([[1], [3]]), weights[[0, 2], [0, 1]].unsqueeze(1))
    torch.testing.assert_close(got[[0, 2]], alone, rtol=1e-5, atol=1e-6)
    unfused = run(layer, hidden, ids, weights, Gate(silu_gate))
    torch.testing.assert_close(unfused, got, rtol=1e-5, atol=1e-6)


def test_an_expert_of_several_tokens_and_choices(device: str) -> None:
    layer = Layer.random(SHAPE, ["int4-g16"] * 2, device)
    hidden, _, weights = routed(layer, tokens=4, top_k=2)
    got = run(layer, hidden, torch.ones(4, 2, dtype=torch.int64), weights)
    want = weights.sum(1, keepdim=True).double() * layer.exact(1, hidden)
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("formats", [["int4-g16"] * 3, MIXED])
def test_the_fused_gate_equals_the_modules_own(formats: list[str], device: str) -> None:
    layer = Layer.random(ExpertShape(64, 40, has_bias=True), [name.replace("g16", "g8") for name in formats], device)
    inputs = routed(layer, tokens=2, top_k=3)
    assert error(run(layer, *inputs), run(layer, *inputs, Gate(silu_gate))) < 1e-6


def test_experts_without_a_gate(device: str) -> None:
    relu_squared = Gate(lambda up: functional.relu(up).square())
    layer = Layer.random(ExpertShape(64, 48, has_gate=False), MIXED, device)
    inputs = routed(layer, tokens=3, top_k=2)
    assert error(run(layer, *inputs, relu_squared), twin(layer, *inputs, relu_squared)) < 2e-6


def test_a_gate_whose_rows_are_interleaved(device: str) -> None:
    interleaved = Gate(lambda both: functional.silu(both[..., ::2]) * (both[..., 1::2] + 1))
    layer = Layer.random(SHAPE, ["int4-g16", "int3-g16"], device)
    inputs = routed(layer, tokens=3, top_k=2)
    assert error(run(layer, *inputs, interleaved), twin(layer, *inputs, interleaved)) < 2e-6


def test_no_tokens_give_no_rows(device: str) -> None:
    layer = Layer.random(SHAPE, ["int4-g16"], device)
    assert run(layer, *routed(layer, tokens=0, top_k=2)).shape == (0, 64)


def test_large_and_small_activations_stay_exact(device: str) -> None:
    layer = Layer.random(SHAPE, ["int4-g16", "int8-g16"], device)
    hidden, ids, weights = routed(layer, tokens=2, top_k=2)
    half = Gate(lambda both: both[..., : both.shape[-1] // 2])
    for power in (-40, 25):
        inputs = (hidden * 2.0**power, ids, weights)
        assert error(run(layer, *inputs, half), twin(layer, *inputs, half)) < 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 64, dtype=torch.float64)}, r"hidden is torch\.float64"),
        ({"hidden": torch.zeros(2, 72)}, r"\[tokens, 64\]"),
        ({"hidden": torch.zeros(64, 2).t()}, r"call \.contiguous\(\)"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int64)}, r"must be int32 or int64 \[2, top_k\]"),
        ({"ids": torch.zeros(2, 2)}, r"ids are torch\.float32"),
        ({"weights": torch.zeros(2, 3)}, r"floating \(2, 2\)"),
        ({"out": torch.zeros(2, 64, dtype=torch.bfloat16)}, r"out is torch\.bfloat16"),
        ({"addresses": torch.zeros(1, dtype=torch.int32)}, r"addresses is torch\.int32"),
        ({"row_of": torch.zeros(2, 1, dtype=torch.int32)}, r"row_of is torch\.int32 \(2, 1\)"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Tensor], message: str, device: str) -> None:
    layer = Layer.random(SHAPE, ["int4-g16"], device)
    addresses, row_of, table = layer.arguments()
    right = {"hidden": torch.zeros(2, 64), "ids": torch.zeros(2, 2, dtype=torch.int64), "weights": torch.zeros(2, 2)}
    arguments = {**right, "addresses": addresses, "row_of": row_of, "table": table, "gate": SILU, **change}
    moved = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in arguments.items()}
    with pytest.raises(ExpertFlowError, match=message):
        few_product(**moved)


def test_columns_that_are_no_multiple_of_eight_are_refused(device: str) -> None:
    layer = Layer.random(ExpertShape(10, 8), ["bf16"], device)
    with pytest.raises(ExpertFlowError, match="in eights"):
        run(layer, *routed(layer, tokens=1, top_k=1))
