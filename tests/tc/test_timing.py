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


def test_summary_is_lower_quartile_and_range() -> None:
    assert timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Timing(2.0, 1.0, 5)
    assert timing.summarize([2.0]) == timing.Timing(2.0, 0.0, 1)
    assert timing.summarize([2.0, 1.0]) == timing.Timing(1.0, 0.0, 2)


def test_disturbed_runs_do_not_change_the_time() -> None:
    assert timing.summarize([1.0, 80.0, 1.0, 90.0, 100.0]).seconds == 1.0


def test_warm_up_is_not_counted() -> None:
    runs: list[int] = []
    got = timing.measure(lambda: runs.append(1), scripted([0.01, 0.2, 0.2, 0.2]), 1.0, max_repeats=3)
    assert got == timing.Timing(0.2, 0.0, 3) and len(runs) == 4


def test_a_long_call_is_run_until_patience_ends() -> None:
    runs: list[int] = []
    got = timing.measure(lambda: runs.append(1), scripted([9.0, 1.0]), 1.0)
    assert got == timing.Timing(9.0, 0.0, 1) and len(runs) == 1
    got = timing.measure(lambda: None, scripted([2.0, 1.9, 1.8, 1.0]), 1.0)
    assert got.seconds == pytest.approx(1.85) and got.repeats == 3


def test_gives_up_on_a_slow_call_after_three_runs() -> None:
    runs: list[int] = []
    got = timing.measure(lambda: runs.append(1), scripted([0.5, 0.4, 0.6, 0.1]), 1.0, above=0.3)
    assert got == timing.Timing(0.4, 0.0, 3) and len(runs) == 3


def test_slow_first_runs_do_not_condemn_a_fast_call() -> None:
    got = timing.measure(lambda: None, scripted([0.5, 0.4, 0.1, 0.1]), 1.0, above=0.3, max_repeats=3)
    assert got.seconds == 0.1 and got.repeats == 3


def test_stops_at_the_budget_but_not_before_the_minimum() -> None:
    got = timing.measure(lambda: None, scripted([0.0] + [0.1] * 60), 0.1, min_repeats=4)
    assert got.repeats == 4
    got = timing.measure(lambda: None, scripted([0.0] + [0.125] * 60), 1.0, min_repeats=4)
    assert got.repeats == 8
    got = timing.measure(lambda: None, scripted([0.0] + [0.1] * 60), 1e9, max_repeats=7)
    assert got.repeats == 7


def test_cpu_sampler_runs_the_call_once_and_returns_its_time() -> None:
    order: list[int] = []
    seconds = timing.sampler("cpu")(lambda: order.append(1))
    assert order == [1] and 0 < seconds < 60


class Device:
    """A GPU and the host that launches its work, each with a clock of its own, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.free = 0.0
        self.launching = 1e-5
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(timing.torch.cuda, "Event", lambda enable_timing: Event(self))

    def launch(self, seconds: float) -> None:
        self.host += self.launching
        self.free = max(self.free, self.host) + seconds


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = max(self.device.host, self.device.free)

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, after: Event) -> float:
        return (after.at - self.at) * 1e3


def test_what_a_busy_host_takes_to_launch_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    runs: list[float] = []
    sample = timing._ColdRuns(lambda: device.launch(7e-5))

    def call(host: float) -> Callable[[], None]:
        def run() -> None:
            runs.append(host)
            device.host += host
            device.launch(2e-5)

        return run

    assert sample(call(0.0)) == pytest.approx(2e-5) and sample.flushes == 1 and len(runs) == 1
    assert sample(call(2e-4)) == pytest.approx(2e-5) and sample.flushes == 4 and len(runs) == 4
    assert sample(call(2e-4)) == pytest.approx(2e-5) and len(runs) == 5
    for _ in range(4):
        assert sample(call(0.0)) == pytest.approx(2e-5)
    assert sample.flushes < 4
    assert sample(call(1.0)) > 0.9 and sample.flushes == timing.MOST_FLUSHES  # nothing hides that


@pytest.mark.gpu
def test_cuda_sampler_runs_the_call_and_returns_its_time() -> None:
    order: list[int] = []
    seconds = timing.sampler("cuda")(lambda: order.append(1))
    assert 1 <= len(order) <= 4 and 0 < seconds < 60


@pytest.mark.parametrize(("text", "size"), [("2048K\n", 2 << 20), ("4096", 4096), ("big", 2 << 20)])
def test_l2_size_from_the_system(tmp_path: Path, text: str, size: int) -> None:
    (tmp_path / "size").write_text(text)
    assert timing.l2_bytes(tmp_path / "size") == size


def test_l2_size_where_the_system_is_silent(tmp_path: Path) -> None:
    assert timing.l2_bytes(tmp_path / "absent") == 2 << 20
