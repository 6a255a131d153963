"""Builds many things in parallel, each within its time limit, whatever they do."""

from __future__ import annotations

import collections
import os
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

S = TypeVar("S", bound=Hashable)
C = TypeVar("C")

GRACE = 1.0  # seconds that a build may overrun its own time limit before it is given up for hung


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Builds(Generic[S, C]):
    """Builds schedules on daemon threads.

    Not a `ThreadPoolExecutor`: that one joins its threads when the interpreter ends, and a hung build
    would keep the process alive for ever.
    """

    def __init__(
        self,
        build: Callable[[S, float], C],
        limit: Callable[[int], float | None],
        workers: int,
        times: list[float],
    ) -> None:
        self.build, self.limit, self.workers, self.times = build, limit, workers, times
        self.done: queue.SimpleQueue[tuple[S, C | BaseException, float]] = queue.SimpleQueue()

    def run(self, wave: Iterable[S]) -> dict[S, C | BaseException]:
        """The outcome of each build, in the order of `wave`."""
        waiting = collections.deque(wave)
        order = list(waiting)
        outcomes: dict[S, C | BaseException] = {}
        overdue: dict[S, float] = {}  # the builds under way, and when each is to be given up
        while waiting or overdue:
            while waiting and len(overdue) < self.workers:
                timeout = self.limit(len(outcomes) + len(overdue))
                if timeout is None:
                    waiting.clear()
                    break
                schedule = waiting.popleft()
                overdue[schedule] = time.monotonic() + timeout + GRACE
                threading.Thread(target=self.work, args=(schedule, timeout), daemon=True).start()
            if not overdue:
                break
            try:
                wait = max(0.0, min(overdue.values()) - time.monotonic())
                schedule, outcome, seconds = self.done.get(timeout=wait)
            except queue.Empty:
                schedule = min(overdue, key=lambda s: overdue[s])
                outcome, seconds = TimeoutError("the build did not keep its time limit"), GRACE
            if schedule in overdue:  # a build that was given up may still end
                del overdue[schedule]
                outcomes[schedule] = outcome
                self.times.append(seconds)
        return {schedule: outcomes[schedule] for schedule in order if schedule in outcomes}

    def work(self, schedule: S, timeout: float) -> None:
        began = time.monotonic()
        outcome: Any
        try:
            outcome = self.build(schedule, timeout)
        except BaseException as error:
            outcome = error
        self.done.put((schedule, outcome, time.monotonic() - began))
