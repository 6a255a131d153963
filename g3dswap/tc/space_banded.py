"""The banded matrix products worth trying for a nest in Triton, of skewed positions and few channels a group.

A block of positions with its filters is one side of the product, the patch that it is read from with its
channels the depth; in a gradient in the kernel, the patch is a side and positions are the depth.  The image
is always the first operand, which the matrix unit takes from registers.  Along what is not skewed, windows
of planes share their loads and the sides of the kernel are unrolled.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Container, Iterator
from dataclasses import replace

from ..errors import ScheduleError
from .nest import Nest, Tensor
from .product import Product, Skews, by_tile, splits
from .roles import added, image_and_other, possible, roles_of, sides
from .schedule import rewritten
from .skew import Skew, patch_name, shifted_by
from .space_triton import BATCH, Tile, another_split, power
from .words import ITEM_BYTES, WARP, WORD_BYTES

LEAST, MOST = 16, 64
"""Of a block's positions with its filters; groups of more channels than the least need no skewing."""
DEEPEST = 256
"""Elements of a patch with its channels, at most."""
BLOCKS = (1, 2, 4, 8, 16)
SKEWINGS = 6
MULTIPLIED, LOADED = 512, 10
"""Multiplications and loads of a multiprocessor in a cycle, about, by which skewings are compared."""
POSITIONS = (32, 64, 128, 256)
WINDOWS = (1, 2, 4, 8)
PRODUCTS = 64
"""Matrix products of one unrolled tile, at most."""
HELD = (16, 160)
"""Accumulators of a thread, at least and at most."""
AHEAD = (0, 1, 2)


def skewings(nest: Nest) -> list[Skews]:
    """Blocks of the last one or two positions, where groups have few channels and a line's elements are
    consecutive; those first that multiply and load the least for a result, by their number and by words.
    """
    image, _ = image_and_other(nest)
    roles, tensor = roles_of(nest), nest.tensor(image.tensor)
    channels, filters = (
        math.prod(nest.extent(a) or 1 for a in axes) for axes in (roles.channels, roles.other)
    )
    found = [(a, f) for a in roles.positions if (f := shifted_by(nest, a)) and (nest.extent(f[1]) or 1) > 1]
    steps = [tensor.strides[image.indices.index(index)] for _, (index, _) in found]
    if max(channels, filters) >= LEAST or not steps or steps[-1] != 1:
        return []
    ranked = []
    for axes in (found[-1:], found[-2:]):
        taps = math.prod(nest.extent(a) or 1 for a in sides(nest)) // math.prod(
            nest.extent(side) or 1 for _, (_, side) in axes
        )
        for counts in itertools.product(BLOCKS, repeat=len(axes)):
            wide = filters * math.prod(counts)
            if not LEAST <= wide <= MOST:
                continue
            fast, (index, _) = axes[-1]
            for word in _words(tensor, index.coefficient(fast) * counts[-1]):
                skews = tuple(Skew(a, c, word if a == fast else 1) for (a, _), c in zip(axes, counts))
                try:
                    whole = rewritten(nest, (), skews)
                except ScheduleError:
                    continue
                deep = channels * math.prod(whole.extent(patch_name(a)) or 1 for a, _ in axes)
                if deep <= DEEPEST:
                    multiplied = power(deep, DEEPEST) * power(wide, MOST) / wide / MULTIPLIED
                    ranked.append((taps * (multiplied + deep / (word * wide * LOADED)), skews))
    return [skews for _, skews in sorted(ranked)[:SKEWINGS]]


def _words(tensor: Tensor, step: int) -> list[int]:
    """How many elements a load may bring of a line in which blocks begin `step` apart, if more than one."""
    line = next((e or 1 for e, s in zip(tensor.shape, tensor.strides) if s == 1 and e != 1), 1)
    steps = [step, line, *(s for s in tensor.strides if s != 1)]
    most = WORD_BYTES // ITEM_BYTES[tensor.dtype]
    return [w for w in (2, 4) if w <= most and not any(s % w for s in steps)] or [1]


def families(
    nest: Nest, batch: int = BATCH
) -> Iterator[tuple[list[Product], Callable[[Container[Tile]], Iterator[Product]]]]:
    """For each skewing: every tile once, and all products of some tiles."""
    # TF32 needs four times the registers and loads: 88 us where lanes took 46.
    if not possible(nest) or ITEM_BYTES[nest.tensors[0].dtype] > 2:
        return
    for skews in skewings(nest):
        yield by_tile(list(_products(nest, batch, skews)))


def _products(nest: Nest, batch: int, skews: Skews) -> Iterator[Product]:
    whole = rewritten(nest, (), skews)
    roles = roles_of(whole)
    positions = roles.positions[-2:]
    steps = math.prod(whole.extent(a) or 1 for a in positions)
    places = [c for c in POSITIONS if c <= power(steps, POSITIONS[-1])] or [LEAST]
    channels, others = (
        (axes, max(LEAST, power(math.prod(whole.extent(a) or 1 for a in axes), DEEPEST)))
        for axes in (roles.channels, roles.other)
    )
    for tile, place, warps, across in itertools.product(_tiles(whole), places, (1, 2, 4, 8), (True, False)):
        rows, depth = ((positions, place), channels) if roles.along else (channels, (positions, place))
        results = math.prod(c for a, c in tile if not whole.is_reduce(a))
        held = results * rows[1] * others[1] / (WARP * warps)
        if HELD[0] <= held <= HELD[1] and rows[1] >= LEAST * warps:
            for split in splits(whole, (rows, others, depth), tile, batch):
                yield Product(rows, others, depth, (), skews, tile, split, warps, 1, 0, across)


def _tiles(nest: Nest) -> list[Tile]:
    """All sides of the kernel unrolled, and windows of what is no position of a product; `nest` is skewed."""
    taps = tuple((a, nest.extent(a) or 1) for a in sides(nest) if (nest.extent(a) or 1) > 1)
    windows = [
        a
        for a in roles_of(nest).positions[:-2]
        if a in added(image_and_other(nest)[0]) and (nest.extent(a) or 1) > 1
    ]
    choices = [[(a, c) for c in WINDOWS if c <= (nest.extent(a) or 1)] for a in windows]
    tiles = [(*taps, *(w for w in window if w[1] > 1)) for window in itertools.product(*choices)]
    return [tile for tile in tiles if math.prod(c for _, c in tile) <= PRODUCTS]


def mutate(nest: Nest, product: Product, rng: random.Random, batch: int = BATCH) -> Product:
    """A product that differs in one choice: positions, the window, the split, warps or the order of loads."""
    choice = rng.randrange(5)
    whole = rewritten(nest, product.pack, product.skew)
    along = roles_of(whole).along
    if choice == 0:
        axes, count = product.rows if along else product.depth
        side = (axes, max(LEAST, min(512, count * 2 if rng.random() < 0.5 else count // 2)))
        return replace(product, rows=side) if along else replace(product, depth=side)
    if choice == 1:
        return replace(product, tile=rng.choice(_tiles(whole)))
    if choice == 2:
        options = splits(whole, (product.rows, product.cols, product.depth), product.tile, batch)
        return replace(product, split=another_split(whole, product.split, options, rng))
    if choice == 3:
        return replace(product, warps=rng.choice((1, 2, 4, 8)))
    return replace(product, ahead=rng.choice(AHEAD), across=rng.random() < 0.5)
