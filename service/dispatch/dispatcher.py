"""The request queue: bounded admission, deadlines, cancellation, hand-over to a free worker, one retry.

Lives on the event loop alone; knows neither HTTP nor torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

from service.dispatch.admission import Admission, Ticket
from service.dispatch.costs import Costs
from service.dispatch.counts import Counts
from service.dispatch.quarantine import Quarantine
from service.errors import (
    DeadlineExceeded,
    Draining,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    ModelTypeNotSupported,
    ModelUnloaded,
    NoWorker,
    ServiceError,
    WorkerLost,
    echo,
    nearest,
)
from service.settings import Settings
from service.workers.messages import SERVED_TYPE, Answer, Done, ExplainRequest, Job, MethodInfo, ModelInfo
from service.workers.pool import Pool

STARTING_RETRY_S = 5.0
MAX_LOSSES = 2


@dataclass(frozen=True)
class Workers:
    """Each device with whether its worker serves and the pictures that it has; how many were replaced so far."""

    devices: tuple[tuple[str, bool, int], ...]
    replaced: int


class Dispatcher:
    """Accepts requests up to the bounds of the settings and sees each of them answered, refused or cancelled.

    It is the pool's listener.
    """

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self._pool = pool
        self._ids = itertools.count(1)
        self._tickets: dict[int, Ticket] = {}
        self._pending: list[Ticket] = []
        self._admission = Admission(settings, pool, self._tickets)
        self._costs = Costs(lambda: pool.methods)
        self._quarantine = Quarantine()
        self._closing: set[str] = set()
        self.counts = Counts()
        self._retried: set[int] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._ready = asyncio.Event()

    def models(self) -> Mapping[str, ModelInfo]:
        """Every model of the repository by its id, in the order of the ids."""
        return self._pool.models

    def model(self, model_id: str) -> ModelInfo:
        """One model of the repository. Raises ModelNotFound, which names the nearest ids."""
        try:
            return self._pool.models[model_id]
        except KeyError:
            hint = nearest(model_id, self._pool.models)
            raise ModelNotFound(f"There is no model {echo(model_id)}; GET /models lists them.{hint}") from None

    def loaded(self, model_id: str) -> ModelInfo:
        """One model that was loaded. Raises ModelNotFound, ModelTypeNotSupported, ModelFailed or ModelLoading."""
        info = self.model(model_id)
        if info.type is not None and info.type != SERVED_TYPE:
            detail = f"Model {model_id!r} is of type {info.type!r}; only {SERVED_TYPE!r} is explained."
            raise ModelTypeNotSupported(detail)
        if info.state == "failed":
            raise ModelFailed(f"Model {model_id!r} could not be loaded: {info.reason}")
        if info.state == "unloaded":
            raise ModelUnloaded(f"Model {model_id!r} was unloaded; an operator can load it again.")
        if info.state == "loading":
            raise ModelLoading(f"Model {model_id!r} is in its first load.", retry_after=STARTING_RETRY_S)
        return info

    def methods(self) -> tuple[MethodInfo, ...]:
        """The heatmap methods that the workers know. Raises NoWorker before the first worker has told."""
        if not self._pool.methods:
            raise NoWorker("The first worker is still starting.", retry_after=STARTING_RETRY_S)
        return self._pool.methods

    def held(self) -> dict[str, int]:
        """The requests, pictures and bytes that are accepted and unanswered."""
        tickets = self._tickets.values()
        return {
            "requests": len(tickets),
            "pictures": sum(ticket.pictures for ticket in tickets),
            "bytes": sum(ticket.size_bytes for ticket in tickets),
        }

    def workers(self) -> Workers:
        """Who works now."""
        devices = tuple((worker.device, worker.serves, worker.pictures) for worker in self._pool.workers)
        return Workers(devices, self._pool.replaced)

    def not_ready(self) -> tuple[str, ...]:
        """Why requests can't be served now; empty when they can."""
        reasons = ["the service is shutting down"] if self._draining else []
        if not any(worker.serves for worker in self._pool.workers):
            reasons.append("no worker serves")
            reasons += [f"model {info.id} is loading" for info in self._pool.models.values() if info.state == "loading"]
        return tuple(reasons)

    async def first_ready(self) -> None:
        """Return when requests could be served for the first time."""
        await self._ready.wait()

    async def explain(self, request: ExplainRequest, size_bytes: int, timeout_s: float) -> Answer:
        """Queue a request and wait for its answer. Cancelling the caller drops the work.

        `size_bytes` is what the request holds in memory; `timeout_s` the time it has, queueing included.
        Raises the ServiceError that the contract names for what went wrong.
        """
        ticket = self._admit(request, size_bytes, timeout_s)
        self._hand_over()
        try:
            with self.counts.counting():
                async with asyncio.timeout(timeout_s):
                    return await ticket.answer
        except TimeoutError:
            raise deadline_exceeded(timeout_s) from None
        finally:
            self._forget(ticket)

    def _admit(self, request: ExplainRequest, size_bytes: int, timeout_s: float) -> Ticket:
        """Accept a request, or raise the ServiceError that it is refused with."""
        passable = self._is_passable(request)
        self.check_open(request.model_id, len(request.pictures), size_bytes, passable)
        self._quarantine.check(request)
        cost = self._costs.estimate(request)
        if cost is not None:
            self._admission.check_time(cost, timeout_s, passable)
        now = time.monotonic()
        job = Job(next(self._ids), request, deadline=now + timeout_s, passable=passable)
        answer = asyncio.get_running_loop().create_future()
        ticket = Ticket(job, size_bytes, answer, accepted=now, cost=cost or 0.0)
        self._tickets[job.id] = ticket
        self._pending.append(ticket)
        self._idle.clear()
        return ticket

    def _is_passable(self, request: ExplainRequest) -> bool:
        """Whether quick requests may pass it: it is of the priority `batch`, or of a method with very many passes."""
        slow = {method.name for method in self._pool.methods if method.alone}
        return request.priority == "batch" or not slow.isdisjoint(request.methods)

    async def load(self, model_id: str) -> ModelInfo:
        """Read a model of the repository again, or for the first time; what serves it goes on until the new one can.

        Raises ModelNotFound, or ModelFailed with the reason.
        """
        if reason := await self._pool.load(model_id):
            served = "; it is served as before" if self.model(model_id).state == "ready" else ""
            raise ModelFailed(f"Model {model_id!r} could not be loaded: {reason}{served}")
        return self.model(model_id)

    async def unload(self, model_id: str) -> ModelInfo:
        """Refuse new requests for a model, answer the accepted ones, and let go of it. Raises ModelNotFound."""
        self.model(model_id)
        self._closing.add(model_id)
        try:
            accepted = [one.answer for one in self._tickets.values() if one.job.request.model_id == model_id]
            if accepted:
                await asyncio.wait(accepted)
            await self._pool.unload(model_id)
        finally:
            self._closing.discard(model_id)
        return self.model(model_id)

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests from now on, and return when every accepted one is answered.

        What is not answered within `grace_s` seconds is refused then.
        """
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        for ticket in self._tickets.values():
            if not ticket.answer.done():
                ticket.answer.set_exception(Draining("The service shut down before the request was answered."))
        await self._idle.wait()

    def check_open(self, model_id: str, pictures: int = 0, size_bytes: int = 0, passable: bool = False) -> None:
        """Raise the ServiceError that a request of this size would be refused with now.

        Without a size: whether it is of any use to send one. What is `passable` gets half of the queue.
        """
        if self._draining:
            raise Draining("The service is shutting down; another replica may answer.", retry_after=STARTING_RETRY_S)
        self._check_served(model_id)
        self._admission.check_room(pictures, size_bytes, passable)

    def _check_served(self, model_id: str) -> None:
        if model_id in self._closing:
            raise ModelUnloaded(f"Model {model_id!r} is being unloaded.")
        if any(worker.has(model_id) for worker in self._pool.workers):
            return
        info = self.loaded(model_id)
        raise NoWorker(f"No worker serves model {info.id!r} now; one is starting.", retry_after=STARTING_RETRY_S)

    def changed(self) -> None:
        """A worker may have room now, or a model more."""
        if not self.not_ready():
            self._ready.set()
        self._hand_over()

    def _hand_over(self) -> None:
        """Give waiting requests, oldest first, to workers with room. A worker that is full blocks nobody else."""
        alone = {worker for worker in self._pool.workers if not self._retried.isdisjoint(worker.jobs)}
        for ticket in sorted(self._pending, key=lambda ticket: ticket.turn):
            worker = self._pool.free_worker(ticket.job.request.model_id, ticket.job.passable, alone)
            if worker is None:
                self._refuse_failed(ticket)
                continue
            if ticket.suspect and not worker.serves:  # it would not be alone: models are being loaded
                continue
            if ticket.losses:  # what may kill a worker again takes nobody along: it waits until this one is empty
                alone.add(worker)
                if worker.jobs:
                    continue
            self._pending.remove(ticket)
            ticket.worker, ticket.started = worker, time.monotonic()
            worker.submit(ticket.job)

    def _refuse_failed(self, ticket: Ticket) -> None:
        """Do not let a request wait for a model that no worker could load again."""
        try:
            self.loaded(ticket.job.request.model_id)
        except ModelLoading:
            return
        except ServiceError as error:
            if not ticket.answer.done():
                ticket.answer.set_exception(error)

    def done(self, job: Job, done: Done) -> None:
        """A worker answered a job, or says what was wrong with it."""
        self._retried.discard(done.id)
        if isinstance(done.outcome, Answer | DeadlineExceeded):
            self._costs.learn(job.request, done.spent, finished=isinstance(done.outcome, Answer))
        ticket = self._tickets.get(done.id)
        if ticket is None or ticket.answer.done():
            return
        if isinstance(done.outcome, ServiceError):
            ticket.answer.set_exception(done.outcome)
            return
        waited = (ticket.started or ticket.accepted) - ticket.accepted
        timings = dataclasses.replace(done.outcome.timings, queue=waited + done.outcome.timings.queue)
        ticket.answer.set_result(dataclasses.replace(done.outcome, timings=timings))

    def lost(self, job_ids: tuple[int, ...], crashed: bool) -> None:
        """A worker died under these jobs: an explanation is a pure function, so each is tried once more."""
        self._retried.difference_update(job_ids)
        for job_id in job_ids:
            ticket = self._tickets.get(job_id)
            if ticket is None or ticket.answer.done():
                continue
            if crashed and len(job_ids) == 1:
                self._quarantine.blame(ticket.job.request)
                ticket.suspect = True
            self._lose(ticket)
        self._hand_over()

    def _lose(self, ticket: Ticket) -> None:
        ticket.losses += 1
        ticket.worker = ticket.started = None
        try:
            self._quarantine.check(ticket.job.request)
            if ticket.losses == MAX_LOSSES:
                detail = "The worker died under this request, and again when it was tried once more."
                raise WorkerLost(detail, retry_after=STARTING_RETRY_S)
        except ServiceError as error:
            ticket.answer.set_exception(error)
        else:
            self._retried.add(ticket.job.id)
            self._pending.append(ticket)

    def _forget(self, ticket: Ticket) -> None:
        del self._tickets[ticket.job.id]
        if ticket in self._pending:
            self._pending.remove(ticket)
            self._retried.discard(ticket.job.id)
        if ticket.worker is not None:
            ticket.worker.cancel(ticket.job.id)
        if not self._tickets:
            self._idle.set()


def deadline_exceeded(timeout_s: float) -> DeadlineExceeded:
    """The error of a request whose time is over."""
    return DeadlineExceeded(
        f"The request was not answered within its {timeout_s:g} seconds; its work was dropped. "
        "Give it a longer timeout_s, or ask for less."
    )
