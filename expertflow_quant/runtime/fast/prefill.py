"""Prompts of one or several requests in one pass: attention row by row, experts streamed past (streamed.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.kernels import Gate
from expertflow_quant.runtime.fast.kv import KVRows
from expertflow_quant.runtime.fast.passes import AttentionOptions, Routes
from expertflow_quant.runtime.streamed import StreamedExperts

QUERIES = 512
"""Queries at a time where scores have to be made by hand: bounds their memory."""


class PrefillPass:
    """Answers the model while it reads prompts, left-padded to one width.

    Prompt i has ``counts[i]`` tokens and goes to row ``rows[i]`` of ``kv``; rows follow each other. ``valid`` bool
    ``[prompts * width]`` is false for padding, which no expert sees.
    """

    def __init__(
        self,
        kv: KVRows,
        streamed: StreamedExperts,
        gates: Sequence[Gate],
        rows: range,
        counts: Sequence[int],
        valid: Tensor | None,
        routes: Routes | None = None,
    ) -> None:
        self._kv, self._streamed, self._gates, self._routes = kv, streamed, gates, routes
        self._rows, self._counts, self._valid = rows, counts, valid

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        width = q.shape[2]
        if all(count == width for count in self._counts):
            self._kv.store(layer, self._rows, k, v)
            return causal_attention(q, k, v, options).transpose(1, 2)
        out = q.new_zeros(q.shape[0], width, q.shape[1], v.shape[-1])
        for index, count in enumerate(self._counts):
            part = slice(width - count, width)
            this = slice(index, index + 1)
            self._kv.store(layer, self._rows[index : index + 1], k[this, :, part], v[this, :, part])
            one = causal_attention(q[this, :, part], k[this, :, part], v[this, :, part], options)
            out[index, part] = one[0].transpose(0, 1)
        return out

    def experts(self, layer: int, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self._routes is not None:
            ids = self._routes(layer, ids)
        return self._streamed.layer(layer, self._gates[layer], hidden, ids, weights, self._valid)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """``q [B, heads, n, D]``, ``k``, ``v [B, kv_heads, n, D]`` -> ``[B, heads, n, D]``, all tokens real."""
    n = q.shape[2]
    windowed = options.window is not None and options.window < n
    if options.sinks is None and not windowed:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.scaling, enable_gqa=True)
    parts = [_by_hand(q, k, v, options, start, min(start + QUERIES, n)) for start in range(0, n, QUERIES)]
    return torch.cat(parts, dim=2)


def _by_hand(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, start: int, stop: int) -> Tensor:
    """Queries ``start`` to ``stop`` with a window or sinks, scores in float32."""
    begin = 0 if options.window is None else max(0, start + 1 - options.window)
    group = q.shape[1] // k.shape[1]
    keys, values = (each[:, :, begin:stop].repeat_interleave(group, dim=1) for each in (k, v))
    scores = (q[:, :, start:stop] @ keys.transpose(2, 3)).float() * options.scaling
    query, key = (torch.arange(*span, device=q.device) for span in ((start, stop), (begin, stop)))
    hidden = key[None] > query[:, None]
    if options.window is not None:
        hidden |= key[None] <= query[:, None] - options.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = functional.softmax(scores, dim=-1)[..., : stop - begin]
    return weights.to(v.dtype) @ values
