"""What Prometheus may know of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from annexe.inference.server.engine import Engine

_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server; several in a process share nothing."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry

        # Of requests
        self.requests = Counter(
            "annexe_requests", "Requests that were answered.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "annexe_request_seconds",
            "From the start of a request to the end of its response.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_word = Histogram(
            "annexe_first_word_seconds",
            "From the start of a streamed request to its first words.",
            buckets=_SECONDS,
            registry=registry,
        )

        # Of batches
        self.batch_size = Histogram(
            "annexe_batch_size",
            "Photos that went through the model together.",
            buckets=_SIZES,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "annexe_batch_seconds",
            "Of a batch in the model.",
            buckets=_SECONDS,
            registry=registry,
        )

        # Of workers and their queue
        self.deaths = Counter("annexe_worker_deaths", "Workers that died.", registry=registry)
        self.queue_length = Gauge(
            "annexe_queue_length", "Requests that no worker has yet.", registry=registry
        )
        self.running = Gauge("annexe_running", "Requests that workers have.", registry=registry)
        self.workers = Gauge("annexe_workers", "Workers that take requests.", registry=registry)

    def watch(self, engine: Engine) -> None:
        """Read queue and workers of an engine whenever metrics are asked for."""
        self.queue_length.set_function(lambda: engine.num_waiting)
        self.running.set_function(lambda: engine.num_running)
        self.workers.set_function(lambda: engine.num_alive)

    def on_batch(self, num_photos: int, seconds: float) -> None:
        """Count a batch."""
        self.batch_size.observe(num_photos)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' form."""
        return generate_latest(self.registry)
