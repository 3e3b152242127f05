"""One answer as a stream: generation runs in a thread of its own and ends when its reader does.

transformers pushes tokens (``generate`` calls a streamer), readers pull text: a queue lies between. A reader
that stops early closes the stream; the generation sees it at its next token.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from expertflow_quant.runtime.answers import Generation, TextEmitter


class TokenQueue(BaseStreamer):
    """Takes the tokens that ``generate`` pushes, of ``rows`` answers; the first push is the prompts and is left out."""

    def __init__(self, rows: int = 1) -> None:
        self._items: queue.SimpleQueue[tuple[int, int] | BaseException | None] = queue.SimpleQueue()
        self._rows = rows
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            for place, token in enumerate(value.reshape(-1).tolist()):
                self.put_at(place % self._rows, token)
        self._prompt_seen = True

    def put_at(self, row: int, token: int) -> None:
        """The next token of answer ``row``."""
        self._items.put((row, token))

    def end(self) -> None:
        """Left to ``conclude``, which also comes when generation fails."""

    def conclude(self, error: BaseException | None) -> None:
        """No more tokens come; ``error`` is why, if generation failed."""
        self._items.put(error)

    def get(self) -> tuple[int, int] | None:
        """The next token with its row in front, or None after the last. Raises what generation raised."""
        item = self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item


class Cancellable(StoppingCriteria):
    """Stops generation once ``event`` is set, and before that of the answers in ``rows``."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.rows: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool)
        ended[list(self.rows)] = True
        return ended.to(input_ids.device)


class TokenStream(Iterator[str]):
    """Pieces of one answer's text, one per token ("" while a character is unfinished).

    Afterwards ``last`` is the whole answer, or after ``close`` what had been read of it. ``generate(tokens,
    cancellable)`` runs the model, in a thread; ``conclude(token_ids)`` makes a Generation of the tokens that
    were read. What ``generate`` raises, the reader gets.
    """

    def __init__(
        self,
        generate: Callable[[TokenQueue, Cancellable], None],
        conclude: Callable[[list[int]], Generation],
        emitter: TextEmitter,
    ) -> None:
        self.last: Generation | None = None
        self._conclude = conclude
        self._emitter = emitter
        self._tokens: list[int] = []
        self._queue = TokenQueue()
        self._cancellable = Cancellable()
        self._done = False
        # The thread knows nothing of this object, so that a stream that is dropped unread ends, too.
        self._thread = threading.Thread(
            target=run_into,
            args=(generate, self._queue, self._cancellable),
            name="expertflow-stream",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> str:
        if self._done:
            raise StopIteration
        try:
            item = self._queue.get()
        except BaseException:
            self._done = True
            raise
        if item is not None:
            self._tokens.append(item[1])
            return self._emitter.feed(item[1])
        self._finish()
        rest = self._emitter.finish(self.last.text if self.last else "")
        if not rest:
            raise StopIteration
        return rest

    def close(self) -> None:
        """End the generation at its next token and wait for that."""
        self._cancellable.event.set()
        if not self._done:
            self._finish()

    def __del__(self) -> None:
        self._cancellable.event.set()

    def _finish(self) -> None:
        self._done = True
        self._thread.join()
        self.last = self._conclude(self._tokens)


def run_into(generate: Callable[[TokenQueue, Cancellable], None], tokens: TokenQueue, cancellable: Cancellable) -> None:
    """Run ``generate``, and tell ``tokens`` when it is over and what it raised."""
    error: BaseException | None = None
    try:
        generate(tokens, cancellable)
    except BaseException as raised:
        error = raised
    tokens.conclude(error)
