"""Measures one pass of one layer in one run: the chosen kernels and PyTorch's, in both layouts.

All contenders run in turn, one run each a round, in an order that rotates from round to round, each
run on cold data (`tc.timing`).  Whatever drifts or disturbs the machine then meets all of them alike.
The time of a contender is the median of its runs, or their lower quartile: on a machine that other
processes keep busy, the median is a time of theirs (`tc.timing` says why).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from g3dswap import native
from g3dswap.choice import Choice
from g3dswap.problem import Problem
from g3dswap.tc import timing
from g3dswap.tc.timing import Call, Sampler
from g3dswap.workload import Sample, distance

Key = TypeVar("Key", bound=Hashable)
Run = Callable[[], Tensor]

STATISTICS = ("median", "quartile")
FEWEST, ENOUGH, MOST = 3, 5, 100  # runs of a contender
PATIENCE = 5.0  # times the budget, for getting from FEWEST to ENOUGH
OURS, TORCH = "ours", "torch"

# Bytes of one copied buffer, and the matrix product's extent: far beyond every cache, some ms a run.
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
PRODUCT_EXTENT = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Times:
    """Of the runs of one contender; `seconds` is one of the others, the statistic that counts."""

    seconds: float
    low: float  # quartile
    median: float
    high: float  # quartile
    runs: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        """By the median; of at least two runs."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, median, high, len(samples))

    def by(self, statistic: str) -> Times:
        """The same with another statistic as the one that counts."""
        return replace(self, seconds=self.low if statistic == "quartile" else self.median)

    @property
    def spread(self) -> float:
        """The interquartile range over the time."""
        return (self.high - self.low) / self.seconds


@dataclass(frozen=True)
class Ceilings:
    """What the device can do: bytes copied (read and written) a second, and flops of a matrix product.

    `product` has one figure for each precision of fp32 that PyTorch's switch may ask for.
    """

    bandwidth: float
    product: dict[str, float]

    def roofline(self, problem: Problem, batch: int) -> float:
        """Seconds below which a pass cannot go.

        A depthwise layer is held to IEEE arithmetic even where TF32 is allowed, for PyTorch computes it so.
        """
        exact = problem.precision == "ieee" or problem.geometry.depthwise
        return problem.roofline(batch, self.bandwidth, self.product["ieee" if exact else "tf32"])


@dataclass(frozen=True)
class Check:
    """Relative errors against float64 of our kernel and of PyTorch's, and what ours may be.

    `correct` also says that ours agrees with PyTorch's where no float64 result was computed.
    """

    error: float
    torch_error: float
    bound: float
    correct: bool


@dataclass(frozen=True)
class Measured:
    """What one run found about one pass, by layout."""

    torch: dict[str, Times]
    ours: dict[str, Times]  # PyTorch's own where the choice is its kernel
    checks: dict[str, Check]


def ceilings(device: str, dtype: torch.dtype, seconds: float) -> Ceilings:
    """Measure them, each for about `seconds`; of several runs the fastest counts."""
    sample = timing.sampler(device)
    source = torch.ones(COPY_BYTES[device] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPY_BYTES[device] / _fastest(partial(target.copy_, source), sample, seconds)
    del source, target
    extent = PRODUCT_EXTENT[device]
    a, b = (torch.randn(extent, extent, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = {}
    tf32 = device == "cuda" and dtype == torch.float32
    for precision in ("ieee", "tf32") if tf32 else ("ieee",):
        with _products_in(precision) if tf32 else contextlib.nullcontext():
            took = _fastest(partial(torch.mm, a, b, out=out), sample, seconds)
        product[precision] = 2 * extent**3 / took
    return Ceilings(bandwidth, product)


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _fastest(call: Call, sample: Sampler, seconds: float) -> float:
    sample(call)
    samples = [sample(call) for _ in range(FEWEST)]
    while len(samples) < MOST and sum(samples) < seconds:
        samples.append(sample(call))
    return min(samples)


def measure_pass(
    choices: Mapping[str, Choice], problems: Mapping[str, Problem], batch: int, seconds: float
) -> Measured:
    """Check and time the choices, and PyTorch's kernels in every layout of `problems`.

    Both mappings are by layout; `seconds` is what each contender may take.
    """
    operands = {layout: native.random_operands(problem, batch) for layout, problem in problems.items()}
    calls: dict[tuple[str, str], Run] = {
        (TORCH, layout): partial(native.run, problem, *operands[layout])
        for layout, problem in problems.items()
    }
    for layout, choice in choices.items():
        if not choice.is_native:
            calls[OURS, layout] = partial(choice.run, *operands[layout])
    layout, problem = next(iter(problems.items()))
    with torch.no_grad(), native.switches(problem):
        sample = Sample(problem, operands[layout])  # the values are those of the other layouts too
        checks = {layout: _check(problem, sample, calls, layout) for layout, problem in problems.items()}
        del sample
        times = alternate(calls, timing.sampler(problem.device), seconds)
    return Measured(
        torch={layout: times[TORCH, layout] for layout in problems},
        ours={layout: times.get((OURS, layout), times[TORCH, layout]) for layout in choices},
        checks={layout: checks[layout] for layout in choices},
    )


def _check(problem: Problem, sample: Sample, calls: Mapping[tuple[str, str], Run], layout: str) -> Check:
    """Compare both kernels of a layout with float64; these runs are also the warm-up of the measurement."""
    theirs = calls[TORCH, layout]()
    own = native.error(sample.of(theirs), sample.reference)
    bound = max(2 * own, native.FLOORS[problem.dtype])
    if (OURS, layout) not in calls:
        return Check(own, own, bound, True)
    out = calls[OURS, layout]()
    error = native.error(sample.of(out), sample.reference)
    # Both are within their errors of the exact result, so they cannot be further apart than this.
    correct = error <= bound and distance(out, theirs) <= 2 * bound
    return Check(error, own, bound, correct)


def alternate(calls: Mapping[Key, Call], sample: Sampler, seconds: float) -> dict[Key, Times]:
    """Time warm calls in rounds, until each has run for `seconds`.

    At least FEWEST rounds, ENOUGH of them unless that takes PATIENCE times the budget, MOST at most.
    """
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    names = list(calls)

    def wanted(taken: list[float]) -> bool:
        if len(taken) < ENOUGH:
            return len(taken) < FEWEST or sum(taken) < PATIENCE * seconds
        return len(taken) < MOST and sum(taken) < seconds

    for turn in range(MOST):
        first = turn % len(names)
        running = [name for name in names[first:] + names[:first] if wanted(samples[name])]
        if not running:
            break
        for name in running:
            samples[name].append(sample(calls[name]))
    return {name: Times.of(taken) for name, taken in samples.items()}
