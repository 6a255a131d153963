"""One pass of a convolution as the tuner sees it: random operands, kernels that run on them, checks, times.

A check compares a kernel with float64 on random data.  Float64 convolutions are slow, so of a large
problem only some groups (and, where images are independent, some images) are computed in float64; the
whole result is compared with PyTorch's own kernel beside that, and must leave no element unwritten.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import comprehensions, native
from .errors import NoCompilerError
from .problem import Problem
from .tc import kernel, timing
from .tc.builds import Builds, cores
from .tc.kernel import Kernel
from .tc.schedule import Schedule
from .tc.space import Space
from .tc.timing import Timing
from .tc.trial import Check, brief

Operands = Sequence[Tensor | None]

# What may be spent on one float64 reference, in floating-point operations: 0.2 s on two cores.
REFERENCE_FLOPS = {"cpu": 5e7, "cuda": 1e10}
QUICK_PART = 0.2  # of that, for a check of a kernel that was checked thoroughly when it was tuned
# What one run on tuning data may cost.  A larger batch is tuned at the batch that stays below.
TUNING_FLOPS = {"cpu": 2e9, "cuda": 1e13}
TUNING_BYTES = {"cpu": 1 << 29, "cuda": 1 << 33}
# PyTorch's kernel is run once for its result anyway; a run this long (seconds) is its time as well.
LONG = 0.5
RACE_SECONDS = 0.02
# A kernel that was within its bound when it was tuned is only looked at again for damage: within twice
# that bound, and never above this for its dtype (in fp32, of TF32 and of IEEE arithmetic).
CEILINGS = {torch.float64: 1e-11, torch.bfloat16: 3e-2, torch.float16: 5e-3}
FP32_CEILINGS = {"ieee": 1e-4, "tf32": 5e-3}


class Candidate:
    """A pass that can be run: by one of our kernels, or by PyTorch's own (`kernel` is None).

    shape, batched, format: of the result; whether it begins with the batch, for which `shape` has 0.
    reads: takes what the kernel reads out of the operands of `native.run`.
    """

    def __init__(self, problem: Problem, kernel: Kernel | None = None) -> None:
        self.problem, self.kernel = problem, kernel
        self.format = problem.memory_format
        self.shape = result_shape(problem, 0)  # worked out once, for calls must be cheap
        self.batched = problem.direction != "grad_weight"
        # grad_input does not read its input, grad_weight does not read its weight, a bias may be None.
        reads = (0, 2) if problem.direction == "grad_input" else (0, 1)
        self.reads = operator.itemgetter(*reads, *[reads[-1] + 1] * problem.bias)

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        """The pass on operands in the order of `native.run`; its result is newly allocated."""
        if self.kernel is None:
            return native.run(self.problem, *tensors)
        first = tensors[0]
        assert first is not None
        shape = (first.shape[0], *self.shape[1:]) if self.batched else self.shape
        out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=self.format)
        self.kernel(*self.reads(tensors), out=out)
        return out

    def into(self, out: Tensor, tensors: Operands) -> None:
        """Compute with our kernel into `out`, which has the result's shape and the problem's layout."""
        assert self.kernel is not None
        self.kernel(*self.reads(tensors), out=out)


def result_shape(problem: Problem, batch: int) -> tuple[int, ...]:
    """The shape of what a pass returns."""
    geometry = problem.geometry
    if problem.direction == "forward":
        return geometry.output_shape(batch)
    return geometry.input_shape(batch) if problem.direction == "grad_input" else geometry.weight_shape()


def build(problem: Problem, schedule: Schedule, timeout: float) -> Candidate:
    """Compile a schedule for the problem; errors are those of `tc.kernel.build`."""
    nest = comprehensions.nest(problem)
    return Candidate(problem, kernel.build(nest, schedule, kernel.target_of(problem.device), timeout))


def prepare(found: Sequence[tuple[Problem, Schedule]], timeout: float) -> None:
    """Compile schedules for problems side by side; the `build` of each then meets what fails here."""

    def compile_one(item: tuple[Problem, Schedule], seconds: float) -> None:
        problem, schedule = item
        kernel.prepare(comprehensions.nest(problem), schedule, kernel.target_of(problem.device), seconds)

    for _ in Builds(compile_one, lambda begun: timeout, cores(), []).begin(found):
        pass


def tuning_batch(problem: Problem, batch: int) -> int:
    """The batch at which a problem is tuned: the given one, or the largest that one run can afford."""
    flops, size = TUNING_FLOPS[problem.device], TUNING_BYTES[problem.device]
    affordable = min(flops / problem.flops(1), size / problem.bytes(1))
    return max(1, min(batch, int(affordable)))


class PassWorkload:
    """A `tc.tuner.Workload`: tunes one problem at one batch size, with data of its own."""

    def __init__(self, problem: Problem, batch: int, seed: int = 0) -> None:
        self.problem = problem
        target, threads = kernel.target_of(problem.device), torch.get_num_threads()
        self.space = Space(comprehensions.nest(problem), target, threads, batch)
        self.baseline = Candidate(problem)
        self.operands = native.random_operands(problem, batch, seed)
        self._sample_time = timing.sampler(problem.device)
        began = time.perf_counter()
        with torch.no_grad(), native.switches(problem):
            self._native = native.run(problem, *self.operands)
        self._first_seconds = time.perf_counter() - began
        self._sample = Sample(problem, self.operands)
        own = native.error(self._sample.of(self._native), self._sample.reference)
        self.bound = max(2 * own, native.FLOORS[problem.dtype])
        self.native_error = own

    def build(self, schedule: Schedule, timeout: float) -> Candidate:
        return build(self.problem, schedule, timeout)

    def check(self, candidate: Candidate) -> Check:
        out = unwritten(self.problem, self.operands)
        candidate.into(out, self.operands)
        error = native.error(self._sample.of(out), self._sample.reference)
        # Both are within their errors of the exact result, so they cannot be further apart than this.
        if not distance(out, self._native) <= 2 * self.bound:
            error = float("inf")
        return Check(error, self.bound)

    def time(self, candidate: Candidate, seconds: float, above: float | None = None) -> Timing:
        if candidate is self.baseline and self.problem.device == "cpu" and self._first_seconds > LONG:
            return Timing(self._first_seconds, 0.0, 1)
        with torch.no_grad(), native.switches(self.problem):
            return timing.measure(lambda: candidate(*self.operands), self._sample_time, seconds, above=above)


def quick_check(candidate: Candidate, bound: float | None = None, seed: int = 1) -> Check:
    """Check a kernel without measuring anything: before a stored or unmeasured schedule is used.

    `bound` is the one that it met when it was tuned; without it, twice the error of PyTorch's kernel
    on the same data.
    """
    problem = candidate.problem
    batch = 2 if problem.flops(2) <= QUICK_PART * REFERENCE_FLOPS[problem.device] else 1
    operands = native.random_operands(problem, batch, seed)
    sample = Sample(problem, operands, QUICK_PART)
    if bound is None:
        with torch.no_grad(), native.switches(problem):
            theirs = native.unsearched(partial(native.run, problem, *operands))
        own = native.error(sample.of(theirs), sample.reference)
        bound = max(2 * own, native.FLOORS[problem.dtype])
    else:
        ceiling = CEILINGS.get(problem.dtype, FP32_CEILINGS[problem.precision])
        bound = min(max(2 * bound, native.FLOORS[problem.dtype]), ceiling)
    out = unwritten(problem, operands)
    candidate.into(out, operands)
    written = bool(torch.isfinite(out).all())
    return Check(native.error(sample.of(out), sample.reference) if written else float("inf"), bound)


def attempt(
    problem: Problem, schedule: Mapping[str, Any], bound: float | None, timeout: float
) -> tuple[Candidate | None, str]:
    """A kernel from the JSON of its schedule, built and checked here; or None, and what was wrong.

    NoCompilerError: none can be built.
    """
    try:
        candidate = build(problem, Schedule.from_json(schedule), timeout)
        check = quick_check(candidate, bound)
    except NoCompilerError:
        raise
    except Exception as error:
        return None, brief(error)
    if check.passed:
        return candidate, ""
    return None, f"its error {check.error:.3g} exceeds {check.bound:.3g}"


def race(candidate: Candidate, batch: int) -> tuple[float, float]:
    """Seconds of a kernel and of PyTorch's at a batch size, cold, measured for `RACE_SECONDS` each."""
    problem = candidate.problem
    operands, sample = native.random_operands(problem, batch, 0), timing.sampler(problem.device)
    with torch.no_grad(), native.switches(problem):
        theirs, ours = (
            timing.measure(partial(it, *operands), sample, RACE_SECONDS).seconds
            for it in (Candidate(problem), candidate)
        )
    return ours, theirs


