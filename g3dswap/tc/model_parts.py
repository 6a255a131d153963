"""What a program in CUDA C++ copies of a factor at a time, for cost models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .box import WIDEST
from .cuda_text import REGISTER
from .nest import Access, Index, Nest
from .roles import Roles, roles_of
from .words import ITEM_BYTES, SECTOR, WARP

GATHERED = 3.5
"""Issue slots of a warp for an element that is gathered."""
IN_FLIGHT = 12
"""Where copies are of single elements: how many of a thread are loaded at once."""
PADDED = 1.15
"""Of a box's elements, with the padding between its rows."""


@dataclass(frozen=True)
class Part:
    """What a program copies of a factor at a time: elements, those of one copy, those that lie together.

    turned: what lies side by side in memory does not do so in shared memory.
    """

    elements: int
    width: int
    together: int
    size: int
    turned: bool

    @property
    def gathered(self) -> float:
        """Issue slots of all warps that gather what has arrived."""
        return 0.0

    @property
    def bytes(self) -> float:
        """Of the sectors that hold them."""
        return self.elements * self.size * max(1.0, SECTOR / (self.together * self.size))

    @property
    def copies(self) -> float:
        """Instructions of a warp."""
        return self.elements / self.width / WARP

    def room(self, buffers: int) -> float:
        """Elements that there is room for, with so many buffers of what is copied."""
        return self.elements * PADDED * buffers

    @property
    def is_async(self) -> bool:
        """Whether a thread goes on while its copies are under way."""
        return not self.is_loaded and not self.turned

    @property
    def is_loaded(self) -> bool:
        """Whether copies are loads and stores of single elements, which are no whole words."""
        return self.width == 1 and self.size < REGISTER

    def waits(self, threads: int) -> float:
        """How often a thread waits for loads, which copies of single elements are."""
        return self.elements / (threads * IN_FLIGHT) if self.is_loaded else 0.0


@dataclass(frozen=True)
class Slab(Part):
    """A part of which the tensor has so many elements, which are copied as they lie and then gathered."""

    slab: int

    is_async, is_loaded = True, False

    @property
    def gathered(self) -> float:
        return self.slab / WARP * GATHERED

    @property
    def bytes(self) -> float:
        return self.slab * self.size

    @property
    def copies(self) -> float:
        return self.slab * self.size / WIDEST / WARP

    def room(self, buffers: int) -> float:
        return self.elements * PADDED + self.slab * buffers


def part_of(nest: Nest, access: Access, level: int, whole: bool = False, lines: bool = False) -> Part:
    """What the loops inside of a level read of an access."""
    tensor = nest.tensor(access.tensor)
    size = ITEM_BYTES[tensor.dtype]
    spans = [
        sum(abs(c) * (_inside(nest, a, level) - 1) for a, c in index.terms) // index.divisor + 1
        for index in access.indices
    ]
    width, together, turned = 1, 1, False
    roles = roles_of(nest)
    side = {*roles.channels, *roles.other}
    dims = zip(access.indices, spans, tensor.shape, tensor.strides)
    for index, span, extent, stride in sorted(dims, key=lambda dim: dim[3]):
        if stride == 1 and span > 1:
            turned = not lines and not index.axes & side
            moves = [c * _inside(nest, a, level) for a, c in index.terms if _is_outside(nest, a, level)]
            steps = (_fixed(roles, index, size), extent or 0, *moves)
            width = next(
                w for w in (8, 4, 2, 1) if w * size <= WIDEST and w <= span and not any(s % w for s in steps)
            )
        if stride == together:
            together *= span
    if whole and lines:
        return Part(*_lying(nest, access, level, spans), together, size, False)
    slab = _slab(nest, access, level, spans) if whole and (turned or width == 1) else 0
    part = math.prod(spans), width, together, size, turned
    return Slab(*part, slab) if slab else Part(*part)


def _lying(nest: Nest, access: Access, level: int, spans: Sequence[int]) -> tuple[int, int]:
    """Elements of a box that has whole dimensions as they lie (`box.lying`), and those of one copy."""
    tensor = nest.tensor(access.tensor)
    dims = sorted(zip(access.indices, spans, tensor.shape, tensor.strides), key=lambda dim: dim[3])
    elements, found, size, others = math.prod(spans), (1, 0), 1, [stride for *_, stride in dims]
    widest = WIDEST // ITEM_BYTES[tensor.dtype]
    for index, span, extent, stride in dims:
        if not extent or not _is_whole(nest, index, level, span, extent) or (extent > 1 and stride != size):
            break
        size, elements = size * extent, elements // span * extent
        others.remove(stride)
        found = max(found, (math.gcd(widest, size, *others), elements))
    return found[1] or elements, found[0]


def _slab(nest: Nest, access: Access, level: int, spans: Sequence[int]) -> int:
    """How many elements that lie together the loops inside of a level read, if those are all: of some
    dimensions whole, and a part of one more; else 0."""
    tensor = nest.tensor(access.tensor)
    size, whole = 1, True
    dims = zip(access.indices, spans, tensor.shape, tensor.strides)
    for index, span, extent, stride in sorted(dims, key=lambda dim: dim[3]):
        own = whole and _is_whole(nest, index, level, span, extent or 0)
        if own and extent and (extent == 1 or stride == size):
            size *= extent
        elif span == 1 or (whole and stride == size and len(index.terms) == 1):
            size, whole = size * span, False
        else:
            return 0
    return size


def _is_whole(nest: Nest, index: Index, level: int, span: int, extent: int) -> bool:
    """Whether the loops inside of a level, which read so many elements, read all of a dimension."""
    return span >= extent and not any(_is_outside(nest, axis, level) for axis in index.axes)


def _fixed(roles: Roles, index: Index, size: int) -> int:
    """Where a part begins that may not begin sooner: fragments of rows are read in words, those of a depth by
    eights, and what is turned around may begin anywhere."""
    if not index.axes & {*roles.channels}:
        return 0
    return index.offset % (REGISTER // size) if roles.along else index.offset


def _is_outside(nest: Nest, axis: str, level: int) -> bool:
    """Whether an axis has steps outside of a level."""
    fused = nest.fusion_of(axis)
    names = (axis, fused.name) if fused else (axis,)
    return any(p.axis in names and p.count != 1 for p in nest.loops[:level])


def _inside(nest: Nest, axis: str, level: int) -> int:
    """How many values of an axis the loops inside of a level run over."""
    own = math.prod(p.count or 1 for p in nest.loops[level:] if p.axis == axis)
    fused = nest.fusion_of(axis)
    if fused is None:
        return own
    steps = math.prod(p.count or 1 for p in nest.loops[level:] if p.axis == fused.name)
    for part, extent in zip(reversed(fused.parts), reversed(fused.extents)):
        here = steps if part == fused.parts[0] else min(steps, extent)
        if part == axis:
            return own * here
        steps = -(-steps // here)
    return own
