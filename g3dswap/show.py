"""The intermediate forms of one pass: notation, nest, scheduled nest, source text."""

from __future__ import annotations

import json
from typing import Any

import torch

from g3dswap import comprehensions, native
from g3dswap.choice import Record
from g3dswap.choose import Chooser
from g3dswap.errors import ScheduleError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import kernel
from g3dswap.tc.cache import Cache
from g3dswap.tc.schedule import Schedule, apply
from g3dswap.tc.space import Space

UNSCHEDULED = ("notation", "nest")
STAGES = (*UNSCHEDULED, "scheduled", "source")


def problem(
    direction: str, geometry: Geometry, dtype: torch.dtype, layout: str, device: str, bias: bool
) -> Problem:
    """A pass under the switches that PyTorch is set to."""
    return Problem(
        direction,
        geometry,
        dtype,
        layout,
        device,
        bias and direction == "forward",
        native.precision(dtype, device),
        native.deterministic(device),
    )


def parse_schedule(text: str) -> Schedule:
    """A schedule from its JSON. Raises ScheduleError."""
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScheduleError(
            f"{text[:80]!r} is no JSON ({error}); copy a schedule from `g3dswap cache show`."
        ) from None
    return Schedule.from_json(data)


def schedule_for(problem: Problem, target: str, cache: Cache) -> tuple[Schedule, str]:
    """The tuned schedule if the cache has one for this target, else the default; and which of them."""
    if target == kernel.target_of(problem.device):
        entry = cache.get(Chooser(cache, "cached").key(problem))
        stored = Record.from_json(entry.value).schedule if entry else None
        if stored is not None:
            return Schedule.from_json(stored), "tuned"
    return Space(comprehensions.nest(problem), target).default(), "default"


def unscheduled(problem: Problem) -> dict[str, str]:
    """The forms that need no schedule, `UNSCHEDULED`."""
    notation, nest = comprehensions.comprehension(problem), comprehensions.nest(problem)
    return {"notation": str(notation), "nest": str(nest)}


def stages(problem: Problem, schedule: Schedule, target: str) -> dict[str, str]:
    """Every form by its name in `STAGES`. ScheduleError: the schedule does not fit."""
    nest = comprehensions.nest(problem)
    return {
        **unscheduled(problem),
        "scheduled": str(apply(nest, schedule)),
        "source": kernel.show(nest, schedule, target),
    }
