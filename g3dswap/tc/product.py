"""A matrix product as a point of the search space: what its rows, columns and depth run along."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from .nest import GRID_BINDS, SIDE_BINDS, Nest
from .program_cuda import MOST_CLUSTER
from .roles import image_and_other, nearest_last, roles_of, sides
from .schedule import Digit, Schedule, fused_name, rewritten
from .skew import Skew, patch_name
from .space_cpp import phases, reduces
from .space_triton import BATCH, PROGRAMS, Split, Tile, split_reductions, steps_outside, walks_of

Side = tuple[tuple[str, ...], int]
Packs = tuple[tuple[str, int], ...]
Skews = tuple[Skew, ...]


@dataclass(frozen=True)
class Product:
    """rows, cols, depth: the axes that each runs along, flattened, and how many steps of them.
    pack:  blocks of a batch axis.  skew: blocks of positions.
    tile:  unroll counts; of an axis of a side, the block of each row.
    split: axes whose outer digit is on the grid, and how many steps of them a program makes: of a reduction
           all if it is not named, of another axis one, or those of a walk.
    stages, ahead: how far ahead Triton begins the loads of a loop, and the printer those of a product.
    across: whether neighbouring lanes load the words of neighbouring blocks, or those of one block.
    staged: whether what is read at shifted positions is copied to shared memory first.
    apart: a batch axis of which each warp has a step.
    teams: of warps that have steps of the loop around the product of their own.
    whole: whether what is staged is copied as it lies, where it lies together.
    lines: whether a depth of positions is read along lines of them.
    clustered: whether programs that split a reduction, but not the batch, are a cluster."""

    rows: Side
    cols: Side
    depth: Side
    pack: Packs
    skew: Skews
    tile: Tile
    split: Split
    warps: int
    stages: int
    ahead: int
    across: bool = False
    staged: bool = False
    apart: Tile = ()
    teams: int = 1
    whole: bool = False
    lines: bool = False
    clustered: bool = False

    @property
    def sides(self) -> dict[str, Side]:
        return {"rows": self.rows, "cols": self.cols, "depth": self.depth}

    def schedule(self, nest: Nest) -> Schedule:
        whole = rewritten(nest, self.pack, self.skew)
        groups = [axes for axes, _ in self.sides.values()]
        own = {a for axes in groups for a in axes}
        counts, split = dict(self.tile), dict(self.split)
        # The sides of the kernel that remain are one loop.
        rest = [a for a in sides(whole) if a not in {*own, *counts} and whole.is_reduce(a)]
        serial = tuple(a for a in rest if (whole.extent(a) or 0) > 1)
        if serial:
            groups.append(serial)
        names = list(dict.fromkeys(fused_name(_group(groups, a.name)) for a in whole.axes))
        inside = [fused_name(serial)] if serial else []
        reductions = [n for n in names if reduces(whole, n) and n not in inside] + inside
        grid = [n for n in names if not reduces(whole, n) or n in split]
        if self.apart:  # or what programs take of the same lines of memory comes at different times
            grid = nearest_last(whole, grid)
        summed = [n for n in grid if reduces(whole, n) and n != batch_axis(whole)]
        bind = dict.fromkeys(summed if self.clustered else (), "cluster")
        digits = [Digit(n, None, bind.get(n, "grid")) for n in sorted(grid, key=bind.__contains__)]
        looped = walks_of(whole, grid, split) + [n for n in reductions if split.get(n) != 1]
        digits += [Digit(n, split.get(n), "serial") for n in looped]
        digits += [Digit(a, c, "warps") for a, c in self.apart]
        digits += [Digit(a, c, "unroll") for a, c in self.tile if a not in own]
        digits += [
            Digit(fused_name(axes), count // math.prod(self.words.get(a, 1) for a in axes), bind)
            for bind, (axes, count) in self.sides.items()
        ]
        blocks = {**{a: p for a, p in phases(whole).items() if a not in own}, **_blocks(self.tile, own)}
        digits += [Digit(a, c, "unroll", True) for a, c in blocks.items()]
        binds = {a: bind for bind, (axes, _) in self.sides.items() for a in axes}
        digits += [Digit(a, c, binds[a], True) for a, c in self.words.items()]
        hints = [("across", 1)] if self.across else []
        hints += [("ahead", self.ahead)]
        hints += [("lines", 1)] if self.lines else []
        hints += [("stages", self.stages)]
        hints += [("teams", self.teams)] if self.teams > 1 else []
        hints += [("warps", self.warps)]
        hints += [("whole", 1)] if self.whole else []
        stage = self._stages(whole, digits) if self.staged else ()
        return Schedule(
            tuple(digits), tuple(g for g in groups if len(g) > 1), stage, tuple(hints), self.pack, self.skew
        )

    def _stages(self, nest: Nest, digits: Sequence[Digit]) -> tuple[tuple[str, int], ...]:
        """The image, outside of what is summed, where its positions are rows; else both factors, inside."""
        image, other = image_and_other(nest)
        outside = [d for d in digits if d.bind in (*GRID_BINDS, "serial")]
        if roles_of(nest).along:
            results = sum(d.bind in GRID_BINDS or not reduces(nest, d.axis) for d in outside)
            return ((image.tensor, results),)
        return (image.tensor, len(outside)), (other.tensor, len(outside))

    @property
    def words(self) -> dict[str, int]:
        """The patches that are read as words, and how many elements those have."""
        words = () if self.staged else self.skew
        return {patch_name(skew.axis): skew.word for skew in words if skew.word > 1}

    def loops(self, nest: Nest, batch: int = BATCH) -> bool:
        """Whether there is a loop around the product, of more than one step; `nest` is the rewritten one."""
        own = named(self.sides.values())
        steps = {**steps_outside(nest, own, dict(self.tile), batch), **dict(self.split)}
        return any(count > 1 for name, count in steps.items() if reduces(nest, name))

    @classmethod
    def of(cls, schedule: Schedule) -> Product:
        """The inverse of `schedule`."""
        groups = {fused_name(g): g for g in schedule.fuse}
        words = {d.bind: d.count or 1 for d in schedule.digits if d.bind in SIDE_BINDS and d.phase}
        sides = {
            d.bind: (groups.get(d.axis, (d.axis,)), (d.count or 1) * words.get(d.bind, 1))
            for d in schedule.digits
            if d.bind in SIDE_BINDS and not d.phase
        }
        own = {a for axes, _ in sides.values() for a in axes}
        unrolled = [d for d in schedule.digits if d.bind == "unroll"]
        tile = tuple((d.axis, d.count or 1) for d in unrolled if not d.phase or d.axis in own)
        steps = {d.axis: d.count or 1 for d in schedule.digits if d.bind == "serial"}
        grid = tuple((d.axis, steps.get(d.axis, 1)) for d in schedule.digits if d.bind in GRID_BINDS)
        hints = (schedule.hint("warps", 4), schedule.hint("stages", 2), schedule.hint("ahead", 0))
        across, teams = bool(schedule.hint("across", 0)), schedule.hint("teams", 1)
        rows, cols, depth = sides["rows"], sides["cols"], sides["depth"]
        staged = bool(schedule.stage)
        apart = tuple((d.axis, d.count or 1) for d in schedule.digits if d.bind == "warps")
        rewrites = schedule.pack, schedule.skew
        flags = tuple(bool(schedule.hint(name, 0)) for name in ("whole", "lines"))
        flags = *flags, any(d.bind == "cluster" for d in schedule.digits)
        return cls(rows, cols, depth, *rewrites, tile, grid, *hints, across, staged, apart, teams, *flags)


def batch_axis(nest: Nest) -> str | None:
    """The axis whose extent only calls know."""
    return next((axis.name for axis in nest.axes if axis.extent is None), None)


def _group(groups: list[tuple[str, ...]], axis: str) -> tuple[str, ...]:
    return next((g for g in groups if axis in g), (axis,))


def _blocks(tile: Tile, own: set[str]) -> dict[str, int]:
    return {a: c for a, c in tile if a in own}


def is_product(schedule: Schedule) -> bool:
    return any(d.bind == "depth" for d in schedule.digits)


def of_tiles(products: Sequence[Product], wanted: Container[Tile]) -> Iterator[Product]:
    """Those of the products that have one of these tiles."""
    return (product for product in products if product.tile in wanted)


def by_tile(found: Sequence[Product]) -> tuple[list[Product], Callable[[Container[Tile]], Iterator[Product]]]:
    """One product of each tile, and all products of some tiles."""
    return list({product.tile: product for product in reversed(found)}.values()), partial(of_tiles, found)


def splits(
    nest: Nest,
    own: tuple[Side, ...],
    tile: Tile,
    batch: int = BATCH,
    wanted: Sequence[int] = PROGRAMS,
    blocks: bool = False,
) -> list[Split]:
    """Reductions to split, for a product with these sides and a tile; `nest` is the rewritten one."""
    return split_reductions(nest, named(own), dict(tile), batch, wanted, blocks)


def clusters(nest: Nest, own: tuple[Side, ...], tile: Tile, batch: int = BATCH, most: int = 4) -> list[Split]:
    """Reductions to split over the programs of a cluster, of which each then has all of the batch.

    At most so many ways, those with the most programs first and, of these, with the fewest steps left over.
    """
    steps = steps_outside(nest, named(own), dict(tile), batch).items()
    several = [(n, count) for n, count in steps if count > 1 and reduces(nest, n) and n != batch_axis(nest)]
    alike = [{-(-count // parts) for parts in range(1, MOST_CLUSTER + 1)} for _, count in several]
    ranked = []
    for shares in itertools.product(*alike):
        parts = [-(-count // share) for (_, count), share in zip(several, shares)]
        programs = math.prod(parts)
        if 1 < programs <= MOST_CLUSTER:
            left = math.prod(map(operator.mul, parts, shares))
            split = tuple((n, share) for (n, _), share, part in zip(several, shares, parts) if part > 1)
            ranked.append((-programs, left, split))
    return [split for _, _, split in sorted(ranked)][:most]


def named(own: Iterable[Side]) -> dict[str, Side]:
    """Sides by the axis that each runs along, flattened if it is several."""
    return {fused_name(axes): (axes, width) for axes, width in own}
