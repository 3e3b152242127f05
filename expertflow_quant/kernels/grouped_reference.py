"""The PyTorch twins of ``grouped``: one expert after the other through ``reference``, on the CPU."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from expertflow_quant.formats import RecordLayout
from expertflow_quant.kernels.blocks import Blocks
from expertflow_quant.kernels.gate import Gate
from expertflow_quant.kernels.host_view import record_at
from expertflow_quant.kernels.reference import ExpertWeights, expert_product, expert_weights
from expertflow_quant.kernels.table import LayoutTable


def grouped_rows_reference(
    hidden: Tensor, blocks: Blocks, addresses: Tensor, row_of: Tensor, table: LayoutTable, gate: Gate, rows: Tensor
) -> Tensor:
    """Twin of ``grouped_rows``."""

    def weights_of(expert: int) -> ExpertWeights:
        return weights_at(int(addresses[expert]), table.layouts[int(row_of[expert])], hidden.dtype)

    return _write(hidden, blocks, weights_of, gate, rows)


def grouped_dense_reference(
    hidden: Tensor,
    blocks: Blocks,
    gate_up: Tensor,
    down: Tensor,
    index_of: Tensor,
    addresses: Tensor,
    row_of: Tensor,
    table: LayoutTable,
    gate: Gate,
    rows: Tensor,
) -> Tensor:
    """Twin of ``grouped_dense``."""

    def weights_of(expert: int) -> ExpertWeights | None:
        index = int(index_of[expert])
        if index < 0:
            return None
        rest = ExpertWeights(gate_up[index], down[index])
        if not (table.has_input_scale or table.shape.has_bias):
            return rest
        own = weights_at(int(addresses[expert]), table.layouts[int(row_of[expert])], hidden.dtype)
        return replace(own, gate_up=rest.gate_up, down=rest.down)

    return _write(hidden, blocks, weights_of, gate, rows)


def combine_reference(rows: Tensor, ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Twin of ``combine``, on any device."""
    tokens, top_k = ids.shape
    terms = rows.view(tokens, top_k, rows.shape[1]).float()
    total = torch.zeros(tokens, rows.shape[1], device=rows.device)
    known = (ids >= 0) & (ids < num_experts)
    for choice in range(top_k):
        term = weights[:, choice, None].float() * terms[:, choice]
        total += torch.where(known[:, choice, None], term, 0.0)
    return total.to(rows.dtype)


def weights_at(address: int, layout: RecordLayout, dtype: torch.dtype) -> ExpertWeights:
    """The weights of the record at a host address."""
    return expert_weights(layout.views(record_at(address, layout.nbytes)), layout, dtype)


def _write(
    hidden: Tensor, blocks: Blocks, weights_of: Callable[[int], ExpertWeights | None], gate: Gate, rows: Tensor
) -> Tensor:
    for expert, pairs in _by_expert(blocks):
        weights = weights_of(expert)
        if weights is not None:
            rows[pairs] = expert_product(hidden[pairs // blocks.top_k], weights, gate.apply)
    return rows


def _by_expert(blocks: Blocks) -> Iterator[tuple[int, Tensor]]:
    """Each expert once with all of its pairs, int64."""
    spans: dict[int, list[Tensor]] = {}
    for expert, start, end in zip(blocks.expert.tolist(), blocks.start.tolist(), blocks.end.tolist(), strict=True):
        if expert >= 0:
            spans.setdefault(expert, []).append(blocks.order[start:end].long())
    for expert, parts in spans.items():
        yield expert, torch.cat(parts)
