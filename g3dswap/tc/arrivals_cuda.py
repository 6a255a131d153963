"""How a part of a tensor comes to shared memory, in the order in which fragments are read there.

Copies of words go to where they are read, if what lies side by side in memory does so there.  Else a part
that lies together is copied as it is, in wide words and while the program does other things; what is to lie
side by side is gathered when it has arrived, and floats are rounded to TF32 then, once and not in every
fragment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ScheduleError
from .box import WIDEST, Box
from .copies_cuda import Run, is_inside, merged, write_copy, write_loops
from .cuda_text import REGISTER, CudaText
from .linear import Linear


class Arrival:
    """A box whose words are copied to where they are read.

    fetched: bytes that a copy of it takes; placed: those of the box, where they are others.
    settles: whether there is something to be done when it has arrived; floats are rounded after that.
    """

    settles = False

    def __init__(self, text: CudaText, box: Box) -> None:
        self.text, self.box = text, box
        self.fetched, self.placed = box.size * text.item, 0

    def begin(self, fetched: str, placed: str) -> str:
        """Where fragments are read, of what is fetched and placed there."""
        return fetched

    def clear(self, placed: str, threads: int, thread: str) -> None:
        """Write what is the same at every copy, where the box is placed."""

    def fetch(self, to: str, threads: int, thread: str) -> None:
        """Begin the copies, each thread its own."""
        write_copy(self.text, self.box, to, threads, thread)

    def settle(self, fetched: str, placed: str, threads: int, thread: str) -> None:
        """Make of what has arrived what fragments are read from; its threads are to meet before and after."""


@dataclass(frozen=True)
class _Slab:
    """Elements that lie together in a tensor: from `base` on, so many, in copies of `width`.

    inside: of each dimension of the box, where the first of them has its place, and how many there are.
    """

    base: Linear
    size: int
    width: int
    inside: tuple[tuple[int, int], ...]


class SlabArrival(Arrival):
    """A box whose part of the tensor is copied as it lies, and then gathered."""

    settles = True

    def __init__(self, text: CudaText, box: Box, slab: _Slab) -> None:
        super().__init__(text, box)
        self.slab = slab
        self.fetched, self.placed = slab.size * text.item, box.size * text.item

    def begin(self, fetched: str, placed: str) -> str:
        return placed

    def clear(self, placed: str, threads: int, thread: str) -> None:
        """Write the zeros around the tensor's elements."""
        if any(first or count < dim.span for (first, count), dim in zip(self.slab.inside, self.box.dims)):
            self.text.emit(f"clear({placed}, {self.placed}, {thread}, {threads});")

    def fetch(self, to: str, threads: int, thread: str) -> None:
        text, slab = self.text, self.slab
        begin = text.form(slab.base, kind="(i64)")
        with text.block():
            text.emit(f"{text.kind}* to = reinterpret_cast<{text.kind}*>({to});")
            text.emit(f"const {text.kind}* from = {self.box.tensor} + ({begin});")

            def copy(to: str, offset: str) -> None:
                text.emit(f"copy<{slab.width * text.item}>(to + ({to}), from + ({offset}), true);")

            write_loops(text, [Run(slab.size, 1, 1, width=slab.width)], threads, thread, copy)

    def settle(self, fetched: str, placed: str, threads: int, thread: str) -> None:
        text, dims, order = self.text, self.box.dims, self.box.order
        first = sum(at * dim.pitch for (at, _), dim in zip(self.slab.inside, dims))
        counts = {d: count for d, (_, count) in enumerate(self.slab.inside)}
        *others, nearest = order
        outer = [Run(counts[d], dims[d].stride, dims[d].pitch) for d in others if counts[d] > 1]
        runs = merged(sorted(outer, key=lambda run: run.stride))
        along = Run(counts[nearest], dims[nearest].stride, 1)
        along.width = math.gcd(WIDEST // text.item, along.count, first, *(run.pitch for run in runs))
        with text.block():
            text.emit(f"{text.kind}* to = reinterpret_cast<{text.kind}*>({placed}) + {first};")
            text.emit(f"const {text.kind}* from = reinterpret_cast<const {text.kind}*>({fetched});")

            def gather(to: str, offset: str) -> None:
                text.emit(f"gather<{along.width}>(to + ({to}), from + ({offset}), {along.stride});")

            write_loops(text, [*runs, along], threads, thread, gather)


class LyingArrival(Arrival):
    """A box with dimensions that lie as they do in the tensor, beside which lanes read.

    reach: from which element of it to which one they do.
    """

    def __init__(self, text: CudaText, box: Box, reach: tuple[int, int]) -> None:
        super().__init__(text, box)
        whole = WIDEST // text.item
        self.before = -(min(0, reach[0]) // whole) * whole * text.item
        self.fetched = self.before + max(box.size, reach[1]) * text.item

    def begin(self, fetched: str, placed: str) -> str:
        return f"{fetched} + {self.before}"

    def fetch(self, to: str, threads: int, thread: str) -> None:
        super().fetch(self.begin(to, ""), threads, thread)


def arrivals_of(text: CudaText, boxes: Sequence[Box], whole: bool) -> list[Arrival]:
    """How each box arrives.

    whole: as it lies, where it can and its own words would be turned around or are single elements.
    ScheduleError: that is so for none of them.
    """
    found = []
    for box in boxes:
        slab = _slab_of(text, box) if whole and (box.is_turned or box.width == 1) else None
        found.append(Arrival(text, box) if slab is None else SlabArrival(text, box, slab))
    if whole and not any(arrival.settles for arrival in found):
        raise ScheduleError("a program reads no whole part of a tensor that it would have to put in order.")
    return found


def _slab_of(text: CudaText, box: Box) -> _Slab | None:
    """What a box has of its tensor, if that lies together: all of some dimensions, and a part of one more."""
    inside = [(0, dim.span) for dim in box.dims]
    size, base, whole = 1, Linear(), True
    for d in sorted(range(len(box.dims)), key=lambda d: box.dims[d].stride):
        dim = box.dims[d]
        if whole and dim.is_whole and dim.extent and (dim.extent == 1 or dim.stride == size):
            inside[d] = -dim.base.const, dim.extent
            size *= dim.extent
            continue
        if not is_inside(text, dim) or (dim.span > 1 and not (whole and dim.stride == size)):
            return None
        whole = False
        size *= dim.span
        base = base + dim.base * dim.stride
    steps = [size, base.const, *(factor for _, factor in base.terms)]
    width = math.gcd(WIDEST // text.item, *steps)
    return _Slab(base, size, width, tuple(inside)) if width * text.item >= REGISTER else None
