"""A cost model for C++ kernels: cycles of one core, from counts that need no printing.

The register tile costs the largest of its multiply-adds, its loads and its dependence chains; around it
come loop overhead, results and the copies of stages, and the traffic of footprints that leave the cache.
The constants are those of a core with two 512-bit multiply-add units; only the order that they give to
schedules matters.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from .buffers import Buffer, Flat, index_over_loops, loop_counts, make_buffer
from .nest import Access, Nest
from .place import Placer

REGISTERS = 30
FMA_LATENCY = 4.0
CLOCK = 2.6e9
L1 = 32 << 10
L2 = 1 << 20
SHORT = 64
"""Steps of a reduction after which the rows it started with are still in the nearest cache."""

SCATTERED = 1.5
"""Cycles that a load takes longer where lanes read a small part of each row."""


MOST_CORNERS = 10


@dataclass(frozen=True)
class Counts:
    """Of one register tile: vector multiply-adds, accumulators, vector loads, broadcasts."""

    terms: int
    accumulators: int
    loads: int
    broadcasts: int
    held: int


def count(nest: Nest) -> Counts:
    """What one execution of the register tile does, terms that vanish left out."""
    loops = [(i, p) for i, p in enumerate(nest.loops) if i >= nest.tile_start and p.bind == "unroll"]
    shape = [p.count or 1 for _, p in loops]
    grids = np.indices(shape, sparse=True)
    alive = np.ones(shape, bool)
    keys = []
    for factor in nest.factors:
        key = np.zeros(shape, np.int64)
        for index in factor.indices:
            value = np.asarray(index.offset)
            unit = True
            for axis, c in index.terms:
                fused = nest.fusion_of(axis)
                name, scale = (fused.name, 1) if fused else (axis, c)
                for (_, p), grid in zip(loops, grids):
                    if p.axis == name:
                        value = value + grid * (p.step * scale)
                unit = unit and all(
                    (p.step * c) % index.divisor == 0 for p in nest.loops[: nest.tile_start] if p.axis == axis
                )
            if index.divisor > 1 and unit:
                alive = alive & (value % index.divisor == 0)
                value = value // index.divisor
            key = key * 100003 + value
        keys.append(key)
    parallel = [not nest.is_reduce(p.axis) for _, p in loops]
    accumulators = math.prod(c for c, own in zip(shape, parallel) if own)
    distinct = [len(np.unique(key[alive])) for key in keys]
    vector = [_has_lanes(nest, factor) for factor in nest.factors]
    loads = sum(d for d, v in zip(distinct, vector) if v)
    broadcasts = sum(d for d, v in zip(distinct, vector) if not v)
    stream = max(range(len(distinct)), key=lambda f: (vector[f], distinct[f]))
    held = sum(d for f, d in enumerate(distinct) if f != stream and vector[f])
    return Counts(int(alive.sum()), accumulators, loads, broadcasts, held)


def _has_lanes(nest: Nest, access: Access) -> bool:
    for loop in nest.loops:
        if loop.bind == "lanes":
            fused = nest.fused_axis(loop.axis)
            return bool(access.axes & set(fused.parts if fused else (loop.axis,)))
    return False


def buffers_of(nest: Nest) -> dict[str, Buffer]:
    """Of the stages.  ScheduleError: one has none."""
    return {s.tensor: make_buffer(nest, s) for s in nest.stages}


def check(nest: Nest, buffers: dict[str, Buffer]) -> None:
    """ScheduleError: a corner of a tile has no place in memory.  This takes longer than the cost."""
    placer = Placer(nest, buffers)
    unrolled = {f"v{i}": (p.count or 1) - 1 for i, p in enumerate(nest.loops) if p.bind == "unroll"}
    divided = any(i.divisor > 1 for f in nest.factors for i in f.indices)
    corners = (
        itertools.product(*({0, last} for last in unrolled.values())) if divided else [[0] * len(unrolled)]
    )
    for values in [*itertools.islice(corners, MOST_CORNERS), tuple(unrolled.values())]:
        for access in nest.accesses:
            placer.place(access, dict(zip(unrolled, values)))


def cost(nest: Nest, buffers: dict[str, Buffer], threads: int, batch: int = 1) -> float:
    """Estimated seconds of a nest, which `check` may still refuse."""
    tile = count(nest)
    counts = nest.counts(batch)
    runs = math.prod(counts[: nest.tile_start])
    stores = math.prod(counts[: nest.accumulate_from])
    lane_reduces = any(p.bind == "lanes" and nest.is_reduce(p.axis) for p in nest.loops)
    itemsize = 8 if nest.tensors[0].dtype == "float64" else 4

    multiply = tile.terms / 2
    load = tile.loads * 0.9 + tile.broadcasts * 0.5
    chain = tile.terms / max(1, tile.accumulators) * FMA_LATENCY
    spill = max(0, tile.accumulators + min(tile.held, 8) + 2 - REGISTERS) * 2.0
    body = max(multiply, load, chain) + 0.15 * min(multiply, load) + spill + 6
    edge = 1.0 - _interior(nest, buffers)
    body += edge * (0.15 * body + tile.loads * 0.3 + 5)
    results = tile.accumulators * (24.0 if lane_reduces else 2.0) + 4
    cycles = runs * body + stores * results
    for name, buffer in buffers.items():
        cycles += math.prod(counts[: buffer.level]) * _copy(nest, buffer, name == nest.output.tensor)
        if buffer.size * itemsize > L2:
            cycles += runs * tile.loads * 2.0
        elif buffer.size * itemsize > L1:
            cycles += runs * tile.loads * 0.3
    for factor in nest.factors:
        if factor.tensor not in buffers and _has_lanes(nest, factor):
            cycles += runs * tile.loads * (0.3 + SCATTERED * (1 - _used(nest)))
    tasks = math.prod(counts[: nest.grid_loops])
    balance = -(-tasks // threads) * threads / tasks
    partials = math.prod(counts[i] for i in nest.partial_loops)
    extra = 0.0
    if nest.partial_loops:
        out = math.prod(e or batch for e in nest.tensor(nest.output.tensor).shape)
        extra = partials * out * 1.0 + 20000
    # Among near equals the smaller kernel is sooner compiled and better scheduled.
    size = 1 + tile.terms / 4000
    return float((cycles * balance * size + tasks * 300 + extra) / threads / CLOCK)


def _used(nest: Nest) -> float:
    """The part of a row of memory along the lanes that is read before the next position is.

    What is left of it is fetched again for other lanes, and rows that lie a power of two apart evict
    one another from the nearest cache.
    """
    name = next((p.axis for p in nest.loops if p.bind == "lanes"), None)
    parallel = [p for p in nest.loops[: nest.accumulate_from] if p.bind == "serial" and p.count != 1]
    inner = math.prod(p.count or 1 for p in nest.loops[nest.accumulate_from : nest.tile_start])
    if name is None or (parallel and parallel[-1].axis == name and inner <= SHORT):
        return 1.0
    run = math.prod(p.count or 1 for p in nest.loops[nest.tile_start :] if p.axis == name)
    return min(1.0, run / (nest.extent(name) or 1))


def _interior(nest: Nest, buffers: dict[str, Buffer]) -> float:
    """The share of the tiles in which no load needs a guard: those that fit the tensor everywhere."""
    share = 1.0
    counts = loop_counts(nest)
    inner = {f"v{i}": c if i >= nest.tile_start else 1 for i, c in enumerate(counts.values())}
    for factor in nest.factors:
        if factor.tensor in buffers:
            continue
        for index, extent in zip(factor.indices, nest.tensor(factor.tensor).shape):
            if extent is None or any(nest.fusion_of(a) for a in index.axes):
                continue
            value = index_over_loops(nest, index)
            low, high = value.bounds(counts)
            first, last = value.bounds(inner)
            low, high, span = low // index.divisor, high // index.divisor, (last - first) // index.divisor
            if low < 0 or high >= extent:
                share *= max(0, extent - span) / max(1, high - low + 1 - span)
    return min(1.0, share)


def _copy(nest: Nest, buffer: Buffer, out: bool) -> float:
    """Cycles of one fill: cheap where rows are contiguous in memory, an element at a time where not."""
    row = buffer.rows[-1]
    if isinstance(row, Flat):
        source = row.parts[-1]
        run = row.fused.extents[-1] if len(row.parts) > 1 else row.extent
    else:
        source, run = row.source, row.extent
    contiguous = source is not None and buffer.tensor.strides[source.dim] == 1 and source.phases == 1
    wide = nest.tensors[0].dtype in ("float32", "float64")
    apart = source is not None and buffer.tensor.strides[source.dim] * source.phases >= 16
    element = (0.15 if wide else 0.4) if contiguous else 6.0 if apart else 1.3
    return buffer.size * element + buffer.size / max(1, run) * 8.0 + 20
