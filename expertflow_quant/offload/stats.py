"""What the cache counted: hits, misses, bytes moved, time stalled; whole and per layer."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerStats:
    """Requests of one MoE layer; a request is one expert wanted by one forward pass, however many tokens want
    it."""

    hits: int = 0
    misses: int = 0

    @property
    def requests(self) -> int:
        return self.hits + self.misses


@dataclass(frozen=True)
class CacheStats:
    """Counts since the last reset. ``bytes_moved``: record bytes copied into slots, ``ahead_bytes`` of them before they
    were asked for; ``stall_seconds``: time that the computation waited for them; ``layers``: the same requests by MoE
    layer, in model order."""

    hits: int = 0
    misses: int = 0
    bytes_moved: int = 0
    stall_seconds: float = 0.0
    layers: tuple[LayerStats, ...] = field(default=())
    ahead_bytes: int = 0

    @property
    def requests(self) -> int:
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of requests that were resident, 0 to 1; 1 when nothing was asked for."""
        return self.hits / self.requests if self.requests else 1.0
