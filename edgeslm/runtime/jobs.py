"""One worker thread and the bounded queue before it: jobs come from an event loop, their events go back there.

The worker computes one job at a time; a job that waits can be taken back, one that runs is asked to end
between two of its steps.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    Work = Callable[[Callable[[], bool]], Iterator[Any]]
    """What a job does: given a question whether to end now, an iterator of its events."""

LONGEST_WAIT_S = 60
_MEMORY = 0.8
"""How much of the mean duration the newest job leaves unchanged."""


class BusyError(Exception):
    """The queue is full; retry_after_s: when a place is likely to be free, in whole seconds."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests wait already")
        self.retry_after_s = retry_after_s


class StoppingError(Exception):
    """The worker takes no more jobs, or has to leave this one."""


class Job:
    """One piece of work and the events that it has sent; use Worker.submit to make one."""

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.ended_by: str | None = None
        """client or shutdown, where one of those ended it early."""
        self.done = False
        """Whether its end has reached the loop."""
        self._loop = loop
        self._inbox: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def post(self, kind: str, value: Any = None) -> None:
        """Hand an event, an end or an error to the loop; from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (kind, value))

    async def events(self) -> AsyncIterator[Any]:
        """What the work yields; raises what it raised."""
        while True:
            kind, value = await self._inbox.get()
            self.done = kind != "event"
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value


class Worker:
    """A thread that does jobs in order, and a queue of at most `capacity` that wait."""

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._capacity = capacity
        self._clock = clock
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stopping = False
        self._mean_s = 1.0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="edgeslm-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs being computed: 0 or 1."""
        return int(self._running is not None)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def submit(self, work: Work) -> Job:
        """Queue a job of the running event loop.  Raises BusyError when full, StoppingError at the end."""
        job = Job(work, asyncio.get_running_loop())
        with self._changed:
            if self._stopping:
                raise StoppingError("the server is stopping")
            # A worker that waits for work takes the job at once: it takes no place in the queue.
            if len(self._waiting) + self.running > self._capacity:
                ahead = len(self._waiting) + self.running
                raise BusyError(
                    len(self._waiting), max(1, min(LONGEST_WAIT_S, math.ceil(self._mean_s * ahead)))
                )
            self._waiting.append(job)
            self._changed.notify()
        return job

    def withdraw(self, job: Job, why: str) -> None:
        """Take a job out of the queue, or ask it to end if it runs; nothing happens to one that is done."""
        with self._changed:
            if not job.done:
                job.ended_by = job.ended_by or why
            if job in self._waiting:
                self._waiting.remove(job)
                job.post("end")

    def stop(self) -> None:
        """Take no more jobs and tell those that wait; the one that runs goes on."""
        with self._changed:
            self._stopping = True
            while self._waiting:
                self._waiting.popleft().post("error", StoppingError("the server is stopping"))
            self._changed.notify()

    def interrupt(self) -> None:
        """Ask the job that runs to end now."""
        with self._changed:
            if self._running is not None:
                self._running.ended_by = self._running.ended_by or "shutdown"

    def close(self, timeout_s: float | None = None) -> bool:
        """Stop, and wait until the thread has ended; False when it did not in time."""
        self.stop()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._take()) is not None:
            start = self._clock()
            try:
                for event in job.work(lambda job=job: job.ended_by is not None):  # type: ignore[misc]
                    job.post("event", event)
            except BaseException as error:  # goes to whoever waits: the worker lives on
                self._leave(start)
                job.post("error", error)
            else:
                self._leave(start)
                job.post("end")

    def _take(self) -> Job | None:
        with self._changed:
            while not self._waiting:
                if self._stopping:
                    return None
                self._changed.wait()
            self._running = self._waiting.popleft()
            return self._running

    def _leave(self, start: float) -> None:
        with self._changed:
            self._mean_s = _MEMORY * self._mean_s + (1 - _MEMORY) * (self._clock() - start)
            self._running = None
