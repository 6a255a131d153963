"""What the cost model takes for the fastest, without measuring anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .comprehensions import nest
from .problem import Problem
from .tc import kernel
from .tc.product import is_product
from .tc.schedule import Schedule
from .tc.space import Space

WORTH, SAVED = 1.3, 4e-6
"""How many times as fast a product in TF32 is to be, by the models, and how many seconds it is to save, to be
preferred to what rounds nothing: of kernels that hardly take longer than their launch, they cannot tell."""


@dataclass(frozen=True)
class _Guess:
    """A schedule and the model's seconds for it."""

    schedule: Schedule
    seconds: float


class Guesses:
    """The default schedules of problems, each worked out once: that may take seconds."""

    def __init__(self) -> None:
        self._known: dict[tuple[Problem, int], _Guess] = {}

    def of(self, problem: Problem, batch: int) -> Iterator[Schedule]:
        """The best at a batch first.

        Where PyTorch's switch allows TF32, its kernels do without for many layers, and then a product in TF32
        is not exact enough: what is best without it comes second, or first where it is nearly as fast.  It is
        worked out only where the best is such a product.

        NoCompilerError: no kernel can be built. ScheduleError: there is no schedule.
        """
        kernel.require(kernel.target_of(problem.device))
        found = [self._default(problem, batch)]
        if problem.precision == "tf32" and is_product(found[0].schedule):
            found.append(self._default(replace(problem, precision="ieee"), batch))
            if found[1].seconds < max(WORTH * found[0].seconds, found[0].seconds + SAVED):
                found.reverse()
        yield from dict.fromkeys(guess.schedule for guess in found)

    def _default(self, problem: Problem, batch: int) -> _Guess:
        key = problem, batch
        if key not in self._known:
            space = Space(nest(problem), kernel.target_of(problem.device), torch.get_num_threads(), batch)
            schedule = space.default()
            self._known[key] = _Guess(schedule, space.cost(schedule))
        return self._known[key]
