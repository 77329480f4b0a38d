"""A predictor at work: batches on one device, in a thread or in a process of its own.

Jobs go in and events come out. Nothing waits for a batch to fill up: whatever is there when the
device becomes free goes through the model together, so an idle server answers at once, and a busy
one in large batches.

    put(job) ---> prepare ---> generate ---> finish ---> tell(event)
                  threads      this thread   threads

On a CPU all three happen in one thread, as they do in `annexe predict`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch

from annexe.errors import UserError
from annexe.evaluation.records import Record
from annexe.inference.predictor import Predictor, Prepared, finish
from annexe.inference.results import Photo, PhotoResult
from annexe.workers import Spawn, num_cores

log = logging.getLogger(__name__)

LoadPredictor = Callable[[], Predictor]
"""Makes the predictor of a worker, in its thread or process; can be pickled."""

_START_SECONDS = 3600.0  # the weights of a large model come from slow disks
_STOP_SECONDS = 10.0
_THREADS_BESIDE_GPU = 8  # that decode photos and encode masks
_environment_lock = threading.Lock()


@dataclass(frozen=True)
class Job:
    """A photo for a worker.

    Attributes:
        id: under which events name it.
        photo: with its questions.
        tells_words: its first answer, or its analysis where nothing is asked, is told as it grows.
        wants_depth: its depth map is wanted.
    """

    id: int
    photo: Photo
    tells_words: bool = False
    wants_depth: bool = False


# What a worker tells


@dataclass(frozen=True)
class Started:
    """These jobs go through the model now."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Grown:
    """The text of a job as it is so far; its last word may still change."""

    id: int
    text: str


@dataclass(frozen=True)
class Done:
    """A job is answered."""

    id: int
    records: tuple[Record, ...]
    size: tuple[int, int]  # height, width
    depth: np.ndarray | None  # float32[S, S]


@dataclass(frozen=True)
class Failed:
    """A job is not answered.

    Attributes:
        id: of the job.
        message: what is wrong with its photo or questions; None where the server is to blame.
    """

    id: int
    message: str | None


@dataclass(frozen=True)
class Finished:
    """A batch went through the model."""

    num_photos: int
    seconds: float


@dataclass(frozen=True)
class Died:
    """The worker is gone, and with it what it was doing."""


