"""What `/metrics` tells, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from visar.serving.engine import Engine
from visar.serving.wanted import Made, Wanted

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
PASSES = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 4096)
OUTCOMES = ("finished", "failed", "cancelled", "late", "refused")


class Metrics:
    """Histograms of the images that were made, by model and sampler, and what others add to the `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("model", "sampler")

        def of(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

        self._queue = of("visar_image_queue_seconds", "Seconds that an image waited for its row", SECONDS)
        self._seconds = of("visar_image_seconds", "Seconds of an image, from its request to its file", SECONDS)
        self._passes = of("visar_image_passes", "Passes of the model for an image", PASSES)

    def made(self, wanted: Wanted, image: Made) -> None:
        """Count an image."""
        for histogram, value in (
            (self._queue, image.waited), (self._seconds, image.seconds), (self._passes, image.passes),
        ):  # fmt: skip
            histogram.labels(wanted.model, wanted.sampler).observe(value)


class EngineCollector(Collector):
    """An engine's counts, read when they are asked for."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, counts = self.engine, self.engine.counts
        images = CounterMetricFamily("visar_images", "Images by how they ended", labels=("outcome",))
        for outcome in OUTCOMES:
            images.add_metric((outcome,), getattr(counts, outcome))
        yield images
        for name, text, total in (
            ("visar_passes", "Passes of all pools", counts.passes),
            ("visar_row_passes", "Passes of rows at work", counts.row_passes),
            ("visar_row_places", "Passes of all rows, at work or not", counts.places),
            ("visar_tokens", "Tokens of finished images", counts.tokens),
        ):
            yield CounterMetricFamily(name, text, total)
        for name, text, now in (
            ("visar_rows", "Rows of a sampler", engine.rows),
            ("visar_rows_running", "Images at work", engine.running),
            ("visar_images_waiting", "Images in line", engine.queued),
        ):
            yield GaugeMetricFamily(name, text, now)
