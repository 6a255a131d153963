"""The source text of a scheduled nest on a target."""

from __future__ import annotations

from .nest import Nest
from .print_cpp import print_cpp
from .print_cuda import is_cuda, print_cuda
from .print_triton import print_triton
from .schedule import Schedule


def source(nest: Nest, schedule: Schedule, target: str) -> str:
    """ScheduleError: the schedule, which the nest has, has no meaning for the target."""
    if target == "cpp":
        return print_cpp(nest)
    if is_cuda(schedule):
        stages, teams = schedule.hint("stages", 1), schedule.hint("teams", 1)
        return print_cuda(nest, schedule.hint("warps", 4), stages, teams, bool(schedule.hint("whole", 0)))
    return print_triton(nest, schedule.hint("ahead", 0), bool(schedule.hint("across", 0)))
