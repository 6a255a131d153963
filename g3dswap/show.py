"""The intermediate forms of one pass: notation, nest, scheduled nest, source text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from g3dswap import comprehensions, native
from g3dswap.choice import Record
from g3dswap.choose import Chooser
from g3dswap.decide import problems
from g3dswap.discover import find, observe
from g3dswap.errors import ArgumentError, ScheduleError
from g3dswap.guard import example
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import kernel
from g3dswap.tc.cache import Cache
from g3dswap.tc.entries import strict_json
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


def layer_problem(model: nn.Module, inputs: Sequence[Tensor], name: str | None, direction: str) -> Problem:
    """A pass of the grouped layer called ``name`` (None: the only one) on the first input that it meets.

    Raises:
        ArgumentError: there is no such layer, the inputs do not reach it, or it does not need the pass.
    """
    sites, _, _ = find(model)
    names = [label for site in sites for label in (site.name, *site.aliases)]
    site = next((site for site in sites if name in (site.name, *site.aliases)), None)
    if name is None and len(sites) == 1:
        site = sites[0]
    if site is None:
        raise ArgumentError(_no_layer(name, names))
    prepared = example(model, tuple(inputs), None)
    assert prepared is not None  # there are inputs
    meetings = observe(model, [site], prepared).meetings[id(site.module)]
    if not meetings:
        raise ArgumentError(f"The inputs do not reach layer {site.name}; give others with --input.")
    found = {problem.direction: problem for problem in problems(site.module, meetings[0])}
    if direction not in found:
        raise ArgumentError(f"Layer {site.name} needs no {direction}; use one of {', '.join(found)}.")
    return found[direction]


def _no_layer(name: str | None, names: Sequence[str]) -> str:
    if not names:
        return "The model has no convolution with groups > 1 that could be swapped; give another --arch."
    if name is None:
        return f"The model has {len(names)} grouped layers; choose one with --layer: {', '.join(names)}."
    close = difflib.get_close_matches(name, names, 3)
    verb = "is" if len(names) == 1 else "are"
    remedy = f"did you mean {' or '.join(close)}?" if close else f"there {verb} {', '.join(names)}."
    return f"The model has no grouped layer {name!r}; {remedy}"


def parse_schedule(text: str) -> Schedule:
    """A schedule from its JSON. Raises ScheduleError."""
    try:
        data: Any = strict_json(text)
    except ValueError as error:
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
