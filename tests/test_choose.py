"""Choosing: the order of the sources, what is stored, what happens when anything fails.

Most tests replace building and timing by fakes (a "kernel" is PyTorch's convolution, times are a table),
so that they say exactly what is fast, wrong or broken; the last ones compile and measure for real.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from g3dswap import choose, decided, guessed, native, ranks, stored, workload
from g3dswap.choice import Choice, Record
from g3dswap.choose import Chooser
from g3dswap.comprehensions import nest
from g3dswap.errors import ArgumentError, CompileError, G3DSwapWarning, NoCompilerError, PlanError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc.cache import Cache
from g3dswap.tc.schedule import Digit, Schedule, serial
from g3dswap.tc.timing import Timing
from g3dswap.tc.trial import TunerConfig
from g3dswap.workload import Candidate, PassWorkload

pytestmark = pytest.mark.usefixtures("forgotten")

GEOMETRY = Geometry(4, 8, 4, (5, 6, 7), (3, 3, 3), padding=(1, 1, 1))
PROBLEM = Problem("forward", GEOMETRY, bias=True)
CONFIG = TunerConfig(
    trials=8, generations=2, population=4, elites=2, mutation_rate=0.5, seconds=60, build_timeout=5, workers=1
)


def schedule(number: int) -> Schedule:
    return Schedule((Digit("n", None, "grid"),), hints=(("number", number),))


def number(candidate: Candidate) -> int:
    kernel = candidate.kernel
    return kernel.schedule.hint("number", -1) if kernel else -1


@dataclass(frozen=True)
class FakeKernel:
    """Computes with PyTorch, in `world.scale` times the truth."""

    problem: Problem
    schedule: Schedule
    scale: float

    def __call__(self, *operands: torch.Tensor, out: torch.Tensor) -> None:
        tensors: list[torch.Tensor | None] = list(operands)
        if self.problem.direction == "forward":
            tensors += [None] * (3 - len(tensors))
        elif self.problem.direction == "grad_input":
            tensors.insert(1, out)
        else:
            tensors.append(out)
        out.copy_(native.run(self.problem, *tensors) * self.scale)


class FakeSpace:
    """Eight schedules, numbered; the model prefers low numbers and the default is 0."""

    def __init__(self, nest: Any, target: str, threads: int, batch: int) -> None:
        pass

    def default(self) -> Schedule:
        return schedule(0)

    def ranked(self, limit: int, rng: random.Random) -> list[Schedule]:
        return [schedule(i) for i in range(min(limit, 8))]

    def mutate(self, parent: Schedule, rng: random.Random) -> Schedule:
        return schedule(rng.randrange(8))

    def crossover(self, a: Schedule, b: Schedule, rng: random.Random) -> Schedule:
        return a

    def cost(self, point: Schedule) -> float:
        return float(point.hint("number", 0))


@dataclass
class World:
    """What the fakes do, and what was asked of them. Kernel -1 is PyTorch's."""

    seconds: dict[int, float] = field(default_factory=lambda: {-1: 3.0, 5: 1.0})
    scale: dict[int, float] = field(default_factory=dict)
    on_build: Callable[[int], None] = lambda n: None
    on_time: Callable[[int], None] = lambda n: None
    built: list[int] = field(default_factory=list)
    timed: list[int] = field(default_factory=list)
    raced: list[tuple[int, int]] = field(default_factory=list)

    def build(self, problem: Problem, point: Schedule, timeout: float) -> Candidate:
        n = point.hint("number", -1)
        self.built.append(n)
        self.on_build(n)
        return Candidate(problem, FakeKernel(problem, point, self.scale.get(n, 1.0)))  # type: ignore[arg-type]

    def race(self, candidate: Candidate, batch: int) -> tuple[float, float]:
        self.raced.append((number(candidate), batch))
        return self.seconds.get(number(candidate), 2.0), self.seconds[-1]

    def time(
        self, _: PassWorkload, candidate: Candidate, seconds: float, above: float | None = None
    ) -> Timing:
        self.timed.append(number(candidate))
        self.on_time(self.timed[-1])
        return Timing(self.seconds.get(self.timed[-1], 2.0), 0.0, 3)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(workload, "build", world.build)
    monkeypatch.setattr(choose, "race", world.race)
    monkeypatch.setattr(guessed, "Space", FakeSpace)
    monkeypatch.setattr(workload, "Space", FakeSpace)
    monkeypatch.setattr(PassWorkload, "time", lambda *args, **options: world.time(*args, **options))
    return world


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "own")


def chooser(cache: Cache, tune: str = "quick", **options: Any) -> Chooser:
    return Chooser(cache, tune, progress=False, config=CONFIG, **options)


def again(cache: Cache, tune: str = "cached", **options: Any) -> Chooser:
    """A chooser as a new process would have it, but for what it knows of the past."""
    choose.forget()
    return chooser(Cache(cache.directory, cache.fallbacks), tune, **options)


def outcome(choice: Choice) -> float:
    """The error of running a choice on new data of another batch size."""
    operands = native.random_operands(choice.problem, 3, seed=9)
    out = choice.run(*operands)
    assert out.is_contiguous(memory_format=choice.problem.memory_format)
    return native.error(out, native.reference(choice.problem, *operands))


