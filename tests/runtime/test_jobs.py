"""The worker: one job at a time, in order, with a bound; taken back, ended, stopped."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.runtime.jobs import LONGEST_WAIT_S, BusyError, Job, StoppingError, Worker
from edgeslm.runtime.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


async def events(job: Job) -> list[Any]:
    return [event async for event in job.events()]


def counting(count: int) -> Callable[..., Iterator[int]]:
    def work(_interrupted: Callable[[], bool]) -> Iterator[int]:
        yield from range(count)

    return work


class Blocked:
    """Work that waits until it is let go, or asked to end."""

    def __init__(self) -> None:
        self.begun, self.gate = threading.Event(), threading.Event()

    def __call__(self, interrupted: Callable[[], bool]) -> Iterator[str]:
        self.begun.set()
        while not self.gate.wait(0.01):
            if interrupted():
                yield "interrupted"
                return
        yield "done"


def test_jobs_come_in_order() -> None:
    async def run() -> list[Any]:
        worker = Worker(10)
        jobs = [worker.submit(counting(n)) for n in range(5)]
        found = [await events(job) for job in jobs]
        assert worker.close(5)
        return found

    assert asyncio.run(run()) == [list(range(n)) for n in range(5)]


def test_a_full_queue_and_one_taken_back() -> None:
    async def run() -> None:
        worker, blocked = Worker(2), Blocked()
        first = worker.submit(blocked)
        await asyncio.to_thread(blocked.begun.wait, 5)
        second, third = worker.submit(counting(1)), worker.submit(counting(2))
        assert (worker.running, worker.waiting) == (1, 2)
        with pytest.raises(BusyError) as caught:
            worker.submit(counting(1))
        assert 1 <= caught.value.retry_after_s <= LONGEST_WAIT_S
        worker.withdraw(second, "client")
        assert await events(second) == []
        assert worker.waiting == 1
        blocked.gate.set()
        assert await events(first) == ["done"]
        assert await events(third) == [0, 1]
        worker.withdraw(third, "client")
        assert third.ended_by is None, "it was done before"
        assert worker.close(5)

    asyncio.run(run())


def test_no_queue_at_all_takes_one() -> None:
    async def run() -> None:
        worker, blocked = Worker(0), Blocked()
        first = worker.submit(blocked)
        await asyncio.to_thread(blocked.begun.wait, 5)
        with pytest.raises(BusyError):
            worker.submit(counting(1))
        blocked.gate.set()
        assert await events(first) == ["done"]
        assert worker.close(5)

    asyncio.run(run())


def test_a_running_job_is_asked_to_end() -> None:
    async def run() -> None:
        worker, blocked = Worker(1), Blocked()
        job = worker.submit(blocked)
        await asyncio.to_thread(blocked.begun.wait, 5)
        worker.withdraw(job, "client")
        assert await events(job) == ["interrupted"]
        assert job.ended_by == "client"
        assert worker.close(5)

    asyncio.run(run())


def test_stopping() -> None:
    async def run() -> None:
        worker, blocked = Worker(3), Blocked()
        first = worker.submit(blocked)
        await asyncio.to_thread(blocked.begun.wait, 5)
        second = worker.submit(counting(1))
        worker.stop()
        with pytest.raises(StoppingError):
            await events(second)
        with pytest.raises(StoppingError):
            worker.submit(counting(1))
        worker.interrupt()
        assert await events(first) == ["interrupted"]
        assert first.ended_by == "shutdown"
        assert worker.close(5)

    asyncio.run(run())


def test_an_error_goes_to_who_waits_and_the_worker_lives() -> None:
    def broken(_interrupted: Callable[[], bool]) -> Iterator[int]:
        yield 1
        raise KeyError("x")

    async def run() -> None:
        worker = Worker(3)
        job = worker.submit(broken)
        with pytest.raises(KeyError):
            await events(job)
        assert await events(worker.submit(counting(2))) == [0, 1]
        assert worker.close(5)

    asyncio.run(run())


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.count("requests_total", path="/x", status="200")
    metrics.count("requests_total", 2, path="/x", status="200")
    for seconds in (0.004, 0.005, 0.3, 1000):
        metrics.observe("time_to_first_token_seconds", seconds)
    text = metrics.text({"running": 1}, model='a "b"\\\n')
    assert 'edgeslm_requests_total{path="/x",status="200"} 3' in text
    assert 'edgeslm_time_to_first_token_seconds_bucket{le="0.005"} 2' in text
    assert 'edgeslm_time_to_first_token_seconds_bucket{le="0.5"} 3' in text
    assert 'edgeslm_time_to_first_token_seconds_bucket{le="+Inf"} 4' in text
    assert "edgeslm_time_to_first_token_seconds_count 4" in text
    assert "edgeslm_time_to_first_token_seconds_sum 1000.309" in text
    assert "edgeslm_running 1" in text
    assert 'edgeslm_model_info{model="a \\"b\\"\\\\\\n"} 1' in text
    assert "edgeslm_rejected_total 0" in text
    for line in text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ", "edgeslm_"))
