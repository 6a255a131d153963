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
        self._known: dict[tuple[Problem, int], Schedule] = {}

    def of(self, problem: Problem, batch: int) -> Iterator[Schedule]:
        """The best at a batch first, each worked out when it is asked for.

        Where PyTorch's switch allows TF32, its kernels do without for many layers, and then a product in TF32
        is not exact enough: what is best without it comes second.

        NoCompilerError: no kernel can be built. ScheduleError: there is no schedule.
        """
        kernel.require(kernel.target_of(problem.device))
        first = self._default(problem, batch)
        yield first
        second = self._default(replace(problem, precision="ieee"), batch)
        if second != first:
            yield second

    def _default(self, problem: Problem, batch: int) -> Schedule:
        key = problem, batch
        if key not in self._known:
            space = Space(nest(problem), kernel.target_of(problem.device), torch.get_num_threads(), batch)
            self._known[key] = space.default()
        return self._known[key]