# Tuning and the cache.


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_the_fastest_kernel_is_tuned_stored_and_found_again(
    world: World, cache: Cache, direction: str, layout: str
) -> None:
    problem = Problem(direction, GEOMETRY, layout=layout, bias=direction == "forward")
    tuned = chooser(cache).choose(problem, 2)
    assert tuned.source == "tuned" and not tuned.is_native
    assert (tuned.seconds, tuned.native_seconds, tuned.speedup) == (1.0, 3.0, 3.0)
    assert tuned.schedule == schedule(5).to_json() and "8 ok" in tuned.reason and "3.00x" in tuned.reason
    assert outcome(tuned) < 1e-6 and tuned.error is not None and tuned.bound is not None
    assert tuned.error <= tuned.bound

    world.built.clear()
    found = again(cache).choose(problem, 2)
    assert found == replace(tuned, source="cached", reason="tuned at batch 2, 3.00x")
    assert world.built == [5] and outcome(found) < 1e-6


def test_the_record_holds_every_trial(world: World, cache: Cache) -> None:
    world.scale[2] = 1.5
    chooser(cache).choose(PROBLEM, 2)
    (entry,) = cache.entries()
    assert entry.key["size"] == [5, 6, 7] and "batch" not in entry.key and entry.key["generator"]
    value = entry.value
    assert value["native_seconds"] == 3.0 and value["seconds"] == 1.0 and value["batch"] == 2
    assert value["effort"] == "quick" and value["interrupted"] is False
    assert value["counts"] == {"ok": 7, "wrong-result": 1}
    assert len(value["trials"]) == 8
    by_category = {t["category"]: t for t in value["trials"]}
    assert "number=2" in by_category["wrong-result"]["schedule"]
    assert "bound" in by_category["wrong-result"]["detail"]


def test_pytorch_wins_and_that_is_remembered(world: World, cache: Cache) -> None:
    world.seconds = {-1: 1.04, 5: 1.0}
    first = chooser(cache).choose(PROBLEM)
    assert first.is_native and first.source == "native" and first.speedup == 1.0
    assert "1.04x" in first.reason and "1.05x" in first.reason
    assert first.seconds == first.native_seconds == 1.04 and outcome(first) < 1e-6
    second = again(cache, "quick").choose(PROBLEM)
    assert second.is_native and second.native_seconds == 1.04 and world.timed.count(5) == 4
    assert not again(cache, min_speedup=1.03).choose(PROBLEM).is_native


def test_another_min_speedup_is_another_decision(world: World, cache: Cache) -> None:
    assert not chooser(cache).choose(PROBLEM).is_native
    assert chooser(cache, min_speedup=4).choose(PROBLEM).is_native
    assert choose.resolve(PROBLEM, cache=str(cache.directory)).is_native  # the latest decision


def test_a_decision_is_made_once(world: World, cache: Cache) -> None:
    first = chooser(cache)
    assert first.choose(PROBLEM, 2) is first.choose(PROBLEM, 7)
    assert chooser(cache).choose(PROBLEM) is first.choose(PROBLEM)
    timed = len(world.timed)
    assert choose.resolve(PROBLEM, 2, "quick", str(cache.directory)) is first.choose(PROBLEM)
    assert choose.resolve(PROBLEM, 2, "cached", str(cache.directory)) is first.choose(PROBLEM)
    assert len(world.timed) == timed


