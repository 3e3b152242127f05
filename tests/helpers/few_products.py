"""The product for few tokens and its twin, over random records and routes."""

import torch
from helpers.records import Layer, silu_gate
from torch import Tensor

from expertflow_quant.formats import ExpertShape
from expertflow_quant.kernels.few import Tile, few_product
from expertflow_quant.kernels.few_reference import few_product_reference
from expertflow_quant.kernels.gate import Gate

MIXED = ["int4-g16", "int2-channel-asym", "int3-g8", "bf16", "int8-g16-asym", "int4-channel", "nf4-g16"]
SILU = Gate(silu_gate, "silu")
SHAPE = ExpertShape(64, 32)


def routed(layer: Layer, tokens: int, top_k: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, ids (about one in E + 1 a sentinel) and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, layer.layouts[0].shape.hidden, generator=generator)
    ids = torch.randint(0, len(layer.layouts) + 1, (tokens, top_k), generator=generator)
    return hidden, ids, torch.rand(tokens, top_k, generator=generator)


def run(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor, gate: Gate = SILU, **options: Tile) -> Tensor:
    """few_product into memory full of NaN, on the layer's device; back on the CPU."""
    inputs = [part.to(layer.device) for part in (hidden, ids, weights)]
    out = torch.full_like(inputs[0], torch.nan)
    assert few_product(*inputs, *layer.arguments(), gate, out=out, **options) is out
    return out.cpu()


def twin(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor, gate: Gate = SILU) -> Tensor:
    here = Layer(layer.layouts, tuple(record.cpu() for record in layer.records), "cpu")
    return few_product_reference(hidden, ids, weights, *here.arguments(), gate)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
