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
from .space_cpp import SIDE, lane_axes, phases, reduces, shares

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
        names = list(
            dict.fromkeys(next((n for n, p in fused.items() if a.name in p), a.name) for a in nest.axes)
        )
        grid = [n for n in names if not reduces(nest, n) or n in self.split]
        serial = [n for n in names if n not in grid]
        digits = [Digit(n, None, "grid") for n in grid] + [Digit(n, None, "serial") for n in serial]
        digits += [Digit(a, c, "unroll") for a, c in self.tile if c > 1]
        digits += [Digit(fused_name(axes), count, "lanes") for axes, count in self.lanes]
        digits += [
            Digit(a, p, "unroll", True)
            for a, p in phases(nest).items()
            if a not in parts or (a,) in fused.values()
        ]
        groups = tuple(axes for axes, _ in self.lanes if len(axes) > 1)
        return Schedule(tuple(digits), groups, (), (("warps", self.warps),))

    @classmethod
    def of(cls, schedule: Schedule) -> Point:
        """The inverse of `schedule`."""
        groups = {fused_name(g): g for g in schedule.fuse}
        lanes = tuple(
            (groups.get(d.axis, (d.axis,)), d.count or 1) for d in schedule.digits if d.bind == "lanes"
        )
        tile = tuple((d.axis, d.count or 1) for d in schedule.digits if d.bind == "unroll" and not d.phase)
        grid = tuple(d.axis for d in schedule.digits if d.bind == "grid")
        return cls(lanes, tile, grid, schedule.hint("warps", 4))


def _power(extent: int, most: int) -> int:
    """The power of two that covers an extent, up to `most`."""
    return min(most, 1 << max(0, extent - 1).bit_length())


def lane_sets(nest: Nest) -> list[tuple[tuple[tuple[str, ...], int], ...]]:
    """One or two lane dimensions, the last of which ends in an axis that is consecutive in memory."""
    runs = [(axes, math.prod(nest.extent(a) or 1 for a in axes)) for axes in lane_axes(nest)]
    runs = [(axes, extent) for axes, extent in runs if not any(_side(nest, a) for a in axes)]
    fast = [(axes, extent) for axes, extent in runs if _consecutive(nest, axes[-1])] or runs
    found: list[tuple[tuple[tuple[str, ...], int], ...]] = []
    for axes, extent in fast:
        widths = [w for w in (32, 64, 128, 256, 512) if w <= max(32, _power(extent, 512))]
        found += [((axes, width),) for width in widths]
        for others, many in runs:
            if set(others) & set(axes) or nest.is_reduce(others[0]) != nest.is_reduce(axes[0]):
                continue
            for width, other in itertools.product((16, 32, 64), (4, 16)):
                if width <= max(16, _power(extent, 64)) and other <= max(4, _power(many, 16)):
                    found.append(((others, other), (axes, width)))
    return found


def _consecutive(nest: Nest, axis: str) -> bool:
    """Whether the result or a shifted factor steps by one element along an axis."""
    streamed = [f for f in nest.factors if any(len(i.terms) > 1 for i in f.indices)]
    return any(
        s == 1 and abs(i.coefficient(axis)) == 1
        for access in (nest.output, *(streamed or nest.factors))
        for i, s in zip(access.indices, nest.tensor(access.tensor).strides)
    )


def _side(nest: Nest, axis: str) -> bool:
    """Whether an axis is a side of the kernel: short, and added to another axis in some index."""
    short = (nest.extent(axis) or 0) <= SIDE
    longer = (
        max((nest.extent(a) or 0 for a in i.axes), default=0) > (nest.extent(axis) or 0)
        for f in nest.factors
        for i in f.indices
        if len(i.terms) > 1 and i.coefficient(axis)
    )
    return short and any(longer)


def tiles(nest: Nest, lanes: tuple[tuple[tuple[str, ...], int], ...]) -> list[tuple[tuple[str, int], ...]]:
    """Unroll counts: kernel sides whole, and windows over axes that share loads between their steps."""
    covered = {a for axes, _ in lanes for a in axes}
    split = phases(nest)
    sides = [a for a in nest.axes if a.name not in covered and (a.extent or 0) > 1 and _side(nest, a.name)]
    windows = []
    for axis in nest.axes:
        if axis.name in covered or axis in sides or (axis.extent or 0) <= 1 or not shares(nest, axis.name):
            continue
        most = 2 if axis.name in split else 8
        windows.append([(axis.name, c) for c in (1, 2, 4, 8) if c <= min(most, axis.extent or 1)])
    found = []
    for keep in range(len(sides) + 1):
        for window in itertools.product(*windows):
            tile = tuple((a.name, a.extent or 1) for a in sides[keep:]) + tuple(w for w in window if w[1] > 1)
            few = sum(c > 1 for _, c in window) <= 2
            if few and math.prod(c for _, c in tile) * math.prod(split.values()) <= MAX_TERMS:
                found.append(tile)
    return found


def points(nest: Nest) -> list[Point]:
    found = []
    for lanes in lane_sets(nest):
        elements = math.prod(width for _, width in lanes)
        for tile in tiles(nest, lanes):
            own = math.prod(c for a, c in tile if not nest.is_reduce(a)) * math.prod(phases(nest).values())
            if elements * own <= MAX_ELEMENTS:
                found.append(Point(lanes, tile, splits(nest, lanes, tile), max(1, min(8, elements // 64))))
    return found


def splits(
    nest: Nest, lanes: tuple[tuple[tuple[str, ...], int], ...], tile: tuple[tuple[str, int], ...]
) -> tuple[str, ...]:
    """Reductions to split so that there are enough programs: the batch first, then the longest.

    Nothing is split where the result has the batch, which makes programs enough, and large partial results.
    """
    if any(axis.extent is None and not axis.reduce for axis in nest.axes):
        return ()
    counts = dict(tile)
    own = {fused_name(axes): (axes, width) for axes, width in lanes}
    parts = {a for axes, _ in lanes for a in axes}
    programs = 1
    reductions = []
    for name in [*own, *(a.name for a in nest.axes if a.name not in parts)]:
        axes, width = own.get(name, ((name,), 1))
        batch = any(nest.extent(a) is None for a in axes)
        extent = math.prod(nest.extent(a) or 1 for a in axes if nest.extent(a) is not None)
        steps = -(-extent // (width * counts.get(name, 1)))
        if not reduces(nest, name):
            programs *= steps
        elif batch or steps > SIDE:
            reductions.append((batch, steps, name))
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
        reductions = [
            d.axis for d in point.schedule(nest).digits if d.count is None and reduces(nest, d.axis)
        ]
        if reductions:
            name = rng.choice(reductions)
            split = (
                tuple(s for s in point.split if s != name) if name in point.split else (*point.split, name)
            )
            return replace(point, split=split)
    return replace(point, warps=rng.choice((1, 2, 4, 8)))


def random_point(nest: Nest, rng: random.Random) -> Point:
    """Any point, legal or not: the tests' source of schedules nobody would choose."""
    lanes = rng.choice(lane_sets(nest))
    tile = tuple(
        (a.name, c)
        for a in nest.axes
        if a.extent and (c := rng.choice((1, 1, 2, 3, a.extent))) <= a.extent and c > 1
    )
    covered = {a for axes, _ in lanes for a in axes}
    tile = tuple((a, c) for a, c in tile if a not in covered)
    reductions = [a.name for a in nest.axes if a.reduce and a.name not in covered]
    return Point(lanes, tile, tuple(a for a in reductions if rng.random() < 0.3), rng.choice((1, 2, 4)))
