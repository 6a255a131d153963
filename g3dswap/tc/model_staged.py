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

from .cuda_text import REGISTER
from .footprint import LINE, Tile, accumulators_of, distinct, footprint, partials_of, runs_of, tile_of
from .fragments_cuda import KEPT
from .model_parts import Part, Slab, part_of
from .model_product import CYCLES
from .model_triton import MOST_WARPS, PROCESSORS
from .nest import Nest
from .program_cuda import BUFFERS, COLS, MOST_SHARED, ROWS, SHARED, Settings, deep_of
from .roles import image_and_other, roles_of
from .words import ITEM_BYTES, MOST_REGISTERS, REGISTERS, WARP

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
STORE, ADDED = 13.0, 6.0
"""Issue slots of a warp for storing a fragment's results, and for adding one to those of other warps."""
WRITTEN, SINGLES = 4.0, 48.0
"""Trips to the L1 cache for storing a fragment's results: as pairs, and where no two lie together."""
LATENCY = 1200.0
"""Cycles until loads of single elements have arrived."""
OWN, HOPELESS = 40, 330
"""Registers of a thread beside sums and fragments, and how many are far too many."""
WHOLE_WAVES = 4
"""Fewer waves of programs than these end together."""
LINE_COPY, LINE_TRIPS = 8.0, 2.2
"""Where a depth is read along lines: issue slots of a copy of words, and its trips to shared memory."""
PACE, PAIRED, CONFLICTING = 1.5, 0.8, 1.3
"""There, cycles between two instructions of a warp alone, those that make a pair of what has been loaded, and
trips for a load, with conflicts."""
LINES = 0.78
"""Of the estimate, what kernels take whose depth is read along lines."""
WIDE = 1 << 12
"""Elements that are more than a line has."""
CLUSTERED = 1.2
"""Of the estimate, what programs take that begin together and wait for each other's sums."""
OVERLAP = 0.87
"""Of the second largest of the times, what the largest one does not hide."""
SHARED_DEPTH = 0.8
"""Of the estimate, what kernels take whose warps share a depth that is copied as it lies."""


