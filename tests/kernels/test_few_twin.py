"""Where no kernel can run, the product for few tokens is its PyTorch twin."""

import pytest
import torch
from helpers.interpreted import interpreting
from helpers.records import Layer, silu_gate

from expertflow_quant.formats import ExpertShape
from expertflow_quant.kernels.few import few_product
from expertflow_quant.kernels.gate import Gate


@pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1: kernels run here")
def test_the_twin_is_the_weighted_sum_of_the_experts() -> None:
    shape = ExpertShape(32, 24, has_bias=True)
    layer = Layer.random(shape, ["int4-g8", "bf16", "int2-channel-asym"], "cpu", input_scale=True)
    generator = torch.Generator().manual_seed(1)
    hidden, weights = torch.randn(3, 32, generator=generator), torch.rand(3, 2, generator=generator)
    ids = torch.tensor([[0, 2], [1, 3], [2, 2]])
    got = few_product(hidden, ids, weights, *layer.arguments(), Gate(silu_gate, "silu"))
    want = torch.zeros(3, 32, dtype=torch.float64)
    for token, choice in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        want[token] += weights[token, choice] * layer.exact(int(ids[token, choice]), hidden[token : token + 1])[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
