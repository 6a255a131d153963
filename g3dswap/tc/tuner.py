"""Measured search over schedules: cost-model-ranked candidates first, then evolution.

The tuner knows nothing of what it tunes.  A `Workload` says what the schedules are, how one is built,
checked and timed.  Candidates of a generation are compiled in parallel and then, while nothing compiles
(unless the budget says that this disturbs nothing), timed and checked one after the other; only a candidate
that was checked may win.  At the end the fastest
few and the baseline are timed again in alternating rounds, so that the comparison is fair on a machine
whose speed drifts.  What is tried next depends on the seed and on measured times alone, never on which
compiler finished first.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

from ..errors import NoCompilerError
from .builds import Builds, Wave, cores
from .timing import Timing
from .trial import (
    OK,
    RUN_ERROR,
    SLOW_PRUNED,
    WRONG_RESULT,
    C,
    Progress,
    Result,
    S,
    Trial,
    TunerConfig,
    Workload,
    brief,
    category,
    seconds_of,
)

HEADROOM = 1.2  # a build begins only if the time left is this many times what a build usually takes
CLOSE = 1.25  # a trial this many times slower than the fastest is not worth a place in the final comparison


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
        reservoir = [*seeds, self.workload.space.default()]
        reservoir += self.workload.space.ranked(self.config.trials, self.rng)
        wave = self.propose(reservoir, 0)
        first = self.begin(wave) if self.config.overlap else None
        try:
            self.baseline = baseline = self.workload.time(self.workload.baseline, self.config.sample_seconds)
        except BaseException:
            if first:
                first.stop()
            raise
        best: Trial[S] | None = None
        interrupted = False
        try:
            self.report()
            self.measure_all(first or self.begin(wave), 0)
            self.evolve(reservoir)
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

    def evolve(self, reservoir: list[S]) -> None:
        for generation in range(1, self.config.generations):
            wave = self.propose(reservoir, generation)
            if not wave or self.search_seconds <= 0:
                return
            self.report()
            self.measure_all(self.begin(wave), generation)

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

    def begin(self, wave: Sequence[S]) -> Wave[S, C]:
        """Begin to build a generation in parallel; what there is no time left to begin is left out."""
        workers, before = self.config.workers or cores(), len(self.trials)

        def limit(begun: int) -> float | None:
            """The time limit of a build that begins now; None: there is no time to build and measure it.

            Each core's first build gets its full time however little is left, or slow preparations
            would leave a search without any result.
            """
            if not before and begun < workers:
                return self.config.build_timeout
            unmeasured = begun - (len(self.trials) - before)
            left = self.search_seconds - self.trial_seconds * (unmeasured + 1)
            usual = statistics.median(self.build_times) if self.build_times else 0.0
            return min(self.config.build_timeout, left) if left > HEADROOM * usual else None

        return Builds(self.workload.build, limit, workers, self.build_times).begin(wave)

    def measure_all(self, built: Wave[S, C], generation: int) -> None:
        """Measure a generation; unless both may overlap, all of it has been built (or given up) before."""
        outcomes: Iterable[tuple[S, C | BaseException]] = built if self.config.overlap else list(built)
        for schedule, candidate in outcomes:
            if isinstance(candidate, NoCompilerError):
                raise candidate
            if isinstance(candidate, BaseException):
                trial = Trial(schedule, category(candidate), generation, detail=brief(candidate))
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
            return Trial(schedule, RUN_ERROR, generation, detail=brief(error))
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
                again = replace(trial, category=RUN_ERROR, detail=brief(outcome))
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


def _retimed(trial: Trial[S], timing: Timing) -> Trial[S]:
    return replace(trial, seconds=timing.seconds, spread=timing.spread)


def _fastest(rounds: Sequence[Timing]) -> Timing:
    """The fastest round, as the others were disturbed; all contenders have had equally many."""
    best = min(rounds, key=lambda timing: timing.seconds)
    return replace(best, repeats=sum(timing.repeats for timing in rounds))
