"""A cost model for Triton kernels on a large GPU: instructions, trips to the L1 cache, bytes, latency.

A warp's instructions are counted from the register tile; what a factor brings is counted once for all loops
that it does not change in, as it is loaded there.  A multiprocessor takes as long as its schedulers issue, as
its L1 cache serves lines, or as one warp takes alone, which waits for its loads at each step; the device as
long as that, as its L2 cache serves what each program reads (more than the tensor, where neighbours read the
same rows), or as its memory.  The constants are fitted to 5,000 kernels measured on H100s; among the model's
best 8 of a space is one within a few percent of the best that was found.
"""

from __future__ import annotations

import math
from functools import cached_property

from .footprint import (
    WARP,
    accumulators_of,
    footprint,
    lanes_of,
    lines,
    partials_of,
    runs_of,
    tile_of,
    width,
)
from .nest import Access, Nest
from .space_cpp import SIDE
from .triton_text import parts
from .words import ITEM_BYTES, MOST_REGISTERS, REGISTERS, SECTOR

BANDWIDTH = 2.6e12
"""Bytes a second of the device memory, in practice."""
L2_BANDWIDTH = 8.73e12
PROCESSORS = 132
CYCLES = 1.9e9
MOST_WARPS = 64  # of a multiprocessor
MOST_PROGRAMS = 32

ISSUES = 4 * 0.67
"""Instructions that a multiprocessor issues in a cycle, at best and in practice."""
ALONE = 1.92
"""Cycles from one instruction of a warp to the next, if it has the scheduler for itself."""
LATENCY = 4.37e-7
"""Seconds until the loads of a step are through."""
LAUNCH, TOTAL = 4.67e-6, 4.03e-6
"""Seconds of a launch, and of the second stage of a split reduction."""

A_LOAD, A_HALF, AN_ELEMENT_OF_A_WORD, A_STORE = 1.88, 1.38, 1.25, 1.96
"""Instructions of a load with its mask, of making a float32 of what it brought, and of a store."""
A_SUM, BETWEEN = 12, 4.0
"""Instructions of adding an accumulator up over the lanes of a warp, and how many times as many they are
where several warps have parts of a sum, which meet in shared memory."""
A_LINE, A_FURTHER_LINE, A_STORED_LINE = 1.25, 0.16, 1.70
"""Cycles of the L1 cache for the first line of a load, for each further one, and for a line of a store."""
A_PARTIAL = 17.5
"""Bytes of memory traffic for an element of a partial result: written, read and summed."""
TORN = 1.14
"""How often a result is written again, where programs write parts of the same sectors."""
OWN_REGISTERS, PER_VALUE = 31.3, 1.01
"""Registers of a thread: those of addresses and masks, and for each value that is held."""
OF_A_PROCESSOR, OF_THE_DEVICE = 2.5, 4.0
"""Exponents of the norms by which resources are combined that are used side by side."""


