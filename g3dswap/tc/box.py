"""The part of a tensor that a GPU program copies to shared memory: its extents, its order, its pitches.

Along each dimension a program reads `base + x`, with a base of its own and x in [0, span) for all of its
threads and loops.  The box holds all x; where the tensor has no element it holds zero, so that reads need no
guard.  Its innermost dimension is one along which a fragment of the matrix unit has consecutive elements.
Pitches are padded so that the rows which a warp reads at once lie in different banks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import ScheduleError
from .cuda_text import CudaText
from .linear import Linear
from .nest import Access
from .place import Env
from .roles import batches

WIDEST = 16
"""Bytes that one copy of a thread brings, at most."""
BESIDE = 0.75
"""What an element of a line takes, in room and in time, beside the copies of it (measured on an H100)."""
PADS = 8
"""Pads of a pitch that are compared, in steps of what rows begin at multiples of."""


@dataclass(frozen=True)
class Dim:
    """One dimension: in the tensor `base + x`, 0 <= x < span; in the box, x * pitch.

    extent: of the tensor, None for the batch.  stride: of the tensor, in elements.
    """

    base: Linear
    span: int
    extent: int | None
    stride: int
    pitch: int = 0

    @property
    def is_whole(self) -> bool:
        """The box has all of the tensor's, at the same place for every program."""
        low = self.base.const
        return self.extent is not None and not self.base.terms and low <= 0 and low + self.span >= self.extent


@dataclass(frozen=True)
class Box:
    """dims: as the tensor has them.  order: those longer than one, outermost in the box first.
    along: those that fragments have consecutive elements of.
    width: elements of one copy, along the innermost, of which a box has whole ones; at most `widest`.
    turned: where that is not the tensor's innermost, elements of one load along the tensor's."""

    tensor: str
    dims: tuple[Dim, ...]
    order: tuple[int, ...]
    along: frozenset[int]
    width: int
    widest: int
    turned: int = 1

    @property
    def size(self) -> int:
        """Elements, gaps included."""
        outer = self.dims[self.order[0]]
        return outer.span * outer.pitch

    @property
    def nearest(self) -> int:
        """The dimension whose elements lie side by side in the tensor."""
        return min(self.order, key=lambda d: self.dims[d].stride)

    @property
    def is_turned(self) -> bool:
        """What lies side by side in the tensor does not do so here."""
        return self.nearest != self.order[-1]

    def address(self, values: Sequence[Linear]) -> Linear:
        """Where the element with these indices lies in the box."""
        found = Linear()
        for dim, value in zip(self.dims, values):
            found = found + (value - dim.base) * dim.pitch
        return found


def box_of(
    text: CudaText,
    access: Access,
    points: Iterable[Env],
    level: int,
    along: Callable[[str], bool] | None = None,
) -> Box:
    """What a program reads of an access inside of a level, at these points of the unrolled loops.

    along: whether a symbol belongs to the side that fragments have consecutive elements of; without it, they
    lie as they do in the tensor.
    Rows follow each other without gaps.  ScheduleError: the part is no box, or an index divides at run time.
    """
    spotter, outer = text.spotter, text.is_outer(level)
    tensor = spotter.nest.tensor(access.tensor)
    bases: list[Linear | None] = [None] * len(tensor.shape)
    lows, highs = [math.inf] * len(tensor.shape), [-math.inf] * len(tensor.shape)
    fragment: set[int] = set()
    met: list[set[Linear]] = [set() for _ in tensor.shape]  # most points differ in other dimensions
    for point in points:
        values = spotter.indices(access, point)
        for d, value in enumerate(values or ()):
            if value in met[d]:
                continue
            met[d].add(value)
            base = Linear(0, tuple(t for t in value.terms if outer(t[0])))
            inner = value - base
            if text.part(inner, *(f"v{i}" for i in range(level))).terms:
                raise ScheduleError(f"{access} is read along lines that a program has a part of.")
            if base != (bases[d] or base):
                raise ScheduleError(f"{access} is read at places that move apart.")
            bases[d] = base
            low, high = inner.bounds(spotter.counts)
            lows[d], highs[d] = min(lows[d], low), max(highs[d], high)
            if along and any(along(symbol) for symbol, _ in inner.terms):
                fragment.add(d)
    dims = []
    for d, (extent, stride) in enumerate(zip(tensor.shape, tensor.strides)):
        found = bases[d]
        if found is None:
            raise ScheduleError(f"{access} reads nothing.")
        dims.append(Dim(found + int(lows[d]), int(highs[d] - lows[d]) + 1, extent, stride))
    order = sorted((d for d in range(len(dims)) if dims[d].span > 1), key=lambda d: -dims[d].stride)
    if along is None:  # of a single element, any dimension will do
        order = order or [len(dims) - 1]
        fragment = {order[-1]}
    if not order or not fragment:
        raise ScheduleError(f"{access} has no side that lies in consecutive elements.")
    nearest = order[-1]
    width, turned = _width(dims, nearest, text.chunk), 1
    if nearest not in fragment:  # it is turned around on its way to the box, in registers
        order.sort(key=lambda d: d in fragment)
        width, turned = text.pair, width if text.pair > 1 else 1
    elif along:  # groups lie behind each other, so that what is next to a channel is one of the next position
        batch = {*batches(text.nest)}
        order.sort(key=lambda d: not access.indices[d].axes <= batch)
    box = Box(access.tensor, tuple(dims), tuple(order), frozenset(fragment), width, text.chunk, turned)
    return pitched(box, [0] * (len(order) - 1), width)


