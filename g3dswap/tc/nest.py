"""The loop-nest IR: one contraction, the loops that run it, and the buffers it is staged through.

The whole grammar::

    nest    ::= output += factor * factor                 the contraction, over all axes
                output += addend + ...                    the epilogue, once the reductions are done:
                output = pointwise                        sums first, then functions of the result alone
                with axes, fused axes, loops, stages
    axis    ::= name in [0, extent), parallel or reduce   extent None: the batch, known at run time
    fused   ::= name = (axis, ...)                        row-major flattening; inner extents may be padded
                a part may have unrolled digits of its own: the flat index then counts blocks of that part
    access  ::= tensor(index, ...) [axis == axis]...      ties: zero where the two axes of one differ, or,
                for the output, not written there
    index   ::= (sum coefficient * axis + offset) / divisor
                an inexact division or an index outside its tensor makes the whole term zero
                (of the output: not written); the output's indices tell all parallel axes
    replica ::= parallel axis, a first dimension of the output along which results are summed in the end
    loop    ::= axis-digit = step * [0, count)  bind      grid | serial | unroll | warps | lanes
                                                          | rows | cols | depth
    stage   ::= tensor inside loops[:level]               copy the footprint of the inner loops to a buffer
    pointwise ::= number | output(index, ...)             operators and functions as in the notation
                | -pointwise | pointwise operator pointwise | function(pointwise, ...)

An axis's value is the sum of its digits.  Digits may overshoot the extent (the product of counts is a
multiple of the tile); such iterations contribute nothing and store nothing.  The batch has one loop, of as
many steps as there are, or two: blocks of it on the grid (`Blocks`), whose variable is the first step of a
block, and a serial loop in each.  `unroll`, `lanes`, the three axes of a matrix product and `warps`, of which
each warp has a step, form the register tile, and all of them stand at the end of `loops`; an `unroll` further
out repeats the code.  A side of a product has one loop, and a second one where it runs along blocks of a
part.  A reduction on the grid leaves partial results, of which no function is to be taken: a nest with
pointwise expressions has none.  An unscheduled nest has one serial loop for each axis.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import NestError
from .linear import Linear
from .pointwise import fault
from .syntax import Expr, Name, Ref

BINDS = ("grid", "cluster", "serial", "unroll", "lanes", "rows", "cols", "depth", "warps")
GRID_BINDS = ("grid", "cluster")
"""Of loops whose steps are programs; those of a cluster add up their sums without writing them to memory."""
TILE_BINDS = ("unroll", "lanes", "rows", "cols", "depth", "warps")
SIDE_BINDS = ("rows", "cols", "depth")
VECTOR_BINDS = ("lanes", *SIDE_BINDS)

ENOUGH = 100
"""Programs that blocks of the batch leave, where programs of one step are so many."""


@dataclass(frozen=True)
class Axis:
    name: str
    extent: int | None
    reduce: bool = False


@dataclass(frozen=True)
class Fused:
    """Axes flattened row-major into one; `extents` are the parts' extents, padded but for the first.

    Where a part has digits of its own, its extent here is the number of its blocks.
    """

    name: str
    parts: tuple[str, ...]
    extents: tuple[int, ...]

    @property
    def extent(self) -> int:
        return math.prod(self.extents)

    def weight(self, part: str) -> int:
        """How far the flat index moves when `part` moves by one."""
        return math.prod(self.extents[self.parts.index(part) + 1 :])


@dataclass(frozen=True)
class Tensor:
    """A tensor in memory: extents (None: the batch) and strides, both in elements."""

    name: str
    shape: tuple[int | None, ...]
    strides: tuple[int, ...]
    dtype: str

    def repeated(self, count: int) -> Tensor:
        """So many of these tensors behind each other, each without gaps."""
        size = math.prod(extent for extent in self.shape if extent is not None)
        return replace(self, shape=(count, *self.shape), strides=(size, *self.strides))


@dataclass(frozen=True)
class Index:
    terms: tuple[tuple[str, int], ...]
    offset: int = 0
    divisor: int = 1

    def coefficient(self, axis: str) -> int:
        return next((c for name, c in self.terms if name == axis), 0)

    @functools.cached_property
    def axes(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.terms)

    def is_axis(self, axis: str) -> bool:
        """Whether the index is that axis and nothing else."""
        return self.terms == ((axis, 1),) and self.offset == 0 and self.divisor == 1

    def __str__(self) -> str:
        text = " + ".join(name if c == 1 else f"{c}*{name}" for name, c in self.terms)
        if self.offset or not text:
            text = (
                f"{text} {'-' if self.offset < 0 else '+'} {abs(self.offset)}" if text else str(self.offset)
            )
        return text if self.divisor == 1 else f"({text})/{self.divisor}"


@dataclass(frozen=True)
class Access:
    tensor: str
    indices: tuple[Index, ...]
    ties: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def axes(self) -> frozenset[str]:
        return frozenset().union(*(index.axes for index in self.indices), *self.ties)

    def __str__(self) -> str:
        ties = "".join(f" [{a} == {b}]" for a, b in self.ties)
        return f"{self.tensor}({', '.join(map(str, self.indices))}){ties}"


@dataclass(frozen=True)
class Blocks:
    """Blocks of the batch on the grid.

    most: steps of a block, at most: fewer where there are few programs, and where the batch ends.
    others: programs of each block.
    """

    most: int
    others: int

    def share(self, batch: int) -> int:
        """Steps of a block that is whole."""
        return max(1, min(self.most, batch * self.others // ENOUGH))

    def number(self, batch: int) -> int:
        """How many blocks there are."""
        return -(-batch // self.share(batch))


@dataclass(frozen=True)
class Loop:
    axis: str
    count: int | None
    step: int
    bind: str

    def __str__(self) -> str:
        count = "batch" if self.count is None else str(self.count)
        return f"{self.bind:<6} {self.axis} += {self.step} * [0, {count})"


@dataclass(frozen=True)
class Stage:
    tensor: str
    level: int


@dataclass(frozen=True)
class Nest:
    name: str
    tensors: tuple[Tensor, ...]
    axes: tuple[Axis, ...]
    output: Access
    factors: tuple[Access, ...]
    addends: tuple[Access, ...] = ()
    pointwise: tuple[Expr, ...] = ()
    loops: tuple[Loop, ...] = ()
    fused: tuple[Fused, ...] = ()
    stages: tuple[Stage, ...] = ()
    precision: str = "ieee"
    replicas: tuple[str, ...] = ()
    _by_name: dict[tuple[str, str], Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._by_name.update({("tensor", t.name): t for t in self.tensors})
        self._by_name.update({("axis", a.name): a for a in self.axes})
        self._by_name.update({("fused", f.name): f for f in self.fused})
        self._by_name.update({("part", p): f for f in self.fused for p in f.parts})
        # Of axes and fused ones alike; a search asks for these two a hundred times for each nest.
        self._by_name.update({("extent", a.name): a.extent for a in self.axes})
        self._by_name.update({("extent", f.name): f.extent for f in self.fused})
        self._by_name.update({("reduce", a.name): a.reduce for a in self.axes})
        self._by_name.update({("reduce", f.name): self.axis(f.parts[0]).reduce for f in self.fused})

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self._by_name["tensor", name]
        return found

    def axis(self, name: str) -> Axis:
        found: Axis = self._by_name["axis", name]
        return found

    def fused_axis(self, name: str) -> Fused | None:
        found: Fused | None = self._by_name.get(("fused", name))
        return found

    def fusion_of(self, part: str) -> Fused | None:
        """The fused axis that `part` is a part of."""
        found: Fused | None = self._by_name.get(("part", part))
        return found

    def extent(self, name: str) -> int | None:
        """The extent of an axis or a fused axis."""
        extent: int | None = self._by_name["extent", name]
        return extent

    def is_reduce(self, name: str) -> bool:
        """Whether an axis, or what a fused axis is made of, is summed over."""
        found: bool = self._by_name["reduce", name]
        return found

    def block(self, part: str) -> int:
        """How many values of a part one step of its fused axis stands for: the part's own digits."""
        return math.prod(loop.count or 1 for loop in self.loops if loop.axis == part)

    def covers(self, name: str) -> int | None:
        """How many values the digits of an axis run over, overshoot included."""
        counts = [loop.count for loop in self.loops if loop.axis == name]
        return None if None in counts else math.prod(c for c in counts if c is not None)

    def overshoots(self, name: str) -> bool:
        extent, covers = self.extent(name), self.covers(name)
        return extent is not None and covers is not None and covers > extent

    @functools.cached_property
    def blocks(self) -> Blocks | None:
        """The blocks of the batch, which may be single steps; None where programs have all of it."""
        if not any(loop.count is None and loop.bind == "grid" for loop in self.loops):
            return None
        inner = [loop.count or 1 for i, loop in enumerate(self.loops) if self.is_in_block(i)]
        return Blocks(inner[0] if inner else 1, self.programs)

    @property
    def shares(self) -> Blocks | None:
        """The blocks of the batch, if they are not single steps."""
        return self.blocks if self.blocks and self.blocks.most > 1 else None

    def is_in_block(self, i: int) -> bool:
        """Whether a loop is that over the steps of a block."""
        return self.loops[i].count is not None and self.extent(self.loops[i].axis) is None

    def is_first_of_block(self, i: int) -> bool:
        """Whether a loop's variable is the first step of a block, and not the number of one."""
        return self.shares is not None and self.loops[i].count is None

    def counts(self, batch: int) -> list[int]:
        """How often each loop runs; in a block of the batch, at most."""
        number, share = (self.blocks.number(batch), self.blocks.share(batch)) if self.blocks else (batch, 0)
        found = [number if loop.count is None else loop.count for loop in self.loops]
        return [share if self.is_in_block(i) else count for i, count in enumerate(found)]

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (*self.factors, *self.addends, self.output)

    @property
    def operands(self) -> tuple[str, ...]:
        """The input tensors, in the order in which a kernel takes them."""
        return tuple(t.name for t in self.tensors if t.name != self.output.tensor)

    @property
    def grid_loops(self) -> int:
        """How many loops have programs as steps; all others are inside of them."""
        return sum(loop.bind in GRID_BINDS for loop in self.loops)

    @property
    def programs(self) -> int:
        """How many programs there are, or, with blocks of the batch, for each of these."""
        return math.prod(loop.count or 1 for loop in self.loops[: self.grid_loops])

    @property
    def cluster(self) -> int:
        """How many programs a cluster has."""
        return math.prod(loop.count or 1 for loop in self.loops if loop.bind == "cluster")

    @property
    def tile_start(self) -> int:
        """Where the register tile begins: the loops from here on are unrolled or lanes."""
        start = len(self.loops)
        while start and self.loops[start - 1].bind in TILE_BINDS:
            start -= 1
        return start

    @property
    def lengths(self) -> dict[str, int]:
        """How long each side of the matrix product is, blocks included."""
        return {b: math.prod(p.count or 1 for p in self.loops if p.bind == b) for b in SIDE_BINDS}

    @property
    def accumulate_from(self) -> int:
        """The level at which accumulators live: only reductions and the register tile are inside."""
        level = self.tile_start
        while level and self.is_reduce(self.loops[level - 1].axis) and self.loops[level - 1].bind == "serial":
            level -= 1
        return level

    @property
    def partial_loops(self) -> tuple[int, ...]:
        """The reduction loops that are mapped to the grid; each of their steps makes a partial result."""
        return tuple(i for i, p in enumerate(self.loops) if p.bind == "grid" and self.is_reduce(p.axis))

    @functools.cached_property
    def partial_counts(self) -> tuple[int | None, ...]:
        """How many partial results there are of each element, by what makes them; (): sums are whole.

        None: one for each block of the batch.
        Replicas are added up by the program whose factors are staged; elsewhere each is a partial result.
        """
        grid = tuple(self.loops[i].count for i in self.partial_loops)
        left = () if self.stages else self.replicas
        return (*grid, *(self.extent(name) for name in left))

    def parts(self, batch: int) -> int:
        """How many partial results there are of each element; 1 where sums are whole."""
        blocks = self.blocks.number(batch) if self.blocks else 1
        return math.prod(blocks if count is None else count for count in self.partial_counts)

    def stage_of(self, tensor: str) -> Stage | None:
        return next((s for s in self.stages if s.tensor == tensor), None)

    def unscheduled(self) -> Nest:
        loops = tuple(Loop(a.name, a.extent, 1, "serial") for a in self.axes)
        return replace(self, loops=loops, fused=(), stages=(), _by_name={})

    def __str__(self) -> str:
        lines = [f"nest {self.name}"]
        for t in self.tensors:
            shape = "x".join("batch" if e is None else str(e) for e in t.shape)
            lines.append(f"  tensor {t.name}: {t.dtype} {shape} strides {t.strides}")
        for a in self.axes:
            extent = "batch" if a.extent is None else str(a.extent)
            lines.append(f"  axis {a.name} in [0, {extent}) {'reduce' if a.reduce else 'parallel'}")
        for f in self.fused:
            lines.append(f"  fused {f.name} = ({', '.join(f'{p}:{e}' for p, e in zip(f.parts, f.extents))})")
        indent = "  "
        for level in range(len(self.loops) + 1):
            lines.extend(f"{indent}stage {s.tensor}" for s in self.stages if s.level == level)
            if level < len(self.loops):
                lines.append(f"{indent}{self.loops[level]}")
                indent += " "
        lines.append(f"{indent}{self.output} += {' * '.join(map(str, self.factors))}")
        lines.extend(f"  {self.output} += {addend}" for addend in self.addends)
        lines.extend(f"  {self.output} = {expr}" for expr in self.pointwise)
        return "\n".join(lines)