def test_threads_share_one_decision(world: World, cache: Cache) -> None:
    world.on_time = lambda n: time.sleep(0.002)
    one, found = chooser(cache), []
    threads = [threading.Thread(target=lambda: found.append(one.choose(PROBLEM))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(choice is found[0] for choice in found) and world.built.count(5) == 1


def test_full_tuning_replaces_a_quick_record_and_starts_from_it(world: World, cache: Cache) -> None:
    chooser(cache).choose(PROBLEM)
    world.seconds[3] = 0.5
    world.built.clear()
    assert again(cache, "quick").choose(PROBLEM).source == "cached"
    assert world.built == [5]
    world.built.clear()
    full = again(cache, "full").choose(PROBLEM)
    assert full.source == "tuned" and full.seconds == 0.5 and world.built[0] == 5
    assert again(cache, "quick").choose(PROBLEM).schedule == schedule(3).to_json()


def test_no_kernel_works(world: World, cache: Cache) -> None:
    def refuse(n: int) -> None:
        raise CompileError("no")

    world.on_build = refuse
    wanted = (
        r"none of 8 kernels could be compiled and run \(CompileError: no\); see whether the compiler works"
    )
    with pytest.warns(G3DSwapWarning, match=wanted):
        choice = chooser(cache).choose(PROBLEM)
    assert choice.is_native and "8 compile-error" in choice.reason and "no kernel worked" in choice.reason
    # It says more about the compiler than about the kernels, so it is not remembered.
    assert not cache.entries()


def test_a_wrong_kernel_never_wins(world: World, cache: Cache) -> None:
    world.scale[5] = 1.0 + 1e-4
    world.seconds[4] = 1.5
    choice = chooser(cache).choose(PROBLEM)
    assert choice.schedule == schedule(4).to_json()


def test_an_unwritten_element_is_a_wrong_result(world: World, cache: Cache) -> None:
    class Forgetful(FakeKernel):
        def __call__(self, *operands: torch.Tensor, out: torch.Tensor) -> None:
            corner = out[0, 0, 0, 0, 0].clone()
            super().__call__(*operands, out=out)
            out[0, 0, 0, 0, 0] = corner

    problem = replace(PROBLEM, geometry=replace(GEOMETRY, size=(40, 60, 70)))
    work = PassWorkload(problem, 2)
    kernel = Forgetful(problem, schedule(0), 1.0)
    assert not work.check(Candidate(problem, kernel)).passed  # type: ignore[arg-type]
    assert not workload.quick_check(Candidate(problem, kernel)).passed  # type: ignore[arg-type]
    good = Candidate(problem, FakeKernel(problem, schedule(0), 1.0))  # type: ignore[arg-type]
    assert work.check(good).passed and workload.quick_check(good).passed


def test_global_random_state_is_left_alone(world: World, cache: Cache) -> None:
    torch.manual_seed(3)
    random.seed(3)
    before, python = torch.get_rng_state(), random.getstate()
    chooser(cache).choose(PROBLEM)
    again(cache).choose(PROBLEM)
    assert torch.equal(before, torch.get_rng_state()) and python == random.getstate()


def test_counts_sum_over_passes(world: World, cache: Cache) -> None:
    one = chooser(cache)
    one.choose(PROBLEM)
    one.choose(replace(PROBLEM, direction="grad_input", bias=False))
    assert one.counts == {"ok": 16}


# What is stored may be bad.


def damaged(cache: Cache, **changes: Any) -> None:
    (entry,) = cache.entries()
    cache.put(entry.key, {**entry.value, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"digits": ["n rest somewhere"], "fuse": [], "stage": [], "hints": {}}},
        {"schedule": "fast"},
        {"native_seconds": None},
        {"native_seconds": "3"},
        {"seconds": -1.0},
        {"seconds": None},
        {"effort": "huge"},
        {"batch": "2"},
    ],
)
def test_a_malformed_entry_is_a_miss_said_once(world: World, cache: Cache, changes: dict[str, Any]) -> None:
    chooser(cache).choose(PROBLEM)
    damaged(cache, **changes)
    with pytest.warns(G3DSwapWarning, match=r"malformed.*tune it again") as said:
        choice = again(cache, "quick").choose(PROBLEM)
    assert choice.source == "tuned" and len(said) == 1


def test_an_entry_whose_kernel_fails_its_check_is_a_miss(world: World, cache: Cache) -> None:
    chooser(cache).choose(PROBLEM)
    world.scale[5] = 1.5
    world.seconds[6] = 1.5
    with pytest.warns(G3DSwapWarning, match=r"cached schedule.*exceeds.*tune it again") as said:
        choice = again(cache, "quick").choose(PROBLEM)
    assert choice.schedule == schedule(6).to_json() and choice.source == "tuned" and len(said) == 1


def test_an_entry_whose_kernel_does_not_build_is_a_miss(world: World, cache: Cache) -> None:
    def refuse(n: int) -> None:
        raise CompileError("internal compiler error")

    chooser(cache).choose(PROBLEM)
    world.on_build = refuse
    with pytest.warns(G3DSwapWarning) as said:
        choice = again(cache).choose(PROBLEM)
    assert choice.is_native and "internal compiler error" in str(said[0].message) and len(said) == 2


def test_a_stored_bound_cannot_excuse_a_wrong_kernel(world: World, cache: Cache) -> None:
    chooser(cache).choose(PROBLEM)
    damaged(cache, bound=10.0)
    world.scale[5] = 1.01
    with pytest.warns(G3DSwapWarning, match="exceeds"):
        assert again(cache, "quick").choose(PROBLEM).schedule != schedule(5).to_json()


def test_no_compiler_is_said_once(world: World, cache: Cache) -> None:
    def refuse(n: int) -> None:
        raise NoCompilerError("no c++ on the PATH; install one.")

    world.on_build = refuse
    one = chooser(cache)
    with pytest.warns(G3DSwapWarning, match=r"PyTorch's own kernels run: no c\+\+") as said:
        first = one.choose(PROBLEM)
        second = one.choose(replace(PROBLEM, direction="grad_input", bias=False))
    assert first.is_native and second.is_native and first.reason == "no compiler" and len(said) == 1
    assert cache.entries() == [] and outcome(first) < 1e-6


