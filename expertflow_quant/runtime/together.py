"""Answers computed together as one stream: pieces of each as they come, and the whole one when it has ended."""

import threading
from collections.abc import Callable, Iterator, Sequence

from expertflow_quant.runtime.answers import Generation, TextEmitter
from expertflow_quant.runtime.stream import Cancellable, TokenQueue, run_into

RowEvent = tuple[int, str | Generation]
"""(row, a piece of its text) or, once, (row, its answer)."""


class BatchStream(Iterator[RowEvent]):
    """``generate(tokens, cancellable)`` runs the model, in a thread, for as many rows as there are ``emitters``;
    ``ended(row, token_ids)`` says whether an answer is over, ``conclude(row, token_ids)`` makes a Generation of it.
    What ``generate`` raises, the reader gets. Close it when it is not read to its end."""

    def __init__(
        self,
        generate: Callable[[TokenQueue, Cancellable], None],
        ended: Callable[[int, Sequence[int]], bool],
        conclude: Callable[[int, list[int]], Generation],
        emitters: Sequence[TextEmitter],
    ) -> None:
        self._ended, self._conclude, self._emitters = ended, conclude, emitters
        self._tokens: list[list[int]] = [[] for _ in emitters]
        self._open = set(range(len(emitters)))
        self._ready: list[RowEvent] = []
        self._queue, self._cancellable = TokenQueue(len(emitters)), Cancellable()
        self._thread = threading.Thread(
            target=run_into, args=(generate, self._queue, self._cancellable), name="expertflow-batch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> RowEvent:
        while not self._ready:
            if not self._open:
                self.close()
                raise StopIteration
            item = self._queue.get()
            if item is None:
                for row in sorted(self._open):
                    self._end(row)
            elif item[0] in self._open:
                self._take(*item)
        return self._ready.pop(0)

    def drop(self, row: int) -> None:
        """Nobody reads ``row`` any more: it has no further events, and its computation ends where it can."""
        self._ready = [event for event in self._ready if event[0] != row]
        self._let_go(row)

    def close(self) -> None:
        """End the generation at its next token and wait for that."""
        self._cancellable.event.set()
        self._open.clear()
        self._thread.join()

    def __del__(self) -> None:
        self._cancellable.event.set()

    def _take(self, row: int, token: int) -> None:
        self._tokens[row].append(token)
        self._ready.append((row, self._emitters[row].feed(token)))
        if self._ended(row, self._tokens[row]):
            self._end(row)

    def _end(self, row: int) -> None:
        answer = self._conclude(row, self._tokens[row])
        if rest := self._emitters[row].finish(answer.text):
            self._ready.append((row, rest))
        self._ready.append((row, answer))
        self._let_go(row)

    def _let_go(self, row: int) -> None:
        self._open.discard(row)
        self._cancellable.rows.add(row)
        if not self._open:
            self._cancellable.event.set()
