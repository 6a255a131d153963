"""Choices without tuning or compiling: PyTorch's kernels, said to be g3dswap's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

from g3dswap import choose
from g3dswap.choice import Choice
from g3dswap.problem import Problem
from g3dswap.workload import Candidate

SCHEDULE = {
    "digits": ["n rest grid", "g rest grid", "f rest grid", "t rest serial", "h rest serial", "w rest lanes"],
    "fuse": [],
    "stage": [],
    "hints": {},
}


class Wrong(Candidate):
    """A kernel that computes something else."""

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        return super().__call__(*tensors) * 1.001


class FakeChooser:
    """Stands for ``Chooser``: every pass is three times as fast, but those that ``native`` picks out."""

    def __init__(self) -> None:
        self.native: Callable[[Problem], bool] = lambda problem: False
        self.candidate: type[Candidate] = Candidate
        self.asked: list[tuple[Problem, int, str]] = []
        self.made: dict[str, Any] = {}
        self.expected = 0
        self.prepared: list[tuple[Problem, int, str]] = []

    def __call__(self, cache: Any, tune: str, min_speedup: float, progress: bool) -> FakeChooser:
        """The constructor of the real one."""
        self.made = {"cache": cache, "tune": tune, "min_speedup": min_speedup, "progress": progress}
        self.tune, self.min_speedup, self.cache = tune, min_speedup, cache
        return self

    def key(self, problem: Problem) -> dict[str, Any]:
        """Of no entry of any cache."""
        return problem.key({"compiler": "none"})

    def expect(self, passes: int) -> None:
        self.expected = passes

    def prepare(self, wanted: Iterable[tuple[Problem, int, str]]) -> None:
        """There is nothing to build."""
        self.prepared = list(wanted)

    def share(self, wanted: Iterable[tuple[Problem, int, str]]) -> None:
        """There are no other ranks."""

    def choose(self, problem: Problem, batch: int, label: str = "") -> Choice:
        self.asked.append((problem, batch, label))
        return self.resolve(problem)

    def resolve(self, problem: Problem, batch: int = 1, tune: str = "", cache: str = "") -> Choice:
        if self.native(problem):
            return Choice(problem, "native", "nothing was faster", 3e-3, 3e-3, candidate=Candidate(problem))
        return Choice(problem, "tuned", "3.00x", 1e-3, 3e-3, 1e-7, 4e-7, SCHEDULE, self.candidate(problem))


@contextmanager
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChooser]:
    """Within it, conversions and the layers that they make get their choices from the fake."""
    fake = FakeChooser()
    monkeypatch.setattr(sys.modules["g3dswap.convert"], "Chooser", fake)
    monkeypatch.setattr(choose, "resolve", fake.resolve)
    choose.forget()
    try:
        yield fake
    finally:
        choose.forget()


class Block(nn.Module):
    """A residual block around a grouped convolution."""

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm3d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv2(self.conv1(x))) + x)


class Net(nn.Module):
    """A small residual network with two grouped layers of the same shape and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(Block(8), Block(8))
        self.down = nn.Conv3d(8, 16, 3, stride=2, padding=1, groups=8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.layers(self.stem(x)))
        return self.head(self.drop(x.mean((2, 3, 4))))

    def extra(self) -> str:
        """A method that only this class has."""
        return "still here"
