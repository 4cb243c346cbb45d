"""The worker thread, which does all computation. Its results reach the I/O loop as events."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from edge_runtime.data.features import Report
from edge_runtime.resources.throttle import StepControl

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far the running job is."""

    activity: str
    done: int
    total: int


@dataclass(frozen=True)
class JobEnded:
    """`future` has the job's result or error; `then` is called with it in the loop's thread."""

    future: Future[Any]
    then: Callable[[Future[Any]], object]


class Worker:
    """Runs jobs one after the other in one thread.

    Its methods belong to the loop's thread. `post` puts an event into the loop's queue, from any thread.
    """

    def __init__(self, control: StepControl, post: Callable[[JobEnded], None]) -> None:
        self.control = control
        self._post = post
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker")
        self._jobs: set[Future[Any]] = set()
        self._steps = -1  # at the last call of `is_alive`

    @property
    def idle(self) -> bool:
        return not self._jobs

    def is_alive(self) -> bool:
        """Whether the worker is idle, or its job has made a step since the last call."""
        before, self._steps = self._steps, self.control.steps
        return self.idle or self._steps != before

    def submit(self, job: Callable[[], Result], then: Callable[[Future[Result]], object]) -> None:
        """Runs `job` after those that were submitted before."""
        future = self._executor.submit(job)
        self._jobs.add(future)
        future.add_done_callback(lambda done: self._post(JobEnded(done, then)))

    def end(self, event: JobEnded) -> None:
        """Calls `then` with the job's result. Raises what `then` raises, usually the job's error. Does nothing if the
        job is of an earlier worker, whose event was left in the queue."""
        if event.future not in self._jobs:
            return
        self._jobs.remove(event.future)
        self.control.stop(False)
        event.then(event.future)

    def close(self) -> None:
        """Stops the running job at its next step and waits for its end."""
        self.control.stop()
        self._executor.shutdown(cancel_futures=True)


def progress_poster(post: Callable[[Progress], None]) -> Report:
    """A Report that posts Progress events."""
    return lambda activity, done, total: post(Progress(activity, done, total))
