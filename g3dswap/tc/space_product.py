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
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..errors import ScheduleError
from .nest import Access, Nest
from .pack import image_of
from .schedule import Digit, Schedule, fused_name, packed_by
from .space_cpp import phases, reduces
from .space_triton import WARP, Split, Tile, power, split_reductions, steps_outside

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

Side = tuple[tuple[str, ...], int]
Packs = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Product:
    """rows, cols, depth: the axes that each runs along, flattened, and how many steps of them.
    pack:  blocks of a batch axis.  tile: unroll counts; of an axis of a side, the block of each row.
    split: reductions whose outer digit is on the grid, and how many steps of them a program makes.
    stages, ahead: how far ahead Triton begins the loads of a loop, and the printer those of a product."""

    rows: Side
    cols: Side
    depth: Side
    pack: Packs
    tile: Tile
    split: Split
    warps: int
    stages: int
    ahead: int

    @property
    def sides(self) -> dict[str, Side]:
        return {"rows": self.rows, "cols": self.cols, "depth": self.depth}

    def schedule(self, nest: Nest) -> Schedule:
        whole = packed_by(nest, self.pack)
        groups = [axes for axes, _ in self.sides.values()]
        own = {a for axes in groups for a in axes}
        counts, split = dict(self.tile), dict(self.split)
        # The sides of the kernel that remain are one loop.
        rest = [a for a in _sides(whole) if a not in {*own, *counts} and whole.is_reduce(a)]
        serial = tuple(a for a in rest if (whole.extent(a) or 0) > 1)
        if serial:
            groups.append(serial)
        names = list(dict.fromkeys(fused_name(_group(groups, a.name)) for a in whole.axes))
        inside = [fused_name(serial)] if serial else []
        reductions = [n for n in names if reduces(whole, n) and n not in inside] + inside
        digits = [Digit(n, None, "grid") for n in names if not reduces(whole, n) or n in split]
        digits += [Digit(n, split.get(n), "serial") for n in reductions if split.get(n) != 1]
        digits += [Digit(a, c, "unroll") for a, c in self.tile if a not in own]
        digits += [Digit(fused_name(axes), count, bind) for bind, (axes, count) in self.sides.items()]
        blocks = {**{a: p for a, p in phases(whole).items() if a not in own}, **_blocks(self.tile, own)}
        digits += [Digit(a, c, "unroll", True) for a, c in blocks.items()]
        hints = (("ahead", self.ahead), ("stages", self.stages), ("warps", self.warps))
        return Schedule(tuple(digits), tuple(g for g in groups if len(g) > 1), (), hints, self.pack)

    def loops(self, nest: Nest) -> bool:
        """Whether there is a loop around the product, of more than one step; `nest` is the packed one."""
        own = {fused_name(axes): (axes, count) for axes, count in self.sides.values()}
        steps = {**steps_outside(nest, own, dict(self.tile)), **dict(self.split)}
        return any(count > 1 for name, count in steps.items() if reduces(nest, name))

    @classmethod
    def of(cls, schedule: Schedule) -> Product:
        """The inverse of `schedule`."""
        groups = {fused_name(g): g for g in schedule.fuse}
        sides = {
            d.bind: (groups.get(d.axis, (d.axis,)), d.count or 1)
            for d in schedule.digits
            if d.bind in ("rows", "cols", "depth")
        }
        own = {a for axes, _ in sides.values() for a in axes}
        unrolled = [d for d in schedule.digits if d.bind == "unroll"]
        tile = tuple((d.axis, d.count or 1) for d in unrolled if not d.phase or d.axis in own)
        steps = {d.axis: d.count or 1 for d in schedule.digits if d.bind == "serial"}
        grid = tuple((d.axis, steps.get(d.axis, 1)) for d in schedule.digits if d.bind == "grid")
        hints = (schedule.hint("warps", 4), schedule.hint("stages", 2), schedule.hint("ahead", 0))
        rows, cols, depth = sides["rows"], sides["cols"], sides["depth"]
        return cls(rows, cols, depth, schedule.pack, tile, grid, *hints)


def _group(groups: list[tuple[str, ...]], axis: str) -> tuple[str, ...]:
    return next((g for g in groups if axis in g), (axis,))


def _blocks(tile: Tile, own: set[str]) -> dict[str, int]:
    return {a: c for a, c in tile if a in own}


def is_product(schedule: Schedule) -> bool:
    return any(d.bind == "depth" for d in schedule.digits)


