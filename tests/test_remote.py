"""Trials in a process of their own: the same results as in this one, and kernels that crash or hang.

The kernels here are for the CPU.  A kernel that misbehaves is an object that was compiled from something
else and put, sealed, where that of a schedule belongs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from g3dswap import choose, native, remote, trials
from g3dswap import workload as passes
from g3dswap.choose import Chooser
from g3dswap.errors import CompileError, G3DSwapWarning, ProcessError, ScheduleError
from g3dswap.problem import Geometry, Problem
from g3dswap.remote import RemoteWorkload
from g3dswap.tc import children, objects, runtime_cpp
from g3dswap.tc.cache import Cache
from g3dswap.tc.schedule import Schedule, apply
from g3dswap.tc.trial import TunerConfig
from g3dswap.tc.tuner import tune
from g3dswap.workload import PassWorkload

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

PROBLEM = Problem("forward", Geometry(4, 8, 4, (3, 6, 7), (3, 3, 3), padding=(1, 1, 1)), bias=True)
CONFIG = TunerConfig(
    trials=6,
    generations=1,
    population=6,
    elites=2,
    mutation_rate=0.5,
    seconds=120,
    build_timeout=60,
    workers=2,
    prune=1e9,  # how fast anything is does not matter here
)
CRASH = "*(volatile int*)8 = 1;"
HANG = "for (volatile int i = 0;; ++i) {}"
NOTHING = "return 0;"


@pytest.fixture(autouse=True)
def cpu_trials_apart(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    choose.forget()
    monkeypatch.setattr(remote, "runs_apart", lambda problem: True)
    yield
    choose.forget()


@pytest.fixture
def workload() -> Iterator[RemoteWorkload]:
    workload = RemoteWorkload(PROBLEM, 2)
    yield workload
    workload.close()


def spoil(workload: RemoteWorkload, schedule: Schedule, body: str) -> None:
    """Let a schedule's kernel do something else."""
    path = runtime_cpp.path_of(apply(workload.nest, schedule), schedule)
    command = [runtime_cpp.compiler(), "-shared", "-fPIC", "-O0", "-x", "c++", "-", "-o", str(path)]
    program = f'extern "C" int run(void**, void*, long, int) {{ {body} return 0; }}'
    subprocess.run(command, input=program, text=True, check=True)
    objects.seal(path)


def pid() -> int:
    assert remote._process
    return remote._process.pid


def test_what_is_measured_there_is_what_would_be_here(workload: RemoteWorkload) -> None:
    here = PassWorkload(PROBLEM, 2)
    assert here.space.batch == workload.space.batch == 2
    schedule = workload.space.default()
    assert schedule == here.space.default()
    candidate = workload.build(schedule, 60)
    assert workload.check(candidate) == here.check(here.build(schedule, 60))
    for what in (None, candidate):
        timing = workload.time(what, 0.01)
        assert timing.seconds > 0
    assert workload.time(candidate, 30.0, above=0.0).repeats == 3


def test_building_compiles_and_does_not_load(
    workload: RemoteWorkload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_cpp, "_Launcher", lambda *_: pytest.fail("loads a kernel"))
    schedule = workload.build(workload.space.default(), 60)
    (built,) = objects.folder().glob("*.so")
    before = built.stat()
    assert workload.check(schedule).passed
    assert [built] == list(objects.folder().glob("*.so")) and built.stat().st_mtime_ns == before.st_mtime_ns


def test_what_cannot_be_built_is_an_error_here(
    workload: RemoteWorkload, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ScheduleError):
        workload.build(Schedule(()), 60)
    monkeypatch.setattr(runtime_cpp, "FLAGS", ("--no-such-flag",))
    with pytest.raises(CompileError, match="failed with exit code"):
        workload.build(workload.space.default(), 60)


def test_the_process_is_kept_over_problems(workload: RemoteWorkload) -> None:
    workload.time(None, 0.01)
    first = pid()
    workload.close()
    other = RemoteWorkload(replace(PROBLEM, direction="grad_weight", bias=False), 3)
    assert other.check(other.build(other.space.default(), 60)).passed
    assert pid() == first
    other.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (CRASH, ProcessError, "the process that runs trials was killed by SIGSEGV."),
        ("__builtin_trap();", ProcessError, "the process that runs trials was killed by SIG"),
        (HANG, TimeoutError, "the process that runs trials did not answer within 3 s."),
        ("return 1;", RuntimeError, "MemoryError: no memory for the buffers"),
    ],
)
def test_a_kernel_that_fails_is_an_error_and_the_next_one_runs(
    body: str, error: type[Exception], message: str
) -> None:
    workload = RemoteWorkload(PROBLEM, 2, patience=3)
    first, second = list(workload.space.ranked(2, random.Random(0)))[:2]
    bad, good = workload.build(first, 60), workload.build(second, 60)
    spoil(workload, first, body)
    workload.time(None, 0.01)
    for _ in range(2):
        with pytest.raises(error) as caught:
            workload.check(bad)
        assert message in str(caught.value)
    assert workload.check(good).passed
    workload.close()