def digits(nest: Nest, axis: str) -> Linear:
    """The value of an axis (or fused axis) as a linear form over the loop variables `v<i>`."""
    known: Linear | None = nest._by_name.get(("digits", axis))
    if known is None:
        known = Linear.of(0, ((f"v{i}", p.step) for i, p in enumerate(nest.loops) if p.axis == axis))
        nest._by_name["digits", axis] = known
    return known


def _require(condition: bool, nest: Nest, message: str, *values: object) -> None:
    """The values are put in only on failure: searching a space verifies thousands of nests."""
    if not condition:
        raise NestError(f"{nest.name}: {message.format(*values)}.")


def verify(nest: Nest) -> Nest:
    """Check every invariant of the IR and return the nest; NestError is a defect of the pass before."""
    names = [a.name for a in nest.axes]
    _require(len(set(names)) == len(names), nest, "axis names {} are not distinct", names)
    for access in nest.accesses:
        _require(("tensor", access.tensor) in nest._by_name, nest, "unknown tensor {}", access.tensor)
        rank = len(nest.tensor(access.tensor).shape)
        _require(len(access.indices) == rank, nest, "{} does not have {} indices", access, rank)
        for index in access.indices:
            _require(index.axes <= set(names), nest, "{} uses an axis that is not one of {}", access, names)
            _require(index.divisor > 0, nest, "{} divides by {}", access, index.divisor)
        _require(access.axes <= set(names), nest, "{} ties an axis that is not one of {}", access, names)
    for access in (*nest.addends, nest.output):
        _require(not any(nest.axis(a).reduce for a in access.axes), nest, "{} depends on a reduction", access)
    parallel = {a.name for a in nest.axes if not a.reduce}
    _require(nest.output.axes == parallel, nest, "the output is not indexed by exactly the parallel axes")
    told = _told(nest)
    _require(told >= parallel, nest, "the output's indices do not tell {}", sorted(parallel - told))
    for index, name in zip(nest.output.indices, nest.replicas):
        _require(index.is_axis(name), nest, "{} is no replica of the output", name)
    _require(not (nest.replicas and nest.addends), nest, "an addend of a sum that is left in parts")
    for expr in nest.pointwise:
        wrong = fault(expr, str(result_of(nest.output)))
        _require(wrong is None, nest, "{}", wrong)
    return verify_loops(nest)


