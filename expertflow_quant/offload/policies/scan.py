"""LRU that a scan does not empty: a prompt wants nearly every expert of every layer once, in the order of layers."""

from collections import OrderedDict
from collections.abc import Collection

from expertflow_quant.offload.policy import LRU, Key, Progress


class ScanResistant:
    """Least recently used, but for scans: what a scan brought in goes first, the last of it before the rest.

    A scan refreshes nothing that was resident. Where every step is a scan (batches of many rows) a fixed part of
    the experts stays and hits, where LRU evicts each expert just before its layer comes round again. A use outside a
    scan makes an expert an ordinary one.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._kept = LRU()
        self._keeping: set[Key] = set()
        self._passing: OrderedDict[Key, None] = OrderedDict()

    def used(self, key: Key) -> None:
        if not self._progress.scan:
            self._passing.pop(key, None)
            self._keeping.add(key)
            self._kept.used(key)
        elif key not in self._keeping:
            self._passing.setdefault(key)

    def removed(self, key: Key) -> None:
        if key in self._keeping:
            self._keeping.remove(key)
            self._kept.removed(key)
        else:
            del self._passing[key]

    def victim(self, in_use: Collection[Key]) -> Key | None:
        passing = next((key for key in reversed(self._passing) if key not in in_use), None)
        return passing if passing is not None else self._kept.victim(in_use)

    def admits(self, key: Key, victim: Key) -> bool:
        """Not during a scan, in which no expert is worth more than another."""
        return not self._progress.scan
