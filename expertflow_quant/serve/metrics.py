"""What /metrics shows, in Prometheus' text format. Each server has its own registry."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from expertflow_quant.serve.work import CacheStats, Done

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32)
_EXPERTS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_CACHE = (
    ("hits", "Routed experts that were resident."),
    ("misses", "Routed experts that had to be loaded."),
    ("bytes_moved", "Bytes copied from the host's store into device slots."),
    ("stall_seconds", "Seconds that answers waited for experts."),
)


class Metrics:
    """Counters of one server; ``outcome`` is ok, cancelled, refused, busy or failed."""

    def __init__(self, stats: Callable[[], CacheStats], waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "expertflow_requests", "Chat requests, by how they ended.", ["outcome"], registry=registry
        )
        self._prompt = Counter("expertflow_prompt_tokens", "Tokens read, image tokens included.", registry=registry)
        self._image = Counter("expertflow_image_tokens", "Image tokens read.", registry=registry)
        self._completion = Counter("expertflow_completion_tokens", "Tokens generated.", registry=registry)
        self._seconds = Histogram(
            "expertflow_request_seconds",
            "From a request's arrival to its end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "expertflow_first_token_seconds",
            "From arrival to the first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch = Histogram(
            "expertflow_batch_requests", "Requests answered together.", buckets=_ROWS, registry=registry
        )
        self._experts = Histogram(
            "expertflow_batch_experts",
            "Distinct experts of a layer that the decode steps of a batch touch, where they are counted.",
            buckets=_EXPERTS,
            registry=registry,
        )
        queue = Gauge("expertflow_queue_length", "Requests that wait; not the one in work.", registry=registry)
        queue.set_function(waiting)
        registry.register(_CacheCollector(stats))

    def ended(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def answered(self, done: Done, seconds: float) -> None:
        self.ended("ok")
        self._prompt.inc(done.prompt_tokens)
        self._image.inc(done.image_tokens)
        self._completion.inc(done.completion_tokens)
        self._seconds.observe(seconds)

    def batch_ended(self, requests: int, experts: float | None) -> None:
        """``requests`` were answered together and touched ``experts`` of a layer, if they were counted."""
        self._batch.observe(requests)
        if experts is not None:
            self._experts.observe(experts)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _CacheCollector(Collector):
    """Reads the engine's counts when it is asked, so that nothing is counted twice."""

    def __init__(self, stats: Callable[[], CacheStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text in _CACHE:
            yield CounterMetricFamily(f"expertflow_cache_{name}", text, value=float(getattr(stats, name)))
