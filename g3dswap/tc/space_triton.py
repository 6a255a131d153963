"""The schedules worth trying for a nest in Triton: what the lanes run along, and what is unrolled.

One program computes one register tile, or a few on a walk along a parallel axis, on which it loads once what
all of them need: every other parallel axis is on the grid but for its unrolled or lane digit.  Reductions are
serial loops or unrolled, and a reduction with few parallel elements beside it is split over the grid.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from .nest import Nest
from .schedule import Digit, Schedule, fused_name
from .space_cpp import SIDE, lane_axes, phases, reduces, shares
from .words import WARP

MAX_TERMS = 900
"""Multiply-adds of a thread in one unrolled tile: 27 taps of 32 results.  More compile long, for nothing."""

MAX_OUTPUTS = 64
"""Steps of the windows, at most, and of blocks."""

ENOUGH = 8
"""Accumulators below which a lane shares too few loads to be worth a trial, where more are possible."""

MAX_ACCUMULATORS = 128
MAX_ELEMENTS = 16384
"""Accumulator elements of one program: 128 registers of 128 threads."""

PROGRAMS = (600, 2400)
"""How many programs a split reduction is to give: a few for each multiprocessor of a large GPU."""

WARPS = 4
"""Warps of such a program; of programs with fewer, there are to be more."""

LONG = 128  # an axis as long as this fills the lanes of a program by itself

WALKS = (2, 4, 8)
"""Steps of a walk."""

BATCH = 4
"""The batch that is assumed where nobody says how large it is."""

Lanes = tuple[tuple[tuple[str, ...], int], ...]
Tile = tuple[tuple[str, int], ...]
Split = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Point:
    """lanes: (axes, count) for each dimension of the program's tile, the fastest in memory last.
    tile:  unroll counts; of an axis that lanes run along, the block that each lane has.
    split: how many steps a program makes along an axis whose outer digit is on the grid: one that is not
           named makes all if it is a reduction, and else one."""

    lanes: Lanes
    tile: Tile
    split: Split
    warps: int

    def schedule(self, nest: Nest) -> Schedule:
        fused = {fused_name(axes): axes for axes, _ in self.lanes}
        parts = {a for axes in fused.values() for a in axes}
        names = list(
            dict.fromkeys(next((n for n, p in fused.items() if a.name in p), a.name) for a in nest.axes)
        )
        split = dict(self.split)
        grid = [n for n in names if not reduces(nest, n) or n in split]
        walks = walks_of(nest, grid, split)
        serial = [n for n in names if reduces(nest, n) and split.get(n) != 1]
        digits = [Digit(n, None, "grid") for n in grid]
        digits += [Digit(n, split.get(n), "serial") for n in walks + serial]
        digits += [Digit(a, c, "unroll") for a, c in self.tile if c > 1 and a not in parts]
        digits += [Digit(fused_name(axes), count, "lanes") for axes, count in self.lanes]
        blocks = {a: c for a, c in self.tile if c > 1 and a in parts}
        whole = {a: p for a, p in phases(nest).items() if a not in parts or (a,) in fused.values()}
        digits += [Digit(a, c, "unroll", True) for a, c in {**whole, **blocks}.items()]
        groups = tuple(axes for axes, _ in self.lanes if len(axes) > 1)
        return Schedule(tuple(digits), groups, (), (("warps", self.warps),))

    @classmethod
    def of(cls, schedule: Schedule) -> Point:
        """The inverse of `schedule`."""
        groups = {fused_name(g): g for g in schedule.fuse}
        lanes = tuple(
            (groups.get(d.axis, (d.axis,)), d.count or 1) for d in schedule.digits if d.bind == "lanes"
        )
        parts = {a for axes, _ in lanes for a in axes}
        unrolled = [d for d in schedule.digits if d.bind == "unroll"]
        tile = tuple((d.axis, d.count or 1) for d in unrolled if not d.phase or d.axis in parts)
        steps = {d.axis: d.count or 1 for d in schedule.digits if d.bind == "serial"}
        grid = tuple((d.axis, steps.get(d.axis, 1)) for d in schedule.digits if d.bind == "grid")
        return cls(lanes, tile, grid, schedule.hint("warps", 4))


def walks_of(nest: Nest, grid: Sequence[str], split: Mapping[str, int]) -> list[str]:
    """The axes on the grid that a program takes several steps of: no reductions, which are split instead."""
    return [n for n in grid if not reduces(nest, n) and split.get(n, 1) > 1]


def power(extent: int, most: int) -> int:
    """The power of two that covers an extent, up to `most`."""
    return min(most, 1 << max(0, extent - 1).bit_length())


def lane_sets(nest: Nest) -> list[Lanes]:
    """One or two lane dimensions, the last of which ends in an axis that is consecutive in memory."""
    runs = [(axes, math.prod(nest.extent(a) or 1 for a in axes)) for axes in lane_axes(nest)]
    runs = [(axes, extent) for axes, extent in runs if not any(_side(nest, a) for a in axes)]
    fast = [(axes, extent) for axes, extent in runs if _consecutive(nest, axes[-1])] or runs
    found: list[Lanes] = []
    for axes, extent in fast:
        widths = [w for w in (32, 64, 128, 256, 512) if w <= max(32, power(extent, 512))]
        found += [((axes, width),) for width in widths]
        for others, many in runs:
            # Lanes may add up parts of a result that few programs share; the fastest of them run along it.
            mixed = nest.is_reduce(others[0]) != nest.is_reduce(axes[0])
            parts = mixed and nest.is_reduce(others[0]) and not _batched(nest)
            if set(others) & set(axes) or (mixed and not parts) or len(others) > 1 or extent >= LONG:
                continue
            for width, other in ((16, 8), (32, 4), (64, 4)):
                if width <= max(16, power(extent, 64)) and other <= max(4, power(many, 16)):
                    found.append(((others, other), (axes, width)))
    return found


def _batched(nest: Nest) -> bool:
    """Whether the result has the batch, which makes programs enough, and large partial results."""
    return any(axis.extent is None and not axis.reduce for axis in nest.axes)


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


def tiles(nest: Nest, lanes: Lanes) -> list[Tile]:
    """Unroll counts: as many kernel sides as fit, windows over axes that share loads between their steps,
    and blocks of the axes that the lanes run along."""
    covered = {a for axes, _ in lanes for a in axes}
    split = phases(nest)
    sides = [a for a in nest.axes if a.name not in covered and (a.extent or 0) > 1 and _side(nest, a.name)]
    windows = []
    for axis in nest.axes:
        extent = axis.extent or 1
        if axis in sides or extent <= 1:
            continue
        phase = split.get(axis.name, 1)
        if axis.name in covered:
            choices = [c for c in (1, 2, 4) if c <= extent and (c % phase == 0 or c == 1)]
        elif axis.reduce and not shares(nest, axis.name):
            choices = [1, extent] if extent <= SIDE and _consecutive(nest, axis.name) else [1]
        elif shares(nest, axis.name):
            choices = [c for c in (1, 2, 4, 8, 16) if c * phase <= max(extent, phase)]
        else:
            choices = [c for c in (1, 2, 4) if c <= extent] if _consecutive(nest, axis.name) else [1]
        windows.append([(axis.name, c) for c in choices])
    found: list[Tile] = []
    few: list[Tile] = []
    for window in itertools.product(*windows):
        own = tuple(w for w in window if w[1] > 1)
        uncovered = math.prod(p for a, p in split.items() if a not in covered)
        outputs = math.prod(c for a, c in own if not nest.axis(a).reduce) * uncovered
        count = math.prod(c for _, c in own) * uncovered
        if outputs > MAX_OUTPUTS or len(own) > 4:
            continue
        kept = len(sides)
        while kept:
            extent, reduced = sides[kept - 1].extent or 1, sides[kept - 1].reduce
            if count * extent > MAX_TERMS or (not reduced and outputs * extent > MAX_ACCUMULATORS):
                break
            kept, count, outputs = kept - 1, count * extent, outputs if reduced else outputs * extent
        tile = tuple((a.name, a.extent or 1) for a in sides[kept:]) + own
        (found if outputs >= ENOUGH else few).append(tile)
    return found or few


def families(
    nest: Nest, batch: int = BATCH
) -> Iterator[tuple[list[Point], Callable[[Container[Tile]], Iterator[Point]]]]:
    """For each choice of axes for the lanes: every tile with one count of lanes, and some tiles with all."""
    by_axes: dict[tuple[tuple[str, ...], ...], list[Lanes]] = {}
    for lanes in lane_sets(nest):
        by_axes.setdefault(tuple(axes for axes, _ in lanes), []).append(lanes)
    for sets in by_axes.values():
        unrolled = tiles(nest, sets[0])
        typical = sets[len(sets) // 2]
        first = [p for tile in unrolled for p in _points(nest, batch, typical, tile)[:1]]
        yield first, partial(_of_tiles, nest, batch, sets, unrolled)


def _of_tiles(
    nest: Nest, batch: int, sets: Sequence[Lanes], unrolled: Sequence[Tile], wanted: Container[Tile]
) -> Iterator[Point]:
    for lanes in sets:
        for tile in unrolled:
            if tile in wanted:
                yield from _points(nest, batch, lanes, tile)


def _points(nest: Nest, batch: int, lanes: Lanes, tile: Tile) -> list[Point]:
    elements = math.prod(width for _, width in lanes)
    warps = max(1, min(8, elements // WARP))
    own = math.prod(c for a, c in tile if not nest.is_reduce(a)) * math.prod(phases(nest).values())
    terms = math.prod(c for _, c in tile) * max(1, elements // (WARP * warps))
    if elements * own > MAX_ELEMENTS or terms > MAX_TERMS:
        return []
    return [Point(lanes, tile, split, warps) for split in splits(nest, lanes, tile, batch)]


def splits(nest: Nest, lanes: Lanes, tile: Tile, batch: int = BATCH) -> list[Split]:
    if _batched(nest):
        return [(), *_walks(nest, lanes, dict(tile))]
    own = {fused_name(axes): (axes, width) for axes, width in lanes}
    warps = max(1, math.prod(width for _, width in lanes) // WARP)
    more = () if warps >= WARPS else (PROGRAMS[-1] * WARPS // warps,)
    return split_reductions(nest, own, dict(tile), batch, (*PROGRAMS, *more))


def _walks(nest: Nest, lanes: Lanes, tile: Mapping[str, int]) -> Iterator[Split]:
    """Walks along one axis, on which a factor stays the same as it is read whole at each step."""
    covered = {a for axes, _ in lanes for a in axes}
    split = phases(nest)
    inside = [a for a in nest.axes if a.reduce and a.name not in covered and (a.extent or 2) > 1]
    looped = {a.name for a in inside if tile.get(a.name) != a.extent}
    for axis in nest.axes:
        stays = any(not factor.axes & {axis.name, *looped} for factor in nest.factors)
        if axis.reduce or axis.extent is None or axis.name in covered or not stays:
            continue
        steps = -(-axis.extent // (tile.get(axis.name, 1) * split.get(axis.name, 1)))
        yield from (((axis.name, walk),) for walk in WALKS if walk <= steps)


def steps_outside(
    nest: Nest, own: Mapping[str, tuple[tuple[str, ...], int]], counts: Mapping[str, int], batch: int = BATCH
) -> dict[str, int]:
    """How many steps each axis, flattened or not, has outside of a program's tile.

    own: by name, the axes that the tile runs along and its steps there; counts: what is unrolled.
    """
    parts = {a for axes, _ in own.values() for a in axes}
    found = {}
    for name in [*own, *(a.name for a in nest.axes if a.name not in parts)]:
        axes, width = own.get(name, ((name,), 1))
        extents = [-(-(nest.extent(a) or batch) // counts.get(a, 1)) for a in axes]
        found[name] = -(-math.prod(extents) // width)
    return found


def split_reductions(
    nest: Nest,
    own: Mapping[str, tuple[tuple[str, ...], int]],
    counts: Mapping[str, int],
    batch: int = BATCH,
    wanted: Sequence[int] = PROGRAMS,
    blocks: bool = False,
) -> list[Split]:
    """Reductions to split so that there are enough programs: the batch first, then the longest.

    own, counts: as for `steps_outside`.  wanted: numbers of programs, about; for each there is a choice.
    blocks: whether a program may have a block of the batch, and not only all of it or one step.
    Nothing is split where the result has the batch.
    """
    if _batched(nest):
        return [()]
    programs = 1
    reductions = []
    for name, steps in steps_outside(nest, own, counts, batch).items():
        if not reduces(nest, name):
            programs *= steps
        elif steps > 1:
            batched = name not in own and nest.extent(name) is None
            reductions.append((batched, steps, name))
    found = []
    for most in wanted:
        chosen, many = [], programs
        for batched, steps, name in sorted(reductions, reverse=True):
            if many < most:
                longest = 1 if batched and not blocks else max(1, steps * many // most)
                number = -(-steps // longest)
                chosen.append((name, -(-steps // number)))  # alike, if they can be
                many *= number
        found.append(tuple(chosen))
    return list(dict.fromkeys(found))


def of_reductions(nest: Nest, split: Split) -> Split:
    """A split without what only is on the grid: a split that is read from a schedule names all of that."""
    return tuple((n, c) for n, c in split if c > 1 or reduces(nest, n))


def another_split(nest: Nest, split: Split, options: Sequence[Split], rng: random.Random) -> Split:
    """One of the options, or a split with steps half or twice as many."""
    own = of_reductions(nest, split)
    halved = tuple((n, max(1, c // 2)) for n, c in own)
    doubled = tuple((n, c * 2 if c > 1 else c) for n, c in own)
    return rng.choice([*options, halved, doubled])


def mutate(nest: Nest, point: Point, rng: random.Random, batch: int = BATCH) -> Point:
    """A point that differs in one choice: a lane count, an unroll count, a split reduction, the warps."""
    choice = rng.randrange(4)
    if choice == 0:
        i = rng.randrange(len(point.lanes))
        axes, width = point.lanes[i]
        width = max(4, min(1024, width * 2 if rng.random() < 0.5 else width // 2))
        return replace(point, lanes=(*point.lanes[:i], (axes, width), *point.lanes[i + 1 :]))
    if choice == 1:
        return replace(point, tile=_near(tiles(nest, point.lanes), point.tile, rng))
    if choice == 2:
        options = splits(nest, point.lanes, point.tile, batch)
        return replace(point, split=another_split(nest, point.split, options, rng))
    return replace(point, warps=rng.choice((1, 2, 4, 8)))


def _near(choices: list[Tile], tile: Tile, rng: random.Random) -> Tile:
    """One of the tiles that differ in the fewest counts, or now and then any."""
    if rng.random() < 0.2:
        return rng.choice(choices)
    own = set(tile)
    ranked = sorted((len(own ^ set(other)), i) for i, other in enumerate(choices) if set(other) != own)
    near = [choices[i] for distance, i in ranked if distance <= max(2, ranked[0][0])]
    return rng.choice(near) if near else tile


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
    split = tuple((a, 1) for a in reductions if rng.random() < 0.3)
    blocks = tuple((a, c) for a in sorted(covered) if (c := rng.choice((1, 1, 2, 3, 4))) > 1)
    return Point(lanes, tile + blocks, split, rng.choice((1, 2, 4)))
