"""The gradients in the kernel worth trying whose depth is read along lines of positions.

Where an image's positions lie side by side, words of its lines are what a product takes: pairs of positions,
which is the depth.  The sides are blocks of another position, with the patches that those read, and channels.
Nothing is turned around, and a line need be no multiple of anything.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace

from .nest import Nest
from .product import Product, Side, Skews, by_tile
from .program_cuda import COLS, ROWS, deep_of
from .roles import image_and_other, possible, roles_of, sides
from .schedule import rewritten
from .skew import Skew, patch_name, shifted_by
from .space_staged import (
    LINES,
    by_steps,
    choices_of,
    divisions,
    is_small,
    sharing_of,
    steps_in,
    teams_of,
    varied,
    windows_of,
)
from .space_triton import BATCH, Tile

MOST_ROWS, MOST_COLS = 64, 32
"""Of a product, in elements of its sides."""
FORMS = 4
"""Blocks that are compared: those with the fewest products for a position."""
MOST_POSITIONS = 1024
"""Of a program, along the depth."""
APART, FEW_WINDOWS = 2.5, 2
"""How many times as many positions the next choice has, and how many windows there are, where not all are
compared."""
MOST_WINDOW = 16
"""Steps of a position that are unrolled, all of them."""


def families(
    nest: Nest, batch: int = BATCH
) -> Iterator[tuple[list[Product], Callable[[Container[Tile]], Iterator[Product]]]]:
    """For each block: every tile once, and all products of some tiles."""
    for skews in forms(nest):
        yield by_tile(products(nest, skews, batch, thorough=False))


def forms(nest: Nest) -> list[Skews]:
    """Blocks of a position, each with as many steps as its fragments have room for; or none, if the channels
    fill them."""
    if not _is_possible(nest):
        return []
    roles = roles_of(nest)
    channels, filters = (steps_in(nest, axes) for axes in (roles.channels, roles.other))
    ranked: list[tuple[float, Skews]] = []
    if channels % ROWS == 0 and filters % COLS == 0:
        ranked.append((_products(channels, filters), ()))
    for axis in roles.positions[:-1]:
        shifted = shifted_by(nest, axis)
        if shifted is None or (nest.extent(shifted[1]) or 1) == 1:
            continue
        largest: dict[tuple[int, int], tuple[float, Skews]] = {}
        for count in range(1, (nest.extent(axis) or 1) + 1):
            skew = Skew(axis, count)
            whole = rewritten(nest, (), (skew,))
            rows, cols = channels * (whole.extent(patch_name(axis)) or 1), filters * count
            size = _whole(rows, ROWS), _whole(cols, COLS)
            if size[0] > MOST_ROWS or size[1] > MOST_COLS:
                break
            # A product has all taps of this axis at once, and one of each other axis.
            steps = (whole.extent(axis) or 1) / (nest.extent(shifted[1]) or 1)
            largest[size] = _products(*size) * steps / (nest.extent(axis) or 1), (skew,)
        ranked += largest.values()
    return [skews for _, skews in sorted(ranked)[:FORMS]]


def _is_possible(nest: Nest) -> bool:
    """Whether factors are of a half type, and the last of several positions steps by one element, or two."""
    if not possible(nest) or nest.tensors[0].dtype == "float32":
        return False
    roles = roles_of(nest)
    if roles.along or len(roles.positions) < 2:
        return False
    last = roles.positions[-1]
    steps = [
        stride * index.coefficient(last)
        for factor in image_and_other(nest)
        for index, stride in zip(factor.indices, nest.tensor(factor.tensor).strides)
        if last in index.axes
    ]
    return steps in ([1, 1], [2, 1])


def _whole(steps: int, unit: int) -> int:
    return -(-steps // unit) * unit


def _products(rows: int, cols: int) -> float:
    """Of fragments, for each step of a depth."""
    return rows * cols / (ROWS * COLS)


@functools.lru_cache(maxsize=64)
def products(nest: Nest, skews: Skews, batch: int, thorough: bool = True) -> list[Product]:
    """The products with such a block: all, or some of each tile."""
    return list(_every(rewritten(nest, (), skews), batch, skews, thorough))


def _every(nest: Nest, batch: int, skews: Skews, thorough: bool) -> Iterator[Product]:
    image, _ = image_and_other(nest)
    roles = roles_of(nest)
    rows = _side(by_steps(nest, image, roles.channels), nest, ROWS)
    cols = _side(by_steps(nest, nest.output, roles.other), nest, COLS)
    taps = tuple((a, nest.extent(a) or 1) for a in sides(nest) if (nest.extent(a) or 1) > 1)
    skewed = {skew.axis for skew in skews}
    for depth, whole in _depths(nest, thorough):
        outside = [a for a in _long(nest, roles.positions) if a not in {*depth[0], *skewed}]
        numbers = teams_of(sharing_of(-(-depth[1] // deep_of(nest)), thorough), True, thorough)
        unrolled = [taps[start:] for start in range(min(2, len(taps) + 1) if thorough else 1)]
        for own, window in itertools.product(unrolled, _windows(nest, outside, thorough)):
            tile, three = (*own, *window), (rows, cols, depth)
            if not is_small(nest, tile, rows, cols, depth, False):
                continue
            for split, clustered in divisions(nest, three, tile, batch, thorough):
                made = Product(*three, (), skews, tile, split, 1, 1, 0, staged=True, whole=whole, lines=True)
                looped = made.loops(nest, batch)
                for (warps, teams), stages in itertools.product(numbers, (1, 2) if looped else (1,)):
                    if looped or teams == 1:
                        yield replace(made, warps=warps, stages=stages, teams=teams, clustered=clustered)


def _side(axes: tuple[str, ...], nest: Nest, unit: int) -> Side:
    """All steps of these axes, in whole fragments."""
    return axes, _whole(steps_in(nest, axes), unit)


def _long(nest: Nest, axes: Iterable[str]) -> list[str]:
    return [axis for axis in axes if (nest.extent(axis) or 1) > 1]


def _depths(nest: Nest, thorough: bool) -> Iterator[tuple[Side, bool]]:
    """A line, or some that follow each other, and whether they are read as they lie."""
    roles = roles_of(nest)
    last = roles.positions[-1]
    length, others = nest.extent(last) or 1, _long(nest, roles.positions[:-1])[-1:]
    half = deep_of(nest) // 2
    alone = (last,), half if length <= half else _whole(length, deep_of(nest))
    yield from ((alone, whole) for whole in (False, True))
    for axis in others:
        steps, odd, last_count = nest.extent(axis) or 1, length % 2, 0
        for lines in () if odd else range(2, steps + 1):
            count = lines * length
            near = not thorough and count < APART * last_count
            if (steps % lines == 0 or lines in LINES) and not near and count <= MOST_POSITIONS:
                last_count = count
                yield from ((((axis, last), count), whole) for whole in (False, True))
        if odd and steps * length <= MOST_POSITIONS:
            yield ((axis, last), _whole(steps * length, deep_of(nest))), True


def _windows(nest: Nest, outside: Sequence[str], thorough: bool) -> list[Tile]:
    """Steps of the nearest position outside; all of them, too, if they are few."""
    found = windows_of(nest, outside[-1] if outside else None)
    if not thorough and len(found) > FEW_WINDOWS:
        found = found[-FEW_WINDOWS:]
    if outside and (nest.extent(outside[-1]) or 1) <= MOST_WINDOW:
        found.append(((outside[-1], nest.extent(outside[-1]) or 1),))
    return list(dict.fromkeys(found))


def mutate(nest: Nest, product: Product, rng: random.Random, batch: int = BATCH) -> Product:
    """A product with the same block that differs in a choice: the depth, the tile, the split, warps or
    buffers."""
    own = choices_of(rewritten(nest, (), product.skew), product)
    return varied(product, own, _described(nest, product.skew, batch), rng)


@functools.lru_cache(maxsize=64)
def _described(nest: Nest, skews: Skews, batch: int) -> list[tuple[tuple[object, ...], Product]]:
    """All products with such a block, each with its choices."""
    whole = rewritten(nest, (), skews)
    return [(choices_of(whole, product), product) for product in products(nest, skews, batch)]
