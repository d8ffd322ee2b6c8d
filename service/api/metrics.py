"""`GET /metrics` for Prometheus: what became of requests, how long their stages took, what waits and who works."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from service.api.record import outcome
from service.dispatch.dispatcher import Dispatcher
from service.workers.messages import Timings

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
ENDS = {
    "accepted": "Requests that were accepted",
    "answered": "Accepted requests that were answered",
    "failed": "Accepted requests that ended with an error other than those below",
    "cancelled": "Accepted requests whose client left",
    "timed_out": "Accepted requests whose deadline passed",
}


class Metrics:
    """The registry of one server. Counts are the dispatcher's own, read when they are asked for."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Dispatched(dispatcher))
        ProcessCollector(registry=self._registry)
        self._responses = Counter(
            "heatmap_http_requests",
            "Requests of any path, by status, problem code and outcome",
            ("status", "code", "outcome"),
            registry=self._registry,
        )
        self._stages = Histogram(
            "heatmap_stage_seconds",
            "Seconds that answered requests spent in each stage",
            ("model", "stage"),
            buckets=SECONDS,
            registry=self._registry,
        )

    def ended(self, scope: Scope) -> None:
        """Count a request that is over."""
        state = scope["state"]
        self._responses.labels(str(state.get("status", "")), state.get("code") or "", outcome(state)).inc()

    def answered(self, model_id: str, timings: Timings) -> None:
        """Note how long a request's stages took."""
        for stage, seconds in vars(timings).items():
            self._stages.labels(model_id, stage).observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)


class _Dispatched(Collector):
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Metric]:
        for end, count in vars(self._dispatcher.counts).items():
            yield CounterMetricFamily(f"heatmap_requests_{end}", ENDS[end], value=count)
        for unit, held in self._dispatcher.held().items():
            yield GaugeMetricFamily(f"heatmap_queue_{unit}", f"Accepted and unanswered {unit}", value=held)
        state = self._dispatcher.workers()
        yield CounterMetricFamily("heatmap_workers_replaced", "Workers that died or hung", value=state.replaced)
        serving = GaugeMetricFamily("heatmap_worker_serves", "Whether the device's worker serves", labels=["device"])
        pictures = GaugeMetricFamily("heatmap_worker_pictures", "Pictures that a worker has", labels=["device"])
        for device, serves, count in state.devices:
            serving.add_metric([device], serves)
            pictures.add_metric([device], count)
        yield serving
        yield pictures


def create_router(metrics: Metrics) -> APIRouter:
    """`GET /metrics`."""
    router = APIRouter(tags=["health"])

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        operation_id="getMetrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def get_metrics() -> Response:
        """Requests accepted, answered, failed, cancelled and timed out; stages, queue, workers, and this process."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