@pytest.mark.slow
def test_a_search_goes_on_after_kernels_that_crash_hang_or_do_nothing(workload: RemoteWorkload) -> None:
    workload.close()
    patient = RemoteWorkload(PROBLEM, 2, patience=3)
    schedules = [patient.build(s, 60) for s in patient.space.ranked(4, random.Random(0))[:4]]
    for schedule, body in zip(schedules, (CRASH, HANG, NOTHING)):
        spoil(patient, schedule, body)
    result = tune(patient, CONFIG, random.Random(0), seeds=schedules)
    patient.close()
    found = {trial.schedule: trial for trial in result.trials}
    assert [found[s].category for s in schedules[:3]] == ["run-error", "run-error", "wrong-result"]
    assert "killed by SIGSEGV" in found[schedules[0]].detail
    assert "did not answer within" in found[schedules[1]].detail
    assert found[schedules[3]].category in {"ok", "slow-pruned"}
    assert result.counts.get("run-error") == 2


def test_a_process_that_dies_between_trials_is_replaced(workload: RemoteWorkload) -> None:
    workload.time(None, 0.01)
    first = pid()
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert workload.time(None, 0.01).seconds > 0
    assert pid() != first


def test_closing_while_the_problem_is_still_being_opened() -> None:
    RemoteWorkload(PROBLEM, 2).close()
    workload = RemoteWorkload(PROBLEM, 2)
    assert workload.time(None, 0.01).seconds > 0
    workload.close()
    workload.close()


def test_the_user_s_switches_can_be_adopted() -> None:
    before = trials.settings(PROBLEM)
    values = before | {name: not before[name] for name in before if type(before[name]) is bool}
    values["threads"] = before["threads"] + 1
    assert len([name for name in values if values[name] != before[name]]) == 6
    try:
        trials.adopt(values)
        assert trials.settings(PROBLEM) == values
    finally:
        trials.adopt(before)
    assert trials.settings(PROBLEM) == before


def test_the_process_uses_the_cache_folder_of_now(
    workload: RemoteWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload.time(None, 0.01)
    workload.close()
    monkeypatch.setenv("G3DSWAP_CACHE_DIR", str(tmp_path / "other"))
    other = RemoteWorkload(PROBLEM, 2)
    assert other.check(other.build(other.space.default(), 60)).passed
    other.close()
    assert {path.parent for path in tmp_path.rglob("*.so")} == {tmp_path / "other" / "objects"}


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both processes then use the same temporary one."""
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("G3DSWAP_CACHE_DIR", str(blocked))
    workload = RemoteWorkload(PROBLEM, 2)
    assert workload.check(workload.build(workload.space.default(), 60)).passed
    workload.close()
    assert list(objects.folder().glob("*.so"))


# In the chooser.


def chooser(tmp_path: Path) -> Chooser:
    return Chooser(Cache(tmp_path / "options"), progress=False, min_speedup=1e-6, config=CONFIG)


def test_a_winner_is_built_and_checked_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Schedule] = []
    real: Callable[..., object] = passes.quick_check

    def note(candidate: passes.Candidate, *arguments: object) -> object:
        assert candidate.kernel
        checked.append(candidate.kernel.schedule)
        return real(candidate, *arguments)

    monkeypatch.setattr(passes, "quick_check", note)
    choice = chooser(tmp_path).choose(PROBLEM, 2)
    assert choice.source == "tuned" and choice.candidate and choice.candidate.kernel
    assert checked == [choice.candidate.kernel.schedule]
    operands = native.random_operands(PROBLEM, 3)
    assert native.error(choice.run(*operands), native.reference(PROBLEM, *operands)) <= native.bound(
        PROBLEM, *operands
    )
    assert remote._process and remote._process.usable


def test_a_winner_that_fails_here_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CompileError("not on this machine")

    monkeypatch.setattr(passes, "build", refuse)
    with pytest.warns(G3DSwapWarning, match="tuned schedule .* is not used .*not on this machine"):
        choice = chooser(tmp_path).choose(PROBLEM, 2)
    assert choice.is_native and choice.reason.endswith("but its kernel fails here")


def test_a_process_that_cannot_start_leaves_pytorch_s_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.end_all()
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.warns(G3DSwapWarning, match="tuning it failed: ProcessError: the process that runs trials"):
        assert chooser(tmp_path).choose(PROBLEM, 2).is_native


def test_on_a_cpu_no_process_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("G3DSWAP_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(remote, "Child", lambda *_, **__: pytest.fail("starts a process"))
    assert chooser(tmp_path).choose(PROBLEM, 2).source == "tuned"
