"""Work on the CPU in parallel, each piece on one thread: sums then never depend on how many threads there are."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Made = TypeVar("Made")


def side_by_side(
    pieces: Iterator[Piece], make: Callable[[Piece], Made], on_threads: Callable[[Piece], bool]
) -> Iterator[Made]:
    """``make`` of every piece, in any order; those ``on_threads`` run side by side, as many as torch has threads.

    Pieces are asked for as they are needed: one more than run is held. An error in one ends it, once those that
    run are through.
    """
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers, "expertflow") as pool:
        running: deque[Future[Made]] = deque()
        try:
            for piece in pieces:
                if not on_threads(piece):
                    yield make(piece)
                    continue
                running.append(pool.submit(_alone, make, piece))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            pool.shutdown()
            torch.set_num_threads(workers)  # new threads begin with the number that was set last


def _alone(make: Callable[[Piece], Made], piece: Piece) -> Made:
    torch.set_num_threads(1)
    return make(piece)