def _told(nest: Nest) -> set[str]:
    """The axes that an element of the output tells the values of: no two steps of them write to the same."""
    told: set[str] = set()
    while True:
        before = len(told)
        for index in nest.output.indices:
            # Digits of a number: the step of each is beyond what the smaller ones reach together.
            own = [(name, abs(c)) for name, c in index.terms if name not in told]
            reach = 0.0
            for step, extent in sorted((c, nest.extent(name) or math.inf) for name, c in own):
                if step <= reach:
                    break
                reach += step * (extent - 1)
            else:
                told.update(name for name, _ in own)
        told.update(name for tie in nest.output.ties if told & {*tie} for name in tie)
        if len(told) == before:
            return told


def result_of(output: Access) -> Ref:
    """The element of the output that an iteration adds to, as pointwise expressions refer to it."""
    return Ref(output.tensor, tuple(Name(str(index)) for index in output.indices))


def verify_loops(nest: Nest) -> Nest:
    """Check what a schedule adds to a verified nest: fused axes, loops and stages."""
    fused_parts = [p for f in nest.fused for p in f.parts]
    _require(len(set(fused_parts)) == len(fused_parts), nest, "an axis is fused twice")
    for fused in nest.fused:
        kinds = {nest.axis(p).reduce for p in fused.parts}
        _require(len(kinds) == 1, nest, "{} mixes kinds of axes", fused.name)
        for part, extent in zip(fused.parts, fused.extents):
            own, block = nest.axis(part).extent, nest.block(part)
            fits = own is not None and extent * block >= own
            _require(fits, nest, "{} cuts or flattens {}", fused.name, part)
            if own and extent * block > own:
                _require_ended(nest, part)
    _verify_blocks(nest, fused_parts)
    looped = {loop.axis for loop in nest.loops if loop.axis not in fused_parts}
    plain = [a.name for a in nest.axes if a.name not in fused_parts]
    _require(
        looped == {*plain, *(f.name for f in nest.fused)},
        nest,
        "loops over {} miss or repeat axes",
        sorted(looped),
    )
    for name in looped:
        _verify_digits(nest, name)
    whole = not nest.pointwise or not nest.partial_counts
    _require(whole, nest, "a pointwise expression of a sum that is split over the grid")
    grids = nest.grid_loops
    start, accumulate = nest.tile_start, nest.accumulate_from
    for loop in nest.loops:
        _require(loop.bind in BINDS, nest, "unknown bind {}", loop.bind)
    for i, loop in enumerate(nest.loops):
        _require(loop.bind not in VECTOR_BINDS or i >= start, nest, "{} outside the register tile", loop.bind)
        _require((loop.bind in GRID_BINDS) == (i < grids), nest, "programs inside another loop")
        if loop.bind == "cluster":
            innermost = all(other.bind == "cluster" for other in nest.loops[i:grids])
            _require(innermost, nest, "programs of a cluster that do not follow each other")
            _require(nest.is_reduce(loop.axis), nest, "a cluster adds up {}, which is not summed", loop.axis)
        inside = i >= start or accumulate <= i or loop.bind in GRID_BINDS
        _require(
            inside or not nest.is_reduce(loop.axis),
            nest,
            "the reduction {} is outside a parallel loop",
            loop.axis,
        )
    staged = [s.tensor for s in nest.stages]
    _require(len(set(staged)) == len(staged), nest, "a tensor is staged twice")
    for stage in nest.stages:
        known = stage.tensor in {a.tensor for a in (*nest.factors, nest.output)}
        _require(known, nest, "{} cannot be staged", stage.tensor)
        last = accumulate if stage.tensor == nest.output.tensor else start
        _require(
            grids <= stage.level <= last,
            nest,
            "{} is staged at {}, not {}..{}",
            stage.tensor,
            stage.level,
            grids,
            last,
        )
    return nest