@dataclass(frozen=True)
class _Work:
    """What a program needs and does.

    shared: bytes; registers: of a thread; busy: warps that multiply; slots: issue slots of all warps;
    products: of fragments; trips: of warps to shared memory and the L1 cache; chain: products of the same
    sums that follow each other in one warp; arrivals: waits for copies; waits: for loads; copied: bytes;
    pieces: in which results are written, where no line of the cache is written whole; pace: cycles between
    two instructions of a warp alone; scale: of the estimate; lies: whether anything is copied as it lies.
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
    pace: float = 1.0
    scale: float = 1.0
    lies: bool = False


def cost(nest: Nest, settings: Settings, batch: int = 4, room: int = MOST_SHARED) -> float:
    """Estimated seconds of a scheduled nest with such programs; infinite if none fits.

    room: bytes of shared memory that a program can have.
    """
    programs, runs = runs_of(nest, batch)
    warps, along = settings.warps, roles_of(nest).along
    work = _rows(nest, settings, runs) if along else _depth(nest, settings, runs)
    if work.shared > room or work.registers > HOPELESS or (settings.whole and not work.lies):
        return math.inf
    most = min(MOST_REGISTERS, REGISTERS // (WARP * warps))
    threads = min(most, work.registers) * WARP * warps
    resident = max(1, min(MOST_WARPS // warps, int(SHARED / (work.shared + 1024)), REGISTERS // threads))
    waves = waves_of(programs, resident)
    busy = min(4, work.busy)
    single = max(
        work.slots * work.pace / busy, work.products * MATRIX * 4 / busy, work.trips, work.chain * CHAIN
    )
    alone = waves * (work.arrivals * ARRIVAL + (single + work.waits * LATENCY) / CYCLES)
    each = max(work.slots / 4, work.products * MATRIX, work.trips)
    together = programs / PROCESSORS * each / CYCLES
    memory = max(bytes_of(nest, batch) / BANDWIDTH, programs * work.copied / L2)
    *_, second, first = sorted((alone, together, memory))
    spilled = max(1.0, work.registers / most) ** 2
    launches = LAUNCH + (TOTAL if partials_of(nest, batch) > 1 else 0.0)
    scale = work.scale * (CLUSTERED if nest.cluster > 1 else 1.0)
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
    kernel = part_of(nest, other, nest.grid_loops)
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
        lies=isinstance(part, Slab),
    )


@dataclass(frozen=True)
class _Reading:
    """What it takes to read a depth of positions.

    slots, trips: of a warp, for a piece of the depth, its products left out.  pieces: of a step of the loop
    around the product, a shallow one a half.  copy, arrival: slots of a copy of words, and its trips to
    shared memory, or none, where those of its bytes count.  pace, scale: as of the work.
    """

    slots: float
    trips: float
    pieces: float
    copy: float = COPY
    arrival: float = 0.0
    pace: float = 1.0
    scale: float = 1.0


def _turned(nest: Nest, planes: int, others: int, parts: Sequence[Part], groups: int) -> _Reading:
    """By fragments, which are turned around on their way to registers."""
    rows, cols, deep = _fragments(nest)
    shares_depth = groups == 1 and not any(part.turned or part.gathered for part in parts)
    scale = SHARED_DEPTH if shares_depth else 1.0
    return _Reading(float(planes * rows), float(planes * rows * 4 + others * cols * 2), deep, scale=scale)


def _along_lines(nest: Nest, tile: Tile, planes: int, others: int) -> _Reading:
    """By words, each of a line that is read at a few shifts once; and pairs, put together and masked."""
    rows, cols, deep = _fragments(nest)
    image, _ = image_and_other(nest)
    words, alone = (distinct(tile, image, nest.tensor(image.tensor), width)[1] for width in (2, WIDE))
    loads = (words + alone) * rows * 4 + others * cols * 2
    slots = loads + planes * rows * 4 * PAIRED
    pieces = deep * (0.5 if nest.lengths["depth"] <= deep_of(nest) // 2 else 1.0)
    return _Reading(slots, loads * CONFLICTING, pieces, LINE_COPY, LINE_TRIPS, PACE, LINES)


def _depth(nest: Nest, settings: Settings, runs: int) -> _Work:
    factors = image_and_other(nest)
    tile, (rows, cols, deep) = tile_of(nest), _fragments(nest)
    parts = [part_of(nest, f, nest.tile_start, settings.whole, settings.lines) for f in factors]
    groups, warps, teams, buffers = _groups(nest), settings.warps, settings.teams, settings.buffers
    planes, others = (footprint(nest, factor, tile).elements for factor in factors)
    if settings.lines:
        read = _along_lines(nest, tile, planes, others)
    else:
        read = _turned(nest, planes, others, parts, groups)
    members, busy_teams = warps // teams, min(teams, runs)
    busy, alike = _shared_out(deep, members, groups)
    sums = accumulators_of(nest, tile) * rows * cols
    products = groups * runs * tile.terms * rows * cols * deep
    copies = runs * sum(part.copies for part in parts)
    copied = runs * sum(part.bytes for part in parts)
    ahead = buffers > 1 and all(part.is_async for part in parts)
    rounds = -(-runs // teams)
    pieces = groups * runs * read.pieces
    return _Work(
        shared=max(sum(p.room(buffers) * p.size for p in parts) * teams, groups * sums * 4 * WARP * 4),
        registers=OWN + sums * 4 + others * cols * 2,
        busy=busy * busy_teams,
        slots=copies * read.copy
        + runs * sum(part.gathered for part in parts)
        + products * PRODUCT
        + pieces * read.slots
        + sums * 4 * warps * ADDED,
        products=products * (read.pieces / deep),
        trips=pieces * read.trips + (copies * read.arrival or copied / LINE),
        chain=products / sums / groups / alike / busy_teams,
        arrivals=_arrivals(rounds, ahead),
        waits=rounds * sum(part.waits(members * WARP) for part in parts),
        copied=copied,
        pace=read.pace,
        scale=read.scale,
        lies=settings.lines or any(isinstance(part, Slab) for part in parts),
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
