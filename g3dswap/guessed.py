"""What the cost model takes for the fastest, without measuring anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .comprehensions import nest
from .problem import Problem
from .tc import kernel
from .tc.schedule import Schedule
from .tc.space import Space


class Guesses:
    """The default schedules of problems, each worked out once: that may take seconds."""

    def __init__(self) -> None:
        self._known: dict[Problem, Schedule] = {}

    def of(self, problem: Problem) -> Iterator[Schedule]:
        """The best first, each worked out when it is asked for.

        Where PyTorch's switch allows TF32, its kernels do without for many layers, and then a product in TF32
        is not exact enough: what is best without it comes second.

        NoCompilerError: no kernel can be built. ScheduleError: there is no schedule.
        """
        kernel.require(kernel.target_of(problem.device))
        first = self._default(problem)
        yield first
        second = self._default(replace(problem, precision="ieee"))
        if second != first:
            yield second

    def _default(self, problem: Problem) -> Schedule:
        if problem not in self._known:
            space = Space(nest(problem), kernel.target_of(problem.device), torch.get_num_threads())
            self._known[problem] = space.default()
        return self._known[problem]