def test_a_defect_in_tuning_falls_back_to_pytorch(
    world: World, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("cost of nothing")

    monkeypatch.setattr(FakeSpace, "ranked", fail)
    with pytest.warns(G3DSwapWarning, match=r"tuning it failed: ZeroDivisionError: cost of nothing"):
        choice = chooser(cache).choose(PROBLEM)
    assert choice.is_native and outcome(choice) < 1e-6


# Without tuning.


def test_an_untuned_problem_runs_by_pytorch_and_is_said_once(world: World, cache: Cache) -> None:
    one = chooser(cache, "cached")
    with pytest.warns(G3DSwapWarning, match="g3dswap tune") as said:
        choice = one.choose(PROBLEM)
        one.choose(replace(PROBLEM, direction="grad_weight", bias=False))
    assert choice.is_native and choice.reason == "no tuned entry; run g3dswap tune" and len(said) == 1
    assert world.built == [] and choice.seconds is None and choice.native_seconds is None


def test_the_default_schedule_is_used_where_asked_for_and_right(world: World, cache: Cache) -> None:
    choice = chooser(cache, "none").choose(PROBLEM)
    assert choice.source == "default" and choice.schedule == schedule(0).to_json() and world.timed == []
    assert choice.speedup is None and outcome(choice) < 1e-6
    choose.forget()
    world.scale[0] = 1.5
    with pytest.warns(G3DSwapWarning):
        assert chooser(cache, "none").choose(PROBLEM).is_native


def use_precise_space(monkeypatch: pytest.MonkeyPatch, rounded: int, exact: int, unit: float = 1.0) -> None:
    """The schedules that are best with TF32 and without, whose numbers are their costs in such units."""

    class Precise(FakeSpace):
        def __init__(self, nest: Any, target: str, threads: int, batch: int) -> None:
            self.number = rounded if nest.precision == "tf32" else exact

        def default(self) -> Schedule:
            return schedule(self.number)

        def cost(self, point: Schedule) -> float:
            return unit * super().cost(point)

    monkeypatch.setattr(guessed, "Space", Precise)
    monkeypatch.setattr(guessed, "is_product", lambda schedule: True)


@pytest.mark.parametrize(
    ("exact", "first", "unit"), [(12, 12, 1e-5), (14, 10, 1e-5), (13, 13, 1e-6), (15, 10, 1e-6)]
)
def test_the_default_rounds_nothing_where_that_is_nearly_as_fast(
    exact: int, first: int, unit: float, world: World, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly is a quarter, or no more microseconds than the models are wrong by."""
    use_precise_space(monkeypatch, 10, exact, unit)
    wide = replace(PROBLEM, precision="tf32")
    assert chooser(cache, "none").choose(wide).schedule == schedule(first).to_json()


def test_what_rounds_nothing_is_not_worked_out_where_the_default_does_not_either(
    world: World, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_precise_space(monkeypatch, 10, 11)
    monkeypatch.setattr(guessed, "is_product", lambda schedule: False)
    wide = replace(PROBLEM, precision="tf32")
    assert chooser(cache, "none").choose(wide).schedule == schedule(10).to_json()


def test_where_tf32_is_not_exact_enough_the_default_does_without(
    world: World, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_precise_space(monkeypatch, 0, 4)
    wide = replace(PROBLEM, precision="tf32")
    assert chooser(cache, "none").choose(wide).schedule == schedule(0).to_json()
    choose.forget()
    world.scale[0] = 1.001
    assert chooser(cache, "none").choose(wide).schedule == schedule(4).to_json() and world.built[-1] == 4
    choose.forget()
    world.scale[4] = 1.001
    with pytest.warns(G3DSwapWarning) as said:
        assert chooser(cache, "none").choose(wide).is_native
    assert "is not used (its error 0.001 exceeds" in str(said[0].message)


def test_a_default_does_not_serve_those_who_want_it_measured(world: World, cache: Cache) -> None:
    assert chooser(cache, "none").choose(PROBLEM).source == "default"
    assert chooser(cache, "quick").choose(PROBLEM).source == "tuned"
    assert chooser(cache, "none").choose(PROBLEM).source == "tuned"


def sized(t: int, h: int, w: int) -> Problem:
    return replace(PROBLEM, geometry=replace(GEOMETRY, size=(t, h, w)))


def test_the_nearest_size_serves_after_a_check(world: World, cache: Cache) -> None:
    world.seconds = {-1: 3.0, 5: 1.0}
    chooser(cache).choose(sized(5, 6, 7))
    world.seconds = {-1: 3.0, 6: 1.0}
    chooser(cache).choose(sized(9, 9, 9))
    world.built.clear()
    message = r"the nearest are used, tuned on .* at size 9x9x9, float32, batch 1; run .g3dswap tune"
    with pytest.warns(G3DSwapWarning, match=message) as said:
        choice = again(cache).choose(sized(10, 9, 8))
    assert choice.source == "nearest" and choice.schedule == schedule(6).to_json() and world.built == [6]
    assert choice.seconds == 1.0 and "at batch 1 here, 3.00x" in choice.reason and len(said) == 1
    assert world.raced == [(6, 1)]
    assert outcome(choice) < 1e-6


def test_a_nearest_that_is_slower_here_is_not_used(world: World, cache: Cache) -> None:
    chooser(cache).choose(sized(5, 6, 7))
    world.seconds = {-1: 1.0, 5: 1.0}
    with pytest.warns(G3DSwapWarning):
        choice = again(cache).choose(sized(6, 6, 7), 3)
    assert choice.is_native and world.raced == [(5, 3)]
    assert "; at batch 3 here, the best kernel was 1.00x and 1.05x is wanted" in choice.reason


@pytest.mark.parametrize(("batch", "raced"), [(1, True), (2, False), (4, False), (8, False), (9, True)])
def test_times_of_a_far_batch_are_not_believed(world: World, cache: Cache, batch: int, raced: bool) -> None:
    chooser(cache).choose(PROBLEM, 4)
    faster = again(cache).choose(PROBLEM, batch)
    assert faster.source == "cached" and faster.seconds == 1.0
    assert world.raced == [(5, batch)] * raced
    world.seconds = {-1: 1.0, 5: 2.0}
    slower = again(cache).choose(PROBLEM, batch)
    assert slower.is_native == raced and (not raced or slower.native_seconds == 1.0)


def test_where_memory_is_short_the_stored_times_decide(
    world: World, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser(cache).choose(PROBLEM, 1)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for so many images")

    monkeypatch.setattr(choose, "race", full)
    assert again(cache).choose(PROBLEM, 64).source == "cached"


def test_a_kernel_that_fails_on_a_far_batch_is_not_used(
    world: World, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser(cache).choose(PROBLEM, 1)

    def broken(*_: Any) -> Any:
        raise RuntimeError("too many programs")

    monkeypatch.setattr(choose, "race", broken)
    with pytest.warns(G3DSwapWarning) as said:
        assert again(cache).choose(PROBLEM, 64).is_native
    assert "is not used" in (text := str(said[0].message)) and "too many programs" in text


def test_a_race_is_between_two_kernels_on_the_same_data() -> None:
    ours, theirs = workload.race(workload.build(PROBLEM, serial(nest(PROBLEM)), 60.0), 2)
    assert ours > 0 and theirs > 0


def test_a_schedule_serves_where_something_else_follows_the_sum(world: World, cache: Cache) -> None:
    world.seconds = {-1: 3.0, 5: 1.0}
    chooser(cache).choose(PROBLEM)
    with pytest.warns(G3DSwapWarning, match="the nearest are used, tuned on .* at size 5x6x7"):
        choice = again(cache).choose(replace(PROBLEM, bias=not PROBLEM.bias, activation="silu"))
    assert choice.source == "nearest" and choice.schedule == schedule(5).to_json()
    assert choice.problem.activation == "silu" and outcome(choice) < 1e-6


def test_tuning_begins_with_the_schedule_of_the_same_sum(world: World, cache: Cache) -> None:
    chooser(cache).choose(PROBLEM)
    world.built.clear()
    choice = again(cache, "quick").choose(replace(PROBLEM, activation="relu"))
    assert world.built[0] == 5 and choice.source == "tuned" and choice.schedule == schedule(5).to_json()


def test_a_nearest_that_is_wrong_here_is_passed_over(world: World, cache: Cache) -> None:
    world.seconds = {-1: 3.0, 5: 1.0}
    chooser(cache).choose(sized(5, 6, 7))
    world.seconds = {-1: 3.0, 6: 1.0}
    chooser(cache).choose(sized(9, 9, 9))
    world.scale[6] = 2.0
    with pytest.warns(G3DSwapWarning):
        choice = again(cache).choose(sized(8, 8, 8))
    assert choice.source == "nearest" and choice.schedule == schedule(5).to_json()


def test_a_far_size_is_no_nearest(world: World, cache: Cache) -> None:
    chooser(cache).choose(PROBLEM)
    with pytest.warns(G3DSwapWarning, match="PyTorch's own kernel is used"):
        assert again(cache).choose(sized(20, 24, 28)).is_native


def test_where_pytorch_won_nearby_it_is_chosen(world: World, cache: Cache) -> None:
    world.seconds = {-1: 0.1}
    chooser(cache).choose(PROBLEM)
    with pytest.warns(G3DSwapWarning):
        choice = again(cache).choose(sized(6, 6, 6))
    assert choice.is_native and "at size 5x6x7, float32" in choice.reason


def test_another_geometry_is_no_nearest(world: World, cache: Cache) -> None:
    chooser(cache).choose(PROBLEM)
    other = replace(PROBLEM, geometry=replace(GEOMETRY, dilation=(2, 1, 1)))
    with pytest.warns(G3DSwapWarning, match="PyTorch's own kernel is used"):
        assert again(cache).choose(other).is_native


def grouped(groups: int, *of_a_group: int) -> Problem:
    c_in, c_out = (groups * count for count in of_a_group)
    return replace(PROBLEM, geometry=replace(GEOMETRY, in_channels=c_in, out_channels=c_out, groups=groups))


def test_more_or_fewer_groups_of_the_same_channels_are_similar(world: World, cache: Cache) -> None:
    world.seconds = {-1: 3.0, 6: 1.0}
    chooser(cache).choose(grouped(16, 1, 2))
    world.seconds = {-1: 3.0, 5: 1.0}
    chooser(cache).choose(grouped(4, 1, 2))
    with pytest.warns(G3DSwapWarning, match="at size 5x6x7, 4 groups, float32"):
        choice = again(cache).choose(grouped(6, 1, 2))
    assert choice.source == "nearest" and choice.schedule == schedule(5).to_json()
    assert outcome(choice) < 1e-6


@pytest.mark.parametrize(("groups", "of_a_group"), [(4, (2, 2)), (4, (1, 1)), (4, (2, 4)), (40, (1, 2))])
def test_other_channels_of_a_group_or_far_more_groups_are_not(
    world: World, cache: Cache, groups: int, of_a_group: tuple[int, int]
) -> None:
    chooser(cache).choose(grouped(4, 1, 2))
    with pytest.warns(G3DSwapWarning, match="PyTorch's own kernel is used"):
        assert again(cache).choose(grouped(groups, *of_a_group)).is_native


@pytest.mark.parametrize(
    "fields",
    [
        {"groups": 0},
        {"groups": "8"},
        {"size": 7},
        {"size": [5, 6]},
        {"size": [5, 6, None]},
        {"size": [5, 6, -7]},
    ],
)
def test_keys_that_are_none_of_ours_are_no_nearest(
    world: World, cache: Cache, fields: dict[str, Any]
) -> None:
    chooser(cache).choose(PROBLEM)
    moved(cache, **fields)
    with pytest.warns(G3DSwapWarning, match="PyTorch's own kernel is used"):
        assert again(cache).choose(PROBLEM).is_native


def moved(cache: Cache, **fields: Any) -> None:
    """Let what was tuned be of another device or dtype."""
    for entry in cache.entries():
        cache.put({**entry.key, **fields}, entry.value)
    cache.prune(lambda entry: any(entry.key[name] != value for name, value in fields.items()))


def test_the_same_size_on_a_similar_device_is_nearer_than_another_size(world: World, cache: Cache) -> None:
    world.seconds = {-1: 3.0, 6: 1.0}
    chooser(cache).choose(PROBLEM)
    moved(cache, device_name="A similar one")
    world.seconds = {-1: 3.0, 5: 1.0}
    chooser(cache).choose(sized(5, 6, 8))
    with pytest.warns(G3DSwapWarning, match="tuned on A similar one at size 5x6x7"):
        choice = again(cache).choose(PROBLEM)
    assert choice.source == "nearest" and choice.schedule == schedule(6).to_json()


def test_a_device_of_another_capability_is_not_similar(world: World, cache: Cache) -> None:
    chooser(cache).choose(PROBLEM)
    moved(cache, device_name="Another", capability="of another")
    with pytest.warns(G3DSwapWarning, match="PyTorch's own kernel is used"):
        assert again(cache).choose(PROBLEM).is_native


def test_one_half_type_takes_what_was_tuned_for_the_other(world: World, cache: Cache) -> None:
    chooser(cache).choose(replace(PROBLEM, dtype=torch.bfloat16))
    with pytest.warns(G3DSwapWarning, match="at size 5x6x7, bfloat16"):
        assert again(cache).choose(replace(PROBLEM, dtype=torch.float16)).source == "nearest"
    with pytest.warns(G3DSwapWarning, match="PyTorch's own kernel is used"):
        assert again(cache).choose(PROBLEM).is_native


def test_tuning_starts_from_what_was_tuned_for_similar_problems(world: World, cache: Cache) -> None:
    world.seconds = {-1: 3.0, 6: 1.0}
    chooser(cache).choose(sized(9, 9, 9))
    world.built.clear()
    again(cache, "quick").choose(sized(8, 8, 8))
    assert world.built[0] == 6


def test_shipped_options_come_after_the_users(world: World, tmp_path: Path) -> None:
    shipped, own = Cache(tmp_path / "shipped"), Cache(tmp_path / "own", [tmp_path / "shipped"])
    chooser(shipped).choose(PROBLEM)
    assert again(own).choose(PROBLEM).source == "shipped"
    world.seconds[3] = 0.5
    assert again(own, "full").choose(PROBLEM).source == "tuned"
    found = again(own).choose(PROBLEM)
    assert found.source == "cached" and found.schedule == schedule(3).to_json()


# Ctrl-C.


def test_an_interrupt_keeps_what_was_measured_and_ends_tuning(world: World, cache: Cache) -> None:
    def interrupt(n: int) -> None:
        if n == 6:
            raise KeyboardInterrupt

    world.on_time = interrupt
    one = chooser(cache)
    first = one.choose(PROBLEM)
    assert one.interrupted and first.source == "tuned" and "interrupted" in first.reason
    assert cache.entries()[0].value["interrupted"] is True
    second = one.choose(replace(PROBLEM, direction="grad_input", bias=False))
    assert second.is_native and "interrupted" in second.reason

    world.on_time = lambda n: None
    assert again(cache, "cached").choose(PROBLEM).source == "cached"
    assert again(cache, "quick").choose(PROBLEM).source == "tuned"
    assert cache.entries()[0].value["interrupted"] is False


def test_an_interrupt_before_anything_was_measured(world: World, cache: Cache) -> None:
    def interrupt(n: int) -> None:
        raise KeyboardInterrupt

    world.on_time = interrupt
    one = chooser(cache)
    choice = one.choose(PROBLEM)
    assert one.interrupted and choice.is_native and "interrupted" in choice.reason and cache.entries() == []


# Plans.


def test_a_plan_decides_before_the_cache(world: World, cache: Cache) -> None:
    tuned = chooser(cache).choose(PROBLEM)
    planned = replace(tuned, schedule=schedule(2).to_json(), reason="2.00x")
    text = json.dumps(planned.to_json())
    decided.lookup()["something"] = tuned
    decided.install([Choice.from_json(json.loads(text))])
    assert decided.lookup() == {}
    choice = chooser(cache, "cached").choose(PROBLEM)
    assert choice.schedule == schedule(2).to_json() and choice.reason == "from the plan: 2.00x"
    assert choice.source == "tuned" and outcome(choice) < 1e-6
    assert choose.resolve(PROBLEM, cache=str(cache.directory)) is choice
    assert chooser(cache, "full").choose(PROBLEM) is choice


def test_a_plan_for_pytorch(world: World, cache: Cache) -> None:
    chooser(cache).choose(PROBLEM)
    decided.install([choose.native(PROBLEM, "by hand")])
    assert chooser(cache).choose(PROBLEM).is_native


def test_a_plan_that_fails_is_a_miss(world: World, cache: Cache) -> None:
    tuned = chooser(cache).choose(PROBLEM)
    decided.install([replace(tuned, schedule=schedule(2).to_json())])
    world.scale[2] = 1.5
    with pytest.warns(G3DSwapWarning, match="planned schedule"):
        choice = chooser(cache, "cached").choose(PROBLEM)
    assert choice.source == "cached" and choice.schedule == schedule(5).to_json()


def test_a_choice_read_from_a_file_must_be_installed_to_run(world: World, cache: Cache) -> None:
    tuned = chooser(cache).choose(PROBLEM)
    read = Choice.from_json(tuned.to_json())
    assert read == tuned
    with pytest.raises(ArgumentError, match="install it to run it"):
        read.run(*native.random_operands(PROBLEM, 1))


def test_choices_survive_json_for_every_problem() -> None:
    for problem in (
        PROBLEM,
        Problem("grad_weight", GEOMETRY, torch.bfloat16, "channels_last_3d", "cuda", deterministic=True),
    ):
        choice = replace(choose.native(problem, "because", 1.5), candidate=None)
        assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("source",), "magic"),
        (("source",), "tuned"),
        (("seconds",), "fast"),
        (("schedule",), {"digits": 3}),
        (("problem", "direction"), "sideways"),
        (("problem", "geometry", "groups"), 3),
        (("problem", "geometry", "groups"), "4"),
        (("problem", "dtype"), "int8"),
        (("problem", "device"), "tpu"),
        (("problem", "bias"), 1),
        (("problem",), None),
    ],
)
def test_a_malformed_choice_is_a_plan_error(path: tuple[str, ...], value: Any) -> None:
    data = json.loads(json.dumps(choose.native(PROBLEM, "because").to_json()))
    place = data
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(PlanError, match="tune again"):
        Choice.from_json(data)


# Arguments, small things.


def test_bad_arguments(cache: Cache) -> None:
    with pytest.raises(ArgumentError, match="tune='fast' is unknown; use one of none, cached, quick, full"):
        Chooser(cache, "fast")
    with pytest.raises(ArgumentError, match="min_speedup=-1 must be a number of at least 0"):
        Chooser(cache, min_speedup=-1)
    with pytest.raises(ArgumentError, match="min_speedup=nan"):
        Chooser(cache, min_speedup=float("nan"))


def test_resolve_uses_the_default_cache(world: World, fresh_cache: Path) -> None:
    chooser(stored.open_cache()).choose(PROBLEM)
    assert choose.resolve(PROBLEM).source == "tuned"
    choose.forget()
    assert choose.resolve(PROBLEM).source == "cached"
    assert [path.parent for path in stored.open_cache().files()] == [fresh_cache]


def test_large_problems_are_tuned_at_a_smaller_batch() -> None:
    assert workload.tuning_batch(PROBLEM, 16) == 16
    large = sized(128, 128, 128)
    assert 1 <= workload.tuning_batch(large, 64) < 64
    assert workload.tuning_batch(sized(1024, 1024, 1024), 8) == 1


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
def test_a_sample_is_the_whole_result_cut_to_size(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    geometry = Geometry(12, 24, 6, (4, 5, 6), (2, 3, 1), (1, 2, 1), (1, 0, 1))
    problem = Problem(direction, geometry, torch.float64, bias=direction == "forward")
    operands = native.random_operands(problem, 5)
    whole = native.reference(problem, *operands)
    monkeypatch.setitem(workload.REFERENCE_FLOPS, "cpu", problem.flops(1) / 6 * 9)
    some = workload.Sample(problem, operands)
    assert some.groups == [5] if direction == "grad_weight" else some.groups[-1] == 5
    assert some.images[-1] == 4 and len(some.images) == (5 if direction == "grad_weight" else 1)
    assert some.reference.shape == some.of(whole).shape and some.reference.numel() < whole.numel()
    assert native.error(some.of(whole), some.reference) < 1e-14
    monkeypatch.setitem(workload.REFERENCE_FLOPS, "cpu", 1e12)
    assert torch.equal(workload.Sample(problem, operands).reference, whole)


def test_operands_of_any_size_are_random_and_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "PERIOD", 101)
    problem = Problem("grad_weight", GEOMETRY, layout="channels_last_3d")
    grad, image, weight = native.random_operands(problem, 2, 0)
    assert grad is not None and image is not None and weight is not None
    assert (grad.shape, image.shape, weight.shape) == ((2, 8, 5, 6, 7), (2, 4, 5, 6, 7), (8, 1, 3, 3, 3))
    flat = image.contiguous().view(-1)
    assert torch.equal(flat[:101], flat[101:202]) and flat[:101].unique().numel() == 101
    assert image.is_contiguous(memory_format=torch.channels_last_3d)
    assert not torch.equal(grad.contiguous().view(-1)[:101], flat[:101])


def test_a_long_first_run_of_pytorch_is_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    work = PassWorkload(PROBLEM, 1)
    monkeypatch.setattr(workload, "LONG", 0.0)
    once = work.time(work.baseline, 0.01)
    assert once.repeats == 1 and work.time(work.baseline, 0.01) == once
    monkeypatch.setattr(workload, "LONG", 1e9)
    assert work.time(work.baseline, 0.01).repeats > 1


def test_spread_keeps_the_ends() -> None:
    assert workload.spread(10, 4) == [0, 3, 6, 9]
    assert workload.spread(3, 9) == [0, 1, 2]
    assert workload.spread(10, 0) == workload.spread(10, 1) == [9]


def test_a_record_survives_json() -> None:
    record = Record(2, "full", False, schedule(1).to_json(), 1.0, 2.0, 1e-7, 2e-7, 3.5, {"ok": 1}, [])
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record and record.speedup == 2.0


def test_progress_shows_pass_trials_times_and_ends(
    world: World, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = Chooser(cache, "quick", config=CONFIG)
    loud.expect(2)
    loud.choose(PROBLEM, 1, "layer1.conv2")
    loud.choose(replace(PROBLEM, direction="grad_input", bias=False), 1, "layer1.conv2")
    said = capsys.readouterr().err
    assert "tuning 1/2 layer1.conv2 forward" in said and "tuning 2/2 layer1.conv2 grad_input" in said
    assert "8 trials, best 1000 ms, PyTorch 3000 ms (3.0x)" in said
    chooser(cache).choose(sized(6, 6, 6))
    assert capsys.readouterr().err == ""


# With the compiler.


@pytest.mark.parametrize(
    ("direction", "dtype", "layout"),
    [
        ("forward", torch.float32, "contiguous"),
        ("grad_input", torch.bfloat16, "channels_last_3d"),
        ("grad_weight", torch.float16, "contiguous"),
        ("grad_weight", torch.float64, "channels_last_3d"),
    ],
)
def test_compiled_kernels_are_tuned_checked_stored_and_run(
    fresh_cache: Path, direction: str, dtype: torch.dtype, layout: str
) -> None:
    problem = Problem(direction, GEOMETRY, dtype, layout, bias=direction == "forward")
    config = replace(CONFIG, trials=3, generations=1, build_timeout=60, workers=2, prune=1e9)
    one = Chooser(stored.open_cache(), min_speedup=0, progress=False, config=config)
    tuned = one.choose(problem, 2)
    assert tuned.source == "tuned" and one.counts["ok"] >= 1
    assert not {"compile-error", "run-error"} & one.counts.keys()
    assert tuned.bound and outcome(tuned) <= 2 * tuned.bound
    choose.forget()
    found = Chooser(stored.open_cache(), "cached", min_speedup=0, progress=False).choose(problem, 2)
    assert found == replace(tuned, source="cached", reason=found.reason)
    operands = native.random_operands(problem, 3, seed=2)
    assert torch.equal(found.run(*operands), tuned.run(*operands))


def test_the_default_schedule_compiles_and_runs(fresh_cache: Path) -> None:
    choice = Chooser(stored.open_cache(), "none", progress=False).choose(PROBLEM)
    assert choice.source == "default" and outcome(choice) < 1e-6


def test_no_compiler_on_the_path(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(G3DSwapWarning, match="no C\\+\\+ compiler 'no-such-compiler'.*CXX"):
        choice = Chooser(stored.open_cache(), progress=False, config=CONFIG).choose(PROBLEM)
    assert choice.is_native and outcome(choice) < 1e-6


# Several processes (tests/test_ranks.py has the agreement itself).


def test_another_rank_decides(world: World, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    told = chooser(cache).choose(PROBLEM)
    choose.forget()
    world.timed.clear()
    answer = json.loads(json.dumps({"choice": told.to_json(), "effort": 1}))
    monkeypatch.setattr(ranks, "active", lambda: True)
    monkeypatch.setattr(ranks, "agree", lambda topic, decide, patience: (answer, False))
    choice = chooser(Cache(cache.directory / "empty")).choose(PROBLEM)
    assert choice == told and outcome(choice) < 1e-6 and world.timed == []


def test_a_rank_that_is_told_nothing_decides_alone(
    world: World, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "active", lambda: True)
    monkeypatch.setattr(ranks, "agree", lambda topic, decide, patience: (None, False))
    assert chooser(cache).choose(PROBLEM).source == "tuned"


def test_the_deciding_rank_publishes_json(
    world: World, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[dict[str, Any]] = []

    def agree(topic: Any, decide: Callable[[], dict[str, Any]], patience: float) -> tuple[Any, bool]:
        published.append(json.loads(json.dumps(decide())))
        return published[-1], True

    monkeypatch.setattr(ranks, "active", lambda: True)
    monkeypatch.setattr(ranks, "agree", agree)
    choice = chooser(cache).choose(PROBLEM)
    assert choice.candidate and Choice.from_json(published[0]["choice"]) == choice