def aligned(box: Box) -> list[Box]:
    """The box as it is, and with more before and behind its elements for wider copies, the cheapest first.

    Wider copies are fewer, but what they bring besides takes room and time.
    """
    nearest = box.nearest
    dim = box.dims[nearest]
    found = [(_copying(box), 0, box)]
    single = box.is_turned and box.width == 1  # elements that fill a register are turned around one by one
    for width in (1 << n for n in range(1, 1 if single else box.widest.bit_length())):
        before = dim.base.const % width
        span = -(-(dim.span + before) // width) * width
        dims = [*box.dims]
        dims[nearest] = replace(dim, base=dim.base + -before, span=span)
        if _width(dims, nearest, box.widest) < width:
            break
        made = replace(box, dims=tuple(dims))
        made = replace(made, turned=width) if box.is_turned else replace(made, width=width)
        made = pitched(made, [0] * (len(box.order) - 1), made.width)
        found.append((_copying(made), len(found), made))
    return list(dict.fromkeys(made for _, _, made in sorted(found)))


def _copying(box: Box) -> float:
    """What copying a line of the tensor takes, in steps."""
    span = box.dims[box.nearest].span
    return span / (box.turned if box.is_turned else box.width) + BESIDE * span


def _width(dims: Sequence[Dim], innermost: int, most: int) -> int:
    """Elements of one copy: so many lie together in the tensor and in the box, and are in or out together."""
    dim = dims[innermost]
    if dim.stride != 1:
        return 1
    steps = [dim.extent or 0, dim.base.const, *(c for _, c in dim.base.terms)]
    steps += [other.stride for other in dims if other is not dim and other.extent != 1]
    width = most
    while width > 1 and any(step % width for step in steps):
        width //= 2
    return width


def pitched(box: Box, pads: Sequence[int], unit: int) -> Box:
    """The box with its rows a multiple of `unit` elements apart, and so many units of padding at each level.

    Not so where a row is shorter, and a fragment goes on in the next.
    """
    dims = list(box.dims)
    pitch = 1
    for place, d in enumerate(reversed(box.order)):
        if place and (d not in box.along or pitch % unit == 0):
            pitch = -(-pitch // unit) * unit + pads[place - 1] * unit
        dims[d] = replace(dims[d], pitch=pitch)
        span = dims[d].span
        pitch *= span if place else -(-span // box.width) * box.width
    return replace(box, dims=tuple(dims))


def lying(box: Box, conflicts: Callable[[Box], int]) -> tuple[Box, tuple[int, ...]] | None:
    """The box with as many dimensions as they lie in the tensor as its words are the widest for, and those.

    They are the innermost ones, and all of the tensor's; the zeros around are left out.  The others have
    those pads that conflict least.  None: there are none.
    """
    found: list[tuple[int, int, tuple[int, ...]]] = []
    own: list[int] = []
    size = 1
    for d in sorted(range(len(box.dims)), key=lambda d: (box.dims[d].stride, box.dims[d].extent != 1)):
        dim = box.dims[d]
        if not dim.is_whole or not dim.extent or (dim.extent != 1 and dim.stride != size):
            break
        own.append(d)
        size *= dim.extent
        others = (
            box.dims[e].stride for e in range(len(box.dims)) if e not in own and box.dims[e].extent != 1
        )
        found.append((math.gcd(box.widest, size, *others), len(own), tuple(own)))
    if size == 1:
        return None
    _, _, chosen = max(found)
    made = [_as_it_lies(box, chosen, pad) for pad in range(PADS)]
    return min(made, key=lambda each: (conflicts(each), each.size)), chosen


def _as_it_lies(box: Box, own: Sequence[int], pad: int) -> Box:
    """The box with these dimensions as they lie, and so many wide words between the steps of the next one."""
    dims = list(box.dims)
    for d in own:
        extent = dims[d].extent or 1
        dims[d] = replace(dims[d], base=Linear(), span=extent, pitch=dims[d].stride)
    pitch = math.prod(dims[d].span for d in own)
    order = sorted((d for d in range(len(dims)) if dims[d].span > 1), key=lambda d: dims[d].stride)
    for d in order:
        if d not in own:
            pitch = (-(-pitch // box.widest) + pad) * box.widest
            dims[d] = replace(dims[d], pitch=pitch)
            pitch, pad = pitch * dims[d].span, 0
    return replace(box, dims=tuple(dims), order=tuple(reversed(order)), width=1, turned=1)


def without_conflicts(box: Box, unit: int, conflicts: Callable[[Box], int]) -> Box:
    """The box with those pads of its two innermost pitches that conflict least and take the least room."""
    levels = len(box.order) - 1
    best: tuple[int, int, Box] | None = None
    for pads in itertools.product(range(PADS), repeat=min(2, levels)):
        made = pitched(box, [*pads, *[0] * (levels - len(pads))], unit)
        key = conflicts(made), made.size
        if best is None or key < best[:2]:
            best = (*key, made)
    assert best is not None
    return best[2]
