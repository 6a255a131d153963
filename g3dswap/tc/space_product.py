"""The matrix products worth trying for a nest in Triton: what its rows, columns and depth run along.

Of the two factors, one is read at shifted positions (an image), the other is not (a kernel, or another
image).  A product has the parallel axes of either factor as a side, and reductions of both as its depth:
flattened positions, and channels.  Where a group has few channels, several are packed.  The sides of the
kernel are unrolled, or steps of one flattened loop around the product, whose loads Triton pipelines.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from functools import partial

from ..errors import ScheduleError
from .nest import SIDE_BINDS, Nest
from .product import Packs, Product, Side, of_tiles, splits
from .roles import Roles, batches, possible, roles_of, sides
from .schedule import rewritten
from .space_cpp import phases
from .space_triton import BATCH, Tile, another_split, power
from .words import WARP

MAX_PRODUCTS = 54
"""Matrix products of one unrolled tile: each is some hundred instructions."""

MAX_REGISTERS = 128
"""Accumulators of a thread."""

LEAST, MOST = 16, 64  # channels of a side
POSITIONS = (32, 64, 128, 256)
TYPICAL = 16 * 16 * 128
"""Multiplications of the products by which tiles are compared."""
WINDOWS = (1, 2, 4, 8)
STAGES = (1, 2, 3, 4)
AHEAD = (0, 2, 4, 8, 16)
STRAIGHT, LOOPED = (1, 8), (3, 0)
"""Stages and loads ahead: Triton overlaps the steps of a loop, and what is no loop has to do without."""


def packings(nest: Nest) -> list[Packs]:
    """No packing, and blocks of the batch axis that make its channels a side of a product."""
    batch, roles = batches(nest), roles_of(nest)
    wide = max(math.prod(nest.extent(a) or 1 for a in axes) for axes in (roles.other, roles.channels))
    found: list[Packs] = [()] if wide >= LEAST or not batch else []
    for axis in batch:
        for count in (2, 4, 8, 16, 32, 64):
            if (nest.extent(axis) or 1) % count == 0 and LEAST <= count * wide <= MOST:
                found.append(((axis, count),))
    return found


def families(
    nest: Nest, batch: int = BATCH
) -> Iterator[tuple[list[Product], Callable[[Container[Tile]], Iterator[Product]]]]:
    """For each packing and choice of positions: every tile once, and all products of some tiles."""
    if not possible(nest):
        return
    for packs in packings(nest):
        try:
            whole = rewritten(nest, packs, ())
        except ScheduleError:
            continue
        roles = roles_of(whole)
        if not all((roles.image, roles.other, roles.depth)):
            continue
        for positions in _runs(whole, roles.positions):
            products = list(_products(whole, batch, roles, packs, positions))
            small = {p.tile: p for p in products if math.prod(n for _, n in p.sides.values()) <= TYPICAL}
            first = list(({p.tile: p for p in reversed(products)} | small).values())
            yield first, partial(of_tiles, products)


def _runs(nest: Nest, axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The last one, two or three axes that are longer than one step."""
    long = [a for a in axes if (nest.extent(a) or 1) > 1] or list(axes[-1:])
    return [tuple(long[start:]) for start in range(len(long))]


