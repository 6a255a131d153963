"""On a CUDA device: trials in a process of their own, with kernels that fault and kernels that hang."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g3dswap import choose, native, remote
from g3dswap.choose import Chooser
from g3dswap.errors import ProcessError
from g3dswap.problem import DIRECTIONS, Geometry, Problem
from g3dswap.remote import RemoteWorkload
from g3dswap.tc import compile_triton, objects, runtime_triton, space
from g3dswap.tc.cache import Cache
from g3dswap.tc.schedule import Schedule, apply
from g3dswap.tc.trial import TunerConfig
from g3dswap.tc.tuner import tune
from g3dswap.workload import PassWorkload
from tests import texts

pytestmark = pytest.mark.gpu

PROBLEM = Problem("forward", Geometry(16, 16, 16, (4, 14, 14), (3, 3, 3), padding=(1, 1, 1)), device="cuda")
HEAD = """
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def kernel(x, weight, out, batch, early: tl.constexpr = False):
"""
FAULT = HEAD + "    tl.store(out + (tl.cast(batch, tl.int64) + (1 << 44)), 0.0)\n"
HANG = HEAD + "    while batch > 0:\n        tl.atomic_add(out, 0.0)\n"
NOTHING = HEAD + "    tl.store(out, 0.0)\n"


@pytest.fixture(autouse=True)
def own_caches(fresh_cache: Path) -> Iterator[None]:
    choose.forget()
    yield
    choose.forget()


@pytest.fixture
def workload(monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteWorkload]:
    monkeypatch.setattr(space, "has_cuda", lambda: False)  # the texts above take the place of Triton's
    workload = RemoteWorkload(PROBLEM, 2, patience=15)
    yield workload
    workload.close()


def spoil(workload: RemoteWorkload, schedule: Schedule, text: str) -> None:
    """Let a schedule's kernel do something else."""
    nest = apply(workload.nest, schedule)
    job = runtime_triton._job(nest, schedule)
    with texts.workers():
        wanted = compile_triton.compiled(texts.of_text(job, text), 60)
    for name, place in compile_triton.compiled(job, 60).items():
        shutil.copyfile(wanted[name], place)
        objects.seal(Path(place))


def test_what_is_measured_there_is_what_would_be_here(workload: RemoteWorkload) -> None:
    here = PassWorkload(PROBLEM, 2)
    candidate = workload.build(workload.space.default(), 60)
    assert workload.check(candidate) == here.check(here.build(candidate, 60))
    assert workload.time(candidate, 0.02).seconds > 0 and workload.time(None, 0.02).seconds > 0


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (FAULT, ProcessError, "had to be ended: .*illegal memory access"),
        (HANG, TimeoutError, "did not answer within"),
    ],
)
def test_a_bad_kernel_costs_its_process_and_nothing_here(
    workload: RemoteWorkload, text: str, error: type[Exception], message: str
) -> None:
    mine = torch.arange(1000.0, device="cuda")
    first, second = workload.space.ranked(2, random.Random(0))[:2]
    bad, good = workload.build(first, 60), workload.build(second, 60)
    spoil(workload, first, text)
    assert workload.check(good).passed
    for call in (workload.check, lambda candidate: workload.time(candidate, 0.02)):
        with pytest.raises(error, match=message):
            call(bad)
        assert workload.check(good).passed
    torch.cuda.synchronize()
    assert float(mine.sum()) == 499500.0


def test_a_search_goes_on_after_bad_kernels(workload: RemoteWorkload) -> None:
    schedules = [workload.build(s, 60) for s in workload.space.ranked(4, random.Random(0))[:4]]
    for schedule, text in zip(schedules, (FAULT, HANG, NOTHING)):
        spoil(workload, schedule, text)
    config = replace(TunerConfig.quick(), seconds=90.0, generations=1, prune=1e9, build_timeout=60.0)
    result = tune(workload, config, random.Random(0), seeds=schedules)
    found = {trial.schedule: trial for trial in result.trials}
    assert [found[s].category for s in schedules] == ["run-error", "run-error", "wrong-result", "ok"]
    assert result.best and result.best.schedule not in schedules[:3]
    torch.cuda.synchronize()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tuning_on_a_gpu(direction: str, tmp_path: Path) -> None:
    """The winner of the other process runs in this one; trials free their memory when they are through."""
    problem = replace(PROBLEM, direction=direction)
    chooser = Chooser(Cache(tmp_path / "options"), progress=False, min_speedup=1e-6)
    choice = chooser.choose(problem, 4)
    assert choice.source == "tuned", choice.reason
    assert chooser.counts["ok"]
    operands = native.random_operands(problem, 3)
    bound = native.bound(problem, *operands)
    assert native.error(choice.run(*operands), native.reference(problem, *operands)) <= bound
    assert remote._process and remote._process.usable


def test_the_current_device_is_the_one_of_the_trials() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(1):
        workload = RemoteWorkload(PROBLEM, 2)
        assert workload.settings["device"] == 1
        assert workload.check(workload.build(workload.space.default(), 60)).passed
        workload.close()
