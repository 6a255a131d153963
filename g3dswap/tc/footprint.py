"""What the register tile of a scheduled nest reads: distinct elements and words, and lines of the cache.

Terms that vanish, because what they read lies outside of the tensor wherever the loops stand, are left out.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .nest import VECTOR_BINDS, Access, Axis, Index, Loop, Nest, Tensor
from .triton_text import parts
from .words import ITEM_BYTES, WARP, WORD_BYTES

LINE = 128
PRIME = (1 << 31) - 1  # hashes of points are taken modulo this: two points rarely have the same
MOST_TILES = 4096
"""Tiles that are remembered: many schedules of a search have the same."""

Values = NDArray[np.int64]


@dataclass(frozen=True)
class Footprint:
    """What one execution of the register tile reads of a factor.

    elements, words: distinct ones; width: elements of a word; lines: trips to the cache of a warp's load of
    one word.
    """

    elements: int
    words: int
    width: int
    lines: float
    vector: bool


def runs_of(nest: Nest, batch: int) -> tuple[int, int]:
    """How many programs run a scheduled nest, and how often each executes the register tile."""
    counts = nest.counts(batch)
    programs = math.prod(counts[: nest.grid_loops])
    return programs, math.prod(counts[: nest.tile_start]) // programs


def partials_of(nest: Nest, batch: int) -> int:
    """How many partial results there are to be summed; 0 where there are none."""
    counts = nest.counts(batch)
    return math.prod(counts[i] for i in nest.partial_loops) if nest.partial_counts else 0


def lanes_of(nest: Nest) -> list[Loop]:
    """The loops whose steps run beside each other."""
    return [loop for loop in nest.loops if loop.bind in VECTOR_BINDS]


@dataclass(frozen=True, eq=False)
class Tile:
    """The unrolled loops of a register tile, and which of its terms do not vanish: a dimension a loop."""

    own: tuple[Loop, ...]
    alive: NDArray[np.bool_]

    @functools.cached_property
    def terms(self) -> int:
        """How many do not vanish."""
        return int(self.alive.sum())


def accumulators_of(nest: Nest, tile: Tile) -> int:
    """How many results an element of the lanes, or a product, has in the tile."""
    return math.prod(p.count or 1 for p in tile.own if not nest.is_reduce(p.axis))


def tile_of(nest: Nest) -> Tile:
    """The register tile of a scheduled nest."""
    own = tuple(p for p in nest.loops[nest.tile_start :] if p.bind == "unroll")
    indices = tuple(
        (index, extent, index.divisor > 1 and not any(x % index.divisor for x in _steps(nest, index)))
        for access in nest.factors
        for index, extent in zip(access.indices, nest.tensor(access.tensor).shape)
    )
    return _tile(nest.axes, indices, own)


@functools.lru_cache(maxsize=MOST_TILES)
def _tile(
    axes: tuple[Axis, ...], indices: tuple[tuple[Index, int | None, bool], ...], own: tuple[Loop, ...]
) -> Tile:
    """indices: of the factors, each with its extent and whether the tile alone decides if it divides."""
    alive = np.ones([p.count or 1 for p in own], bool)
    for index, extent, decided in indices:
        value = _values(index, own)
        if decided:
            alive = alive & (value % index.divisor == 0)
        if extent is not None:
            low, high = _outside(axes, index, own)
            alive = alive & (value + high >= 0) & (value + low < extent * index.divisor)
    return Tile(own, alive)


def _outside(axes: tuple[Axis, ...], index: Index, own: tuple[Loop, ...]) -> tuple[int, int]:
    """The least and the most that the loops which the tile does not unroll add to an index's numerator."""
    low = high = 0
    extents = {axis.name: axis.extent or 1 for axis in axes}
    for axis, coefficient in index.terms:
        step = math.prod(p.count or 1 for p in own if p.axis == axis)
        reach = coefficient * step * max(0, -(-extents[axis] // step) - 1)
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high


def _values(index: Index, own: tuple[Loop, ...]) -> Values:
    """The numerator of an index at each point of the tile, the outer loops at zero."""
    value: Values = np.full([1] * len(own), index.offset, np.int64)
    for axis, coefficient in index.terms:
        for dim, loop in enumerate(own):
            if loop.axis == axis:
                shape = [-1 if d == dim else 1 for d in range(len(own))]
                value = value + (np.arange(loop.count or 1) * (loop.step * coefficient)).reshape(shape)
    return value


def footprint(nest: Nest, access: Access, tile: Tile) -> Footprint:
    """What the nest's tile reads of a factor."""
    wide = width(nest, access)
    vector = any(access.axes & parts(nest, p.axis) for p in lanes_of(nest))
    elements, words = distinct(tile, access, nest.tensor(access.tensor), wide)
    return Footprint(elements, words, wide, lines(nest, access) * wide**0.5, vector)


@functools.lru_cache(maxsize=2 * MOST_TILES)
def distinct(tile: Tile, access: Access, tensor: Tensor, width: int) -> tuple[int, int]:
    """How many different elements, and words of so many, the tile reads."""
    elements: Values = np.zeros(tile.alive.shape, np.int64)
    words = elements
    for index, extent, stride in zip(access.indices, tensor.shape, tensor.strides):
        value = _values(index, tile.own) // index.divisor + (1 << 12)
        elements = (elements * 8191 + value) % PRIME
        words = (words * 8191 + (value // width if stride == 1 and extent != 1 else value)) % PRIME
    return len(np.unique(elements[tile.alive])), len(np.unique(words[tile.alive]))


def width(nest: Nest, access: Access) -> int:
    """Elements that one load brings, as `words.word` finds it."""
    tensor = nest.tensor(access.tensor)
    runs = [d for d, (e, s) in enumerate(zip(tensor.shape, tensor.strides)) if s == 1 and e != 1]
    found = WORD_BYTES // ITEM_BYTES[tensor.dtype]
    if len(runs) != 1:
        return 1
    index, extent = access.indices[runs[0]], tensor.shape[runs[0]] or 1
    steps = [extent, *(s for d, s in enumerate(tensor.strides) if d != runs[0] and tensor.shape[d] != 1)]
    steps += [step // index.divisor for step in _steps(nest, index)]
    while found > 1 and any(step % found for step in steps):
        found //= 2
    return found


def _steps(nest: Nest, index: Index) -> list[int]:
    """How far the numerator of an index moves with each loop that the tile does not unroll and that moves."""
    start = nest.tile_start
    return [
        index.coefficient(part) * (nest.block(part) if part != loop.axis else loop.step)
        for i, loop in enumerate(nest.loops)
        if loop.count != 1 and (i < start or loop.bind != "unroll")
        for part in parts(nest, loop.axis)
    ]


def lines(nest: Nest, access: Access) -> float:
    """Cache lines that a warp's load of one element a lane touches, on average."""
    strides = nest.tensor(access.tensor).strides
    size = ITEM_BYTES[nest.tensors[0].dtype]
    lanes = lanes_of(nest)
    if not lanes:
        return 1.0
    loop = lanes[-1]
    fused = nest.fused_axis(loop.axis)
    last = fused.parts[-1] if fused else loop.axis
    scale = nest.block(last) if fused else loop.step
    step = sum(s * abs(i.coefficient(last)) // i.divisor for i, s in zip(access.indices, strides)) * scale
    across = min(WARP, loop.count or 1)
    touched = max(1.0, min(across, across * step * size / LINE) if step else 1.0)
    rest = WARP // across
    if rest > 1 and len(lanes) > 1 and access.axes & parts(nest, lanes[-2].axis):
        touched *= rest
    return min(float(WARP), touched)
