"""A layer of random experts at any shape, with random inputs routed to them, as the pipeline would hand it over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats import ExpertShape, Format
from expertflow_quant.kernels import ExpertWeights
from expertflow_quant.pipeline.methods import Job
from expertflow_quant.pipeline.observe import ExpertRows


def silu_gate(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows ``[gate; up]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


@dataclass(frozen=True)
class RandomLayer:
    """bf16 weights gate_up ``[E, 2I, H]`` and down ``[E, H, I]``, bf16 tokens ``[T, H]``, and the ``top_k`` experts and
    affinities of each ``[T, K]``."""

    shape: ExpertShape
    gate_up: Tensor
    down: Tensor
    hidden: Tensor
    index: Tensor
    affinity: Tensor

    @classmethod
    def make(
        cls, shape: ExpertShape, experts: int, top_k: int, tokens: int, device: str, seed: int = 0
    ) -> "RandomLayer":
        """Channels of very different sizes that are correlated, as activations are; popular and rare experts."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def matrices(rows: int, columns: int) -> Tensor:
            made = torch.empty(experts, rows, columns, dtype=torch.bfloat16, device=device)
            for matrix in made:
                matrix.copy_(normal(rows, columns) / columns**0.5)
            return made

        factors = min(shape.hidden, 64)
        hidden = 0.5 * normal(tokens, shape.hidden) + normal(tokens, factors) @ normal(factors, shape.hidden) / 8
        hidden *= torch.exp(0.7 * normal(shape.hidden))
        router = normal(shape.hidden, experts) / shape.hidden**0.5
        scores = (functional.normalize(hidden, dim=-1) @ router) * shape.hidden**0.5 + 0.5 * normal(experts)
        affinity, index = scores.softmax(-1).topk(top_k, dim=-1)
        affinity /= affinity.sum(-1, keepdim=True)
        up, down = shape.matrices["gate_up"], shape.matrices["down"]
        return cls(shape, matrices(*up), matrices(*down), hidden.bfloat16(), index, affinity)

    @property
    def rows(self) -> list[int]:
        """Tokens routed to each expert."""
        return self.index.flatten().bincount(minlength=len(self.down)).tolist()

    def jobs(self, format: Format, experts: Sequence[int], device: str) -> Iterator[Job]:
        """What the quantizer is given, expert by expert, on ``device``."""
        for expert in experts:
            token, choice = (self.index == expert).nonzero(as_tuple=True)
            inputs, weights = self.hidden[token].to(device), self.affinity[token, choice].to(device)
            matrices = (each[expert].to(device).float() for each in (self.gate_up, self.down))
            yield Job(expert, format, ExpertWeights(*matrices), ExpertRows(inputs, weights, len(token), "routed"))
