"""Compiling what is stored ahead of the choices, side by side."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import g3dswap
from g3dswap import choose, comprehensions, decided, guessed, stored, workload
from g3dswap.choice import Record
from g3dswap.choose import Chooser
from g3dswap.errors import CompileError, G3DSwapWarning, NoCompilerError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import kernel, runtime_cpp
from g3dswap.tc.cache import Cache
from g3dswap.tc.nest import Nest
from g3dswap.tc.schedule import Schedule
from g3dswap.tc.space import Space

pytestmark = pytest.mark.usefixtures("forgotten")

PROBLEMS = [Problem("forward", Geometry(c, c, c, (3, 4, 5), (1, 1, 1))) for c in (2, 3, 4)]
WANTED = [(problem, 1, "") for problem in PROBLEMS]


@pytest.fixture
def cache(fresh_cache: Path) -> Cache:
    """One that has the default schedules of PROBLEMS."""
    for problem in PROBLEMS:
        store(stored.open_cache(), problem)
    return stored.open_cache()


def store(cache: Cache, problem: Problem, **changes: Any) -> None:
    schedule = Space(comprehensions.nest(problem), "cpp", 1).default().to_json()
    record = Record(1, "quick", False, schedule, 1.0, 3.0, 1e-7, 1e-6)
    cache.put(Chooser(cache).key(problem), replace(record, **changes).to_json())


def chooser(cache: Cache, tune: str = "cached") -> Chooser:
    return Chooser(cache, tune, progress=False)


@dataclass
class Compiler:
    """Stands for the one of `kernel.prepare`; it compiles nothing."""

    during: Callable[[], object] = lambda: None
    channels: list[int] = field(default_factory=list)

    def __call__(self, nest: Nest, schedule: Schedule, target: str, timeout: float) -> None:
        assert target == "cpp" and timeout > 0
        self.channels.append(next(axis.extent or 0 for axis in nest.axes if axis.name == "g"))
        self.during()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(kernel, "prepare", made)
    monkeypatch.setattr(workload, "cores", lambda: 3)
    return made


def test_kernels_are_compiled_at_the_same_time(cache: Cache, compiler: Compiler) -> None:
    barrier = threading.Barrier(3)
    compiler.during = lambda: barrier.wait(30)
    chooser(cache).prepare(WANTED)
    assert sorted(compiler.channels) == [2, 3, 4] and not barrier.broken


def test_no_more_than_cores_are_compiled_at_a_time(
    cache: Cache, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "cores", lambda: 1)
    running = threading.Semaphore(1)

    def alone() -> None:
        assert running.acquire(blocking=False)
        time.sleep(0.01)
        running.release()

    compiler.during = alone
    chooser(cache).prepare(WANTED)
    assert compiler.channels == [2, 3, 4]


def test_what_compiles_longest_is_begun_first(
    cache: Cache, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "cores", lambda: 1)
    for problem, lanes, warps in zip(PROBLEMS, (64, 128, 256), (2, 1, 4)):
        digits = ["n rest grid", f"w {lanes} lanes"]
        store(cache, problem, schedule={"digits": digits, "fuse": [], "stage": [], "hints": {"warps": warps}})
    chooser(cache).prepare(WANTED)
    assert compiler.channels == [3, 4, 2]


def test_what_is_decided_is_not_prepared(cache: Cache, compiler: Compiler) -> None:
    one = chooser(cache)
    one.choose(PROBLEMS[0])
    one.prepare(WANTED)
    assert sorted(compiler.channels) == [3, 4]
    one.choose(PROBLEMS[1])
    compiler.channels.clear()
    one.prepare(WANTED)  # one kernel gains nothing
    assert compiler.channels == []


def test_what_is_to_be_tuned_is_not_prepared(cache: Cache, compiler: Compiler) -> None:
    chooser(cache, "full").prepare(WANTED)
    assert compiler.channels == []
    store(cache, PROBLEMS[0], interrupted=True)
    chooser(cache, "quick").prepare(WANTED)
    assert sorted(compiler.channels) == [3, 4]


def test_what_pytorch_runs_is_not_prepared(cache: Cache, compiler: Compiler) -> None:
    store(cache, PROBLEMS[0], native_seconds=1.0)
    store(cache, PROBLEMS[1], schedule=None, seconds=None)
    store(cache, PROBLEMS[2], native_seconds=1.0)
    chooser(cache).prepare(WANTED)
    assert compiler.channels == []


def test_after_an_interrupt_what_is_stored_is_prepared(cache: Cache, compiler: Compiler) -> None:
    one = chooser(cache, "full")
    one.interrupted = True
    one.prepare(WANTED)
    assert sorted(compiler.channels) == [2, 3, 4]


def test_what_serves_by_being_near_is_prepared(cache: Cache, compiler: Compiler) -> None:
    sizes = [replace(problem, geometry=replace(problem.geometry, size=(3, 4, 6))) for problem in PROBLEMS]
    chooser(cache).prepare([(problem, 1, "") for problem in sizes])
    assert sorted(compiler.channels) == [2, 3, 4]
    compiler.channels.clear()
    chooser(cache, "quick").prepare([(problem, 1, "") for problem in sizes])
    assert compiler.channels == []


def test_a_plan_is_prepared(cache: Cache, compiler: Compiler) -> None:
    choices = [replace(chooser(cache).choose(problem), candidate=None) for problem in PROBLEMS]
    choose.forget()
    decided.install(choices)
    chooser(Cache(cache.directory / "empty"), "full").prepare(WANTED)
    assert sorted(compiler.channels) == [2, 3, 4]


@pytest.mark.parametrize("ahead", [False, True])
def test_failures_are_told_once_and_by_the_choice(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    def fail(*_: Any) -> None:
        raise CompileError("internal compiler error")

    monkeypatch.setattr(runtime_cpp, "_compile", fail)
    one = chooser(cache)
    if ahead:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.prepare(WANTED)
    with pytest.warns(G3DSwapWarning) as said:
        choices = [one.choose(problem) for problem in PROBLEMS]
    assert all(choice.is_native for choice in choices)
    messages = [str(warning.message) for warning in said]
    # Of each problem, that its own schedule fails and that those of the other two do; and the advice.
    assert len({*messages}) == len(messages) == 7 and "g3dswap tune" in messages[2]
    assert sum("internal compiler error" in message for message in messages) == 6


def test_without_a_compiler_it_is_said_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise NoCompilerError("no c++")

    monkeypatch.setattr(runtime_cpp, "compiler", fail)
    one = chooser(cache)
    one.prepare(WANTED)
    with pytest.warns(G3DSwapWarning, match="PyTorch's own kernels run") as said:
        assert {one.choose(problem).reason for problem in PROBLEMS} == {"no compiler"}
    assert len(said) == 1


def test_an_interrupt_ends_it_and_leaves_all_to_be_chosen(
    cache: Cache, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "cores", lambda: 1)
    over = threading.Event()
    compiler.during = lambda: over.wait(30)
    one = chooser(cache)
    main = threading.main_thread().ident
    assert main
    timer = threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT])
    # Where the tests run in the background, they inherit that interrupts are ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            one.prepare(WANTED)
        assert time.monotonic() - began < 10
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
    assert {one.choose(problem).source for problem in PROBLEMS} == {"cached"}
    assert compiler.channels == [2]  # nothing more was begun


def test_a_conversion_compiles_ahead_and_only_loads_then(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []
    compile_one, prepare = runtime_cpp._compile, workload.prepare

    def note(command: Any, source: str, *rest: Any) -> None:
        began.append(source)
        compile_one(command, source, *rest)

    def end(*arguments: Any) -> None:
        prepare(*arguments)
        began.append("prepared")

    monkeypatch.setattr(runtime_cpp, "_compile", note)
    monkeypatch.setattr(choose, "prepare", end)
    model = nn.Sequential(*(nn.Conv3d(c, c, 1, groups=c, bias=False) for c in (2, 2)))
    other = nn.Conv3d(4, 4, 1, groups=4, bias=False)
    x = torch.randn(1, 2, 3, 4, 5)
    with torch.no_grad():
        net = nn.Sequential(*model, nn.Conv3d(2, 4, 1), other)
        fast = g3dswap.convert(net, x, tune="cached", progress=False)
    assert [item.calls[0].passes[0].source for item in g3dswap.report(fast).swapped] == ["cached"] * 3
    assert began[-1] == "prepared" and len(began) == 4  # two kernels and the program that runs them once


def test_guesses_of_the_model_are_prepared_where_nothing_is_to_be_tuned(
    cache: Cache, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.prune(lambda entry: True)
    made = []

    class Counted(Space):
        def default(self) -> Any:
            made.append(self.nest)
            return super().default()

    monkeypatch.setattr(guessed, "Space", Counted)
    one = chooser(cache, "none")
    one.prepare(WANTED)
    assert sorted(compiler.channels) == [2, 3, 4] and len(made) == 3
    assert one.choose(PROBLEMS[0]).source == "default" and len(made) == 3  # not worked out again
