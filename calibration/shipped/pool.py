"""The newest training sheets, kept on the training device."""

import queue
import threading
import time

import numpy as np
import torch
from torch import Tensor

from calibration.shipped import feed

MARGIN = 4
"""Blocks that stay between those drawn from and the one being overwritten."""


class Pool:
    """The newest drawn sheets, on the training device; a thread keeps refilling it."""

    def __init__(self, source: feed.Feed, blocks: int, device: str) -> None:
        self.source, self.blocks, self.device = source, blocks, device
        self.count = source.layout.count
        self.data = {
            name: torch.empty(
                (blocks * self.count, *shape[1:]), dtype=getattr(torch, np.dtype(dtype).name), device=device
            )
            for name, (shape, dtype) in source.layout.fields.items()
        }
        self.written = 0
        self.stop = threading.Event()
        self.errors: queue.Queue[BaseException] = queue.Queue()
        self.thread = threading.Thread(target=self._refill, daemon=True)
        self.thread.start()
        while self.written < min(2 * MARGIN, blocks):
            self.check()
            time.sleep(0.05)

    def check(self) -> None:
        """Raise what stopped the thread."""
        if not self.errors.empty():
            raise RuntimeError("the sheets' feed stopped") from self.errors.get()

    def _refill(self) -> None:
        try:
            cuda = self.device == "cuda"
            fields = self.source.layout.fields
            staging = {
                n: torch.empty(s, dtype=getattr(torch, np.dtype(d).name), pin_memory=cuda)
                for n, (s, d) in fields.items()
            }
            stream = torch.cuda.Stream() if cuda else None
            while not self.stop.is_set():
                taken = self.source.take(wait=True)
                assert taken is not None
                block, arrays = taken
                for name, array in arrays.items():
                    staging[name].copy_(torch.from_numpy(array))
                del arrays, taken
                self.source.give(block)
                at = (self.written % self.blocks) * self.count
                if stream is None:
                    self._copy(staging, at)
                else:
                    with torch.cuda.stream(stream):
                        self._copy(staging, at)
                    stream.synchronize()
                self.written += 1
        except BaseException as error:
            self.errors.put(error)

    def _copy(self, staging: dict[str, Tensor], at: int) -> None:
        for name, tensor in staging.items():
            self.data[name][at : at + self.count].copy_(tensor, non_blocking=True)

    def draw(self, generator: torch.Generator, batch: int) -> Tensor:
        """Random rows of the pool, away from those being overwritten."""
        filled = min(self.written, self.blocks)
        free = filled if self.written + MARGIN <= self.blocks else self.blocks - 2 * MARGIN
        start = 0 if filled < self.blocks else self.written % self.blocks + MARGIN
        rows = torch.randint(0, free * self.count, (batch,), generator=generator)
        return (rows + start * self.count) % (self.blocks * self.count)