def possible(nest: Nest) -> bool:
    """Whether a matrix unit multiplies the factors: in half precision, or where TF32 is allowed."""
    dtype = nest.tensors[0].dtype
    narrow = dtype in ("bfloat16", "float16") or (dtype == "float32" and nest.precision == "tf32")
    return narrow and len(nest.factors) == 2


def _image(nest: Nest) -> tuple[Access, Access]:
    """The factor that packing copies an axis of, which is read at shifted positions; and the other."""
    place = image_of(nest)
    return nest.factors[place], nest.factors[1 - place]


def _sides(nest: Nest) -> list[str]:
    """The sides of the kernel: of the axes that are added to others in an index, those without the batch.

    A convolution has the parallel ones as positions and the reductions as the sides of its kernel; its
    gradient in the kernel has them the other way round.
    """
    image, other = _image(nest)
    added = {a for i in image.indices if len(i.terms) > 1 for a in i.axes}
    batch = {a.name for a in nest.axes if a.extent is None}
    summed = not batch & other.axes  # the other factor is the kernel
    return [a.name for a in nest.axes if a.name in added and a.reduce == summed]


@dataclass(frozen=True)
class _Roles:
    """image, other: parallel axes of one factor alone.  depth: reductions of both.

    along: whether the image's parallel axes are positions, along which shifted indices step; else the depth's
    are, and the image's are channels.
    """

    image: tuple[str, ...]
    other: tuple[str, ...]
    depth: tuple[str, ...]
    along: bool

    @property
    def positions(self) -> tuple[str, ...]:
        return self.image if self.along else self.depth

    @property
    def channels(self) -> tuple[str, ...]:
        return self.depth if self.along else self.image


def _roles(nest: Nest) -> _Roles:
    image, other = _image(nest)
    sides = _sides(nest)
    usable = [a for a in nest.axes if a.extent is not None and a.name not in sides]
    shifted = {a for i in image.indices if len(i.terms) > 1 or i.divisor > 1 for a in i.axes}
    own = tuple(a.name for a in usable if a.name in image.axes - other.axes and not a.reduce)
    mine = tuple(a.name for a in usable if a.name in other.axes - image.axes and not a.reduce)
    both = tuple(a.name for a in usable if a.name in image.axes & other.axes and a.reduce)
    return _Roles(own, mine, both, bool(shifted & set(own)))


def packings(nest: Nest) -> list[Packs]:
    """No packing, and blocks of the batch axis that make its channels a side of a product."""
    image, other = _image(nest)
    shared = image.axes & other.axes & nest.output.axes
    batch = [a for a in nest.axes if a.name in shared and (a.extent or 1) > 1]
    roles = _roles(nest)
    wide = max(math.prod(nest.extent(a) or 1 for a in axes) for axes in (roles.other, roles.channels))
    found: list[Packs] = [()] if wide >= LEAST or not batch else []
    for axis in batch[:1]:
        for count in (2, 4, 8, 16, 32, 64):
            if (axis.extent or 1) % count == 0 and LEAST <= count * wide <= MOST:
                found.append(((axis.name, count),))
    return found


def families(nest: Nest) -> Iterator[tuple[list[Product], Callable[[Container[Tile]], Iterator[Product]]]]:
    """For each packing and choice of positions: every tile once, and all products of some tiles."""
    if not possible(nest):
        return
    for packs in packings(nest):
        try:
            whole = packed_by(nest, packs)
        except ScheduleError:
            continue
        roles = _roles(whole)
        if not all((roles.image, roles.other, roles.depth)):
            continue
        for positions in _runs(whole, roles.positions):
            products = list(_products(whole, roles, packs, positions))
            small = {p.tile: p for p in products if math.prod(n for _, n in p.sides.values()) <= TYPICAL}
            first = list(({p.tile: p for p in reversed(products)} | small).values())
            yield first, partial(_of_tiles, products)


def _of_tiles(products: Sequence[Product], wanted: Container[Tile]) -> Iterator[Product]:
    return (product for product in products if product.tile in wanted)


