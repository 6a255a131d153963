"""The schedules worth trying for a nest in Triton: what the lanes run along, and what is unrolled.

One program computes one register tile: every parallel axis is on the grid but for its unrolled or lane
digit, reductions are serial loops or unrolled, and a reduction with few parallel elements beside it is
split over the grid.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

from .nest import Nest
from .schedule import Digit, Schedule, fused_name
from .space_cpp import SIDE, lane_axes, phases

MAX_TERMS = 160
MAX_ELEMENTS = 8192
"""Accumulator elements of one program: 64 registers of 128 threads."""

PROGRAMS = 1024
"""Enough programs for every multiprocessor of a large GPU to hold several."""


@dataclass(frozen=True)
class Point:
    """lanes: (axes, count) for each dimension of the program's tile, the fastest in memory last.
    split: reductions whose outer digit is on the grid."""

    lanes: tuple[tuple[tuple[str, ...], int], ...]
    tile: tuple[tuple[str, int], ...]
    split: tuple[str, ...]
    warps: int

    def schedule(self, nest: Nest) -> Schedule:
        fused = {fused_name(axes): axes for axes, _ in self.lanes}
        parts = {a for axes in fused.values() for a in axes}
        names = list(dict.fromkeys(next((n for n, p in fused.items() if a.name in p), a.name) for a in nest.axes))
        grid = [n for n in names if not _reduces(nest, n) or n in self.split]
        serial = [n for n in names if n not in grid]
        digits = [Digit(n, None, "grid") for n in grid] + [Digit(n, None, "serial") for n in serial]
        digits += [Digit(a, c, "unroll") for a, c in self.tile if c > 1]
        digits += [Digit(fused_name(axes), count, "lanes") for axes, count in self.lanes]
        digits += [Digit(a, p, "unroll", True) for a, p in phases(nest).items() if a not in parts or (a,) in fused.values()]
        groups = tuple(axes for axes, _ in self.lanes if len(axes) > 1)
        return Schedule(tuple(digits), groups, (), (("warps", self.warps),))

    @classmethod
    def of(cls, schedule: Schedule) -> Point:
        """The inverse of `schedule`."""
        groups = {fused_name(g): g for g in schedule.fuse}
        lanes = tuple((groups.get(d.axis, (d.axis,)), d.count or 1) for d in schedule.digits if d.bind == "lanes")
        tile = tuple((d.axis, d.count or 1) for d in schedule.digits if d.bind == "unroll" and not d.phase)
        grid = tuple(d.axis for d in schedule.digits if d.bind == "grid")
        return cls(lanes, tile, grid, schedule.hint("warps", 4))


def _reduces(nest: Nest, name: str) -> bool:
    return nest.is_reduce(name.split("*")[0])


def _power(extent: int, most: int) -> int:
    """The power of two that covers an extent, up to `most`."""
    return min(most, 1 << max(0, extent - 1).bit_length())


def lane_sets(nest: Nest) -> list[tuple[tuple[tuple[str, ...], int], ...]]:
    """One or two lane dimensions, the last along neighbours in memory of a factor or of the result."""
    single = [(axes, math.prod(nest.extent(a) or 1 for a in axes)) for axes in lane_axes(nest)]
    streamed = {a for f in nest.factors for i in f.indices if len(i.terms) > 1 for a in i.axes} | nest.output.axes
    found: list[tuple[tuple[tuple[str, ...], int], ...]] = []
    for axes, extent in single:
        if set(axes) <= streamed:
            found += [((axes, width),) for width in (32, 64, 128, 256, 512) if width <= max(32, _power(extent, 512))]
    for (first, many), (second, few) in itertools.permutations(single, 2):
        if set(first) & set(second):
            continue
        for width in (16, 32, 64):
            for other in (4, 8, 16, 32):
                if width <= max(16, _power(few, 64)) and other <= max(4, _power(many, 32)):
                    found.append(((first, other), (second, width)))
    return found


def tiles(nest: Nest, lanes: tuple[tuple[tuple[str, ...], int], ...]) -> list[tuple[tuple[str, int], ...]]:
    """Unroll counts: kernel sides whole, and windows over the axes that share loads through them."""
    covered = {a for axes, _ in lanes for a in axes}
    split = phases(nest)
    sides = [a for a in nest.axes if a.extent and 1 < a.extent <= SIDE and _small(nest, a.name) and a.name not in covered]
    windows: list[list[tuple[str, int]]] = []
    for axis in nest.axes:
        if axis.extent is None or axis.name in covered or axis in sides or axis.extent == 1:
            continue
        choices = [c for c in (1, 2, 4, 8) if c <= axis.extent]
        windows.append([(axis.name, c) for c in (choices[:2] if axis.name in split else choices)])
    found = []
    for keep in range(len(sides) + 1):
        for window in itertools.product(*windows):
            tile = tuple((a.name, a.extent or 1) for a in sides[keep:]) + tuple(w for w in window if w[1] > 1)
            if math.prod(c for _, c in tile) * math.prod(split.values()) <= MAX_TERMS:
                found.append(tile)
    return found


def _small(nest: Nest, axis: str) -> bool:
    """Whether an axis is a side of the kernel: in one index it is added to another axis."""
    return any(len(i.terms) > 1 and i.coefficient(axis) and (nest.extent(axis) or 0) <= SIDE for f in nest.factors for i in f.indices)


def points(nest: Nest) -> list[Point]:
    found = []
    for lanes in lane_sets(nest):
        elements = math.prod(width for _, width in lanes)
        for tile in tiles(nest, lanes):
            own = math.prod(c for a, c in tile if not nest.is_reduce(a)) * math.prod(phases(nest).values())
            if elements * own <= MAX_ELEMENTS:
                warps = max(1, min(8, elements // 64))
                found.append(Point(lanes, tile, splits(nest, lanes, tile), warps))
    return found


def splits(nest: Nest, lanes: tuple[tuple[tuple[str, ...], int], ...], tile: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Reductions to split so that there are enough programs, the longest first."""
    counts = dict(tile)
    widths = {fused_name(axes): (math.prod(nest.extent(a) or 1 for a in axes), w) for axes, w in lanes}
    parts = {a for axes, _ in lanes for a in axes}
    programs, reductions = 1, []
    names = [*widths, *(a.name for a in nest.axes if a.name not in parts)]
    for name in names:
        extent, width = widths.get(name, (nest.extent(name) or 1, 1))
        steps = -(-extent // (width * counts.get(name, 1)))
        if not _reduces(nest, name):
            programs *= steps
        elif steps > SIDE or nest.extent(name) is None:
            reductions.append((nest.extent(name) is None, steps, name))
    chosen = []
    for _, steps, name in sorted(reductions, reverse=True):
        if programs < PROGRAMS:
            chosen.append(name)
            programs *= steps
    return tuple(chosen)


def mutate(nest: Nest, point: Point, rng: random.Random) -> Point:
    """A point that differs in one choice: a lane count, an unroll count, a split reduction, the warps."""
    choice = rng.randrange(4)
    if choice == 0:
        i = rng.randrange(len(point.lanes))
        axes, width = point.lanes[i]
        width = max(4, min(1024, width * 2 if rng.random() < 0.5 else width // 2))
        return replace(point, lanes=(*point.lanes[:i], (axes, width), *point.lanes[i + 1 :]))
    if choice == 1:
        return replace(point, tile=rng.choice(tiles(nest, point.lanes)))
    if choice == 2:
        reductions = [d.axis for d in point.schedule(nest).digits if d.count is None and _reduces(nest, d.axis)]
        if reductions:
            name = rng.choice(reductions)
            split = tuple(s for s in point.split if s != name) if name in point.split else (*point.split, name)
            return replace(point, split=split)
    return replace(point, warps=rng.choice((1, 2, 4, 8)))


def random_point(nest: Nest, rng: random.Random) -> Point:
    """Any point, legal or not: the tests' source of schedules nobody would choose."""
    lanes = rng.choice(lane_sets(nest))
    tile = tuple((a.name, c) for a in nest.axes if a.extent and (c := rng.choice((1, 1, 2, 3, a.extent))) <= a.extent and c > 1)
    covered = {a for axes, _ in lanes for a in axes}
    tile = tuple((a, c) for a, c in tile if a not in covered)
    reductions = [a.name for a in nest.axes if a.reduce and a.name not in covered]
    return Point(lanes, tile, tuple(a for a in reductions if rng.random() < 0.3), rng.choice((1, 2, 4)))
