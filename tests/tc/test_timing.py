"""Timing: what is counted and when measuring stops; clocks are scripted, nothing is timed here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from g3dswap.tc import timing


def scripted(values: list[float]) -> Callable[[timing.Call], float]:
    """A sampler that runs the call and returns the next value."""
    rest = iter(values)

    def sample(call: timing.Call) -> float:
        call()
        return next(rest)

    return sample


def test_summary_is_median_and_quartiles() -> None:
    assert timing.summarize([1.0, 2.0, 3.0, 4.0, 8.0, 0.5, 3.0]) == timing.Timing(3.0, 1.0 / 3, 7)
    assert timing.summarize([2.0]) == timing.Timing(2.0, 0.0, 1)
    assert timing.summarize([1.0, 2.0]) == timing.Timing(1.5, 0.0, 2)
    assert timing.summarize([1.0, 1.0, 1.0, 100.0]).seconds == 1.0


def test_warm_up_is_not_counted() -> None:
    runs: list[int] = []
    got = timing.measure(lambda: runs.append(1), scripted([0.9, 0.1, 0.2, 0.3]), 1.0, max_repeats=3)
    assert got.seconds == 0.2 and got.repeats == 3 and len(runs) == 4


def test_one_run_that_uses_up_the_budget_is_enough() -> None:
    runs: list[int] = []
    got = timing.measure(lambda: runs.append(1), scripted([3.0, 1.0]), 1.0)
    assert got == timing.Timing(3.0, 0.0, 1) and len(runs) == 1


def test_gives_up_on_a_slow_call_after_two_runs() -> None:
    runs: list[int] = []
    got = timing.measure(lambda: runs.append(1), scripted([0.5, 0.4, 0.1]), 1.0, above=0.3)
    assert got == timing.Timing(0.4, 0.0, 2) and len(runs) == 2


def test_a_cold_first_run_does_not_condemn_a_fast_call() -> None:
    got = timing.measure(lambda: None, scripted([0.5, 0.1, 0.1, 0.2, 0.3]), 1.0, above=0.3, max_repeats=3)
    assert got.seconds == 0.2 and got.repeats == 3


def test_stops_at_the_budget_but_not_before_the_minimum() -> None:
    got = timing.measure(lambda: None, scripted([0.0] + [0.1] * 60), 1e-9, min_repeats=4)
    assert got.repeats == 4
    got = timing.measure(lambda: None, scripted([0.0] + [0.1] * 60), 1e9, max_repeats=7)
    assert got.repeats == 7


def test_cpu_sampler_runs_the_call_once_and_returns_its_time() -> None:
    order: list[int] = []
    seconds = timing.sampler("cpu")(lambda: order.append(1))
    assert order == [1] and 0 < seconds < 60


@pytest.mark.gpu
def test_cuda_sampler_runs_the_call_once_and_returns_its_time() -> None:
    order: list[int] = []
    seconds = timing.sampler("cuda")(lambda: order.append(1))
    assert order == [1] and 0 < seconds < 60


@pytest.mark.parametrize(("text", "size"), [("2048K\n", 2 << 20), ("4096", 4096), ("big", 2 << 20)])
def test_l2_size_from_the_system(tmp_path: Path, text: str, size: int) -> None:
    (tmp_path / "size").write_text(text)
    assert timing.l2_bytes(tmp_path / "size") == size


def test_l2_size_where_the_system_is_silent(tmp_path: Path) -> None:
    assert timing.l2_bytes(tmp_path / "absent") == 2 << 20
