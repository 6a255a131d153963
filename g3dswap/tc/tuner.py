"""Measured search over schedules: cost-model-ranked candidates first, then evolution.

The tuner knows nothing of what it tunes.  A `Workload` says what the schedules are, how one is built,
checked and timed.  Candidates of a generation are compiled in parallel and then, while nothing compiles,
timed and checked one after the other; only a candidate that was checked may win.  At the end the fastest
few and the baseline are timed again in alternating rounds, so that the comparison is fair on a machine
whose speed drifts.  What is tried next depends on the seed and on measured times alone, never on which
compiler finished first.
"""

from __future__ import annotations

import collections
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from ..errors import NoCompilerError, ScheduleError
from .builds import Builds, cores
from .timing import Timing

OK = "ok"
ILLEGAL = "illegal"
COMPILE_ERROR = "compile-error"
COMPILE_TIMEOUT = "compile-timeout"
RUN_ERROR = "run-error"
WRONG_RESULT = "wrong-result"
SLOW_PRUNED = "slow-pruned"
CATEGORIES = (OK, ILLEGAL, COMPILE_ERROR, COMPILE_TIMEOUT, RUN_ERROR, WRONG_RESULT, SLOW_PRUNED)

HEADROOM = 1.2  # a build begins only if the time left is this many times what a build usually takes
CLOSE = 1.25  # a trial this many times slower than the fastest is not worth a place in the final comparison

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

    @classmethod
    def quick(cls) -> TunerConfig:
        """A few seconds: the cost model's best and a generation or two of children; time is what ends it."""
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
    def full(cls) -> TunerConfig:
        """A few minutes."""
        return cls(
            trials=400,
            generations=20,
            population=24,
            elites=6,
            mutation_rate=0.7,
            seconds=180.0,
            build_timeout=30.0,
            sample_seconds=0.1,
            final_rounds=7,
            finalists=4,
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


def tune(
    workload: Workload[S, C],
    config: TunerConfig,
    rng: random.Random,
    progress: Callable[[Progress], None] | None = None,
    seeds: Sequence[S] = (),
) -> Result[S, C]:
    """Search the workload's space; `seeds` are schedules to try first, earlier winners say.

    Ctrl-C ends the search: the result holds everything measured so far and is marked `interrupted`.
    A Ctrl-C before the baseline was measured is passed on, for then there is nothing to keep.
    Raises NoCompilerError where there is none.
    """
    return _Search(workload, config, rng, progress or (lambda _: None)).run(seeds)


@dataclass
class _Search(Generic[S, C]):
    workload: Workload[S, C]
    config: TunerConfig
    rng: random.Random
    progress: Callable[[Progress], None]
    start: float = field(default_factory=time.monotonic)
    trials: list[Trial[S]] = field(default_factory=list)
    passed: dict[S, C] = field(default_factory=dict)  # the checked candidates
    seen: set[S] = field(default_factory=set)
    baseline: Timing | None = None
    build_times: list[float] = field(default_factory=list)
    trial_seconds: float = 0.0  # what timing and checking one candidate took, at most

    def run(self, seeds: Sequence[S]) -> Result[S, C]:
        self.baseline = baseline = self.workload.time(self.workload.baseline, self.config.sample_seconds)
        best: Trial[S] | None = None
        interrupted = False
        try:
            self.evolve(seeds)
            best, baseline = self.final(baseline)
        except KeyboardInterrupt:
            interrupted = True
            best = next(iter(self.ranking(OK)), None)
        return Result(
            trials=tuple(self.trials),
            baseline=baseline,
            best=best,
            candidate=self.passed[best.schedule] if best else None,
            seconds=best.seconds if best else None,
            interrupted=interrupted,
            elapsed=self.elapsed,
        )

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def search_seconds(self) -> float:
        """The part of the budget that is left for the search; the rest is for the final comparison."""
        config = self.config
        final = (config.finalists + 1) * config.final_rounds * config.sample_seconds
        return config.seconds - min(final, config.seconds / 5) - self.elapsed

    # The search.

    def evolve(self, seeds: Sequence[S]) -> None:
        config = self.config
        reservoir = [*seeds, self.workload.space.default()]
        reservoir += self.workload.space.ranked(config.trials, self.rng)
        for generation in range(config.generations):
            wave = self.propose(reservoir, generation)
            if not wave or (generation and self.search_seconds <= 0):
                return
            self.report()
            self.measure_all(self.build_all(wave), generation)

    def propose(self, reservoir: list[S], generation: int) -> list[S]:
        """The next generation: children of the elites, and a quarter from the model's ranking.

        Without elites, or where evolution finds nothing new, all of it comes from the ranking.
        """
        size = min(self.config.population, self.config.trials - len(self.seen))
        wave: list[S] = []
        # Where everything is slow, the least slow are still the best to go on from.
        elites = [trial.schedule for trial in self.ranking(OK, SLOW_PRUNED)[: self.config.elites]]
        if generation and elites:
            wave = self.children(elites, size - size // 4)
        taken = {*self.seen, *wave}
        fresh = list(dict.fromkeys(s for s in reservoir if s not in taken))
        wave += fresh[: size - len(wave)]
        self.seen.update(wave)
        return wave

    def children(self, elites: list[S], count: int) -> list[S]:
        """Half as many again as asked for, less those that the model finds costliest."""
        space, found = self.workload.space, dict[S, float]()
        for _ in range(20 * count):
            if len(found) == count + count // 2:
                break
            parent = self.rng.choice(elites)
            if len(elites) == 1 or self.rng.random() < self.config.mutation_rate:
                child = space.mutate(parent, self.rng)
            else:
                child = space.crossover(parent, self.rng.choice(elites), self.rng)
                if self.rng.random() < 0.5:
                    child = space.mutate(child, self.rng)
            if child not in self.seen and child not in found:
                found[child] = space.cost(child)
        return sorted(found, key=lambda s: (found[s], repr(s)))[:count]

    def ranking(self, *categories: str) -> list[Trial[S]]:
        """The trials of some categories, fastest first."""
        good = [trial for trial in self.trials if trial.category in categories]
        return sorted(good, key=lambda t: (seconds_of(t), *self.preference(t.schedule)))

    def preference(self, schedule: S) -> tuple[float, str]:
        """Orders schedules that are equally fast: by the model, then by name."""
        return self.workload.space.cost(schedule), repr(schedule)

    # Building and measuring.

    def build_all(self, wave: Sequence[S]) -> dict[S, C | BaseException]:
        """Build a generation in parallel; what there is no time left to begin is left out.

        Everything that was begun has ended (or was given up) when this returns.
        """

        workers = self.config.workers or cores()

        def limit(begun: int) -> float | None:
            """The time limit of a build that begins now; None: there is no time to build and measure it.

            Each core's first build gets its full time however little is left, or slow preparations
            would leave a search without any result.
            """
            if not self.trials and begun < workers:
                return self.config.build_timeout
            left = self.search_seconds - self.trial_seconds * (begun + 1)
            usual = statistics.median(self.build_times) if self.build_times else 0.0
            return min(self.config.build_timeout, left) if left > HEADROOM * usual else None

        builds = Builds(self.workload.build, limit, workers, self.build_times)
        return builds.run(wave)

    def measure_all(self, built: dict[S, C | BaseException], generation: int) -> None:
        for schedule, candidate in built.items():
            if isinstance(candidate, NoCompilerError):
                raise candidate
            if isinstance(candidate, BaseException):
                trial = Trial(schedule, category(candidate), generation, detail=describe(candidate))
            else:
                began = self.elapsed
                trial = self.measure(schedule, candidate, generation)
                self.trial_seconds = max(self.trial_seconds, self.elapsed - began)
            self.trials.append(trial)
            self.report()

    def measure(self, schedule: S, candidate: C, generation: int) -> Trial[S]:
        """Time a candidate and, unless it is slow, check it: slow ones cannot win."""
        assert self.baseline
        above = self.config.prune * min([self.baseline.seconds, *self.times()])
        try:
            timing = self.workload.time(candidate, self.config.sample_seconds, above)
            trial = Trial(schedule, SLOW_PRUNED, generation, timing.seconds, timing.spread)
            if timing.seconds > above:
                return trial
            check = self.workload.check(candidate)
        except Exception as error:
            return Trial(schedule, RUN_ERROR, generation, detail=describe(error))
        if not check.passed:
            detail = f"error {check.error:.3g}, bound {check.bound:.3g}"
            return replace(trial, category=WRONG_RESULT, check=check, detail=detail)
        self.passed[schedule] = candidate
        return replace(trial, category=OK, check=check)

    def report(self) -> None:
        base = self.baseline.seconds if self.baseline else None
        best = min(self.times(), default=None)
        self.progress(Progress(self.elapsed, self.config.seconds, len(self.trials), best, base))

    def times(self) -> list[float]:
        return [seconds_of(trial) for trial in self.trials if trial.category == OK]

    # The final comparison.

    def final(self, baseline: Timing) -> tuple[Trial[S] | None, Timing]:
        """Time the fastest few and the baseline in alternating rounds; the winner, with its new time."""
        ranking = self.ranking(OK)
        if not ranking:
            return None, baseline
        best = seconds_of(ranking[0])
        chosen = [t for t in ranking[: self.config.finalists] if seconds_of(t) <= CLOSE * best]
        contenders: list[C] = [self.passed[t.schedule] for t in chosen]
        # A baseline that is far behind and long enough to be timed by one run need not be timed again.
        if baseline.seconds <= max(self.config.prune * best, self.config.sample_seconds):
            contenders.append(self.workload.baseline)
        if len(contenders) == 1:
            return chosen[0], baseline
        outcomes = self.alternate(contenders)
        if len(contenders) > len(chosen):
            last = outcomes.pop()
            baseline = last if isinstance(last, Timing) else baseline
        timings: dict[Trial[S], Timing] = {}
        for trial, outcome in zip(chosen, outcomes):
            if isinstance(outcome, Timing):  # the later times are the better ones
                timings[trial] = outcome
                again = _retimed(trial, outcome)
            else:
                again = replace(trial, category=RUN_ERROR, detail=describe(outcome))
            self.trials[self.trials.index(trial)] = again
        # If none got through this, those behind them compete.
        return (self.winner(timings), baseline) if timings else self.final(baseline)

    def alternate(self, contenders: Sequence[C]) -> list[Timing | Exception]:
        """Time the contenders in rounds, in rotating order; the last rounds are left out if time is up."""
        rounds: list[list[Timing]] = [[] for _ in contenders]
        failures: dict[int, Exception] = {}
        order = list(range(len(contenders)))
        for _ in range(self.config.final_rounds):
            for i in order:
                if i not in failures:
                    try:
                        rounds[i].append(self.workload.time(contenders[i], self.config.sample_seconds))
                    except Exception as error:
                        failures[i] = error
            order = order[1:] + order[:1]
            self.report()
            if self.elapsed > self.config.seconds:
                break
        return [failures.get(i) or _fastest(timings) for i, timings in enumerate(rounds)]

    def winner(self, timings: dict[Trial[S], Timing]) -> Trial[S]:
        """The fastest; of those as fast as it within `tie`, the one that the model finds cheapest."""
        fastest = min(timing.seconds for timing in timings.values())
        near = [
            trial for trial, timing in timings.items() if timing.seconds <= fastest * (1 + self.config.tie)
        ]
        trial = min(near, key=lambda trial: self.preference(trial.schedule))
        return _retimed(trial, timings[trial])


def seconds_of(trial: Trial[S]) -> float:
    """The measured time of a trial; infinite where it has none."""
    return float("inf") if trial.seconds is None else trial.seconds


def _retimed(trial: Trial[S], timing: Timing) -> Trial[S]:
    return replace(trial, seconds=timing.seconds, spread=timing.spread)


def _fastest(rounds: Sequence[Timing]) -> Timing:
    """The fastest round, as the others were disturbed; all contenders have had equally many."""
    best = min(rounds, key=lambda timing: timing.seconds)
    return replace(best, repeats=sum(timing.repeats for timing in rounds))


def category(error: BaseException) -> str:
    """The failure category of an exception that a build raised."""
    if isinstance(error, ScheduleError):
        return ILLEGAL
    timeouts = (TimeoutError, subprocess.TimeoutExpired)
    if isinstance(error, timeouts) or isinstance(error.__cause__, timeouts):
        return COMPILE_TIMEOUT
    return COMPILE_ERROR


def describe(error: BaseException) -> str:
    """An exception in one short line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
