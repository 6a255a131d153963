"""From a nest and a schedule to a checked callable on tensors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ArgumentError
from . import runtime_cpp, runtime_triton, totals
from .launch import Launch
from .nest import Nest
from .schedule import Schedule, apply
from .source import source

GENERATORS = {"cpp": "2", "triton": "3"}
"""Raised when schedules begin to print kernels that may be slower than before; part of every cache key."""

_RUNTIMES: dict[str, Any] = {"cpp": runtime_cpp, "triton": runtime_triton}
TARGETS = tuple(_RUNTIMES)


def target_of(device: str) -> str:
    """The target that makes kernels for a device type."""
    return "cpp" if device == "cpu" else "triton"


def versions(target: str) -> dict[str, str]:
    """What a tuned schedule depends on beside the device: the generator and the target's compiler."""
    return {"generator": GENERATORS[target], "compiler": _RUNTIMES[target].version()}


def require(target: str) -> None:
    """NoCompilerError: kernels for this target cannot be built here, so searching for one is in vain."""
    if target == "cpp":
        runtime_cpp.compiler()
    else:
        runtime_triton.require()


@dataclass(frozen=True)
class Kernel:
    """A compiled nest.

    Calling it computes `out` from the operands, which must lie in memory as the nest says: plain
    tensors whose elements follow the nest's strides, with any batch size.  Results of a reduction that
    is split over the grid are added up, in a fixed order: by the kernel `total` or, without one, by PyTorch.
    """

    nest: Nest
    schedule: Schedule
    target: str
    launch: Launch
    total: Kernel | None = None

    @property
    def source(self) -> str:
        """Its text, which is printed for whoever asks: a kernel that was compiled before has not been."""
        return source(self.nest, self.schedule, self.target)

    def __call__(self, *operands: torch.Tensor, out: torch.Tensor) -> None:
        if len(operands) != self._arity:
            raise ArgumentError(f"{self.nest.name} takes {self._arity} operands, not {len(operands)}.")
        batch = 1
        if self._batch_source is not None:
            place, known = self._batch_source
            batch = (*operands, out)[place].numel() // known
        if self.partial_counts is None:
            self.launch(operands, out, batch)
            return
        parts = self.nest.parts(batch)
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        if parts == 1 and out.dtype == dtype:
            self.launch(operands, out, batch)
            return
        partial = torch.empty((parts, out.numel()), dtype=dtype, device=out.device)
        self.launch(operands, partial, batch)
        if self.total is not None:
            self.total(partial, out=out)
            return
        # The partial results lie in the nest's order of elements, which is out's order in memory.
        out.as_strided((out.numel(),), (1,)).copy_(partial.sum(0))

    # What a call needs to know of the nest, worked out once: a layer's call is worth microseconds.

    @functools.cached_property
    def _arity(self) -> int:
        return len(self.nest.operands)

    @functools.cached_property
    def partial_counts(self) -> tuple[int | None, ...] | None:
        """The counts of what makes partial results (None: the batch or its blocks), None without any."""
        return self.nest.partial_counts or None

    @functools.cached_property
    def _batch_source(self) -> tuple[int, int] | None:
        """The tensor that tells the run-time extent, and how many elements it has for each step of it."""
        for place, tensor in enumerate(self.nest.tensors):
            if None in tensor.shape:
                return place, math.prod(e for e in tensor.shape if e is not None)
        return None


def show(nest: Nest, schedule: Schedule, target: str) -> str:
    """The source text of a kernel, and of the one that sums its partial results.

    ScheduleError: the schedule does not fit the nest or the target.
    """
    return "\n\n".join(source(*stage, target) for stage in _stages(nest, schedule, target))


def build(nest: Nest, schedule: Schedule, target: str, timeout: float = 60.0) -> Kernel:
    """Print, compile and load a kernel; what was compiled before is only loaded.

    Thread-safe.  Raises ScheduleError (no such kernel), CompileError (the compiler failed or took
    longer than `timeout` seconds), ProcessError (a C++ kernel crashed or hung in its first run, which is
    in a process of its own) or NoCompilerError.
    """
    found: Kernel | None = None
    for stage in reversed(_stages(nest, schedule, target)):  # each is given the next
        found = Kernel(*stage, target, _RUNTIMES[target].load(*stage, timeout), found)
    assert found is not None
    return found


def prepare(nest: Nest, schedule: Schedule, target: str, timeout: float = 60.0) -> None:
    """Print and compile a kernel without loading it: a later `build`, in any process, need only load it.

    Errors are those of `build`.
    """
    for stage in _stages(nest, schedule, target):
        _RUNTIMES[target].prepare(*stage, timeout)


def _stages(nest: Nest, schedule: Schedule, target: str) -> tuple[tuple[Nest, Schedule], ...]:
    """The scheduled nests of a schedule's kernels with their schedules, in the order of launches."""
    if target not in TARGETS:
        raise ArgumentError(f"target {target!r} is unknown; use one of {', '.join(TARGETS)}.")
    scheduled = apply(nest, schedule)
    second = None if target == "cpp" else totals.total(scheduled)
    if second is None:
        return ((scheduled, schedule),)
    return (scheduled, schedule), (apply(*second), second[1])