def _verify_digits(nest: Nest, name: str) -> None:
    own = [loop for loop in nest.loops if loop.axis == name]
    extent = nest.extent(name)
    if extent is None:
        _verify_batch(nest, name, own)
        return
    span = 1
    for loop in sorted(own, key=lambda p: p.step):
        _require(
            loop.count is not None and loop.count > 0, nest, "a loop over {} has count {}", name, loop.count
        )
        _require(loop.step == span or loop.count == 1, nest, "the digits of {} overlap or leave gaps", name)
        span *= loop.count or 1
    _require(span >= extent, nest, "the digits of {} reach {} of {}", name, span, extent)
    if span > extent:
        fused = nest.fused_axis(name)
        parts = fused.parts if fused else (name,)
        # Past its end, a flat index is past that of its first part.
        for part in parts if nest.is_reduce(name) else parts[:1]:
            _require_ended(nest, part)


def _verify_batch(nest: Nest, name: str, own: list[Loop]) -> None:
    """Check the loops over the batch, which is whole or in blocks: how long the last is only loops know."""
    outer, *inner = own
    whole = outer.count is None and len(inner) <= 1 and all((loop.count or 0) > 0 for loop in inner)
    _require(
        whole and {loop.step for loop in own} == {1}, nest, "the digits of the batch {} are {}", name, own
    )
    binds = ("grid",) if inner else ("grid", "serial")
    _require(outer.bind in binds, nest, "the batch {} is bound to {}", name, outer.bind)
    serial = all(loop.bind == "serial" for loop in inner)
    _require(serial, nest, "a part of the batch {} is bound to {}", name, own[-1].bind)
    level = max(i for i, loop in enumerate(nest.loops) if loop.axis == name)
    for stage in nest.stages:
        inside = not inner or None not in nest.tensor(stage.tensor).shape or stage.level > level
        _require(inside, nest, "{} is staged for blocks of the batch {}", stage.tensor, name)


