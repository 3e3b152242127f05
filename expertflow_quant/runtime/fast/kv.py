"""Keys and values of the tokens so far: one row per answer under way, room for a fixed number of tokens in each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


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
        for layer, shape in shapes.items():
            self.keys[layer] = torch.zeros(rows, shape.heads, room, shape.key_size, dtype=dtype, device=device)
            self.values[layer] = torch.zeros(rows, shape.heads, room, shape.value_size, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for kept in (self.keys, self.values) for t in kept.values())

    def store(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """The first tokens of a row: ``[heads, n, size]`` each; its length is set when the pass is done."""
        self.keys[layer][row, :, : keys.shape[1]].copy_(keys)
        self.values[layer][row, :, : values.shape[1]].copy_(values)
