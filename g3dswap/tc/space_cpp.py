"""The schedules worth trying for a nest in C++.

A schedule of this target is a `Point`: what the lanes run along, the order of the outer loops, how many of
them are parallel tasks, the register tile and the staged tensors.  Families are the choices that decide
whether a kernel exists at all (lanes and staged tensors); within a family the cost model climbs.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..errors import ScheduleError
from .model_cpp import buffers_of, check, cost
from .nest import Access, Nest
from .schedule import Digit, Schedule, apply, fused_name

MAX_TERMS = 450
MAX_ACCUMULATORS = 32
SIDE = 7
"""An axis of up to this extent (the side of a kernel) may be unrolled whole."""


@dataclass(frozen=True)
class Point:
    """lanes: the axes under the lanes; width: their number.  order: the loops outside the register tile,
    of which the first `grid` are parallel.  tile: unroll counts, a number of vectors for the lanes' axis.
    stages: (tensor, how many loops of `order` are outside it)."""

    lanes: tuple[str, ...]
    width: int
    order: tuple[str, ...]
    grid: int
    tile: tuple[tuple[str, int], ...]
    stages: tuple[tuple[str, int], ...] = ()

    def schedule(self, nest: Nest) -> Schedule:
        name = fused_name(self.lanes)
        digits = [Digit(a, None, "grid" if i < self.grid else "serial") for i, a in enumerate(self.order)]
        digits += [Digit(a, c, "unroll") for a, c in self.tile if c > 1]
        if self.width > 1:
            digits.append(Digit(name, self.width, "lanes"))
        digits += [Digit(a, p, "unroll", True) for a, p in phases(nest).items()]
        return Schedule(tuple(digits), (self.lanes,) if len(self.lanes) > 1 else (), self.stages)

    @classmethod
    def of(cls, schedule: Schedule) -> Point:
        """The inverse of `schedule`."""
        order = tuple(d.axis for d in schedule.digits if d.count is None)
        grid = sum(d.bind == "grid" for d in schedule.digits)
        tile = tuple((d.axis, d.count or 1) for d in schedule.digits if d.bind == "unroll" and not d.phase)
        lanes = next((d for d in schedule.digits if d.bind == "lanes"), None)
        name = lanes.axis if lanes else order[-1]
        parts = next((g for g in schedule.fuse if fused_name(g) == name), (name,))
        return cls(parts, lanes.count or 1 if lanes else 1, order, grid, tile, schedule.stage)


def reduces(nest: Nest, name: str) -> bool:
    """Whether an axis, or one that is to be flattened and not yet is, is a reduction."""
    return nest.is_reduce(name.split("*")[0])


def phases(nest: Nest) -> dict[str, int]:
    """The parallel axes that an exact division splits into phases, with their numbers."""
    found: dict[str, int] = {}
    for factor in nest.factors:
        for index in factor.indices:
            if index.divisor > 1:
                own = (a for a, c in index.terms if not nest.axis(a).reduce and c % index.divisor)
                found.update(dict.fromkeys(own, index.divisor))
    return found


def lane_axes(nest: Nest) -> list[tuple[str, ...]]:
    """What lanes can run along: any axis but the batch, or neighbours that lie as one in some tensor."""
    split = phases(nest)
    found: list[tuple[str, ...]] = [(a.name,) for a in nest.axes if a.extent is not None and a.extent > 1]
    for access in nest.accesses:
        strides = nest.tensor(access.tensor).strides
        pure = [
            (i.terms[0][0], s)
            for i, s in zip(access.indices, strides)
            if len(i.terms) == 1 and i.is_axis(i.terms[0][0]) and nest.extent(i.terms[0][0]) is not None
        ]
        pure = [(a, s) for a, s in pure if nest.extent(a) != 1 and a not in split]
        for begin, end in itertools.combinations(range(len(pure) + 1), 2):
            run = pure[begin:end]
            joined = all(s == t * (nest.extent(b) or 1) for (_, s), (b, t) in itertools.pairwise(run))
            if 2 <= len(run) <= 3 and joined and len({nest.is_reduce(a) for a, _ in run}) == 1:
                found.append(tuple(a for a, _ in run))
    return list(dict.fromkeys(found)) or [(nest.output.indices[-1].terms[0][0],)]


def width_of(nest: Nest, lanes: tuple[str, ...]) -> int:
    """A full vector, or the narrower one that a short axis fills."""
    full = 8 if nest.tensors[0].dtype == "float64" else 16
    extent = math.prod(nest.extent(a) or 1 for a in lanes)
    while full > 1 and full // 2 >= extent:
        full //= 2
    return full


def orders(nest: Nest, lanes: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Loop orders, each with its number of parallel loops: the batch and enough axes for the cores, then the
    parallel axes, then the reductions."""
    names = list(dict.fromkeys(fused_name(lanes) if a.name in lanes else a.name for a in nest.axes))
    extents = {
        n: math.prod(nest.extent(a) or 0 for a in (lanes if n == fused_name(lanes) else (n,))) for n in names
    }
    parallel = [n for n in names if not reduces(nest, n)]
    reduce = [n for n in names if n not in parallel]
    # The channel axes come first in every tensor of the product, so the second of them is the one
    # that may go inside the image's loops, where one staged image serves all of its steps.
    batch = [n for n in parallel if n != fused_name(lanes) and nest.extent(n) is None]
    others = [n for n in parallel if n not in batch]
    # Lanes along channels that lie side by side want the image outside and the channels inside.
    last = fused_name(lanes)
    inside = [n for n in others if n != last] + [n for n in others if n == last]
    found = []
    for outer in dict.fromkeys([tuple(others), tuple(inside)]):
        for count in range(min(len(outer), 3) + 1):
            head, rest = (*batch, *outer[:count]), outer[count:]
            for tail in dict.fromkeys([rest, rest[1:2] + rest[:1] + rest[2:], rest[1:] + rest[:1]]):
                found.append(((*head, *tail, *reduce), len(head)))
    for order, grid in list(found):
        # A batch that is reduced can be split over the tasks; what is staged then serves all results.
        found += [
            ((*order[:grid], n, *(o for o in order[grid:] if o != n)), grid + 1)
            for n in reduce
            if extents[n] == 0
        ]
    tasks = [max(1, math.prod(extents[n] or 1 for n in order[:grid])) for order, grid in found]
    enough = [f for f, t in zip(found, tasks) if t >= 2]
    return enough or found


