"""What /metrics says, in Prometheus' format: the engine's state and counts, and how long clients waited."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from openling.serve.types import EngineStats, Output

disable_created_metrics()  # a second gauge for every counter, which nobody reads
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_GAUGES = {
    "running": "replies being generated",
    "waiting": "replies waiting for room",
    "paused": "replies held by a pause",
    "slots_total": "state slots",
    "slots_free": "state slots not in use",
    "pages_total": "cache pages",
    "pages_free": "cache pages not in use",
}
_COUNTERS = {
    "prompt_tokens": "prompt tokens taken in",
    "cached_tokens": "prompt tokens found in the prefix cache",
    "generated_tokens": "tokens generated",
    "drafted_tokens": "tokens drafted by the MTP layers",
    "accepted_tokens": "drafted tokens that were accepted",
    "preemptions": "replies put back to make room",
    "steps": "engine steps",
    "schedule_seconds": "seconds spent in the scheduler",
}


class Metrics:
    """Counts of one server; a registry of its own, so that two servers of one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineStats()
        name, registry = "openling", self.registry
        self._requests = Counter(f"{name}_requests", "answers by route and status", ("route", "status"), registry=registry)
        self._first = Histogram(f"{name}_time_to_first_token_seconds", "to the first token", buckets=_SECONDS, registry=registry)
        self._between = Histogram(f"{name}_inter_token_seconds", "between tokens of a reply", buckets=_SECONDS, registry=registry)
        self._whole = Histogram(f"{name}_reply_seconds", "from request to the reply's end", buckets=_SECONDS, registry=registry)
        self._prompt = Histogram(f"{name}_reply_prompt_tokens", "prompt tokens of a reply", buckets=_TOKENS, registry=registry)
        self._made = Histogram(f"{name}_reply_tokens", "tokens of a reply", buckets=_TOKENS, registry=registry)
        self._reasons = Counter(f"{name}_replies", "replies by how they ended", ("finish_reason",), registry=registry)
        registry.register(_EngineCollector(self))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """One HTTP answer; `route` and `status` come from fixed sets."""
        self._requests.labels(route, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """From the request to its first token."""
        self._first.observe(seconds)

    def between_tokens(self, seconds: float, tokens: int) -> None:
        """Between two outputs; a step that made several tokens counts once for each."""
        for _ in range(tokens):
            self._between.observe(seconds / tokens)

    def finished(self, seconds: float, output: Output) -> None:
        """A reply's end."""
        self._whole.observe(seconds)
        self._prompt.observe(output.prompt_tokens)
        self._made.observe(output.completion_tokens)
        self._reasons.labels(output.finish_reason or "none").inc()

    def render(self) -> bytes:
        """The page, with the latest snapshot of the engine."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's snapshot as metrics; sums are counters, the rest gauges."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        stats = self._metrics.engine
        for field, text in _GAUGES.items():
            yield GaugeMetricFamily(f"openling_{field}", text, value=getattr(stats, field))
        for field, text in _COUNTERS.items():
            yield CounterMetricFamily(f"openling_{field}", text, value=getattr(stats, field))
        version = GaugeMetricFamily("openling_weight_version", "1 for the weights in use", labels=("version",))
        version.add_metric((stats.weight_version,), 1)
        yield version
