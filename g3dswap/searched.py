"""A measured search for one problem, and what its record says of those who failed in it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .choice import Record
from .once import warn_once
from .problem import Problem
from .remote import opened
from .stored import key_of
from .tc.schedule import Schedule
from .tc.trial import Progress, Result, TunerConfig
from .tc.tuner import tune

NOTHING_BUILT = {"compile-error", "compile-timeout", "illegal"}
# of the trials' categories: what says more about the compiler or the load than about the kernels
NOTHING_RAN = NOTHING_BUILT | {"run-error"}


def search(
    problem: Problem,
    batch: int,
    budget: TunerConfig,
    seeds: Callable[[], Sequence[Schedule]],
    progress: Callable[[Progress], None],
) -> Result[Schedule, Any]:
    """Search for the fastest schedule at a batch; the same numbers are drawn every time."""
    began = time.monotonic()
    with opened(problem, batch) as workload:
        # Large problems take their time before the first trial; some of it comes off the budget.
        left = max(budget.seconds - (time.monotonic() - began), 0.6 * budget.seconds)
        rng = random.Random(json.dumps(key_of(problem), sort_keys=True))
        return tune(workload, replace(budget, seconds=left), rng, progress, seeds())


def tells_of_kernels(record: Record) -> bool:
    """Whether a record is worth keeping."""
    return bool(set(record.counts) - NOTHING_BUILT)


def tell_failures(problem: Problem, record: Record) -> None:
    """Say if no kernel ran, and how the first one failed."""
    failed = [trial for trial in record.trials if trial["category"] != "illegal"]
    if failed and not set(record.counts) - NOTHING_RAN:
        warn_once(
            "nothing ran",
            f"PyTorch's own kernel runs {problem}: none of {len(failed)} kernels could be compiled and run "
            f"({failed[0]['detail']}); see whether the compiler works and the disk has room, and tune again.",
        )
