"""A cost model for CUDA C++ kernels that are matrix products of an image in shared memory.

A program copies its part of the image, lays out or copies the other factor, multiplies and writes.  What
decides is either how long one program takes from its first load to its last store, of which few run at a
time for want of shared memory or registers, or what all of them ask of a multiprocessor together (issue
slots, matrix units, shared memory), or bytes.  The constants were fitted to 1600 kernels on an H100, of the
three passes of depthwise 3x3x3 to 7x7x7 layers and of 4 to 32 channels a group; they explain times within a
sixth, and of nearly all layers the fastest was among the best fifth by this model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .box import WIDEST
from .cuda_text import REGISTER
from .footprint import LINE, accumulators_of, footprint, partials_of, runs_of, tile_of
from .fragments_cuda import KEPT
from .model_product import CYCLES
from .model_triton import MOST_WARPS, PROCESSORS
from .nest import Access, Index, Nest
from .program_cuda import BUFFERS, COLS, MOST_SHARED, ROWS, SHARED, Settings, deep_of
from .roles import Roles, image_and_other, roles_of
from .words import ITEM_BYTES, MOST_REGISTERS, REGISTERS, SECTOR, WARP

LAUNCH, TOTAL = 4.5e-6, 8e-6
"""Seconds of a launch, and of the second stage of a split reduction."""
BANDWIDTH = 2.5e12
"""Bytes of memory in a second."""
L2 = 5.5e12
"""Bytes of the L2 cache in a second, which what neighbouring programs copy twice comes from."""
PIECE = 3.8e-11
"""Seconds for a piece of a line that is written alone."""
ARRIVAL, AWAITED = 2.1e-6, 0.25
"""Seconds until a program's copies have arrived and its warps have met, and the part of them that is not
hidden where the next copies are under way."""
MATRIX = 2.3
"""Cycles of a multiprocessor for one product of fragments."""
CHAIN = 18.0
"""Cycles between two products of one warp for the same sum."""
COPY, LAID = 11.6, 8.4
"""Issue slots of a warp's copy of one word, and of one element that is laid out."""
PRODUCT = 1.3
"""Issue slots of a product of fragments."""
SCATTER = 2.0
"""Trips to the L1 cache for a warp's load of elements that are laid out."""
GATHERED = 3.5
"""Issue slots of a warp for an element that is gathered."""
STORE, ADDED = 13.0, 6.0
"""Issue slots of a warp for storing a fragment's results, and for adding one to those of other warps."""
WRITTEN, SINGLES = 4.0, 48.0
"""Trips to the L1 cache for storing a fragment's results: as pairs, and where no two lie together."""
IN_FLIGHT, LATENCY = 12, 1200.0
"""Where copies are of single elements: how many of a thread are loaded at once, and the cycles of that."""
PADDED = 1.15
"""Of a box's elements, with the padding between its rows."""
OWN, HOPELESS = 40, 330
"""Registers of a thread beside sums and fragments, and how many are far too many."""
WHOLE_WAVES = 4
"""Fewer waves of programs than these end together."""
OVERLAP = 0.87
"""Of the second largest of the times, what the largest one does not hide."""
SHARED_DEPTH = 0.8
"""Of the estimate, what kernels take whose warps share a depth that is copied as it lies."""


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
class _Slab(Part):
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


@dataclass(frozen=True)
class _Work:
    """What a program needs and does.

    shared: bytes; registers: of a thread; busy: warps that multiply; slots: issue slots of all warps;
    products: of fragments; trips: of warps to shared memory and the L1 cache; chain: products of the same
    sums that follow each other in one warp; arrivals: waits for copies; waits: for loads; copied: bytes;
    pieces: in which results are written, where no line of the cache is written whole; shares_depth: whether
    warps have parts of a depth that is copied as it lies; gathers: whether anything is gathered.
    """

    shared: float
    registers: int
    busy: int
    slots: float
    products: float
    trips: float
    chain: float
    arrivals: float
    waits: float
    copied: float
    pieces: int = 0
    shares_depth: bool = False
    gathers: bool = False


