"""What the tests of several spaces share: all that is proposed, walks by mutation, judging a model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from g3dswap.choice import problem_from_json
from g3dswap.comprehensions import nest as nest_of
from g3dswap.tc.nest import Nest
from g3dswap.tc.product import Product
from g3dswap.tc.program_cuda import Settings
from g3dswap.tc.schedule import Schedule, apply
from g3dswap.tc.space import Space
from g3dswap.tc.space_lanes import Point

T = TypeVar("T", Product, Point)


def every(families: Iterable[tuple[list[T], Callable[[Any], Iterable[T]]]]) -> list[T]:
    """All points of families."""
    return [point for first, rest in families for point in rest({point.tile for point in first})]


def walk(space: Space, start: Schedule, rng: random.Random, stays: Callable[[Schedule], bool]) -> None:
    """Mutate thirty times: each is legal and of its kind, and many are met."""
    schedule, seen = start, {start}
    for _ in range(30):
        schedule = space.mutate(schedule, rng)
        assert stays(schedule) and space.cost(schedule) < math.inf
        seen.add(schedule)
    assert len(seen) > 10


def measured(
    layer: Mapping[str, Any], cost: Callable[[Nest, Settings, int], float]
) -> list[tuple[float, float]]:
    """Of each schedule of a layer that was measured, a model's seconds and the device's microseconds."""
    nest = nest_of(problem_from_json(layer["problem"]))
    schedules = ((Schedule.from_json(text), microseconds) for text, microseconds in layer["kernels"])
    return [
        (cost(apply(nest, schedule), Settings.of(schedule), layer["batch"]), microseconds)
        for schedule, microseconds in schedules
    ]


def judged(layers: Iterable[Sequence[tuple[float, float]]]) -> tuple[int, float, float, float]:
    """How good a model is, from its seconds and the device's microseconds for schedules of each layer.

    How many layers there are; how many times slower its first, and the best of its first four, are than the
    fastest; how many times its times of the fast ones are off: geometric means.
    """
    first, four, ratios = [], [], []
    for found in layers:
        best = min(microseconds for _, microseconds in found)
        ranked = [microseconds for _, microseconds in sorted(found)]
        first.append(math.log(ranked[0] / best))
        four.append(math.log(min(ranked[:4]) / best))
        ratios += [abs(math.log(cost * 1e6 / real)) for cost, real in found if real < 1.5 * best]

    def mean(logs: list[float]) -> float:
        return math.exp(sum(logs) / len(logs))

    return len(four), mean(first), mean(four), mean(ratios)