def unwritten(problem: Problem, operands: Operands) -> Tensor:
    """A result filled with NaN, so that an element that a kernel forgets shows."""
    first = operands[0]
    assert first is not None
    out = torch.empty(
        result_shape(problem, first.shape[0]),
        dtype=problem.dtype,
        device=first.device,
        memory_format=problem.memory_format,
    )
    return out.fill_(float("nan"))


def distance(out: Tensor, other: Tensor) -> float:
    """||out - other|| / ||other||, summed in float64 but without float64 copies; NaN if there is one."""
    wide = torch.promote_types(out.dtype, torch.float32)
    difference = out.to(wide) - other.to(wide)
    norm = torch.linalg.vector_norm(other, dtype=torch.float64)
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64) / norm.clamp_min(1e-300))


class Sample:
    """Some groups and images of a problem, and the float64 result for them.

    All of them if that is affordable, and the last group and image in any case.
    """

    def __init__(self, problem: Problem, operands: Operands, share: float = 1.0) -> None:
        first = operands[0]
        assert first is not None
        self.problem = problem
        geometry, batch = problem.geometry, first.shape[0]
        pair = problem.flops(1) / geometry.groups  # one group of one image
        afford = share * REFERENCE_FLOPS[problem.device] / pair
        self.images = list(range(batch))
        if problem.direction != "grad_weight":  # which sums over the images
            self.images = spread(batch, int(afford / geometry.groups))
        self.groups = spread(geometry.groups, int(afford / len(self.images)))
        count = len(self.groups)
        part = replace(
            problem,
            geometry=replace(
                geometry,
                groups=count,
                in_channels=geometry.in_channels // geometry.groups * count,
                out_channels=geometry.out_channels // geometry.groups * count,
            ),
        )
        # Images come first among the operands; weights and biases are cut along their first dimension.
        images = 1 if problem.direction == "forward" else 2
        cut = [self._channels(x[self.images], 1) for x in operands[:images] if x is not None]
        rest = [None if x is None else self._channels(x, 0) for x in operands[images:]]
        self.reference = native.reference(part, *cut, *rest)

    def _channels(self, x: Tensor, dim: int) -> Tensor:
        width = x.shape[dim] // self.problem.geometry.groups
        chosen = [group * width + i for group in self.groups for i in range(width)]
        return x.index_select(dim, torch.tensor(chosen, device=x.device))

    def of(self, out: Tensor) -> Tensor:
        """The part of a whole result that `reference` is for."""
        if self.problem.direction == "grad_weight":
            return self._channels(out, 0)
        return self._channels(out[self.images], 1)


def spread(count: int, most: int) -> list[int]:
    """At most `most` (at least one) numbers below `count`, evenly spread; the last is among them."""
    if most >= count:
        return list(range(count))
    if most <= 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
