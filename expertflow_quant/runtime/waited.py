"""Tokens that nobody waits for, on the plain path: padding, and rows of a batch whose answers have ended.

transformers computes both until the batch's last answer ends. Nothing that is read depends on them, so they are sent
to no expert: none is multiplied, moved or kept for their sake.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class _Current(threading.local):
    tokens: Tensor | None = None


_current = _Current()


def waited_for(count: int) -> Tensor | None:
    """bool ``[count]``: which of the ``count`` tokens of this thread's pass are waited for; None where all may be."""
    tokens = _current.tokens
    return tokens if tokens is not None and len(tokens) == count else None


class Waited(StoppingCriteria):
    """Ends rows as any of ``criteria`` says, and remembers which have ended, by them or by a token of ``end_ids``.

    For one call of ``generate`` with ``attention_mask`` bool or int ``[rows, width]``, inside ``watching``.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria], end_ids: Sequence[int], attention_mask: Tensor) -> None:
        self._criteria = criteria
        self._end_ids = torch.tensor(end_ids, dtype=torch.int64, device=attention_mask.device)
        self._prompts = attention_mask.bool().flatten()
        self._open = torch.ones(len(attention_mask), dtype=torch.bool, device=attention_mask.device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, this thread's passes are those of the call."""
        before, _current.tokens = _current.tokens, self._prompts
        try:
            yield
        finally:
            _current.tokens = before

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        ended = torch.zeros_like(self._open)
        for each in self._criteria:
            ended |= each(input_ids, scores, **options)
        self._open &= ~(ended | torch.isin(input_ids[:, -1], self._end_ids))
        _current.tokens = self._open
        return ended