def cost(nest: Nest, warps: int = 4, batch: int = 4) -> float:
    """Estimated seconds of a scheduled nest, run by programs of so many warps."""
    work = _Work(nest, warps, batch)
    resident = max(warps, min(MOST_WARPS, MOST_PROGRAMS * warps, work.fitting // warps * warps))
    each = work.programs * warps / PROCESSORS  # warps of a multiprocessor, all in all
    beside = min(each, resident)
    spill = max(1.0, work.registers / MOST_REGISTERS) ** 2
    alone = work.runs * LATENCY + work.instructions * spill * ALONE / CYCLES
    issued = beside * work.instructions * spill / (ISSUES * CYCLES)
    served = beside * work.lines * spill / CYCLES
    processor = max(1.0, each / resident) * _norm(OF_A_PROCESSOR, alone, issued, served)
    read, moved = work.read / L2_BANDWIDTH, work.traffic / BANDWIDTH
    return _norm(OF_THE_DEVICE, processor, read, moved) + LAUNCH + TOTAL * (work.partials > 1)


def _norm(exponent: float, *seconds: float) -> float:
    most = max(seconds)
    return most * math.fsum((s / most) ** exponent for s in seconds) ** (1 / exponent)


class _Work:
    """What a scheduled nest does.  Instructions and lines are those of one warp in all its steps.

    runs: executions of the register tile by a program.
    """

    def __init__(self, nest: Nest, warps: int, batch: int) -> None:
        self.nest = nest
        self.batch, self.warps = batch, warps
        self.counts = nest.counts(batch)
        self.start = nest.tile_start
        self.programs, self.runs = runs_of(nest, batch)
        self.partials = partials_of(nest, batch)
        self.tile = tile_of(nest)
        self.factors = [footprint(nest, factor, self.tile) for factor in nest.factors]
        lanes = lanes_of(nest)
        self.each = max(1.0, math.prod(p.count or 1 for p in lanes) / (WARP * warps))  # elements of a thread
        self.sums = any(nest.is_reduce(p.axis) for p in lanes)
        self.accumulators = accumulators_of(nest, self.tile)
        self.item = ITEM_BYTES[nest.tensors[0].dtype]

    def _loads(self, access: Access) -> int:
        """How often a program loads what a tile reads: once for all loops that it does not change in."""
        serial = [(c, p.axis) for c, p in zip(self.counts, self.nest.loops) if p.bind == "serial"]
        changes = (i for i, (_, axis) in enumerate(serial, 1) if access.axes & parts(self.nest, axis))
        return math.prod(count for count, _ in serial[: max(changes, default=0)])

    @cached_property
    def results(self) -> float:
        """How often a program stores its accumulators."""
        inside = math.prod(self.counts[self.nest.accumulate_from : self.start])
        return self.runs / max(1, inside)

    @cached_property
    def instructions(self) -> float:
        nest = self.nest
        total = float(self.tile.terms * self.runs)
        for access, read in zip(nest.factors, self.factors):
            if read.vector:  # what all threads load together is few, and loaded once
                unpack = A_HALF if read.width == 1 else AN_ELEMENT_OF_A_WORD
                one = A_LOAD * read.words + unpack * read.elements * (self.item < 4)
                total += self._loads(access) * one
        wide = 1 if self.sums or self.partials else width(nest, nest.output)
        summed = A_SUM * (BETWEEN if self.warps > 1 else 1) if self.sums else 0
        stored = self.results * self.accumulators
        return self.each * (total + stored * (A_STORE / wide + summed))

    @cached_property
    def lines(self) -> float:
        """Cycles of the L1 cache for a warp's loads and stores."""
        nest = self.nest
        total = 0.0
        for access, read in zip(nest.factors, self.factors):
            if read.vector:
                one = A_LINE + A_FURTHER_LINE * (read.lines - 1)
                total += self._loads(access) * read.words * one
        line = 1 / self.each if self.sums else lines(nest, nest.output)
        return self.each * (total + self.results * self.accumulators * A_STORED_LINE * line)

    @cached_property
    def registers(self) -> float:
        """Registers that a thread wants: of accumulators and of all factors but the one that streams."""
        held = [read.elements for read in self.factors if read.vector]
        values = self.accumulators + sum(held) - max(held, default=0)
        return OWN_REGISTERS + PER_VALUE * values * self.each

    @property
    def fitting(self) -> int:
        """Warps whose registers fit into a multiprocessor."""
        return int(REGISTERS / (min(MOST_REGISTERS, max(WARP, self.registers)) * WARP))

    @cached_property
    def traffic(self) -> float:
        """Bytes that pass the device memory."""
        tensors = (math.prod(e or self.batch for e in t.shape) for t in self.nest.tensors)
        out = math.prod(e or self.batch for e in self.nest.tensor(self.nest.output.tensor).shape)
        total = float(sum(tensors) * self.item)
        if self.partials > 1:
            return total + A_PARTIAL * self.partials * out
        return total + TORN * out * self.item * self._tears()

    @cached_property
    def read(self) -> float:
        """Bytes that programs read of tensors with the batch: a box for each step of a walk or a split."""
        nest, steps = self.nest, self.programs
        reached = dict(self._reached)
        for i, loop in enumerate(nest.loops[: self.start]):
            if loop.bind != "serial":
                continue
            if nest.is_reduce(loop.axis) and nest.fused_axis(loop.axis) is None and self._short(loop.axis):
                reached[loop.axis] = reached.get(loop.axis, 1) * self.counts[i]
            else:
                steps *= self.counts[i]
        return steps * sum(self._box(f, reached) for f in nest.factors if None in nest.tensor(f.tensor).shape)

    def _short(self, axis: str) -> bool:
        return (self.nest.extent(axis) or SIDE + 1) <= SIDE

    @cached_property
    def _reached(self) -> dict[str, int]:
        """How many steps of each axis the register tile of a program takes."""
        found: dict[str, int] = {}
        for loop in self.nest.loops[self.start :]:
            fused = self.nest.fused_axis(loop.axis)
            left = loop.count or 1
            extents = dict(zip(fused.parts, fused.extents)) if fused else {loop.axis: left}
            for part, blocks in reversed(extents.items()):
                found[part] = found.get(part, 1) * min(left, blocks)
                left = -(-left // blocks)
        return found

    def _spans(self, access: Access, reached: dict[str, int]) -> list[tuple[int, float, int]]:
        """Of each dimension but the batch, the fastest first: stride, elements in reach, extent."""
        nest, found = self.nest, []
        tensor = nest.tensor(access.tensor)
        for index, extent, stride in zip(access.indices, tensor.shape, tensor.strides):
            if extent is not None and extent > 1:
                moves = (
                    abs(c) * (min(reached.get(a, 1), nest.extent(a) or 1) - 1) / index.divisor
                    for a, c in index.terms
                )
                found.append((stride, min(1 + math.fsum(moves), extent), extent))
        return sorted(found, key=lambda dim: dim[0])

    def _box(self, access: Access, reached: dict[str, int]) -> float:
        """Bytes of the sectors that hold what one step reads."""
        run, rows, joined = 1.0, 1.0, True
        for _, span, extent in self._spans(access, reached):
            if joined:
                run, joined = run * span, span >= extent
            else:
                rows *= span
        return rows * math.ceil(run * self.item / SECTOR + 0.5) * SECTOR

    def _tears(self) -> bool:
        """Whether programs write parts of the same sectors."""
        if any(self.nest.fused_axis(p.axis) for p in lanes_of(self.nest)):
            return False
        run = 1.0
        for stride, span, extent in self._spans(self.nest.output, self._reached):
            if span < extent:
                ends = (run * span, stride * extent)
                return any(end * self.item % SECTOR for end in ends)
            run *= extent
        return False
