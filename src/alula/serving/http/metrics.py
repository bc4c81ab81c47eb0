"""Numbers for Prometheus, in a registry of the server's own: two servers in one process do not share them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.routing import compile_path

from alula.serving.engine import Engine, Finished

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_OTHER = "other"
"""stands for paths and methods that nothing answers to: what clients make up makes no new series"""


class _Now(Collector):
    """What is asked when somebody looks."""

    def __init__(self, engine: Engine, waiting: Callable[[], int]) -> None:
        self._engine, self._waiting = engine, waiting

    def collect(self) -> Collection[GaugeMetricFamily]:
        return [
            GaugeMetricFamily("alula_requests_queued", "Requests that wait.", value=self._waiting()),
            GaugeMetricFamily("alula_requests_running", "Requests that are computed.", value=self._engine.running),
            GaugeMetricFamily("alula_kept_bytes", "Bytes kept of earlier requests.", value=self._engine.kept_bytes),
            GaugeMetricFamily("alula_models", "Models that are loaded.", value=len(self._engine.models())),
        ]


class Metrics:
    """What is counted.

    Args:
        engine: whose.
        routes: paths that are told apart, as routers write them (``/v1/models/{name}``).
        waiting: tells how many requests wait.
    """

    def __init__(self, engine: Engine, routes: Collection[str], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        compiled = [compile_path(path) for path in routes]
        self._routes = [(pattern, shown) for pattern, shown, _ in compiled]
        self._answered = Counter(
            "alula_http_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self._tokens = Counter(
            "alula_tokens", "Tokens of prompts and answers.", ("model", "kind"), registry=self.registry
        )
        self._ended = Counter("alula_answers", "Answers by their end.", ("model", "reason"), registry=self.registry)
        self._first = Histogram(
            "alula_first_token_seconds",
            "From a request to its first token.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._whole = Histogram(
            "alula_answer_seconds",
            "From a request to the end of its answer.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Now(engine, waiting))

    def answered(self, path: str, status: int) -> None:
        """A response went out, or its client went away (499)."""
        route = next((shown for pattern, shown in self._routes if pattern.match(path)), _OTHER)
        self._answered.labels(route, str(status)).inc()

    def finished(self, model: str, end: Finished) -> None:
        """An answer ended."""
        usage = end.usage
        kinds = {
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "completion": usage.completion_tokens,
            "image": usage.image_tokens,
        }
        for kind, count in kinds.items():
            self._tokens.labels(model, kind).inc(count)
        self._ended.labels(model, end.reason).inc()
        if end.seconds.first_token is not None:
            self._first.labels(model).observe(end.seconds.first_token)
        self._whole.labels(model).observe(end.seconds.total)

    def text(self) -> tuple[bytes, str]:
        """The whole in Prometheus' format, and its media type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
