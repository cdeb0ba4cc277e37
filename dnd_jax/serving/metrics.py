"""What a service counts, for Prometheus."""

from dnd_jax.core import packages
from dnd_jax.serving.service import Service

prometheus = packages.deferred("prometheus_client")

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8)


class Metrics:
    """Counters of one service, in a registry of their own."""

    def __init__(self):
        self._registry = registry = prometheus.CollectorRegistry()
        of = {"registry": registry}
        self.requests = prometheus.Counter(
            "dnd_requests", "Requests by route and status.", ("method", "route", "status"), **of
        )
        self.seconds = prometheus.Histogram(
            "dnd_request_seconds", "Seconds until a request was answered.", ("route",), **of
        )
        self.orders = prometheus.Counter(
            "dnd_orders", "Orders of adapters, made or found.", ("how",), **of
        )
        self._batches = prometheus.Histogram(
            "dnd_batch_adapters", "Adapters of a batch.", buckets=SIZES, **of
        )
        self._generating = prometheus.Histogram(
            "dnd_batch_seconds", "Seconds that a batch took.", buckets=SECONDS, **of
        )
        self._waiting = prometheus.Gauge("dnd_waiting", "Orders that are not done.", **of)
        self._kept = prometheus.Gauge("dnd_kept_adapters", "Adapters that are kept.", **of)
        self._bytes = prometheus.Gauge("dnd_kept_bytes", "Bytes of those.", **of)

    def batch(self, adapters: int, seconds: float) -> None:
        """Counts a batch that was generated."""
        self._batches.observe(adapters)
        self._generating.observe(seconds)

    def text(self, service: Service) -> tuple[bytes, str]:
        """(all of them in Prometheus' text format, its content type)."""
        self._waiting.set(service.waiting)
        self._kept.set(len(service.store.entries()))
        self._bytes.set(service.store.bytes)
        return prometheus.generate_latest(self._registry), prometheus.CONTENT_TYPE_LATEST