def cost(nest: Nest, settings: Settings, batch: int = 4, room: int = MOST_SHARED) -> float:
    """Estimated seconds of a scheduled nest with such programs; infinite if none fits.

    room: bytes of shared memory that a program can have.
    """
    programs, runs = runs_of(nest, batch)
    warps, along = settings.warps, roles_of(nest).along
    work = _rows(nest, settings, runs) if along else _depth(nest, settings, runs)
    if work.shared > room or work.registers > HOPELESS or (settings.whole and not work.gathers):
        return math.inf
    most = min(MOST_REGISTERS, REGISTERS // (WARP * warps))
    threads = min(most, work.registers) * WARP * warps
    resident = max(1, min(MOST_WARPS // warps, int(SHARED / (work.shared + 1024)), REGISTERS // threads))
    waves = waves_of(programs, resident)
    busy = min(4, work.busy)
    single = max(work.slots / busy, work.products * MATRIX * 4 / busy, work.trips, work.chain * CHAIN)
    alone = waves * (work.arrivals * ARRIVAL + (single + work.waits * LATENCY) / CYCLES)
    each = max(work.slots / 4, work.products * MATRIX, work.trips)
    together = programs / PROCESSORS * each / CYCLES
    memory = max(bytes_of(nest, batch) / BANDWIDTH, programs * work.copied / L2)
    *_, second, first = sorted((alone, together, memory))
    spilled = max(1.0, work.registers / most) ** 2
    launches = LAUNCH + (TOTAL if partials_of(nest, batch) > 1 else 0.0)
    scale = SHARED_DEPTH if work.shares_depth else 1.0
    return scale * (launches + spilled * (first + OVERLAP * second)) + programs * work.pieces * PIECE


def waves_of(programs: int, resident: int) -> float:
    """How often all multiprocessors have so many programs each; the last of a few takes as long as any."""
    waves = max(1.0, programs / (PROCESSORS * resident))
    return math.ceil(waves) if waves < WHOLE_WAVES else waves


def bytes_of(nest: Nest, batch: int) -> float:
    """Of all tensors, and of partial results, which are written and read."""
    whole = sum(math.prod(e or batch for e in t.shape) * ITEM_BYTES[t.dtype] for t in nest.tensors)
    shape = nest.tensor(nest.output.tensor).shape[len(nest.replicas) :]
    return whole + 2 * 4 * math.prod(e or batch for e in shape) * partials_of(nest, batch)


def _rows(nest: Nest, settings: Settings, runs: int) -> _Work:
    image, other = image_and_other(nest)
    tile, (rows, cols, deep) = tile_of(nest), _fragments(nest)
    stage = nest.stage_of(image.tensor)
    assert stage is not None
    level = stage.level
    warps = settings.warps
    part, groups = part_of(nest, image, level, settings.whole), _groups(nest)
    kernel = part_of(nest, other, sum(p.bind == "grid" for p in nest.loops))
    steps = math.prod(p.count or 1 for p in nest.loops[:level] if p.bind == "serial")
    buffers = min(BUFFERS, steps)
    busy, alike = _shared_out(rows, warps, groups)
    outside = (p.count or 1 for p in nest.loops[level : nest.tile_start] if p.axis in other.axes)
    taps = footprint(nest, other, tile).elements * math.prod(outside)
    # Elements of four bytes are read as they lie.
    laid = groups * taps * deep * cols * WARP * 4 if part.size < REGISTER else 0
    kept = taps * deep * cols * 2 <= KEPT
    sums = accumulators_of(nest, tile) * cols
    loads = groups * runs * footprint(nest, image, tile).elements * deep * rows
    products = groups * runs * tile.terms * rows * cols * deep
    stored = groups * sums * rows * steps
    written = stored * (WRITTEN if groups > 1 or _is_paired(nest) else SINGLES)
    copies = part.copies * steps + kernel.copies
    slots = copies * COPY + laid / WARP * LAID + products * PRODUCT + loads + stored * STORE
    slots += part.gathered * steps
    beside = laid if groups == 1 else sums * ROWS * COLS * groups  # or the results that are written together
    return _Work(
        shared=(part.room(buffers) + beside) * part.size,
        registers=OWN + sums * 4 + (taps * deep * cols * 2 if kept else 4),
        busy=busy,
        slots=slots + (warps * taps * deep * cols if kept and groups == 1 else 0),
        products=products,
        trips=loads * 4
        + (0 if kept else products * 2)
        + laid / WARP * SCATTER
        + (part.bytes * steps + kernel.bytes) / LINE
        + written,
        chain=products / sums / groups / alike,
        arrivals=_arrivals(steps, part.is_async),
        waits=steps * part.waits(warps * WARP) + kernel.waits(warps * WARP),
        copied=steps * part.bytes + kernel.bytes,
        pieces=steps * _pieces(nest, level),
        gathers=part.gathered > 0,
    )


def _depth(nest: Nest, settings: Settings, runs: int) -> _Work:
    factors = image_and_other(nest)
    tile, (rows, cols, deep) = tile_of(nest), _fragments(nest)
    parts = [part_of(nest, factor, nest.tile_start, settings.whole) for factor in factors]
    groups, warps, teams, buffers = _groups(nest), settings.warps, settings.teams, settings.buffers
    members, busy_teams = warps // teams, min(teams, runs)
    busy, alike = _shared_out(deep, members, groups)
    planes, others = (footprint(nest, factor, tile).elements for factor in factors)
    sums = accumulators_of(nest, tile) * rows * cols
    products = groups * runs * tile.terms * rows * cols * deep
    loads = groups * runs * planes * rows * deep
    copies = runs * sum(part.copies for part in parts)
    copied = runs * sum(part.bytes for part in parts)
    ahead = buffers > 1 and all(part.is_async for part in parts)
    rounds = -(-runs // teams)
    return _Work(
        shared=max(sum(p.room(buffers) * p.size for p in parts) * teams, groups * sums * 4 * WARP * 4),
        registers=OWN + sums * 4 + others * cols * 2,
        busy=busy * busy_teams,
        slots=copies * COPY
        + runs * sum(part.gathered for part in parts)
        + products * PRODUCT
        + loads
        + sums * 4 * warps * ADDED,
        products=products,
        trips=loads * 4 + groups * runs * others * cols * deep * 2 + copied / LINE,
        chain=products / sums / groups / alike / busy_teams,
        arrivals=_arrivals(rounds, ahead),
        waits=rounds * sum(part.waits(members * WARP) for part in parts),
        copied=copied,
        shares_depth=groups == 1 and not any(part.turned or part.gathered for part in parts),
        gathers=any(part.gathered for part in parts),
    )


def _arrivals(rounds: int, ahead: bool) -> float:
    """How often a program waits for copies, those in part that are under way while it multiplies."""
    return 1 + AWAITED * (rounds - 1) if ahead else rounds


def _fragments(nest: Nest) -> tuple[int, int, int]:
    """How many rows, columns and steps of the depth of fragments a product has."""
    lengths = nest.lengths
    return -(-lengths["rows"] // ROWS), lengths["cols"] // COLS, -(-lengths["depth"] // deep_of(nest))


def _is_paired(nest: Nest) -> bool:
    """Whether columns that follow each other do so in memory, so that two results are one store."""
    last = next(p.axis for p in nest.loops if p.bind == "cols")
    fused = nest.fused_axis(last)
    near, tensor = fused.parts[-1] if fused else last, nest.tensor(nest.output.tensor)
    dims = zip(nest.output.indices, tensor.strides)
    return any(stride == 1 and index.coefficient(near) == 1 for index, stride in dims)


def _pieces(nest: Nest, level: int) -> int:
    """How many pieces results are written in, where no line of the cache is written whole."""
    part = part_of(nest, nest.output, level)
    return part.elements // part.together if part.together * part.size < LINE else 0


def _groups(nest: Nest) -> int:
    """How many steps of a batch axis a program has, one for each warp."""
    return math.prod(p.count or 1 for p in nest.loops if p.bind == "warps")


def _shared_out(pieces: int, warps: int, groups: int) -> tuple[int, float]:
    """How many warps multiply, and how many times as fast as one of them they are through with a group."""
    return (warps, 1.0) if groups > 1 else (min(warps, pieces), pieces / -(-pieces // warps))


def part_of(nest: Nest, access: Access, level: int, whole: bool = False) -> Part:
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
            turned = not index.axes & side
            moves = [c * _inside(nest, a, level) for a, c in index.terms if _is_outside(nest, a, level)]
            steps = (_fixed(roles, index, size), extent or 0, *moves)
            width = next(
                w for w in (8, 4, 2, 1) if w * size <= WIDEST and w <= span and not any(s % w for s in steps)
            )
        if stride == together:
            together *= span
    slab = _slab(nest, access, level, spans) if whole and (turned or width == 1) else 0
    part = math.prod(spans), width, together, size, turned
    return _Slab(*part, slab) if slab else Part(*part)


def _slab(nest: Nest, access: Access, level: int, spans: Sequence[int]) -> int:
    """How many elements that lie together the loops inside of a level read, if those are all: of some
    dimensions whole, and a part of one more; else 0."""
    tensor = nest.tensor(access.tensor)
    size, whole = 1, True
    dims = zip(access.indices, spans, tensor.shape, tensor.strides)
    for index, span, extent, stride in sorted(dims, key=lambda dim: dim[3]):
        outside = any(_is_outside(nest, axis, level) for axis in index.axes)
        if whole and extent and not outside and span >= extent and (extent == 1 or stride == size):
            size *= extent
        elif span == 1 or (whole and stride == size and len(index.terms) == 1):
            size, whole = size * span, False
        else:
            return 0
    return size


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
