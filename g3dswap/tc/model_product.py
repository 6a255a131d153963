"""A cost model for Triton kernels that are matrix products: chains of loads and barriers, issue slots, bytes.

An operand's tile is loaded, written to shared memory and read from there by the matrix units, with barriers
between, and few programs fit on a multiprocessor: what decides is how long that chain is in one program, and
how many programs run one after the other.  The constants were fitted to some hundred kernels on an H100, of
convolutions with 4 to 32 channels a group; they explain times within a third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .footprint import LINE, accumulators_of, footprint, partials_of, runs_of, tile_of
from .model_triton import MOST_WARPS, PROCESSORS
from .nest import SIDE_BINDS, Access, Loop, Nest
from .triton_text import parts
from .words import ITEM_BYTES, MOST_REGISTERS, REGISTERS, WARP

BANDWIDTH = 4e12
CYCLES = 1.75e9
STEP = {False: 4.0e-6, True: 0.6e-6}
"""Seconds of one step of the loops around a product, without and with loads that are begun steps ahead."""
TILE = 4e-8
"""Seconds that each further operand adds to a step."""
LOAD = 2e-9
"""Seconds that each load instruction of a thread adds to a step."""
ISSUE = 12.0
"""Cycles of a scheduler for a load, its address, its condition and its way through shared memory."""
SHORT_ROW = 0.25
"""Of a trip to the cache: what a row costs beside its bytes."""
MATRIX = {2: 1024, 4: 512}
"""Multiply-adds of a multiprocessor's matrix units in a cycle, by the bytes of a factor, in practice."""
LAUNCH, TOTAL = 1.5e-6, 4e-6
"""Seconds of a launch, and of the second stage of a split reduction."""
SHARED_BYTES = 220_000
VECTOR_BYTES = 16
IN_FLIGHT = 48
"""Loads of a thread that the compiler keeps registers for."""


@dataclass(frozen=True)
class _Operands:
    """What the product's factors take in one execution of the tile.

    tiles: operands; loads: instructions of a thread; trips: of all to the L1 cache; held, made: bytes of
    one operand of each factor, and of all.
    """

    tiles: int
    loads: float
    trips: float
    held: int
    made: int


def cost(nest: Nest, warps: int, stages: int, batch: int = 4) -> float:
    """Estimated seconds of a scheduled matrix product, run by programs of so many warps.

    Infinite where the operands of the stages that are under way do not fit into shared memory.
    """
    programs, runs = runs_of(nest, batch)
    tile = tile_of(nest)
    size = ITEM_BYTES[nest.tensors[0].dtype]
    uses = [_operands(nest, f, footprint(nest, f, tile).elements, warps) for f in nest.factors]
    tiles, loads, trips = (sum(getattr(u, what) for u in uses) for what in ("tiles", "loads", "trips"))
    rows, cols, depth = nest.lengths.values()
    results = accumulators_of(nest, tile)
    pipelined = stages > 2 and runs > 1
    made = sum(u.made for u in uses)
    shared = made * (stages - 1) if pipelined else min(made, 2 * sum(u.held for u in uses))
    if pipelined and shared > SHARED_BYTES:
        return math.inf
    registers = 40 + results * rows * cols / (WARP * warps) + min(loads, IN_FLIGHT) * 2
    fitting = REGISTERS // (min(registers, MOST_REGISTERS) * WARP * warps)
    resident = min(MOST_WARPS // warps, fitting, SHARED_BYTES // shared)
    waves = max(1.0, programs / (PROCESSORS * max(1.0, resident)))
    chain = runs * (STEP[pipelined] + tiles * TILE + loads * LOAD)
    total = runs * programs / (min(PROCESSORS, programs) * CYCLES)
    matrix = tile.terms * rows * cols * depth / MATRIX[size]
    partials = partials_of(nest, batch)
    out = math.prod(e or batch for e in nest.tensor(nest.output.tensor).shape)
    moved = sum(math.prod(e or batch for e in t.shape) for t in nest.tensors) * size + partials * out * 8
    spilled = max(1.0, registers / MOST_REGISTERS) ** 2
    return (
        LAUNCH
        + spilled * waves * chain
        + total * (ISSUE * loads * warps / 4 + trips + matrix)
        + moved / BANDWIDTH
        + TOTAL * (partials > 1)
    )


def _operands(nest: Nest, factor: Access, tiles: int, warps: int) -> _Operands:
    size = ITEM_BYTES[nest.tensors[0].dtype]
    elements = elements_of(nest, factor)
    run, width = _contiguous(nest, factor)
    loads = tiles * max(1.0, elements / (WARP * warps * width))
    trips = tiles * elements * (size / LINE + SHORT_ROW / run)
    return _Operands(tiles, loads, trips, elements * size, tiles * elements * size)


def elements_of(nest: Nest, factor: Access) -> int:
    """How many elements one operand of a factor has."""
    return math.prod(loop.count or 1 for loop in _along(nest, factor))


def _along(nest: Nest, factor: Access) -> list[Loop]:
    """The loops of the product's sides that a factor runs along."""
    return [p for p in nest.loops if p.bind in SIDE_BINDS and parts(nest, p.axis) & factor.axes]


def _contiguous(nest: Nest, factor: Access) -> tuple[int, int]:
    """How many elements of a tile follow each other in memory, and how many one load may bring.

    Along channels the condition of a load is the same for all, along positions it is not.
    """
    size = ITEM_BYTES[nest.tensors[0].dtype]
    strides = nest.tensor(factor.tensor).strides
    best = (1, 1)
    for loop in _along(nest, factor):
        fused = nest.fused_axis(loop.axis)
        run = 1
        for part in reversed(fused.parts if fused else (loop.axis,)):
            extent = nest.axis(part).extent or 1
            steps = [s * abs(i.coefficient(part)) for i, s in zip(factor.indices, strides) if part in i.axes]
            if extent > 1 and (steps != [run] or nest.block(part) > 1):
                break
            run *= extent
        run = min(run, loop.count or 1)
        shifted = any(len(i.terms) > 1 and i.axes & parts(nest, loop.axis) for i in factor.indices)
        width = 1 if shifted or factor.ties else min(VECTOR_BYTES // size, run & -run)
        best = max(best, (run, width))
    return best
