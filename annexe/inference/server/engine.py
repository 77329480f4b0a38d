r"""The queue of a server, and the workers that answer what is in it.

    submit ---> waiting ---> worker 0: its batch, and the next one, which is prepared meanwhile
                       \---> worker 1: ...

Events of a job go to the function that was given with it. A worker that dies costs those jobs that
it was working on; what it had not begun goes back to the front of the queue, and a new worker takes
its place.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from annexe.errors import UserError
from annexe.evaluation.records import ImageRecord, QueryRecord
from annexe.inference.results import Answer, Photo, PhotoResult
from annexe.inference.server.errors import ApiError, internal_error, invalid
from annexe.inference.server.limits import Limits
from annexe.inference.server.worker import (
    Done,
    Event,
    Failed,
    Finished,
    Grown,
    Job,
    Started,
    Worker,
    WorkerFacts,
)

log = logging.getLogger(__name__)

MakeWorker = Callable[[Callable[[Event], None]], Worker]
"""Makes a worker that has not started yet, from the function that it tells its events."""

_BATCHES_AHEAD = 2  # that a worker has: one goes through the model, one is prepared
_MAX_TRIES = 2  # of a job whose worker dies before it begins
_MAX_PAUSE = 30.0  # seconds between two attempts to start a worker
_SMOOTHING = 0.2  # weight of the latest batch in the mean duration


@dataclass
class Ticket:
    """A job of the queue, and who waits for it."""

    job: Job
    deliver: Callable[[Event | ApiError], None]
    num_tries: int = 0
    is_started: bool = False
    is_cancelled: bool = False


@dataclass
class _Place:
    """Where a worker works; it stays when the worker is replaced."""

    make_worker: MakeWorker
    worker: Worker | None = None  # that takes jobs
    starting: Worker | None = None  # that loads its predictor
    tickets: dict[int, Ticket] = field(default_factory=dict)  # that the worker has


class Engine:
    """Takes photos, and has them answered in batches.

    Args:
        make_workers: one for each device.
        limits: of the server.
        on_batch: is told how many photos a batch had, and the seconds it took.
        on_death: is told that a worker died.

    Attributes:
        facts: of the predictor, once started.
    """

    def __init__(
        self,
        make_workers: list[MakeWorker],
        limits: Limits,
        *,
        on_batch: Callable[[int, float], None] | None = None,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self.limits = limits
        self.on_batch = on_batch
        self.on_death = on_death
        self.facts = WorkerFacts({}, "", 1, 1)
        self._places = [_Place(make_worker) for make_worker in make_workers]
        self._waiting: deque[Ticket] = deque()
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._is_stopping = False
        self._stop_event = threading.Event()
        self._batch_seconds: float | None = None  # a mean

    # Life

    def start(self) -> None:
        """Start all workers, and wait until they are ready.

        Raises:
            UserError: a predictor cannot be loaded.
        """
        problems: SimpleQueue[Exception | None] = SimpleQueue()

        def start(place: _Place) -> None:
            try:
                self._start_worker(place)
                problems.put(None)
            except Exception as error:  # it is raised below
                problems.put(error)

        for place in self._places:
            threading.Thread(target=start, args=(place,), daemon=True).start()
        try:
            for _ in self._places:
                problem = problems.get()
                if problem is not None:
                    raise problem
        except BaseException:
            self._kill_all()
            raise

    def stop(self) -> None:
        """End all workers once they have finished what they have."""
        with self._lock:
            self._is_stopping = True
            self._stop_event.set()
            waiting = list(self._waiting)
            self._waiting.clear()
            workers = [place.worker for place in self._places if place.worker is not None]
            starting = [place.starting for place in self._places if place.starting is not None]
        for ticket in waiting:
            ticket.deliver(_shutting_down())
        for worker in starting:
            worker.kill()
        for worker in workers:
            worker.stop()

    def _kill_all(self) -> None:
        with self._lock:
            self._is_stopping = True
            self._stop_event.set()
        for place in self._places:
            for worker in (place.starting, place.worker):
                if worker is not None:
                    worker.kill()

    def _start_worker(self, place: _Place) -> None:
        """Put a new worker in its place, and give it work."""
        worker = place.make_worker(lambda event: self._on_event(place, event))
        place.starting = worker
        facts = worker.start()
        with self._lock:
            place.starting = None
            self.facts = facts
            place.worker = worker
            self._dispatch()
        if self._is_stopping:
            worker.stop()

    # State

    @property
    def about(self) -> dict[str, Any]:
        """What there is to know of the predictor, for people."""
        return self.facts.about

    @property
    def num_workers(self) -> int:
        """Workers there should be."""
        return len(self._places)

    @property
    def num_alive(self) -> int:
        """Workers that take jobs."""
        return sum(place.worker is not None for place in self._places)

    @property
    def num_waiting(self) -> int:
        """Jobs that no worker has yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Jobs that workers have."""
        return sum(len(place.tickets) for place in self._places)

    @property
    def is_full(self) -> bool:
        """Whether a job would be refused now."""
        with self._lock:
            self._drop_cancelled()
            return len(self._waiting) >= self.limits.queue and not self._has_room()

    @property
    def capacity(self) -> int:
        """Jobs that the queue and the workers hold together."""
        return self.limits.queue + self._room * self.num_workers

    @property
    def _room(self) -> int:
        """Jobs that a worker may have."""
        return _BATCHES_AHEAD * self.facts.batch_size

    def too_busy(self) -> ApiError:
        """The error for a request that finds the queue full: 429, with the time to wait."""
        batch_seconds = self._batch_seconds or 1.0
        num_batches = self.capacity / (self.facts.batch_size * self.num_workers)
        seconds = max(1, min(math.ceil(num_batches * batch_seconds), 60))
        return ApiError(
            429,
            "queue_full",
            f"the queue is full with {self.limits.queue} requests; try again in {seconds} s",
            {"Retry-After": str(seconds)},
        )

    # Jobs

    def submit(
        self,
        photo: Photo,
        deliver: Callable[[Event | ApiError], None],
        *,
        tells_words: bool = False,
        wants_depth: bool = False,
    ) -> Ticket:
        """Put a photo in the queue.

        Args:
            photo: with its questions.
            deliver: gets `Grown`, and at last `Done`, `Failed` or an `ApiError`, from any thread.
                It must not wait.
            tells_words: `Grown` is wanted.
            wants_depth: the depth map is wanted.

        Raises:
            ApiError: the queue is full, or the server stops.
        """
        with self._lock:
            if self._is_stopping:
                raise _shutting_down()
            if self.is_full:
                raise self.too_busy()
            job = Job(next(self._ids), photo, tells_words, wants_depth)
            ticket = Ticket(job, deliver)
            self._waiting.append(ticket)
            self._dispatch()
            return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for a job any more; one that no worker has is dropped."""
        ticket.is_cancelled = True

    async def events(
        self, photo: Photo, *, tells_words: bool = False
    ) -> AsyncGenerator[Grown | Done, None]:
        """The events of a photo, the last of them `Done`.

        Raises:
            ApiError: it is refused, or takes longer than the limit.
        """
        queue: asyncio.Queue[Event | ApiError] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event | ApiError) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it who waited
                loop.call_soon_threadsafe(queue.put_nowait, event)

        deadline = loop.time() + self.limits.timeout
        ticket = self.submit(photo, deliver, tells_words=tells_words)
        try:
            while True:
                left = max(deadline - loop.time(), 0.0)
                try:
                    event = await asyncio.wait_for(queue.get(), left)
                except asyncio.TimeoutError:
                    raise _too_late(self.limits) from None
                event = _raised(event)
                yield event
                if isinstance(event, Done):
                    return
        finally:
            self.cancel(ticket)

    def ask(self, photo: Photo) -> PhotoResult | UserError:
        """The result of a photo, or why there is none; waits for it, so not in an event loop."""
        queue: SimpleQueue[Event | ApiError] = SimpleQueue()
        try:
            ticket = self.submit(photo, queue.put, wants_depth=True)
            try:
                event = _raised(queue.get(timeout=self.limits.timeout))
            except Empty:
                raise _too_late(self.limits) from None
            finally:
                self.cancel(ticket)
        except ApiError as error:
            return UserError(error.message)
        assert isinstance(event, Done)
        return _result_of(photo, event)

    # Workers

    def _has_room(self) -> bool:
        for place in self._places:
            if place.worker is not None and len(place.tickets) < self._room:
                return True
        return False

    def _drop_cancelled(self) -> None:
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_cancelled)

    def _dispatch(self) -> None:
        """Give waiting jobs to the workers that have least to do."""
        while self._waiting:
            free = [
                place
                for place in self._places
                if place.worker is not None and len(place.tickets) < self._room
            ]
            if not free:
                return
            ticket = self._waiting.popleft()
            if ticket.is_cancelled:
                continue
            place = min(free, key=lambda place: len(place.tickets))
            place.tickets[ticket.job.id] = ticket
            assert place.worker is not None
            place.worker.put(ticket.job)

    def _on_event(self, place: _Place, event: Event) -> None:
        """What the worker in a place tells."""
        deliveries: list[tuple[Ticket, Event | ApiError]] = []
        with self._lock:
            if isinstance(event, Started):
                for job_id in event.ids:
                    place.tickets[job_id].is_started = True
            elif isinstance(event, Grown):
                deliveries.append((place.tickets[event.id], event))
            elif isinstance(event, Done | Failed):
                deliveries.append((place.tickets.pop(event.id), event))
                self._dispatch()
            elif isinstance(event, Finished):
                self._note_batch(event)
            else:
                deliveries = self._bury(place)
        for ticket, told in deliveries:
            ticket.deliver(told)

    def _note_batch(self, event: Finished) -> None:
        before = event.seconds if self._batch_seconds is None else self._batch_seconds
        self._batch_seconds = before + _SMOOTHING * (event.seconds - before)
        if self.on_batch is not None:
            self.on_batch(event.num_photos, event.seconds)

    def _bury(self, place: _Place) -> list[tuple[Ticket, Event | ApiError]]:
        """Take the jobs of a dead worker back, and start another; gives what to deliver."""
        place.worker = None
        tickets = list(place.tickets.values())
        place.tickets.clear()
        if self._is_stopping:
            return [(ticket, _shutting_down()) for ticket in tickets]
        log.error("a worker died with %d photos; starting another", len(tickets))
        if self.on_death is not None:
            self.on_death()

        # What it had not begun goes back, unless that happened before
        lost: list[tuple[Ticket, Event | ApiError]] = []
        for ticket in reversed(tickets):
            ticket.num_tries += 1
            if ticket.is_started or ticket.num_tries >= _MAX_TRIES:
                lost.append((ticket, _worker_died()))
            else:
                self._waiting.appendleft(ticket)
        self._dispatch()
        threading.Thread(target=self._replace, args=(place,), daemon=True).start()
        return lost

    def _replace(self, place: _Place) -> None:
        """Start a worker in the place of a dead one, until one lives."""
        pause = 1.0
        while not self._is_stopping:
            try:
                self._start_worker(place)
                return
            except Exception as error:
                log.error("a worker cannot start (%s); next attempt in %g s", error, pause)
                self._stop_event.wait(pause)
                pause = min(2 * pause, _MAX_PAUSE)


def _raised(event: Event | ApiError) -> Grown | Done:
    """An event that brings something; one that is an error is raised.

    Raises:
        ApiError: that is, or belongs to, the event.
    """
    if isinstance(event, ApiError):
        raise event
    if isinstance(event, Failed):
        if event.message is None:
            raise internal_error()
        raise invalid("invalid_request", event.message)
    assert isinstance(event, Grown | Done)
    return event


def _result_of(photo: Photo, done: Done) -> PhotoResult:
    """The result of a photo, as the predictor has it."""
    image_record, *query_records = done.records
    assert isinstance(image_record, ImageRecord)
    answers = []
    for record in query_records:
        assert isinstance(record, QueryRecord)
        answers.append(Answer(record, photo))
    return PhotoResult(photo, done.size, image_record, done.depth, answers)


def _shutting_down() -> ApiError:
    return ApiError(
        503, "shutting_down", "the server stops; ask another one, or later", {"Retry-After": "10"}
    )


def _worker_died() -> ApiError:
    return ApiError(500, "worker_died", "the worker that had this request died; send it again")


def _too_late(limits: Limits) -> ApiError:
    return ApiError(
        504,
        "timeout",
        f"there is no answer after {limits.timeout:g} s; try again later, or ask fewer questions",
    )
