"""The source text of a scheduled nest on a target."""

from __future__ import annotations

from .nest import Nest
from .print_cpp import print_cpp
from .print_cuda import is_cuda, print_cuda
from .print_triton import print_triton
from .program_cuda import Settings
from .schedule import Schedule


def source(nest: Nest, schedule: Schedule, target: str) -> str:
    """ScheduleError: the schedule, which the nest has, has no meaning for the target."""
    if target == "cpp":
        return print_cpp(nest)
    if is_cuda(schedule):
        return print_cuda(nest, Settings.of(schedule))
    return print_triton(nest, schedule.hint("ahead", 0), bool(schedule.hint("across", 0)))
