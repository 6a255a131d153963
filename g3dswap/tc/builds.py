"""Builds many things in parallel, each within its time limit, whatever they do."""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar

S = TypeVar("S", bound=Hashable)
C = TypeVar("C")

GRACE = 1.0  # seconds that a build may overrun its own time limit before it is given up for hung


def cores() -> int:
    """The processor cores for this process's compilers, at least one.

    Those that it may use; the processes that torchrun starts on one machine share them out.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, usable // max(1, int(processes) if processes.isdecimal() else 1))


class Builds(Generic[S, C]):
    """How schedules are built: the function, the time limit of the n-th build or None to begin no more of
    them, how many at a time, and a list to which the seconds of each are added.
    """

    def __init__(
        self,
        build: Callable[[S, float], C],
        limit: Callable[[int], float | None],
        workers: int,
        times: list[float],
    ) -> None:
        self.build, self.limit, self.workers, self.times = build, limit, workers, times

    def begin(self, schedules: Iterable[S]) -> Wave[S, C]:
        """Begin to build them, in this order."""
        return Wave(self, schedules)


class Wave(Generic[S, C]):
    """Builds under way, on daemon threads; iterating waits for the outcome of each, in order.

    Not a `ThreadPoolExecutor`: that one joins its threads when the interpreter ends, and a hung build
    would keep the process alive for ever.
    """

    def __init__(self, builds: Builds[S, C], schedules: Iterable[S]) -> None:
        self.builds = builds
        self.order = list(schedules)
        self.waiting = collections.deque(self.order)
        self.overdue: dict[S, float] = {}  # the builds under way, and when each is to be given up
        self.outcomes: dict[S, C | BaseException] = {}
        self.changed = threading.Condition()
        with self.changed:
            self._fill()

    def __iter__(self) -> Iterator[tuple[S, C | BaseException]]:
        """Schedules with their outcomes; those that were not begun are left out."""
        try:
            for schedule in self.order:
                self._wait(schedule)
                if schedule in self.outcomes:
                    yield schedule, self.outcomes[schedule]
        finally:
            self.stop()

    def stop(self) -> None:
        """Begin no more builds."""
        with self.changed:
            self.waiting.clear()

    def _fill(self) -> None:
        """Begin as many builds as may be under way."""
        while self.waiting and len(self.overdue) < self.builds.workers:
            timeout = self.builds.limit(len(self.outcomes) + len(self.overdue))
            if timeout is None:
                self.waiting.clear()
                return
            schedule = self.waiting.popleft()
            self.overdue[schedule] = time.monotonic() + timeout + GRACE
            threading.Thread(target=self._work, args=(schedule, timeout), daemon=True).start()

    def _wait(self, schedule: S) -> None:
        """Wait until a schedule has its outcome, or will have none."""
        with self.changed:
            while schedule not in self.outcomes and self.overdue:
                late = min(self.overdue, key=lambda s: self.overdue[s])
                left = self.overdue[late] - time.monotonic()
                if left > 0:
                    self.changed.wait(left)
                else:
                    self._end(late, TimeoutError("the build did not keep its time limit"), GRACE)

    def _work(self, schedule: S, timeout: float) -> None:
        began = time.monotonic()
        outcome: Any
        try:
            outcome = self.builds.build(schedule, timeout)
        except BaseException as error:
            outcome = error
        with self.changed:
            if schedule in self.overdue:  # a build that was given up may still end
                self._end(schedule, outcome, time.monotonic() - began)

    def _end(self, schedule: S, outcome: C | BaseException, seconds: float) -> None:
        del self.overdue[schedule]
        self.outcomes[schedule] = outcome
        self.builds.times.append(seconds)
        self._fill()
        self.changed.notify_all()
