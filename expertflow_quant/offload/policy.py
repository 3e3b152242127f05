"""Which resident expert makes room: the policy protocol, over ids alone, and the least recently used one."""

from collections import OrderedDict
from collections.abc import Collection
from typing import Protocol

Key = tuple[int, int]
"""One expert: (MoE layer, expert index)."""


class Policy(Protocol):
    """Watches the use of one size class of slots and names victims; sees ids only, never bytes or a
    device."""

    def used(self, key: Key) -> None:
        """``key`` was asked for and is resident now."""

    def removed(self, key: Key) -> None:
        """``key`` left its slot."""

    def victim(self, in_use: Collection[Key]) -> Key | None:
        """The resident expert to evict next, never one in ``in_use``; None when every resident one is in
        use."""


class LRU:
    """Evicts the expert whose last use is longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def used(self, key: Key) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def removed(self, key: Key) -> None:
        del self._order[key]

    def victim(self, in_use: Collection[Key]) -> Key | None:
        return next((key for key in self._order if key not in in_use), None)