def _products(
    nest: Nest, batch: int, roles: Roles, packs: Packs, positions: tuple[str, ...]
) -> Iterator[Product]:
    blocks = tuple((a, p) for a, p in phases(nest).items() if a in positions)
    steps = math.prod(-(-(nest.extent(a) or 1) // dict(blocks).get(a, 1)) for a in positions)
    most = max(LEAST, power(steps, POSITIONS[-1]))
    places = [(positions, c) for c in POSITIONS if c <= most] or [(positions, most)]
    channels, others = _channels(nest, roles.channels), _channels(nest, roles.other)
    for tile, place, own, other in itertools.product(
        _tiles(nest, positions, blocks), places, channels, others
    ):
        image, depth = (place, own) if roles.along else (own, place)
        for rows, cols in ((image, other), (other, image)):
            for warps, split in itertools.product(
                _warps(nest, rows, cols, tile), splits(nest, (rows, cols, depth), tile, batch)
            ):
                product = Product(rows, cols, depth, packs, (), tile, split, warps, *STRAIGHT)
                looped = product.loops(nest, batch)
                yield replace(product, stages=LOOPED[0], ahead=LOOPED[1]) if looped else product


def _channels(nest: Nest, axes: tuple[str, ...]) -> list[Side]:
    """All channels at once, or half of very many."""
    extent = math.prod(nest.extent(a) or 1 for a in axes)
    whole = max(LEAST, power(extent, MOST))
    return [(axes, c) for c in ((whole, whole // 2) if whole == MOST else (whole,))]


def _warps(nest: Nest, rows: Side, cols: Side, tile: Tile) -> list[int]:
    """Numbers of warps that hold the accumulators, with at least a piece of a product for each."""
    own = {*rows[0], *cols[0]}  # of which the tile has the phases
    results = math.prod(c for a, c in tile if not nest.is_reduce(a)) * math.prod(
        p for a, p in phases(nest).items() if a not in own
    )
    elements = rows[1] * cols[1]
    found = [w for w in (1, 2, 4, 8) if elements * results / (WARP * w) <= MAX_REGISTERS]
    return [w for w in found if elements >= 256 * w][-2:] or found[:1]


def _tiles(nest: Nest, positions: tuple[str, ...], blocks: Tile) -> list[Tile]:
    """Unrolled sides of the kernel and windows; a side that an exact division divides is unrolled."""
    kernel = [a for a in sides(nest) if (nest.extent(a) or 1) > 1]
    split = phases(nest)
    divided = {
        a
        for f in nest.factors
        for i in f.indices
        if i.divisor > 1 and i.axes & split.keys()
        for a in i.axes
        if a in kernel
    }
    shifted = [i.axes for f in nest.factors for i in f.indices if len(i.terms) > 1]
    windows = [
        a.name
        for a in nest.axes
        if a.name not in {*positions, *kernel}
        and not a.reduce
        and (a.extent or 1) > 1
        and any(a.name in axes for axes in shifted)
    ]
    choices = [
        [(a, c) for c in WINDOWS if c * split.get(a, 1) <= max(nest.extent(a) or 1, split.get(a, 1))]
        for a in windows
    ]
    found = []
    runs = itertools.combinations(range(len(kernel) + 1), 2)
    for unrolled in ((), *(tuple(kernel[a:b]) for a, b in runs)):
        if not divided <= set(unrolled):
            continue
        taps = tuple((a, nest.extent(a) or 1) for a in unrolled)
        for window in itertools.product(*choices):
            tile = (*taps, *(w for w in window if w[1] > 1), *blocks)
            # Of the sides that are divided, each phase has its own.
            if math.prod(c for a, c in tile if a not in split) <= MAX_PRODUCTS:
                found.append(tile)
    return found


def mutate(nest: Nest, product: Product, rng: random.Random, batch: int = BATCH) -> Product:
    """A product that differs in one choice: a count, what is unrolled, the split, warps or stages."""
    choice = rng.randrange(5)
    if choice == 0:
        bind = rng.choice(SIDE_BINDS)
        axes, count = product.sides[bind]
        count = max(LEAST, min(512, count * 2 if rng.random() < 0.5 else count // 2))
        rows, cols, depth = ((axes, count) if b == bind else side for b, side in product.sides.items())
        return replace(product, rows=rows, cols=cols, depth=depth)
    whole = rewritten(nest, product.pack, ())
    if choice == 1:
        known = set(roles_of(whole).positions)
        positions = next(axes for axes, _ in product.sides.values() if set(axes) <= known)
        blocks = tuple((a, c) for a, c in product.tile if a in positions)
        return replace(product, tile=rng.choice(_tiles(whole, positions, blocks)))
    if choice == 2:
        options = splits(whole, (product.rows, product.cols, product.depth), product.tile, batch)
        return replace(product, split=another_split(whole, product.split, options, rng))
    if choice == 3:
        return replace(product, warps=rng.choice((1, 2, 4, 8)))
    return replace(product, stages=rng.choice(STAGES), ahead=rng.choice(AHEAD))
