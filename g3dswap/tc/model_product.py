"""A cost model for Triton kernels that are matrix products: matrix units, shared memory, L1, latency.

An operand is loaded from the L1 cache, written to shared memory and read from there by the matrix units.
The slowest of the resources decides, as in `model_triton`, whose constants these are too; here too only the
order that this gives to schedules matters.
"""

from __future__ import annotations

import math

from .model_triton import (
    BANDWIDTH,
    CYCLES,
    ISSUES,
    LATENCY,
    LAUNCH,
    LINE,
    PROCESSORS,
    REGISTERS,
    WARP,
    footprint,
    tile_terms,
)
from .nest import Access, Loop, Nest
from .triton_text import parts
from .words import ITEM_BYTES

RATE = {2: 1024, 4: 512}
"""Multiply-adds of a multiprocessor's matrix units in a cycle, by the bytes of a factor, in practice."""
FIXED = 120
"""Cycles of a product that none of its operands explains: barriers and dependences."""
SHARED_BYTES = 200_000
VECTOR_BYTES = 16
ACCESS_INSTRUCTIONS = 4
"""Of a load with its mask and of the store to shared memory that follows."""


def cost(nest: Nest, warps: int, stages: int, batch: int = 4) -> float:
    """Estimated seconds of a scheduled matrix product, run by programs of so many warps."""
    counts = [loop.count or batch for loop in nest.loops]
    programs = math.prod(c for c, loop in zip(counts, nest.loops) if loop.bind == "grid")
    runs = math.prod(counts[: nest.tile_start]) // programs
    sides = {loop.bind: loop for loop in nest.loops if loop.bind in ("rows", "cols", "depth")}
    alive, own = tile_terms(nest)
    products = int(alive.sum())
    size = ITEM_BYTES[nest.tensors[0].dtype]
    issued, trips, shared, held = 0.0, 0.0, 0.0, 0
    for factor in nest.factors:
        tiles = footprint(nest, factor, alive, own).elements
        along = [p for p in sides.values() if parts(nest, p.axis) & factor.axes]
        elements = math.prod(p.count or 1 for p in along)
        run, width = _contiguous(nest, factor, along)
        issued += tiles * ACCESS_INSTRUCTIONS * max(1.0, elements / (WARP * warps * width)) * warps
        # A row that is shorter than a line takes a part of the time of one.
        trips += tiles * elements * (size / LINE + 0.25 / run)
        shared += 2 * tiles * elements * size / LINE
        held += elements * size
    rows, cols, depth = (sides[bind].count or 1 for bind in ("rows", "cols", "depth"))
    results = math.prod(p.count or 1 for p in own if not nest.is_reduce(p.axis))
    matrix = products * (rows * cols * depth / RATE[size])
    issued += products * 12 * warps
    stores = results * rows * cols
    issued = runs * issued + 4 * stores / WARP + 80 * warps
    trips = runs * trips + stores * size / LINE * 2
    registers = min(255.0, 40 + stores / (WARP * warps) + held / size / (WARP * warps))
    spill = max(1.0, (40 + stores / (WARP * warps)) / 200) ** 2
    resident = max(
        1.0, min(64 // warps, REGISTERS // (registers * WARP * warps), SHARED_BYTES // (held * stages))
    )
    busy = min(1.0, programs / PROCESSORS)
    waves = max(1.0, programs / (PROCESSORS * resident))
    partials = math.prod(counts[i] for i in nest.partial_loops) * (nest.partial_loops != ())
    out = math.prod(e or batch for e in nest.tensor(nest.output.tensor).shape)
    elements = sum(math.prod(e or batch for e in t.shape) for t in nest.tensors)
    traffic = elements * size + partials * out * 8
    total = programs / (PROCESSORS * busy * CYCLES)
    # Loads of a loop around the product are begun some steps ahead.
    chain = runs * (LATENCY / (stages if runs > 1 else 1) + products * FIXED / CYCLES)
    seconds = max(
        total * issued * spill / ISSUES,
        total * trips * spill,
        total * runs * matrix,
        total * runs * shared,
        traffic / BANDWIDTH,
        waves * (LATENCY + chain),
    )
    return (
        seconds
        + 0.15 * total * (issued / ISSUES + trips + runs * (matrix + shared))
        + LAUNCH * (1 + (partials > 1))
    )


def _contiguous(nest: Nest, factor: Access, along: list[Loop]) -> tuple[int, int]:
    """How many elements of a tile follow each other in memory, and how many one load may bring.

    Along channels the condition of a load is the same for all, along positions it is not.
    """
    size = ITEM_BYTES[nest.tensors[0].dtype]
    strides = nest.tensor(factor.tensor).strides
    best = (1, 1)
    for loop in along:
        run = 1
        for part in reversed(_ordered(nest, loop.axis)):
            steps = [
                s * abs(i.coefficient(part)) for i, s in zip(factor.indices, strides) if i.coefficient(part)
            ]
            extent = nest.axis(part).extent or 1
            if extent == 1:
                continue
            if steps != [run] or nest.block(part) > 1:
                break
            run *= extent
        run = min(run, loop.count or 1)
        shifted = any(len(i.terms) > 1 and i.axes & parts(nest, loop.axis) for i in factor.indices)
        width = 1 if shifted or factor.ties else min(VECTOR_BYTES // size, run & -run)
        best = max(best, (run, width))
    return best


def _ordered(nest: Nest, axis: str) -> tuple[str, ...]:
    fused = nest.fused_axis(axis)
    return fused.parts if fused else (axis,)
