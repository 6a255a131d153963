"""Rounds: contenders run in turn, and what their runs say.

All contenders run one run each a round, in an order that rotates from round to round. Whatever drifts or
disturbs the machine then meets all of them alike. The time of a contender is the median of its runs, or
their lower quartile: on a machine that other processes keep busy, the median is a time of theirs
(`tc.timing` says why).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from g3dswap.tc.timing import Call, Sampler

Key = TypeVar("Key", bound=Hashable)

STATISTICS = ("median", "quartile")
FEWEST, ENOUGH, MOST = 3, 5, 100  # runs of a contender
PATIENCE = 5.0  # times the budget, for getting from FEWEST to ENOUGH


@dataclass(frozen=True)
class Times:
    """Of the runs of one contender; `seconds` is one of the others, the statistic that counts.

    On a GPU these are times in CUDA graphs, and `eager_seconds` (the median, with its spread) is that of
    the same call launched from Python, which is the host's time where that is the longer one. `note` says
    why there is no graph; the eager times then count. On a CPU there is no difference: `eager_seconds`
    is None.
    """

    seconds: float
    low: float  # quartile
    median: float
    high: float  # quartile
    runs: int
    eager_seconds: float | None = None
    eager_spread: float | None = None
    note: str = ""

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        """By the median; of at least two runs."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, median, high, len(samples))

    def by(self, statistic: str) -> Times:
        """The same with another statistic as the one that counts."""
        return replace(self, seconds=self.low if statistic == "quartile" else self.median)

    def each(self, count: int) -> Times:
        """Of one call, where each run was of `count` of them."""
        seconds, low, median, high = (x / count for x in (self.seconds, self.low, self.median, self.high))
        return replace(self, seconds=seconds, low=low, median=median, high=high)

    @property
    def spread(self) -> float:
        """The interquartile range over the time."""
        return (self.high - self.low) / self.seconds


def alternate(calls: Mapping[Key, Call], sample: Sampler, seconds: float) -> dict[Key, Times]:
    """Time warm calls in rounds, until each has run for `seconds`.

    At least FEWEST rounds, ENOUGH of them unless that takes PATIENCE times the budget, MOST at most.
    """
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    names = list(calls)

    def wanted(taken: list[float]) -> bool:
        if len(taken) < ENOUGH:
            return len(taken) < FEWEST or sum(taken) < PATIENCE * seconds
        return len(taken) < MOST and sum(taken) < seconds

    for turn in range(MOST):
        first = turn % len(names) if names else 0
        running = [name for name in names[first:] + names[:first] if wanted(samples[name])]
        if not running:
            break
        for name in running:
            samples[name].append(sample(calls[name]))
    return {name: Times.of(taken) for name, taken in samples.items()}


def clock(device: torch.device) -> Sampler:
    """The function that times a warm call by the wall clock, until the device has done it, in seconds."""

    def sample(call: Call) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    return sample


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