Event = Started | Grown | Done | Failed | Finished | Died
Tell = Callable[[Event], None]


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker knows of its predictor once it is loaded."""

    about: dict[str, Any]
    device: str
    batch_size: int
    max_new_tokens: int


def facts_of(predictor: Predictor) -> WorkerFacts:
    """What there is to know of a predictor."""
    return WorkerFacts(
        about=predictor.about,
        device=str(predictor.device),
        batch_size=predictor.batch_size,
        max_new_tokens=predictor.max_new_tokens,
    )


class BatchLoop:
    """Answers jobs in batches, each job at its own risk.

    Args:
        predictor: answers; no other thread uses it.
        tell: gets the events, from several threads.
        num_threads: that prepare and finish beside the device (default: some beside a GPU, none
            beside a CPU).
        pads: gray photos fill batches up to `padded_size` (default: on a GPU, where every size has
            CUDA graphs of its own).
    """

    def __init__(
        self,
        predictor: Predictor,
        tell: Tell,
        *,
        num_threads: int | None = None,
        pads: bool | None = None,
    ) -> None:
        self.predictor = predictor
        self.tell = tell
        self._jobs: deque[tuple[Job, Future[Prepared | UserError | None] | None]] = deque()
        self._has_changed = threading.Condition()
        self._is_stopping = False
        self._threads: ThreadPoolExecutor | None = None
        on_gpu = predictor.device.type == "cuda"
        self._padding: Prepared | None = None
        if on_gpu if pads is None else pads:
            padding = predictor.prepare(_gray_photo())
            assert isinstance(padding, Prepared)
            self._padding = padding
        if num_threads is None:
            num_threads = min(num_cores(), _THREADS_BESIDE_GPU) if on_gpu else 0
        if num_threads:
            self._threads = ThreadPoolExecutor(
                num_threads, initializer=torch.set_num_threads, initargs=(1,)
            )

    def put(self, job: Job) -> None:
        """Take a job, whose photo is prepared from now on; any thread may call this."""
        prepared = None
        if self._threads is not None:
            prepared = self._threads.submit(self._prepare, job)
        with self._has_changed:
            self._jobs.append((job, prepared))
            self._has_changed.notify()

    def stop(self) -> None:
        """Let `run` end once all jobs are done; any thread may call this."""
        with self._has_changed:
            self._is_stopping = True
            self._has_changed.notify()

    def run(self) -> None:
        """Answer jobs until `stop`.

        Raises:
            Exception: the device cannot be used any more.
        """
        while jobs := self._next_batch():
            self.tell(Started(tuple(job.id for job, _ in jobs)))
            start = time.perf_counter()
            batch: list[tuple[Job, Prepared | UserError]] = []
            for job, waiting in jobs:
                prepared = self._prepare(job) if waiting is None else waiting.result()
                if prepared is None:
                    self.tell(Failed(job.id, None))
                else:
                    batch.append((job, prepared))
            if batch:
                self._answer(batch)
                self.tell(Finished(len(batch), time.perf_counter() - start))
        if self._threads is not None:
            self._threads.shutdown()

    def warm_up(self) -> None:
        """Answer gray photos in batches of all sizes, so that a GPU has its graphs."""
        photo = _gray_photo("Which hand holds the object?")
        batch_size = self.predictor.batch_size
        for num_photos in sorted({padded_size(n + 1, batch_size) for n in range(batch_size)}):
            self.predictor.answer_batch([photo] * num_photos)

    def _next_batch(self) -> list[tuple[Job, Future[Prepared | UserError | None] | None]]:
        """What waits, at most a batch of it; nothing at the end."""
        with self._has_changed:
            while not self._jobs and not self._is_stopping:
                self._has_changed.wait()
            num_jobs = min(len(self._jobs), self.predictor.batch_size)
            return [self._jobs.popleft() for _ in range(num_jobs)]

    def _prepare(self, job: Job) -> Prepared | UserError | None:
        """The photo of a job as the model sees it, its error, or None where the server failed."""
        try:
            return self.predictor.prepare(job.photo)
        except Exception:
            log.exception("cannot prepare a photo")
            return None

    def _answer(self, batch: Sequence[tuple[Job, Prepared | UserError]]) -> None:
        """Answer jobs together and, if that fails, one by one."""
        jobs = [job for job, _ in batch]

        def on_text(index: int, query: int | None, text: str) -> None:
            if index >= len(jobs):
                return  # padding
            wanted = 0 if jobs[index].photo.questions else None
            if jobs[index].tells_words and query == wanted:
                self.tell(Grown(jobs[index].id, text))

        # All at once, else each alone
        is_told = any(job.tells_words for job in jobs)
        try:
            photos = self._padded([prepared for _, prepared in batch])
            said = self.predictor.generate(photos, on_text if is_told else None)[: len(batch)]
        except Exception as error:
            if _is_fatal(error):
                raise
            log.exception("a batch of %d photos failed", len(batch))
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(batch) == 1:
                self.tell(Failed(jobs[0].id, None))
                return
            for pair in batch:
                self._answer([pair])
            return

        # Masks are encoded beside the next batch
        for job, one in zip(jobs, said, strict=True):
            if self._threads is None:
                self._finish(job, one)
            else:
                self._threads.submit(self._finish, job, one)

    def _padded(self, photos: list[Prepared | UserError]) -> list[Prepared | UserError]:
        """Photos of a batch, filled up with gray ones where that is wanted."""
        num_readable = sum(isinstance(photo, Prepared) for photo in photos)
        if self._padding is None or not num_readable:
            return photos
        size = padded_size(num_readable, self.predictor.batch_size)
        return photos + [self._padding] * (size - num_readable)

    def _finish(self, job: Job, said: Any) -> None:
        """Tell what came of a job."""
        try:
            result = finish(said)
        except Exception:
            log.exception("cannot finish an answer")
            self.tell(Failed(job.id, None))
            return
        if isinstance(result, UserError):
            self.tell(Failed(job.id, str(result)))
        else:
            self.tell(_done(job, result))


def padded_size(num_photos: int, batch_size: int) -> int:
    """The size that a batch is filled up to: a power of two, or the largest one that there is."""
    size = 1
    while size < num_photos:
        size *= 2
    return min(size, batch_size)


def _gray_photo(*questions: str) -> Photo:
    """A photo that shows nothing."""
    return Photo.of(np.full((360, 640, 3), 127, np.uint8), questions)


def _done(job: Job, result: PhotoResult) -> Done:
    depth = result.depth if job.wants_depth else None
    return Done(job.id, tuple(result.to_records()), result.size, depth)


def _is_fatal(error: Exception) -> bool:
    """Whether an error leaves a GPU in a state that only a new process gets out of."""
    is_memory = isinstance(error, torch.OutOfMemoryError)
    return not is_memory and ("CUDA error" in str(error) or "device-side assert" in str(error))


# Where a loop runs


class Worker(Protocol):
    """A loop somewhere."""

    def start(self) -> WorkerFacts:
        """Load the predictor.

        Raises:
            UserError: it cannot be loaded.
        """

    def put(self, job: Job) -> None:
        """Hand over a job."""

    def stop(self) -> None:
        """Let it finish what it has, and wait for it."""

    def kill(self) -> None:
        """End it at once, as far as that is possible."""


class ThreadWorker:
    """A loop in a thread of this process: for a CPU.

    Args:
        load: makes the predictor.
        tell: gets the events, from another thread.
    """

    def __init__(self, load: LoadPredictor, tell: Tell) -> None:
        self.load = load
        self.tell = tell
        self._num_threads = torch.get_num_threads()
        self._loaded: SimpleQueue[BatchLoop | Exception] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="annexe-worker", daemon=True)
        self._loop: BatchLoop | None = None

    def start(self) -> WorkerFacts:
        """See `Worker.start`."""
        self._thread.start()
        loaded = self._loaded.get()
        if isinstance(loaded, Exception):
            raise loaded
        self._loop = loaded
        return facts_of(loaded.predictor)

    def put(self, job: Job) -> None:
        """See `Worker.put`."""
        assert self._loop is not None
        self._loop.put(job)

    def stop(self) -> None:
        """See `Worker.stop`."""
        if self._loop is not None:
            self._loop.stop()
            self._thread.join(_STOP_SECONDS)

    def kill(self) -> None:
        """See `Worker.kill`: a thread ends with the process."""

    def _run(self) -> None:
        # A thread starts with as many threads for sums as there are cores, whatever the main thread
        # has; sums in another order are other numbers
        torch.set_num_threads(self._num_threads)
        try:
            loop = BatchLoop(self.load(), self.tell)
        except Exception as error:  # it is raised where the predictor is waited for
            self._loaded.put(error)
            return
        self._loaded.put(loop)
        try:
            loop.run()
        except Exception:
            log.exception("a worker failed")
        self.tell(Died())


class ProcessWorker:
    """A loop in a process of its own, which sees one GPU: it can die without the server.

    Args:
        load: makes the predictor.
        tell: gets the events, from another thread.
        environment: variables of the process beside those of this one.
    """

    def __init__(
        self, load: LoadPredictor, tell: Tell, environment: dict[str, str] | None = None
    ) -> None:
        self.tell = tell
        spawn = Spawn()  # the server ends its workers; a Ctrl-C reaches them too
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_run_process,
            args=(theirs, load),
            name="annexe-worker",
            daemon=True,
        )
        self._theirs = theirs
        self._environment = environment or {}
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    def start(self) -> WorkerFacts:
        """See `Worker.start`."""
        with _added_to_environment(self._environment):
            self._process.start()
        self._theirs.close()  # so that its end of the pipe is gone with the process
        try:
            if not self._connection.poll(_START_SECONDS):
                self._process.kill()
                raise RuntimeError("a worker does not start")
            facts = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError("a worker died before it was ready") from None
        if isinstance(facts, Exception):
            self._process.join(_STOP_SECONDS)
            raise facts
        for work in (self._send, self._receive):
            threading.Thread(target=work, name="annexe-worker-pipe", daemon=True).start()
        return facts

    def put(self, job: Job) -> None:
        """See `Worker.put`."""
        self._jobs.put(job)

    def stop(self) -> None:
        """See `Worker.stop`."""
        self._jobs.put(None)
        if self._process.pid is not None:
            self._process.join(_STOP_SECONDS)
            self.kill()

    def kill(self) -> None:
        """See `Worker.kill`."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join(_STOP_SECONDS)

    def _send(self) -> None:
        """Send jobs, in a thread of its own because a full pipe makes the sender wait."""
        with contextlib.suppress(OSError):  # the worker is gone, which the receiver tells
            while True:
                job = self._jobs.get()
                self._connection.send(job)
                if job is None:
                    return

    def _receive(self) -> None:
        """Tell events until the process is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.tell(self._connection.recv())
        self._jobs.put(None)
        self.tell(Died())


@contextlib.contextmanager
def _added_to_environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables for processes that the block starts.

    A process that sets them itself is too late: importing torch may already look for GPUs.
    """
    with _environment_lock:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _run_process(connection: Connection, load: LoadPredictor) -> None:
    """A loop in a process that was started for it."""
    sending = threading.Lock()

    def tell(event: Any) -> None:
        with sending, contextlib.suppress(OSError):  # the server is gone
            connection.send(event)

    # The predictor
    try:
        predictor = load()
        loop = BatchLoop(predictor, tell)
        if predictor.device.type == "cuda":
            loop.warm_up()
    except UserError as error:
        tell(error)
        return
    except Exception as error:
        log.exception("a worker cannot load its model")
        tell(RuntimeError(f"{type(error).__name__}: {error}"))
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which services send to all their processes
    tell(facts_of(predictor))

    # Its jobs; without a server there is no more to do
    def receive() -> None:
        with contextlib.suppress(EOFError, OSError):
            while (job := connection.recv()) is not None:
                loop.put(job)
        loop.stop()

    threading.Thread(target=receive, daemon=True).start()
    loop.run()
