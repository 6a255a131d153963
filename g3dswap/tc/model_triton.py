"""A cost model for Triton kernels on a large GPU: lane operations, coalescing, occupancy, bytes.

Only the order that it gives to schedules matters; the constants are an H100-class device's.
"""

from __future__ import annotations

import math

from .model_cpp import count
from .nest import Access, Nest

BANDWIDTH = 4e12
LANES = 2.5e13
"""Multiply-adds a second, over all lanes."""

LOAD = 4.0
"""Multiply-adds that one load instruction takes the time of, when its lanes are consecutive."""

SCATTERED = 6.0
"""How much longer a load takes whose lanes are not."""

RESIDENT = 132 * 8
"""Programs that the device holds at a time."""

LAUNCH = 4e-6


def cost(nest: Nest, batch: int = 4) -> float:
    """Estimated seconds of a scheduled nest."""
    counts = [loop.count or batch for loop in nest.loops]
    runs = math.prod(counts[: nest.tile_start])
    programs = math.prod(c for c, loop in zip(counts, nest.loops) if loop.bind == "grid")
    lanes = [loop for loop in nest.loops if loop.bind in ("lanes", "rows", "cols", "depth")]
    elements = math.prod(loop.count or 1 for loop in lanes)
    tile = count(nest)
    per_load = max((_load(nest, f) for f in nest.factors), default=1.0)
    operations = runs * (tile.terms * elements + tile.loads * per_load * LOAD + tile.broadcasts * 8.0 + 64.0)
    stores = runs / max(1, math.prod(counts[nest.accumulate_from : nest.tile_start]))
    operations += stores * tile.accumulators * _load(nest, nest.output) * LOAD
    spill = max(1.0, tile.accumulators * elements / 8192)
    idle = max(1.0, RESIDENT / max(1, programs)) ** 0.5
    partials = math.prod(counts[i] for i in nest.partial_loops)
    out = math.prod(e or batch for e in nest.tensor(nest.output.tensor).shape)
    traffic = sum(math.prod(e or batch for e in t.shape) for t in nest.tensors) + partials * out * 2
    return max(operations * spill * idle / LANES, traffic * 4 / BANDWIDTH) + LAUNCH


def _load(nest: Nest, access: Access) -> float:
    """Lane operations of one load of a tile, more where its lanes are not consecutive in memory."""
    strides = nest.tensor(access.tensor).strides
    lanes = [loop for loop in nest.loops if loop.bind in ("lanes", "rows", "cols", "depth")]
    own = 1
    consecutive = 1
    for loop in lanes:
        fused = nest.fused_axis(loop.axis)
        last = fused.parts[-1] if fused else loop.axis
        if access.axes & set(fused.parts if fused else (loop.axis,)):
            own *= loop.count or 1
        step = sum(s * i.coefficient(last) // i.divisor for i, s in zip(access.indices, strides)) * (
            1 if fused else loop.step
        )
        if step == 1:
            consecutive = min(loop.count or 1, nest.extent(loop.axis) or 1)
    if own == 1:
        return 1.0
    return own * (1.0 if consecutive >= 32 else SCATTERED if consecutive < 8 else 2.0)
