"""Keys and values of the tokens so far: one row per answer under way, room for a fixed number of tokens in each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Numbers; every layer's keys and values begin at a multiple of it."""


@dataclass(frozen=True)
class KVShape:
    """One attention layer's keys and values: heads and sizes of a head."""

    heads: int
    key_size: int
    value_size: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token."""
        return self.heads * (self.key_size + self.value_size) * dtype.itemsize


class KVRows:
    """``keys[layer]`` and ``values[layer]`` are ``[rows, heads, room, size]``; ``lengths`` int32 ``[rows]`` says how
    many tokens each row holds."""

    def __init__(
        self, shapes: Mapping[int, KVShape], rows: int, room: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows, self.room = rows, room
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        sizes = [
            (kept, layer, (rows, shape.heads, room, size))
            for layer, shape in shapes.items()
            for kept, size in ((self.keys, shape.key_size), (self.values, shape.value_size))
        ]
        # one allocation: the allocator would round every tensor up by itself, by up to 2 MiB
        steps = [-(-math.prod(each) // ALIGNMENT) * ALIGNMENT for _, _, each in sizes]
        whole = torch.zeros(sum(steps), dtype=dtype, device=device)
        for (kept, layer, each), part in zip(sizes, torch.split(whole, steps), strict=True):
            kept[layer] = part[: math.prod(each)].view(each)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for kept in (self.keys, self.values) for t in kept.values())

    def store(self, layer: int, rows: range, keys: Tensor, values: Tensor) -> None:
        """The first tokens of neighbouring rows: ``[rows, heads, n, size]`` each; lengths are the pass's to set."""
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept[layer][rows.start : rows.stop, :, : new.shape[2]].copy_(new)