def tile_choices(nest: Nest, axis: str, lanes: tuple[str, ...], width: int) -> list[int]:
    """Unroll counts to try for one axis of the tile."""
    if axis == fused_name(lanes):
        vectors = -(-math.prod(nest.extent(a) or 1 for a in lanes) // width)
        return [c for c in (1, 2, 3, 4, 6, 8) if c <= max(1, vectors)]
    extent = nest.extent(axis)
    if extent is None or not shares(nest, axis):
        return [1]
    split = -(-extent // phases(nest).get(axis, 1))
    choices = {c for c in (1, 2, 3, 4, 6, 8, 12, 16) if c <= split}
    return sorted(choices | ({split} if split <= SIDE else set()))


def shares(nest: Nest, axis: str) -> bool:
    """Whether unrolling an axis lets terms share a load: a factor lacks it, or shifts it by another."""
    fused = nest.fused_axis(axis)
    names = set(fused.parts if fused else axis.split("*"))
    return any(
        not access.axes & names or any(len(i.terms) > 1 and i.axes & names for i in access.indices)
        for access in nest.factors
    )


def stage_sets(nest: Nest, lanes: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Sets of tensors that staging may help: those along the lanes, and those read at shifted positions."""
    names = [a.tensor for a in (*nest.factors, nest.output) if a.axes & set(lanes) or _shifted(a)]
    for size in range(len(names) + 1):
        yield from itertools.combinations(dict.fromkeys(names), size)


def _shifted(access: Access) -> bool:
    return any(len(i.terms) > 1 or i.offset for i in access.indices)


def _side(nest: Nest, axis: str) -> bool:
    """Whether an axis is a side of a kernel: it is added to a longer axis in some index."""
    extent = nest.extent(axis) or 0
    return any(
        i.coefficient(axis) and any((nest.extent(a) or 0) > extent for a in i.axes)
        for f in nest.factors
        for i in f.indices
        if len(i.terms) > 1
    ) or nest.is_reduce(axis)


def first_level(nest: Nest, tensor: str, order: tuple[str, ...], grid: int) -> int:
    """The outermost level at which a tensor can be staged: inside the parallel loops and the batch."""
    access = next(a for a in nest.accesses if a.tensor == tensor)
    batch = [order.index(a) + 1 for a in access.axes if nest.extent(a) is None]
    return max([grid, *batch])


def starts(nest: Nest, lanes: tuple[str, ...], staged: tuple[str, ...]) -> Iterator[Point]:
    """Points of a family to begin at, the first that is legal."""
    width = width_of(nest, lanes)
    sides = (a for a in nest.axes if a.extent and 1 < a.extent <= SIDE and a.name not in lanes)
    small = [(a.name, a.extent or 1) for a in sides if _side(nest, a.name)]
    for order, grid in orders(nest, lanes)[:3]:
        for tile in (small, small[-1:], []):
            stages = tuple((t, first_level(nest, t, order, grid)) for t in staged)
            yield Point(lanes, width, order, grid, tuple(tile), stages)


def estimate(nest: Nest, point: Point, threads: int) -> float:
    """Model seconds; infinite beyond the limits of the target, and for most illegal points."""
    if not _is_small(nest, point):
        return math.inf
    try:
        scheduled = apply(nest, point.schedule(nest))
        return cost(scheduled, buffers_of(scheduled), threads)
    except ScheduleError:
        return math.inf


def is_legal(nest: Nest, point: Point) -> bool:
    """Whether a point is within the limits of the target and every corner of its tile has a place."""
    try:
        scheduled = apply(nest, point.schedule(nest))
        check(scheduled, buffers_of(scheduled))
    except ScheduleError:
        return False
    return _is_small(nest, point)


def _is_small(nest: Nest, point: Point) -> bool:
    split = math.prod(phases(nest).values())
    terms = split * math.prod(c for _, c in point.tile)
    accumulators = split * math.prod(c for a, c in point.tile if not reduces(nest, a))
    return terms <= MAX_TERMS and accumulators <= max(MAX_ACCUMULATORS, split)


def _with_tile(point: Point, axis: str, count: int) -> Point:
    changed = {**dict(point.tile), axis: count}
    # Tile digits keep the loop order, so that equal tiles are equal points.
    return replace(point, tile=tuple((a, changed[a]) for a in point.order if changed.get(a, 1) > 1))


def _parallel(nest: Nest, point: Point) -> int:
    return sum(not reduces(nest, a) for a in point.order)


def _with_stages(nest: Nest, point: Point) -> list[Point]:
    """The same point with one stage, or all of them, at another level."""
    found = []
    parallel = _parallel(nest, point)
    for i, (tensor, level) in enumerate(point.stages):
        last = parallel if tensor == nest.output.tensor else len(point.order)
        for other in range(first_level(nest, tensor, point.order, point.grid), last + 1):
            if other != level:
                found.append(
                    replace(point, stages=(*point.stages[:i], (tensor, other), *point.stages[i + 1 :]))
                )
    if len(point.stages) > 1:
        found += [
            replace(point, stages=tuple((t, n) for t, _ in point.stages))
            for n in range(point.grid, parallel + 1)
        ]
    return found


def _with_order(nest: Nest, point: Point) -> list[Point]:
    found = []
    parallel = _parallel(nest, point)
    for order, grid in orders(nest, point.lanes):
        if (order, grid) != (point.order, point.grid):
            stages = tuple(
                (t, max(first_level(nest, t, order, grid), min(level, parallel))) for t, level in point.stages
            )
            moved = replace(point, order=order, grid=grid, stages=stages)
            found.append(_with_tile(moved, order[0], dict(point.tile).get(order[0], 1)))
    return found


def neighbours(nest: Nest, point: Point) -> list[Point]:
    """Points that differ in one choice."""
    tile = dict(point.tile)
    tiles = [
        _with_tile(point, axis, count)
        for axis in point.order
        for count in tile_choices(nest, axis, point.lanes, point.width)
        if count != tile.get(axis, 1)
    ]
    return tiles + _with_stages(nest, point) + _with_order(nest, point)


def climb(nest: Nest, point: Point, threads: int) -> dict[Point, float]:
    """Follow the model downhill from a legal point, one choice after the other.

    The model seconds of the points that are met, less those that turned out to be illegal: only what is about
    to be taken is checked.
    """
    seen: dict[Point, float] = {}
    legal = {point: True}

    def value(p: Point) -> float:
        if p not in seen:
            seen[p] = estimate(nest, p, threads)
        return seen[p]

    def may_be_taken(p: Point) -> bool:
        if p not in legal:
            legal[p] = is_legal(nest, p)
        return legal[p]

    def best(points: Iterable[Point]) -> Point:
        return next(filter(may_be_taken, sorted([point, *points], key=value)))

    while True:
        before = point
        for axis in point.order:
            point = best(
                _with_tile(point, axis, c) for c in tile_choices(nest, axis, point.lanes, point.width)
            )
        point = best(_with_stages(nest, point))
        point = best(_with_order(nest, point))
        if point == before:
            return {p: seconds for p, seconds in seen.items() if legal.get(p, True)}


def mutate(nest: Nest, point: Point, rng: random.Random) -> Point:
    """A point that differs in one or two choices; it may be illegal."""
    for _ in range(rng.choice((1, 1, 2))):
        options = neighbours(nest, point)
        if options:
            point = rng.choice(options)
    return point


def random_point(nest: Nest, rng: random.Random) -> Point:
    """Any point, legal or not: the tests' source of schedules nobody would choose."""
    lanes = rng.choice([*lane_axes(nest), (nest.axes[-1].name,)])
    width = rng.choice([1, 2, 4, 8, width_of(nest, lanes)])
    order, grid = rng.choice(orders(nest, lanes))
    parallel = sum(not reduces(nest, a) for a in order)
    head, tail = list(order[grid:parallel]), list(order[parallel:])
    rng.shuffle(head)
    rng.shuffle(tail)
    order = (*order[:grid], *head, *tail)
    if nest.axes[0].reduce is False and rng.random() < 0.2:
        grid = rng.randint(0, parallel)
    tile = tuple(
        (a, c)
        for a in order
        if (c := rng.choice(tile_choices(nest, a, lanes, width))) > 1 and rng.random() < 0.6
    )
    staged = rng.choice(list(stage_sets(nest, lanes)))
    last = {t: parallel if t == nest.output.tensor else len(order) for t in staged}
    stages = tuple((t, rng.randint(min(grid, last[t]), last[t])) for t in staged)
    return Point(lanes, width, order, grid, tile, stages)
