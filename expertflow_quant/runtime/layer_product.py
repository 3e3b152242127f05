"""One layer's experts times many tokens, some experts at a time: the numbers of a streamed pass, without its bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats.record import ExpertShape
from expertflow_quant.kernels import (
    BLOCK_TOKENS,
    Gate,
    LayoutTable,
    Sorted,
    blocks_of,
    grouped_dense,
    grouped_rows,
    sort_pairs,
    unpack_records,
)

MOST_CODED = 64
"""Largest block where weights are decoded in the kernel: a tile of codes takes registers that a larger one needs."""

PLAN_BYTES = 128
"""Device bytes a pair takes beside its rows, at most: masked ids, the sort's keys, values and workspace, blocks."""

GATE_COPIES = 6
"""Tensors ``[P, I]`` that a gate which no kernel computes holds at once, at most: both halves clamped, the activation
and what it is made of."""


@dataclass(frozen=True)
class Part:
    """Some tokens of a layer: hidden ``[t, H]``, their pairs by expert, and their rows ``[t * K, H]`` to write."""

    hidden: Tensor
    pairs: Sorted
    rows: Tensor


def cut_tokens(hidden: Tensor, ids: Tensor, rows: Tensor, experts: int, tokens: int) -> list[Part]:
    """hidden ``[T, H]``, ids ``[T, K]``, rows ``[T * K, H]`` in parts of at most ``tokens`` tokens."""
    top_k = ids.shape[1]
    pieces = zip(torch.split(hidden, tokens), torch.split(ids, tokens), torch.split(rows, tokens * top_k), strict=True)
    return [Part(some, sort_pairs(routed, experts), target) for some, routed, target in pieces if some.shape[0]]


@dataclass
class LayerProduct:
    """Writes the rows of all pairs of ``parts`` whose expert is given to ``run``.

    ``addresses`` int64 ``[E]`` must be right for those experts when ``run`` is called. ``places`` int32 ``[E]``: each
    expert's place among those that come in one call. ``tokens_per_expert`` sizes the blocks.
    """

    table: LayoutTable
    row_of: Tensor
    addresses: Tensor
    places: Tensor
    gate: Gate
    parts: list[Part]
    tokens_per_expert: float
    _matrices: tuple[Tensor, Tensor] | None = None

    def run(self, experts: Tensor) -> None:
        """Decode in the kernel, for ``experts`` int32 ``[n]``."""
        for part in self.parts:
            blocks = blocks_of(part.pairs, block_tokens(self.tokens_per_expert, MOST_CODED), experts)
            grouped_rows(part.hidden, blocks, self.addresses, self.row_of, self.table, self.gate, part.rows)

    def run_dense(self, experts: Tensor, most: int) -> None:
        """Decode ``experts`` int32 ``[n]`` once for all tokens, ``most`` of them at a time, and multiply."""
        if not self.parts:
            return
        # an expert that is in no block has some index too, which nobody reads
        index_of = self.places % most
        size = block_tokens(self.tokens_per_expert, BLOCK_TOKENS[-1])
        for some in torch.split(experts, most):
            gate_up, down = (matrix[: some.shape[0]] for matrix in self._room(most))
            addresses, row_of = (every.index_select(0, some) for every in (self.addresses, self.row_of))
            unpack_records(addresses, row_of, self.table, gate_up, down)
            for part in self.parts:
                blocks = blocks_of(part.pairs, size, some)
                own = (self.addresses, self.row_of, self.table, self.gate)
                grouped_dense(part.hidden, blocks, gate_up, down, index_of, *own, part.rows)

    def _room(self, most: int) -> tuple[Tensor, Tensor]:
        """Room for ``most`` decoded experts, the same for every call."""
        if self._matrices is None:
            shapes = self.table.shape.matrices
            like = self.parts[0].hidden
            self._matrices = (like.new_empty(most, *shapes["gate_up"]), like.new_empty(most, *shapes["down"]))
        return self._matrices


def block_tokens(tokens_per_expert: float, most: int) -> int:
    """The smallest block, up to ``most``, that holds what an expert gets on average."""
    return next((size for size in BLOCK_TOKENS if size >= tokens_per_expert or size >= most), most)


def decoded_together(shape: ExpertShape, experts: int, dtype: torch.dtype, nbytes: int) -> int:
    """How many of ``experts`` experts are decoded at a time: as ``nbytes`` allow, but at least one."""
    return max(1, min(experts, nbytes // (_values(shape) * dtype.itemsize)))


def part_tokens(shape: ExpertShape, top_k: int, dtype: torch.dtype, fused: bool, nbytes: int) -> int:
    """How many tokens are multiplied at a time: as ``nbytes`` between the two products allow, but at least one."""
    return max(1, nbytes // (top_k * _inner(shape, fused) * dtype.itemsize))


def scratch_bytes(
    shape: ExpertShape, top_k: int, tokens: int, together: int, decoded: int, dtype: torch.dtype, fused: bool
) -> int:
    """Device bytes of one layer over ``tokens`` tokens, at most: rows, result, what lies between the two products of
    ``together`` tokens, ``decoded`` experts' matrices, plans. Allocations' rounding is not in it."""
    pairs, inner = tokens * top_k, min(tokens, together) * top_k * _inner(shape, fused)
    values = (pairs + 2 * tokens) * shape.hidden + inner + decoded * _values(shape)
    return values * dtype.itemsize + pairs * PLAN_BYTES


def _inner(shape: ExpertShape, fused: bool) -> int:
    """Values of one pair between the two products, at most; ``fused``: the kernel computes the gate."""
    if fused and shape.has_gate:
        return shape.intermediate
    return shape.matrices["gate_up"][0] + GATE_COPIES * shape.intermediate


def _values(shape: ExpertShape) -> int:
    """Weights of one expert."""
    return sum(rows * columns for rows, columns in shape.matrices.values())
