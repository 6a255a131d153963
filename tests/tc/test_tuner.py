"""The tuner on synthetic workloads: known optimum, every kind of failure, budgets, Ctrl-C, ties."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from g3dswap.errors import CompileError, NoCompilerError, ScheduleError, described
from g3dswap.tc import builds, trial
from g3dswap.tc.builds import cores
from g3dswap.tc.timing import Timing
from g3dswap.tc.trial import MOST_CHARACTERS, Check, Progress, Result, TunerConfig, brief
from g3dswap.tc.tuner import tune

Point = tuple[int, int]
BASELINE: Point = (-1, -1)
SIZE = 16
CONFIG = TunerConfig(
    trials=100,
    generations=16,
    population=8,
    elites=3,
    mutation_rate=0.7,
    seconds=60,
    build_timeout=5,
    workers=2,
)


@dataclass
class Grid:
    """Points of a square; the model believes that small sums are cheap."""

    limit: int = 1000

    def default(self) -> Point:
        return (0, 0)

    def ranked(self, limit: int, rng: random.Random) -> list[Point]:
        points = [(x, y) for x in range(SIZE) for y in range(SIZE)]
        return sorted(points, key=lambda p: (self.cost(p), rng.random()))[: min(limit, self.limit)]

    def mutate(self, schedule: Point, rng: random.Random) -> Point:
        x, y = (min(SIZE - 1, max(0, c + rng.choice((-2, -1, 1, 2)))) for c in schedule)
        return (x, y)

    def crossover(self, a: Point, b: Point, rng: random.Random) -> Point:
        return (a[0], b[1])

    def cost(self, schedule: Point) -> float:
        return float(sum(schedule))


@dataclass
class Fake:
    """A workload whose times are computed, not measured; what each point does can be replaced."""

    space: Grid = field(default_factory=Grid)
    baseline: Point = BASELINE
    seconds: Callable[[Point], float] = lambda p: 1.0 + abs(p[0] - 9) + abs(p[1] - 5)
    baseline_seconds: float = 50.0
    on_build: Callable[[Point], None] = lambda p: None
    on_check: Callable[[Point], Check] = lambda p: Check(1e-7, 1e-6)
    on_time: Callable[[Point], None] = lambda p: None
    built: list[Point] = field(default_factory=list)
    timed: list[Point] = field(default_factory=list)
    compiling: int = 0
    overlap: int = 0
    timed_while_compiling: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def build(self, schedule: Point, timeout: float) -> Point:
        with self.lock:
            self.built.append(schedule)
            self.compiling += 1
            self.overlap = max(self.overlap, self.compiling)
        try:
            self.on_build(schedule)
        finally:
            with self.lock:
                self.compiling -= 1
        return schedule

    def check(self, candidate: Point) -> Check:
        return self.on_check(candidate)

    def time(self, candidate: Point, seconds: float, above: float | None = None) -> Timing:
        self.timed_while_compiling += self.compiling
        self.timed.append(candidate)
        self.on_time(candidate)
        time = self.baseline_seconds if candidate == BASELINE else self.seconds(candidate)
        return Timing(time, 0.0, 5)


def search(
    workload: Fake,
    config: TunerConfig = CONFIG,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    seeds: tuple[Point, ...] = (),
) -> Result[Point, Point]:
    return tune(workload, config, random.Random(seed), progress, seeds)


def test_finds_the_optimum_that_the_model_does_not_know() -> None:
    workload = Fake()
    result = search(workload)
    assert result.best and result.best.schedule == (9, 5) == result.candidate
    assert result.seconds == 1.0 and result.baseline.seconds == 50.0 and not result.interrupted
    assert len(result.trials) <= CONFIG.trials


def test_evolution_beats_the_ranking_alone() -> None:
    ranking_only = search(Fake(), replace(CONFIG, elites=0))
    evolved = search(Fake())
    assert ranking_only.seconds and evolved.seconds and evolved.seconds < ranking_only.seconds


def test_no_schedule_is_built_twice() -> None:
    workload = Fake()
    result = search(workload, seeds=((0, 0), (3, 3), (3, 3)))
    assert len(workload.built) == len(set(workload.built)) == len(result.trials)
    assert {trial.schedule for trial in result.trials} == set(workload.built)


def test_earlier_winners_and_the_default_come_first() -> None:
    result = search(Fake(), replace(CONFIG, generations=1, population=3), seeds=((7, 7),))
    assert [trial.schedule for trial in result.trials][:2] == [(7, 7), (0, 0)]
    assert {trial.generation for trial in result.trials} == {0}


def test_same_seed_and_times_give_the_same_result_whatever_finishes_first() -> None:
    def slowly(seed: int) -> Callable[[Point], None]:
        delays = random.Random(seed)
        return lambda p: time.sleep(delays.random() * 0.004)

    first, second, third = (
        search(Fake(on_build=slowly(1)), seed=5),
        search(Fake(on_build=slowly(2)), replace(CONFIG, workers=5), seed=5),
        search(Fake(), seed=6),
    )
    assert first.trials == second.trials and first.best == second.best
    assert first.trials != third.trials


def test_builds_in_parallel_and_times_while_nothing_builds() -> None:
    workload = Fake(on_build=lambda p: time.sleep(0.003))
    search(workload, replace(CONFIG, workers=3, trials=16))
    assert 2 <= workload.overlap <= 3
    assert workload.timed_while_compiling == 0


def test_where_builds_disturb_nothing_they_overlap_with_measuring() -> None:
    """The first of a generation is measured while the last is built, and what comes out is the same."""
    last = (3, 0)
    measured = threading.Event()

    def build(point: Point) -> None:
        if point == last:
            assert measured.wait(30)

    def time_(point: Point) -> None:
        if point != BASELINE:
            measured.set()

    config = replace(CONFIG, workers=8)
    overlapping = search(Fake(on_build=build, on_time=time_), replace(config, overlap=True))
    assert overlapping.trials == search(Fake(), config).trials
    assert overlapping.best and overlapping.best.schedule == (9, 5)


def test_the_baseline_is_timed_while_the_first_are_built() -> None:
    began = threading.Event()

    def time_(point: Point) -> None:
        if point == BASELINE:
            assert began.wait(30)

    config = replace(CONFIG, generations=1, overlap=True)
    assert search(Fake(on_build=lambda p: began.set(), on_time=time_), config).best


def test_a_baseline_that_fails_ends_the_builds() -> None:
    def fail(point: Point) -> None:
        raise RuntimeError("no baseline")

    workload = Fake(on_build=lambda p: time.sleep(0.05), on_time=fail)
    with pytest.raises(RuntimeError, match="no baseline"):
        search(workload, replace(CONFIG, overlap=True, workers=1))
    time.sleep(0.3)
    assert len(workload.built) <= 2


def test_a_finalist_that_fails_leaves_the_next_one() -> None:
    """A kernel that crashes now and then must not cost the search."""
    timed: list[Point] = []

    def crash(point: Point) -> None:
        timed.append(point)
        if point in {(9, 5), (9, 4)} and timed.count(point) > 1:
            raise RuntimeError("illegal memory access")

    result = search(Fake(on_time=crash, baseline_seconds=1.5), replace(CONFIG, finalists=1))
    found = {t.schedule: t for t in result.trials}
    assert found[(9, 5)].category == trial.RUN_ERROR and "illegal" in found[(9, 5)].detail
    assert result.best and result.seconds == 2.0 and result.best.schedule != (9, 5)
    assert result.best.category == trial.OK and result.baseline.seconds == 1.5


def test_a_baseline_that_fails_at_last_keeps_its_first_time() -> None:
    calls: list[Point] = []

    def crash(point: Point) -> None:
        calls.append(point)
        if calls.count(BASELINE) > 1 and point == BASELINE:
            raise RuntimeError("out of memory")

    result = search(Fake(on_time=crash, baseline_seconds=2.0))
    assert result.baseline.seconds == 2.0 and result.best and result.best.schedule == (9, 5)


def test_times_of_the_fastest_and_the_baseline_alternate_at_the_end() -> None:
    workload = Fake(baseline_seconds=2.0)
    search(workload, replace(CONFIG, final_rounds=3, finalists=1))
    assert workload.timed[0] == BASELINE
    assert workload.timed[-6:] == [(9, 5), BASELINE, BASELINE, (9, 5), (9, 5), BASELINE]


def test_a_baseline_far_behind_is_not_timed_again() -> None:
    workload = Fake(baseline_seconds=900.0)
    result = search(workload)
    assert workload.timed.count(BASELINE) == 1 and result.baseline.seconds == 900.0


def test_the_final_comparison_corrects_a_lucky_measurement() -> None:
    times: dict[Point, list[float]] = {(0, 0): [1.0, 3.0, 3.0, 3.0], (0, 1): [1.1, 1.1, 1.1, 1.1]}
    workload = Fake(seconds=lambda p: times[p].pop(0) if times.get(p) else 100.0)
    result = search(workload, replace(CONFIG, generations=1, population=6, prune=1000.0))
    assert result.best and result.best.schedule == (0, 1) and result.seconds == 1.1
    assert {t.schedule: t.seconds for t in result.trials}[(0, 0)] == 3.0


def test_near_ties_go_to_the_schedule_that_the_model_prefers() -> None:
    workload = Fake(seconds=lambda p: {(0, 0): 1.01, (0, 1): 1.0}.get(p, 9.0))
    config = replace(CONFIG, generations=1, population=6, tie=0.02)
    tied, apart = search(workload, config), search(workload, replace(config, tie=0.001))
    assert tied.best and tied.best.schedule == (0, 0)
    assert apart.best and apart.best.schedule == (0, 1)


def test_every_failure_has_its_category_and_none_wins() -> None:
    def build(point: Point) -> None:
        if point == (0, 0):
            raise ScheduleError("the batch cannot be cut")
        if point == (0, 1):
            raise CompileError("c++ said\nno")
        if point == (1, 0):
            raise CompileError("out of time") from subprocess.TimeoutExpired("c++", 5)
        if point == (1, 1):
            raise ZeroDivisionError

    def check(point: Point) -> Check:
        if point == (0, 2):
            raise RuntimeError("crashed")
        return Check(float("nan") if point == (2, 0) else 0.5, 0.5 if point != (0, 3) else 0.4)

    seconds: dict[Point, float] = {(2, 0): 0.1, (0, 3): 0.2, (1, 2): 1.0, (2, 1): 99.0}
    workload = Fake(
        on_build=build, on_check=check, seconds=lambda p: seconds.get(p, 1.5), baseline_seconds=8.0
    )
    result = search(workload, replace(CONFIG, generations=1, population=10))
    found = {trial.schedule: trial for trial in result.trials}
    wanted = {
        (0, 0): trial.ILLEGAL,
        (0, 1): trial.COMPILE_ERROR,
        (1, 0): trial.COMPILE_TIMEOUT,
        (1, 1): trial.COMPILE_ERROR,
        (0, 2): trial.RUN_ERROR,
        (2, 0): trial.WRONG_RESULT,
        (0, 3): trial.WRONG_RESULT,
        (1, 2): trial.OK,
        (2, 1): trial.SLOW_PRUNED,
        (3, 0): trial.OK,
    }
    assert {schedule: trial.category for schedule, trial in found.items()} == wanted
    assert result.best and result.best.schedule == (1, 2)
    assert result.counts == {
        "ok": 2,
        "illegal": 1,
        "compile-error": 2,
        "compile-timeout": 1,
        "run-error": 1,
        "wrong-result": 2,
        "slow-pruned": 1,
    }
    assert found[(0, 1)].detail == "CompileError: c++ said" and found[(1, 1)].detail == "ZeroDivisionError"
    assert found[(0, 2)].detail == "RuntimeError: crashed" and found[(0, 2)].seconds is None
    assert found[(0, 3)].check == Check(0.5, 0.4) and found[(0, 3)].detail == "error 0.5, bound 0.4"
    assert found[(2, 1)].seconds == 99.0 and found[(2, 1)].check is None


def test_a_crash_while_timing_is_a_run_error() -> None:
    def crash(point: Point) -> None:
        if point == (9, 5):
            raise RuntimeError("illegal memory access")

    result = search(Fake(on_time=crash))
    assert result.counts["run-error"] == 1
    assert result.best and result.best.schedule != (9, 5) and result.seconds == 2.0


def test_slow_candidates_are_not_checked() -> None:
    checked: list[Point] = []

    def check(point: Point) -> Check:
        checked.append(point)
        return Check(0.0, 0.0)

    workload = Fake(on_check=check, seconds=lambda p: 1.0 + sum(p), baseline_seconds=1.0)
    result = search(workload, replace(CONFIG, generations=1, population=10, prune=2.5))
    assert max(sum(point) for point in checked) == 1
    assert result.counts == {"ok": 3, "slow-pruned": 7}


def test_nothing_works() -> None:
    def refuse(point: Point) -> None:
        raise CompileError("no")

    result = search(Fake(on_build=refuse), replace(CONFIG, trials=20))
    assert (result.best, result.candidate, result.seconds) == (None, None, None)
    assert result.counts == {"compile-error": 20} and result.baseline.seconds == 50.0


def test_no_compiler_ends_the_search() -> None:
    def refuse(point: Point) -> None:
        raise NoCompilerError("no c++ on the PATH")

    workload = Fake(on_build=refuse)
    with pytest.raises(NoCompilerError, match="no c\\+\\+"):
        search(workload)
    assert len(workload.built) <= CONFIG.population


def test_an_empty_ranking_leaves_the_default_and_its_children() -> None:
    result = search(Fake(space=Grid(limit=0)))
    assert result.trials[0].schedule == (0, 0) and len(result.trials) > 10


def test_a_hung_build_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "GRACE", 0.05)
    release = threading.Event()

    def hang(point: Point) -> None:
        if point in {(0, 0), (1, 0)}:
            release.wait(30)

    workload = Fake(on_build=hang)
    config = replace(CONFIG, build_timeout=0.1, generations=2)
    try:
        result = search(workload, config)
    finally:
        release.set()
    assert result.counts["compile-timeout"] == 2 and result.counts["ok"] == 14
    assert result.elapsed < 20


def test_an_exhausted_budget_still_gives_each_core_one_build() -> None:
    workload = Fake(on_time=lambda p: time.sleep(0.05))
    result = search(workload, replace(CONFIG, seconds=0.05, workers=3))
    assert len(workload.built) == 3 and result.counts == {"ok": 3} and result.best


def test_the_budget_ends_the_search_and_keeps_what_was_built() -> None:
    workload = Fake(on_build=lambda p: time.sleep(0.1))
    result = search(workload, replace(CONFIG, seconds=0.6, trials=1000, generations=100))
    assert 2 <= len(result.trials) < 40 and result.counts["ok"] == len(result.trials)
    assert result.best and not result.interrupted


@pytest.mark.parametrize("phase", ["build", "time", "check"])
def test_interrupt_keeps_what_was_measured(phase: str) -> None:
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt

    def check(point: Point) -> Check:
        if phase == "check":
            interrupt()
        return Check(0.0, 0.0)

    workload = Fake(on_check=check)
    if phase == "time":
        workload.on_time = interrupt
    progress = interrupt if phase == "build" else None
    result = search(workload, progress=progress)
    assert result.interrupted and result.best
    done = [trial.seconds for trial in result.trials]
    assert 8 <= len(done) < 12 and result.seconds == min(s for s in done if s is not None)
    assert result.candidate == result.best.schedule


def test_interrupt_in_the_final_comparison_keeps_the_winner_so_far() -> None:
    def interrupt(point: Point) -> None:
        if point == BASELINE and len(workload.timed) > 2:
            raise KeyboardInterrupt

    workload = Fake(baseline_seconds=2.0, on_time=interrupt)
    result = search(workload)
    assert result.interrupted and result.best and result.best.schedule == (9, 5)


def test_interrupt_before_there_is_anything_to_keep_is_passed_on() -> None:
    def interrupt(point: Point) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(Fake(on_time=interrupt))


def test_progress_tells_trials_and_times() -> None:
    seen: list[Progress] = []
    result = search(Fake(), progress=seen.append)
    assert seen[0].trials == 0 and seen[0].best is None and seen[0].baseline == 50.0
    assert seen[-1].trials == len(result.trials) and seen[-1].best == 1.0
    assert all(a.trials <= b.trials and a.elapsed <= b.elapsed for a, b in itertools.pairwise(seen))
    assert {p.seconds for p in seen} == {CONFIG.seconds}


def test_presets_search_more_with_more_time() -> None:
    quick, full = TunerConfig.quick(), TunerConfig.full()
    assert quick.seconds <= 5.5 < 60 <= full.seconds
    assert quick.trials < full.trials and quick.final_rounds < full.final_rounds


@pytest.mark.parametrize(
    ("processes", "wanted"), [("1", 16), ("4", 4), ("5", 3), ("32", 1), ("0", 16), ("x", 16)]
)
def test_processes_of_one_machine_share_out_its_cores(
    processes: str, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert cores() == wanted


def test_a_search_builds_on_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    workload = Fake(on_build=lambda p: time.sleep(0.01))
    search(workload, replace(CONFIG, workers=0, generations=2))
    assert workload.overlap == 2


def test_presets_for_a_gpu_keep_all_cores_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "cores", lambda: 16)
    quick, full = TunerConfig.quick("triton"), TunerConfig.full("triton")
    assert quick.population == 16 <= full.population and quick.overlap and full.overlap
    assert 21 * quick.seconds < 180  # the passes of seven layers
    assert not TunerConfig.quick().overlap and not TunerConfig.full("cpp").overlap


def test_where_everything_is_slow_evolution_goes_on_from_the_least_slow() -> None:
    result = search(Fake(baseline_seconds=0.5))
    assert result.best and result.best.schedule == (9, 5) and result.counts["ok"] == 1
    assert result.seconds == 1.0 and result.baseline.seconds == 0.5


def test_a_record_cuts_a_message_short_and_an_error_does_not() -> None:
    long = "word " * MOST_CHARACTERS + "end"
    error = ValueError(f"\n{long}.\nand a trace")
    assert brief(error) == f"ValueError: {long[:MOST_CHARACTERS]}"
    assert described(error) == f"ValueError: {long}"
    assert described(ValueError()) == brief(ValueError()) == "ValueError"