def _runs(nest: Nest, axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The last one, two or three axes that are longer than one step."""
    long = [a for a in axes if (nest.extent(a) or 1) > 1] or list(axes[-1:])
    return [tuple(long[start:]) for start in range(len(long))]


def _products(nest: Nest, roles: _Roles, packs: Packs, positions: tuple[str, ...]) -> Iterator[Product]:
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
                _warps(nest, rows, cols, tile), _splits(nest, (rows, cols, depth), tile)
            ):
                product = Product(rows, cols, depth, packs, tile, split, warps, *STRAIGHT)
                yield replace(product, stages=LOOPED[0], ahead=LOOPED[1]) if product.loops(nest) else product


def _channels(nest: Nest, axes: tuple[str, ...]) -> list[Side]:
    """All channels at once, or half of very many."""
    extent = math.prod(nest.extent(a) or 1 for a in axes)
    whole = max(LEAST, power(extent, MOST))
    return [(axes, c) for c in ((whole, whole // 2) if whole == MOST else (whole,))]


def _warps(nest: Nest, rows: Side, cols: Side, tile: Tile) -> list[int]:
    """Numbers of warps that hold the accumulators, with at least a piece of a product for each."""
    results = math.prod(c for a, c in tile if not nest.is_reduce(a)) * math.prod(
        p for a, p in phases(nest).items() if a not in dict(tile)
    )
    elements = rows[1] * cols[1]
    found = [w for w in (1, 2, 4, 8) if elements * results / (WARP * w) <= MAX_REGISTERS]
    return [w for w in found if elements >= 256 * w][-2:] or found[:1]


def _tiles(nest: Nest, positions: tuple[str, ...], blocks: Tile) -> list[Tile]:
    """Unrolled sides of the kernel and windows; a side that an exact division divides is unrolled."""
    sides = [a for a in _sides(nest) if (nest.extent(a) or 1) > 1]
    split = phases(nest)
    divided = {
        a
        for f in nest.factors
        for i in f.indices
        if i.divisor > 1 and i.axes & split.keys()
        for a in i.axes
        if a in sides
    }
    shifted = [i.axes for f in nest.factors for i in f.indices if len(i.terms) > 1]
    windows = [
        a.name
        for a in nest.axes
        if a.name not in {*positions, *sides}
        and not a.reduce
        and (a.extent or 1) > 1
        and any(a.name in axes for axes in shifted)
    ]
    choices = [
        [(a, c) for c in WINDOWS if c * split.get(a, 1) <= max(nest.extent(a) or 1, split.get(a, 1))]
        for a in windows
    ]
    found = []
    runs = itertools.combinations(range(len(sides) + 1), 2)
    for unrolled in ((), *(tuple(sides[a:b]) for a, b in runs)):
        if not divided <= set(unrolled):
            continue
        taps = tuple((a, nest.extent(a) or 1) for a in unrolled)
        for window in itertools.product(*choices):
            tile = (*taps, *(w for w in window if w[1] > 1), *blocks)
            # Of the sides that are divided, each phase has its own.
            if math.prod(c for a, c in tile if a not in split) <= MAX_PRODUCTS:
                found.append(tile)
    return found


def _splits(nest: Nest, sides: tuple[Side, ...], tile: Tile) -> list[Split]:
    counts = dict(tile)
    own = {fused_name(axes): (axes, width) for axes, width in sides}
    return split_reductions(nest, own, counts)


def mutate(nest: Nest, product: Product, rng: random.Random) -> Product:
    """A product that differs in one choice: a count, what is unrolled, the split, warps or stages."""
    choice = rng.randrange(5)
    if choice == 0:
        bind = rng.choice(("rows", "cols", "depth"))
        axes, count = product.sides[bind]
        count = max(LEAST, min(512, count * 2 if rng.random() < 0.5 else count // 2))
        rows, cols, depth = ((axes, count) if b == bind else side for b, side in product.sides.items())
        return replace(product, rows=rows, cols=cols, depth=depth)
    whole = packed_by(nest, product.pack)
    if choice == 1:
        known = set(_roles(whole).positions)
        positions = next(axes for axes, _ in product.sides.values() if set(axes) <= known)
        blocks = tuple((a, c) for a, c in product.tile if a in positions)
        return replace(product, tile=rng.choice(_tiles(whole, positions, blocks)))
    if choice == 2:
        options = _splits(whole, (product.rows, product.cols, product.depth), product.tile)
        own = tuple((n, c) for n, c in product.split if reduces(whole, n))
        halved = tuple((n, max(1, c // 2)) for n, c in own)
        doubled = tuple((n, c * 2 if c > 1 else c) for n, c in own)
        return replace(product, split=rng.choice([*options, halved, doubled]))
    if choice == 3:
        return replace(product, warps=rng.choice((1, 2, 4, 8)))
    return replace(product, stages=rng.choice(STAGES), ahead=rng.choice(AHEAD))
