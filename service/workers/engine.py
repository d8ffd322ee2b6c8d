"""The worker's pipeline: jobs are decoded, computed on the device, and rendered, so that these stages overlap."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable
from queue import SimpleQueue

from service.errors import ModelUnloaded, ServiceError
from service.models.activations import ActivationCache
from service.models.resident import Model
from service.settings import Settings
from service.workers.device import Device, cores
from service.workers.messages import Answer, Done, ExplainRequest, Job, Parked
from service.workers.priced import PricedExecutor
from service.workers.run import DEFECT, Run

logger = logging.getLogger(__name__)


class Engine:
    """Takes jobs for the models of one device, and never waits for one of them.

    `capacity` says how many pictures it needs to be given to be busy: while every slot computes a batch, as many are
    decoded, wait or are rendered. So many decoded pictures, and those of one request more, are in memory at most.
    """

    def __init__(self, device: Device, settings: Settings) -> None:
        edges = max(2, cores())
        self.device = device
        self.models: dict[str, Model] = {}
        self.activations = ActivationCache(settings.activation_cache)
        self.capacity = 2 * device.slots * device.max_batch + edges
        self._settings = settings
        self._edges = PricedExecutor(edges, "edge")
        self._runs: dict[int, Run] = {}
        self._changed = threading.Condition()
        self._own_ids = itertools.count(-1, -1)  # those of the server's jobs are positive

    def submit(
        self, job: Job, answer: Callable[[Done], None], park: Callable[[Parked], None] = lambda _parked: None
    ) -> None:
        """Begin a job. `answer` is called with its outcome, `park` when it begins to wait for its turn to decode and
        when that has come, on threads of the engine."""

        def end(outcome: Answer | ServiceError, spent: float) -> None:
            try:
                answer(Done(job.id, outcome, spent))
            except Exception:
                logger.exception("an answer could not be sent")
                answer(Done(job.id, ServiceError(DEFECT)))
            finally:
                with self._changed:
                    del self._runs[job.id]
                    self._changed.notify_all()

        model = self.models.get(job.request.model_id)
        if model is None:
            answer(Done(job.id, ModelUnloaded(f"Model {job.request.model_id!r} was unloaded.")))
            return
        run = Run(job, model, self.device, self._edges, self._settings, end, park)
        with self._changed:
            self._runs[job.id] = run
        run.start()

    def cancel(self, job_id: int) -> None:
        """Stop a job at its next step, if it still runs."""
        if run := self._runs.get(job_id):
            run.cancel()

    def explain(self, request: ExplainRequest) -> Answer:
        """Answer one request while the caller waits. Raises the ServiceError that the contract names."""
        outcomes: SimpleQueue[Done] = SimpleQueue()
        self.submit(Job(next(self._own_ids), request, math.inf), outcomes.put)
        outcome = outcomes.get().outcome
        if isinstance(outcome, ServiceError):
            raise outcome
        return outcome

    def close(self) -> None:
        """Finish the jobs that run, and leave no thread."""
        with self._changed:
            self._changed.wait_for(lambda: not self._runs)
        self.device.close()
        self._edges.close()
