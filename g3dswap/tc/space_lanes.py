"""The schedules worth trying for a nest whose lanes share memory: each thread has a block of positions.

A program has a box of positions, of one image and group or of a few groups, and all that its results sum up
lies in shared memory.  Whole sides of the kernel are unrolled, as far as the code stays small; channels and
the sides that are left are loops.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from .footprint import LINE
from .nest import Nest
from .program_cuda import MOST_SHARED
from .roles import Roles, batches, by_step, image_and_other, nearest, roles_of, sides
from .schedule import Digit, Schedule
from .space_cpp import phases
from .space_triton import BATCH, Tile
from .words import ITEM_BYTES, WARP

DTYPES = "float32", "bfloat16", "float16"
BLOCKS, WHOLE = (1, 2, 4, 8), 14
"""Steps of a thread along an axis, in each phase; or all of them, if they are not more than so many."""
RESULTS = 4, 64
"""Of a thread, at least where there are more, and at most."""
TERMS = 2048
"""Multiply-adds of a thread in unrolled code."""
THREADS, TYPICAL = (32, 64, 128, 256, 512), (128, 256)
"""Of a program, about; and where one size stands for all."""
PARTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
"""Of the steps of an axis, one of which a program has."""
IDLE = 1.25
"""Threads that programs of several warps start for each that has lanes, at most."""
GROUPS = (1, 2, 4, 8, 16, 32)
"""Of a program."""
CHOICES = 2
"""Boxes of positions for each number of threads and of groups: those with the least around them."""


@dataclass(frozen=True)
class Point:
    """lanes: steps of all threads along an axis, the fastest last.
    tile: those of a thread, in each phase, and reductions that are unrolled."""

    lanes: Tile
    tile: Tile

    @property
    def warps(self) -> int:
        return -(-math.prod(count for _, count in self.lanes) // WARP)

    def schedule(self, nest: Nest) -> Schedule:
        own, split = dict(self.tile), phases(nest)
        grid = [axis.name for axis in nest.axes if not axis.reduce]
        digits = [Digit(axis, None, "grid") for axis in grid]
        digits += [
            Digit(axis.name, None, "serial") for axis in nest.axes if axis.reduce and axis.name not in own
        ]
        digits += [Digit(axis, count, "unroll") for axis, count in self.tile if nest.is_reduce(axis)]
        digits += [Digit(axis, count, "lanes") for axis, count in self.lanes]
        blocks = {axis: own.get(axis, 1) * split.get(axis, 1) for axis in grid}
        digits += [Digit(axis, count, "unroll", True) for axis, count in blocks.items() if count > 1]
        image, _ = image_and_other(nest)
        return Schedule(tuple(digits), (), ((image.tensor, len(grid)),), (("warps", self.warps),))

    @classmethod
    def of(cls, schedule: Schedule, nest: Nest) -> Point:
        """The inverse of `schedule`."""
        split = phases(nest)
        lanes = tuple((d.axis, d.count or 1) for d in schedule.digits if d.bind == "lanes")
        unrolled = [(d.axis, d.count or 1) for d in schedule.digits if d.bind == "unroll"]
        tile = ((axis, count // split.get(axis, 1)) for axis, count in unrolled)
        return cls(lanes, tuple((axis, count) for axis, count in tile if count > 1))


def families(
    nest: Nest, batch: int = BATCH
) -> Iterator[tuple[list[Point], Callable[[Container[Tile]], Iterator[Point]]]]:
    """Every tile with one choice of lanes, and some tiles with all."""
    if is_possible(nest):
        # Where neighbours in memory are single channels of other groups, no program has one alone.
        near = nearest(nest)
        found, groups = tiles(nest), GROUPS if near and near <= {*batches(nest)} else GROUPS[:1]
        first = [point for tile in found for point in lanes(nest, tile, TYPICAL, groups)[:1]]
        yield first, partial(_of_tiles, nest, found)


def _of_tiles(nest: Nest, found: Iterable[Tile], wanted: Container[Tile]) -> Iterator[Point]:
    return (point for tile in found if tile in wanted for point in lanes(nest, tile))


def is_possible(nest: Nest) -> bool:
    """Whether lanes may share memory: results have positions of their own, and factors are single or half."""
    if len(nest.factors) != 2 or nest.tensors[0].dtype not in DTYPES:
        return False
    roles = roles_of(nest)
    return roles.along and bool(roles.positions)


def _extent(nest: Nest, axis: str) -> int:
    return nest.extent(axis) or 1


@functools.lru_cache(maxsize=64)
def tiles(nest: Nest) -> list[Tile]:
    """What a thread has: blocks of positions and filters, and as many sides of the kernel as fit, or one
    less."""
    roles, split = roles_of(nest), phases(nest)
    kernel = [axis for axis in sides(nest) if _extent(nest, axis) > 1]
    divided = {axis for factor in nest.factors for i in factor.indices if i.divisor > 1 for axis in i.axes}
    own = {*roles.positions, *roles.other}
    axes = [axis.name for axis in nest.axes if axis.name in own and _extent(nest, axis.name) > 1]
    choices = []
    for axis in axes:
        most = -(-_extent(nest, axis) // split.get(axis, 1))
        counts = [count for count in BLOCKS if count <= most]
        choices.append(
            [(axis, count) for count in dict.fromkeys((*counts, *([most] if most <= WHOLE else [])))]
        )
    parts = math.prod(split.values())
    found = []
    for blocks in itertools.product(*choices):
        results = math.prod(count for _, count in blocks) * parts
        if results > RESULTS[1] or results < min(RESULTS[0], math.prod(_extent(nest, a) for a in axes)):
            continue
        fitting = [
            start
            for start in range(len(kernel) + 1)
            if divided.isdisjoint(kernel[:start])
            and math.prod(_extent(nest, a) for a in kernel[start:]) * results <= TERMS * parts
        ]
        for start in fitting[:2]:
            unrolled = tuple((axis, _extent(nest, axis)) for axis in kernel[start:])
            found.append((*unrolled, *((axis, count) for axis, count in blocks if count > 1)))
    return found


@functools.lru_cache(maxsize=1024)
def lanes(
    nest: Nest, tile: Tile, threads: tuple[int, ...] = THREADS, groups: tuple[int, ...] = GROUPS
) -> list[Point]:
    """Programs of about so many threads and groups, whose threads have such a tile: of each size, those that
    copy the least for a result."""
    roles, split, own = roles_of(nest), phases(nest), dict(tile)
    parallel = (*batches(nest), *roles.other, *roles.positions)
    whole = {axis: -(-_extent(nest, axis) // (own.get(axis, 1) * split.get(axis, 1))) for axis in parallel}
    filters = {axis: whole[axis] for axis in roles.other}
    several = [{a: n} for a in batches(nest) for n in groups if n <= whole[a]] or [{}]
    room = MOST_SHARED // 2 // ITEM_BYTES[nest.tensors[0].dtype]
    found: dict[tuple[int, int], list[tuple[float, Tile]]] = {}
    for counts in itertools.product(*(_balanced(whole[axis]) for axis in roles.positions)):
        box = {**filters, **dict(zip(roles.positions, counts))}
        alone = math.prod(box.values())
        if alone > threads[-1]:
            continue
        read = _read(nest, roles, box, own, split)
        for place, group in enumerate(several):
            number = alone * math.prod(group.values())
            size = next((some for some in threads if number <= some), 0)
            busy = number <= WARP or -(-number // WARP) * WARP <= IDLE * number
            if number > 1 and size and busy and read * number // alone <= room:
                steps = tuple({**group, **box}.items())
                found.setdefault((size, place), []).append((read / alone, steps))
    return [
        Point(_ordered(nest, steps), tile)
        for _, each in sorted(found.items())
        for _, steps in sorted(each)[:CHOICES]
    ]


def _balanced(steps: int) -> list[int]:
    """Numbers that divide steps into parts as even as they can be, all but many small ones."""
    return sorted({-(-steps // parts) for parts in (*PARTS, steps)})


def _read(
    nest: Nest, roles: Roles, counts: Mapping[str, int], own: Mapping[str, int], split: Mapping[str, int]
) -> int:
    """Elements of the image that a program copies, and of lines of the cache that it reads parts of."""
    image, _ = image_and_other(nest)
    tensor = nest.tensor(image.tensor)
    line = LINE // ITEM_BYTES[tensor.dtype]
    spans = {axis: count * own.get(axis, 1) * split.get(axis, 1) for axis, count in counts.items()}
    size, whole = 1, True
    dims = zip(tensor.strides, tensor.shape, image.indices)
    for _, extent, index in sorted(dims, key=lambda dim: dim[0]):
        reach = sum(
            abs(c) * (spans.get(axis, _extent(nest, axis) if nest.is_reduce(axis) else 1) - 1)
            for axis, c in index.terms
        )
        span = reach // index.divisor + 1
        size *= span
        if whole and extent is not None and span < extent:
            whole, size = False, size + line // 2
    return size


def _ordered(nest: Nest, counts: Iterable[tuple[str, int]]) -> Tile:
    """Lanes in the order of what they write, the nearest last; those of one step left out."""
    own = {axis: count for axis, count in counts if count > 1}
    return tuple((axis, own[axis]) for axis in by_step(nest, nest.output, own))


def mutate(nest: Nest, point: Point, rng: random.Random) -> Point:
    """A point with other lanes for the same tile, or with a tile that differs in a count."""
    if rng.random() < 0.5:
        return replace(point, lanes=rng.choice(lanes(nest, point.tile) or [point]).lanes)
    own = {*point.tile}
    near = [tile for tile in tiles(nest) if 0 < len(own ^ {*tile}) <= 2]
    found: Sequence[Point] = lanes(nest, rng.choice(near)) if near else ()
    return min(found, key=lambda other: abs(other.warps - point.warps), default=point)
