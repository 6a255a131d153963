"""What a search works with and reports: workloads, budgets, trials, results."""

from __future__ import annotations

import collections
import random
import subprocess
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..errors import ProcessError, ScheduleError, described
from .builds import cores
from .timing import Timing

OK = "ok"
ILLEGAL = "illegal"
COMPILE_ERROR = "compile-error"
COMPILE_TIMEOUT = "compile-timeout"
RUN_ERROR = "run-error"
WRONG_RESULT = "wrong-result"
SLOW_PRUNED = "slow-pruned"
CATEGORIES = (OK, ILLEGAL, COMPILE_ERROR, COMPILE_TIMEOUT, RUN_ERROR, WRONG_RESULT, SLOW_PRUNED)
MOST_CHARACTERS = 200  # of an exception's message that a record keeps

S = TypeVar("S", bound=Hashable)  # a schedule
C = TypeVar("C")  # a candidate: something that runs


class SearchSpace(Protocol[S]):
    """Legal schedules and a model of their cost (`g3dswap.tc.space.Space` is one)."""

    def default(self) -> S: ...
    def ranked(self, limit: int, rng: random.Random) -> list[S]: ...
    def mutate(self, schedule: S, rng: random.Random) -> S: ...
    def crossover(self, a: S, b: S, rng: random.Random) -> S: ...
    def cost(self, schedule: S) -> float: ...


@dataclass(frozen=True)
class Check:
    """A candidate's error against the float64 reference, and the bound that it must not exceed."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # false for NaN


class Workload(Protocol[S, C]):
    """What is tuned.  `build` is called from several threads at once, everything else from one."""

    @property
    def space(self) -> SearchSpace[S]: ...
    @property
    def baseline(self) -> C: ...
    def build(self, schedule: S, timeout: float) -> C: ...
    def check(self, candidate: C) -> Check: ...
    def time(self, candidate: C, seconds: float, above: float | None = None) -> Timing: ...


@dataclass(frozen=True)
class TunerConfig:
    """How long and how widely to search; `quick()` and `full()` are the presets.

    trials:         most schedules to build.
    generations:    most rounds of proposing, building and measuring.
    population:     schedules in a generation.
    elites:         the fastest schedules that the next generation descends from.
    mutation_rate:  the share of children that are mutations; the others are crossovers, half of them mutated.
    seconds:        wall-clock budget, baseline and final comparison included.
    build_timeout:  seconds for one build.
    workers:        builds at a time; 0 takes one for each core.
    sample_seconds: time spent on measuring one candidate.
    final_rounds:   alternating rounds of the final comparison, each contender `sample_seconds` a round.
    finalists:      candidates in the final comparison, beside the baseline.
    overlap:        measure while others of the same generation still compile, and compile the first while the
                    baseline is timed: for kernels that run elsewhere than their compilers.
    prune:          a first run this many times slower than the best is not repeated.
    tie:            times within this fraction are equal; the schedule that the model finds cheaper wins.
    """

    trials: int
    generations: int
    population: int
    elites: int
    mutation_rate: float
    seconds: float
    build_timeout: float
    workers: int = 0
    sample_seconds: float = 0.04
    final_rounds: int = 3
    finalists: int = 2
    prune: float = 2.5
    tie: float = 0.02
    overlap: bool = False

    @classmethod
    def quick(cls, target: str = "cpp") -> TunerConfig:
        """A few seconds: the cost model's best and a generation or two of children; time is what ends it.

        A GPU kernel compiles for seconds on one core and runs for milliseconds: a generation has one for
        each core, and the first are measured while the last compile.
        """
        if target == "triton":
            return cls(
                trials=256,
                generations=12,
                population=min(max(cores(), 8), 32),
                elites=4,
                mutation_rate=0.7,
                seconds=6.0,
                build_timeout=6.0,
                overlap=True,
            )
        return cls(
            trials=64,
            generations=12,
            population=6,
            elites=2,
            mutation_rate=0.7,
            seconds=5.0,
            build_timeout=4.0,
        )

    @classmethod
    def full(cls, target: str = "cpp") -> TunerConfig:
        """A few minutes."""
        return cls(
            trials=400,
            generations=20,
            population=max(24, min(cores(), 64)) if target == "triton" else 24,
            elites=6,
            mutation_rate=0.7,
            seconds=180.0,
            build_timeout=30.0,
            sample_seconds=0.1,
            final_rounds=7,
            finalists=4,
            overlap=target == "triton",
        )


@dataclass(frozen=True)
class Trial(Generic[S]):
    """One schedule that was tried.  `seconds` is None where it failed before it could be timed."""

    schedule: S
    category: str
    generation: int
    seconds: float | None = None
    spread: float = 0.0
    check: Check | None = None
    detail: str = ""


@dataclass(frozen=True)
class Progress:
    """What a progress display needs; `seconds` is the budget, and None times are not known yet."""

    elapsed: float
    seconds: float
    trials: int
    best: float | None
    baseline: float | None


@dataclass(frozen=True)
class Result(Generic[S, C]):
    """All trials, the baseline's time, and the fastest checked schedule (None: there is none).

    `seconds` and `baseline` come from the final, alternating comparison.
    """

    trials: tuple[Trial[S], ...]
    baseline: Timing
    best: Trial[S] | None
    candidate: C | None
    seconds: float | None
    interrupted: bool
    elapsed: float

    @property
    def counts(self) -> dict[str, int]:
        """How many trials ended in each category that occurred, in the order of `CATEGORIES`."""
        found = collections.Counter(trial.category for trial in self.trials)
        return {category: found[category] for category in CATEGORIES if found[category]}


def seconds_of(trial: Trial[S]) -> float:
    """The measured time of a trial; infinite where it has none."""
    return float("inf") if trial.seconds is None else trial.seconds


def category(error: BaseException) -> str:
    """The failure category of an exception that a build raised."""
    if isinstance(error, ScheduleError):
        return ILLEGAL
    if isinstance(error, ProcessError):  # of its first run
        return RUN_ERROR
    timeouts = (TimeoutError, subprocess.TimeoutExpired)
    if isinstance(error, timeouts) or isinstance(error.__cause__, timeouts):
        return COMPILE_TIMEOUT
    return COMPILE_ERROR


def brief(error: BaseException) -> str:
    """An exception as a record keeps it: in one short line."""
    return described(error, MOST_CHARACTERS)