def _verify_blocks(nest: Nest, parts: list[str]) -> None:
    """Check the digits that parts of fused axes have of their own."""
    step: dict[str, int] = {}
    for loop in reversed([loop for loop in nest.loops if loop.axis in parts]):
        fused = nest.fusion_of(loop.axis)
        sides = [p.bind for p in nest.loops if fused and p.axis == fused.name and p.bind in SIDE_BINDS]
        free = loop.bind == "unroll" or loop.bind in sides
        _require(free and loop.count is not None, nest, "a block of {} is bound", loop.axis)
        whole = loop.step == step.get(loop.axis, 1)
        _require(whole, nest, "the digits of {} overlap or leave gaps", loop.axis)
        step[loop.axis] = loop.step * (loop.count or 1)


def _require_ended(nest: Nest, axis: str) -> None:
    """Overshoot must add nothing and store nothing: past an axis's end, an index is outside its tensor, of a
    factor for a reduction and of the output for a parallel axis or the one that it is tied to."""
    equal = {axis, *(name for tie in nest.output.ties if axis in tie for name in tie)}
    for access in nest.factors if nest.is_reduce(axis) else (nest.output,):
        for index, extent in zip(access.indices, nest.tensor(access.tensor).shape):
            own = equal & index.axes
            if extent is not None and any(_outside(nest, name, index, extent) for name in own):
                return
    _require(False, nest, "nothing ends {}", axis)


def _outside(nest: Nest, axis: str, index: Index, extent: int) -> bool:
    """Whether an index is outside an extent wherever an axis is past its end."""
    if len(index.terms) == 1 and index.is_axis(axis):
        return (nest.axis(axis).extent or 0) >= extent
    own, low, high = index.coefficient(axis), index.offset, index.offset
    for name, coefficient in index.terms:
        others = nest.axis(name).extent
        if others is None:
            return False
        reach = coefficient * (others - 1) if name != axis else coefficient * others
        low += min(reach, 0) if name != axis else reach
        high += max(reach, 0) if name != axis else reach
    return low >= extent * index.divisor if own > 0 else high < 0
