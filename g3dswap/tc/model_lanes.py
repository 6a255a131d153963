"""A cost model for CUDA C++ kernels whose lanes share memory: issue slots, trips to shared memory, bytes.

What one program takes alone, from its first load to its last store, what all of them ask of a multiprocessor
together, and what memory and the L2 cache give hide each other in part.  The constants were fitted to 1,900
kernels on an H200, of depthwise layers in float32 and bfloat16 and of one with eight channels a group;
they explain times within a fifth, and of a space's best four by this model one is within a few percent of the
best that was found.
"""

from __future__ import annotations

import math

from .box import WIDEST
from .cuda_text import REGISTER
from .footprint import accumulators_of, distinct, runs_of, tile_of
from .fragments_cuda import BANKS
from .lanes_cuda import SCATTERED
from .model_parts import Part, part_of
from .model_product import CYCLES
from .model_staged import bytes_of, waves_of
from .model_triton import MOST_PROGRAMS, MOST_WARPS, PROCESSORS
from .nest import Access, Nest
from .program_cuda import MOST_ACCUMULATORS, MOST_SHARED, SHARED, Settings
from .roles import image_and_other
from .words import ITEM_BYTES, MOST_REGISTERS, REGISTERS, SECTOR, WARP

LAUNCH, ARRIVAL = 3.0e-6, 0.64e-6
"""Seconds of a launch, and until the copies of a program have arrived."""
BANDWIDTH, L2 = 4.2e12, 5.5e12
"""Bytes of memory and of the L2 cache in a second."""
PIECE = 64
"""Bytes that come from the L2 cache together, by what programs take that read less."""
COPY, STORE, COLLECTED = 9.5, 4.0, 4.5
"""Issue slots of a copy, of a store of a word, and of a result that is collected before."""
COPIED, COPIED_LINE, STORED, KEPT, WRITTEN = 1.07, 1.26, 0.85, 4.1, 1.0
"""Trips to shared memory or the L1 cache for a copy, for each line that it is of, for each sector that a
store is to, for a result that is kept to be collected, and for each line of those then."""
ISSUE, ALONE, TRIPS_ALONE = 1.06, 0.64, 0.2
"""What parts of issue slots count where all programs issue, and of slots and trips for one alone."""
TOGETHER = 2.43
"""Exponent of the norm by which times are combined that hide each other."""
OWN, HELD = 40, 60
"""Registers of a thread beside its results, and of elements that are read ahead of their use, at most."""


def cost(nest: Nest, settings: Settings, batch: int = 4, room: int = MOST_SHARED) -> float:
    """Estimated seconds of a scheduled nest with such programs; infinite if none fits.

    room: bytes of shared memory that a program can have.
    """
    grid, warps = nest.grid_loops, settings.warps
    factors, out = image_and_other(nest), part_of(nest, nest.output, grid)
    parts = [part_of(nest, factor, grid) for factor in factors]
    shared = max(sum(part.room(1) * part.size for part in parts), out.room(1) * out.size)
    tile = tile_of(nest)
    results = accumulators_of(nest, tile)
    if shared > room or results > MOST_ACCUMULATORS:
        return math.inf
    programs, runs = runs_of(nest, batch)
    widths = [_width(nest, factor) for factor in factors]
    read = [distinct(tile, f, nest.tensor(f.tensor), width) for f, width in zip(factors, widths)]
    elements, words = (sum(counts) for counts in zip(*read))
    slots: float = runs * (tile.terms + words + (elements if out.size < REGISTER else 0))
    loads = zip(factors, widths, read)
    trips: float = runs * sum(number * _trips(nest, factor, width) for factor, width, (_, number) in loads)
    width = _width(nest, nest.output)
    sectors = _sectors(nest, width)
    stored = results / width
    if sectors * SECTOR > SCATTERED * WARP * width * out.size:
        slots, trips = slots + results * COLLECTED, trips + results * KEPT
        written = out.elements / WARP * _lines(out, 1) * WRITTEN
    else:
        slots, trips, written = slots + stored * STORE, trips + stored * sectors * STORED, 0.0
    slots = slots * warps + sum(part.copies for part in parts) * COPY
    trips = trips * warps + written
    trips += sum(part.copies * (COPIED + COPIED_LINE * _lines(part, part.width)) for part in parts)
    registers = min(MOST_REGISTERS, OWN + results + min(HELD, elements)) * WARP * warps
    resident = min(MOST_PROGRAMS, MOST_WARPS // warps, int(SHARED / (shared + 1024)), REGISTERS // registers)
    each, waves = programs / PROCESSORS, waves_of(programs, max(1, resident))
    alone = waves * (ARRIVAL + (slots / min(4, warps) * ALONE + trips * TRIPS_ALONE) / CYCLES)
    issued, served = each * slots / 4 * ISSUE / CYCLES, each * trips / CYCLES
    moved = max(bytes_of(nest, batch) / BANDWIDTH, programs * sum(map(_copied, parts)) / L2)
    return LAUNCH + math.fsum(s**TOGETHER for s in (alone, issued, served, moved)) ** (1 / TOGETHER)


def _copied(part: Part) -> float:
    """Bytes that the L2 cache brings, whose pieces are larger than what lies together."""
    return part.elements * part.size * max(1.0, PIECE / (part.together * part.size))


def _lines(part: Part, width: int) -> float:
    """Lines that a warp's words are of, where not all that a program has lies together."""
    return max(1.0, WARP * width / part.together)


def _lanes_of(nest: Nest, access: Access) -> list[tuple[int, int]]:
    """Of each loop of the lanes, the fastest last: its steps, and how far apart they lie in memory."""
    strides = nest.tensor(access.tensor).strides
    return [
        (
            p.count or 1,
            p.step * sum(s * i.coefficient(p.axis) // i.divisor for i, s in zip(access.indices, strides)),
        )
        for p in nest.loops
        if p.bind == "lanes"
    ]


def _width(nest: Nest, access: Access) -> int:
    """Elements that a thread reads or writes as one word: neighbours in its block."""
    tensor = nest.tensor(access.tensor)
    most = WIDEST // ITEM_BYTES[tensor.dtype]
    for index, stride, extent in zip(access.indices, tensor.strides, tensor.shape):
        if stride == 1 and extent != 1:
            moving = [p for p in nest.loops if p.count != 1 and p.bind in ("serial", "lanes")]
            return math.gcd(most, *(index.coefficient(p.axis) * p.step // index.divisor for p in moving))
    return 1


def _trips(nest: Nest, access: Access, width: int) -> float:
    """Trips to shared memory of a warp that reads a word of so many elements; lines of a box are taken to lie
    in other banks."""
    size = ITEM_BYTES[nest.tensor(access.tensor).dtype]
    words = max(1, width * size // REGISTER)
    found = [(count, abs(step)) for count, step in _lanes_of(nest, access)]
    if not any(step for _, step in found):
        return 1.0
    count, step = found[-1]
    apart = BANKS // math.gcd(BANKS, max(1, step * size // REGISTER)) if step else BANKS
    return words * max(1.0, min(count, WARP // words) / apart)


def _sectors(nest: Nest, width: int) -> int:
    """Sectors that a warp's store of a word of so many results touches."""
    size = ITEM_BYTES[nest.tensor(nest.output.tensor).dtype]
    begins = [0]
    for count, step in reversed(_lanes_of(nest, nest.output)):
        begins = [begin + place * step for place in range(count) for begin in begins][:WARP]
        if len(begins) == WARP:
            break
    ends = (begin + end for begin in begins for end in (0, width - 1))
    return round(len({end * size // SECTOR for end in ends}) * WARP / len(begins))
