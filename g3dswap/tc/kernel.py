"""From a nest and a schedule to a checked callable on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from . import runtime_cpp, runtime_triton
from .nest import Nest
from .print_cpp import print_cpp
from .print_triton import print_triton
from .schedule import Schedule, apply

GENERATOR = "1"
"""Raised when the same schedule begins to print another kernel; part of every cache key."""

TARGETS = ("cpp", "triton")

Launch = Callable[[Sequence[torch.Tensor], torch.Tensor, int], None]


def target_of(device: str) -> str:
    """The target that makes kernels for a device type."""
    return "cpp" if device == "cpu" else "triton"


def versions(target: str) -> dict[str, str]:
    """What a tuned schedule depends on beside the device: the generator and the target's compiler."""
    runtime = runtime_cpp if target == "cpp" else runtime_triton
    return {"generator": GENERATOR, "compiler": runtime.version()}


@dataclass(frozen=True)
class Kernel:
    """A compiled nest.

    Calling it computes `out` from the operands, which must lie in memory as the nest says: plain
    tensors whose elements follow the nest's strides, with any batch size.  Results of a reduction that
    is split over the grid are added up here, in a fixed order.
    """

    nest: Nest
    schedule: Schedule
    source: str
    launch: Launch

    def __call__(self, *operands: torch.Tensor, out: torch.Tensor) -> None:
        nest = self.nest
        if len(operands) != len(nest.operands):
            raise ArgumentError(f"{nest.name} takes {len(nest.operands)} operands, not {len(operands)}.")
        batch = self._batch(operands, out)
        if not nest.partial_loops:
            self.launch(operands, out, batch)
            return
        counts = (nest.loops[i].count for i in nest.partial_loops)
        parts = math.prod(batch if count is None else count for count in counts)
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        if parts == 1 and out.dtype == dtype:
            self.launch(operands, out, batch)
            return
        partial = torch.empty((parts, out.numel()), dtype=dtype, device=out.device)
        self.launch(operands, partial, batch)
        # The partial results lie in the nest's order of elements, which is out's order in memory.
        out.as_strided((out.numel(),), (1,)).copy_(partial.sum(0))

    def _batch(self, operands: Sequence[torch.Tensor], out: torch.Tensor) -> int:
        """The run-time extent, from the first tensor that has it."""
        for tensor, value in zip(self.nest.tensors, (*operands, out)):
            if None in tensor.shape:
                known = math.prod(e for e in tensor.shape if e is not None)
                return value.numel() // known
        return 1


def show(nest: Nest, schedule: Schedule, target: str) -> str:
    """The source text of a kernel. ScheduleError: the schedule does not fit the nest or the target."""
    return (print_cpp if target == "cpp" else print_triton)(apply(nest, schedule))


def build(nest: Nest, schedule: Schedule, target: str, timeout: float = 60.0) -> Kernel:
    """Print, compile and load a kernel; a source that was compiled before is only loaded.

    Thread-safe.  Raises ScheduleError (no such kernel), CompileError (the compiler failed or took
    longer than `timeout` seconds) or NoCompilerError.
    """
    if target not in TARGETS:
        raise ArgumentError(f"target {target!r} is unknown; use one of {', '.join(TARGETS)}.")
    scheduled = apply(nest, schedule)
    runtime, printer = (runtime_cpp, print_cpp) if target == "cpp" else (runtime_triton, print_triton)
    source = printer(scheduled)
    return Kernel(scheduled, schedule, source, runtime.load(scheduled, schedule, source, timeout))

