"""A cost model for Triton kernels that are banded matrix products, of skewed axes.

A program loads a patch of the image for each block of positions, plane by plane, turns it into an operand
and multiplies it with every row of the kernel that meets it.  What decides is either how long one program
takes for a plane, of which few run at a time for want of registers, or what all of them ask of a
multiprocessor together: lines of its L1 cache and multiplications.  The constants were fitted to 1600 kernels
on an H100, in half precision, of depthwise 3x3x3 to 7x7x7 layers and of 4 and 8 channels a group; among the
best eight by this model was, of 14 spaces, in all but two one within a tenth of the fastest.
"""

from __future__ import annotations

import math

from .footprint import LINE, accumulators_of, footprint, runs_of, tile_of
from .model_product import CYCLES, SHARED_BYTES, elements_of
from .model_triton import MOST_WARPS, PROCESSORS
from .nest import SIDE_BINDS, Access, Nest
from .roles import image_and_other
from .words import ITEM_BYTES, MOST_REGISTERS, REGISTERS, WARP

LAUNCH = 3e-6
PLANE = 0.57e-6
"""Seconds that a program takes for a plane of the image, but for its loads."""
LOAD = 2.6e-8
"""Seconds that each load instruction of a thread adds to that."""
LINES = 0.2
"""Cycles of the L1 cache for one of the lines that a warp's load touches."""
KERNEL = 3.6
"""Cycles of a multiprocessor for a warp's load of the kernel's elements, which lie apart."""
MATRIX = 574
"""Multiply-adds of a multiprocessor in a cycle, in practice."""
OWN, OPERAND = 38, 1.4
"""Registers of a thread beside accumulators and operands, and those that one of an operand takes."""
SPILL = 1.6
OVERLAP = 0.3
"""Of the smaller of the two times, what the larger one does not hide."""


def cost(nest: Nest, warps: int, ahead: int, across: bool, batch: int = 4) -> float:
    """Estimated seconds of a scheduled nest, run by programs of so many warps."""
    programs, runs = runs_of(nest, batch)
    tile, threads, size = tile_of(nest), WARP * warps, ITEM_BYTES[nest.tensors[0].dtype]
    image, other = image_and_other(nest)
    planes, bands = (footprint(nest, factor, tile).elements for factor in (image, other))
    elements, kernel, word = elements_of(nest, image), elements_of(nest, other) * bands, _word(nest)
    loads = elements / word / threads
    rows, cols, depth = nest.lengths.values()
    held = accumulators_of(nest, tile) * rows * cols / threads
    operand = OPERAND * elements * size / 4 / threads
    wanted = OWN + held + operand * (1 + ahead)
    registers = min(MOST_REGISTERS, OWN + held + operand * (1 + min(ahead, 2)))
    if (elements + kernel) * size > SHARED_BYTES:
        return math.inf
    resident = max(1, min(MOST_WARPS // warps, int(REGISTERS / (registers * threads))))
    waves = max(1.0, programs / (PROCESSORS * resident))
    alone = waves * runs * planes * (PLANE + LOAD * loads)
    multiplied = tile.terms * rows * cols * depth / MATRIX
    lines = planes * loads * warps * _lines(nest, image, word, across) * LINES
    together = programs / PROCESSORS * runs * (multiplied + lines + kernel / WARP * KERNEL) / CYCLES
    spilled = max(1.0, wanted / MOST_REGISTERS) ** SPILL
    return LAUNCH + spilled * max(alone, together) + OVERLAP * min(alone, together)


def _word(nest: Nest) -> int:
    """How many elements of a patch a load brings."""
    return math.prod(p.count or 1 for p in nest.loops if p.bind in SIDE_BINDS and nest.fusion_of(p.axis))


def _lines(nest: Nest, image: Access, word: int, across: bool) -> float:
    """Cache lines of a warp's load: its lanes have words of neighbouring blocks, or of one block."""
    strides = nest.tensor(image.tensor).strides
    size = ITEM_BYTES[nest.tensors[0].dtype]
    # The line's index adds a block of positions, `step` elements apart, and the patch's elements.
    index = next((i for i, s in zip(image.indices, strides) if s == 1 and len(i.terms) > 1), None)
    if index is None:
        return float(WARP)
    (blocks, step), (patch, _) = sorted(index.terms, key=lambda term: -abs(term[1]))[:2]
    least = word * size * WARP / LINE
    if across:
        lanes = min(WARP, nest.extent(blocks) or 1)
        return max(least, WARP / lanes * max(1.0, lanes * abs(step) * size / LINE))
    return max(least, WARP / min(WARP, -(-(nest.extent(patch) or 1) // word)))
