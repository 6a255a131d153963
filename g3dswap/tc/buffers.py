"""The buffer that a stage copies a tensor's footprint to: its extents, its order, its addresses.

Every index of a staged access is `base + x`, where the base depends on the loops outside the stage and
x >= 0 on those inside.  The buffer holds all x, and where the tensor has no element it holds zero, so
reads from it need no guard.  Its order serves the lanes:

* An index that steps by q > 1 with the lanes (a stride) is split into q phases, x = q * j + phase; each
  phase lies apart, so the lanes read consecutive elements.
* Dimensions that are indexed by parts of a fused axis become one flat dimension: with padded rows, a
  shift of kh rows and kw columns is one constant step of the flat index.
* The dimension that the lanes run along is the innermost one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import ScheduleError
from .linear import Linear
from .nest import Access, Fused, Index, Nest, Stage, Tensor, digits


@dataclass(frozen=True)
class Source:
    """One dimension of the tensor: index = base + phases * j + phase, 0 <= index < extent."""

    dim: int
    base: Linear
    span: int
    phases: int = 1


@dataclass(frozen=True)
class Row:
    """One dimension of the buffer that holds one dimension of the tensor."""

    source: Source
    extent: int


@dataclass(frozen=True)
class Flat:
    """The dimension of the buffer that holds all parts of a fused axis, from `base` on.

    parts: for each part of the fused axis its dimension, or None where the tensor has none.
    """

    fused: Fused
    parts: tuple[Source | None, ...]
    base: Linear
    extent: int


@dataclass(frozen=True)
class Buffer:
    tensor: Tensor
    level: int
    rows: tuple[Row | Flat, ...]
    split: tuple[Source, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the rows, in elements; the phases lie outside them."""
        strides, step = [], 1
        for row in reversed(self.rows):
            strides.append(step)
            step *= row.extent
        return tuple(reversed(strides))

    @property
    def block(self) -> int:
        """Elements of one phase."""
        size = 1
        for row in self.rows:
            size *= row.extent
        return size

    @property
    def size(self) -> int:
        size = self.block
        for source in self.split:
            size *= source.phases
        return size

    def address(
        self, indices: tuple[Linear, ...], flat: Linear, resolve: Callable[[Linear], Linear]
    ) -> Linear:
        """Where the element with these tensor indices lies in the buffer.

        indices: without the parts of a fused axis.
        flat: the value of the fused axis, for a buffer with a flat dimension.
        resolve: puts constants in for unrolled loop variables; `indices` and `flat` are resolved.
        ScheduleError: a phase is not known at compile time.
        """
        address = Linear()
        split = {s.dim: self._quotient(s, indices, resolve) for s in self.sources}
        for row, stride in zip(self.rows, self.strides):
            if isinstance(row, Row):
                address = address + split[row.source.dim][0] * stride
                continue
            address = address + (flat - resolve(row.base))
            for position, source in enumerate(row.parts):
                if source is not None:
                    address = address + split[source.dim][0] * row.fused.weight(row.fused.parts[position])
        step = self.block
        for source in reversed(self.split):
            address = address + split[source.dim][1] * step
            step *= source.phases
        return address

    @property
    def sources(self) -> tuple[Source, ...]:
        found = []
        for row in self.rows:
            found += [row.source] if isinstance(row, Row) else [s for s in row.parts if s is not None]
        return tuple(found)

    def _quotient(
        self, source: Source, indices: tuple[Linear, ...], resolve: Callable[[Linear], Linear]
    ) -> tuple[Linear, int]:
        x = indices[source.dim] - resolve(source.base)
        if any(c % source.phases for _, c in x.terms):
            raise ScheduleError(
                f"dimension {source.dim} of {self.tensor.name} steps by {source.phases} with the lanes and "
                f"must not be shifted by a loop: unroll the reductions that index it."
            )
        phase = x.const % source.phases
        terms = tuple((s, c // source.phases) for s, c in x.terms)
        return Linear((x.const - phase) // source.phases, terms), phase


def index_over_loops(nest: Nest, index: Index, skip: frozenset[str] = frozenset()) -> Linear:
    """The numerator of an index as a linear form over the loop variables, without the axes in `skip`."""
    value = Linear(index.offset)
    for axis, coefficient in index.terms:
        if axis not in skip:
            value = value + digits(nest, axis) * coefficient
    return value


def loop_counts(nest: Nest) -> dict[str, int]:
    """Counts of the loop variables; the batch counts as one, because no footprint spans it."""
    return {f"v{i}": loop.count or 1 for i, loop in enumerate(nest.loops)}


def make_buffer(nest: Nest, stage: Stage) -> Buffer:
    """The buffer of a stage.  ScheduleError when the footprint is not a box of constant size."""
    access = next(a for a in nest.accesses if a.tensor == stage.tensor)
    tensor = nest.tensor(stage.tensor)
    lanes = {loop.axis for loop in nest.loops if loop.bind == "lanes"}
    outer = {f"v{i}" for i in range(stage.level)}
    counts = loop_counts(nest)
    fused = {f for a in access.axes if (f := nest.fusion_of(a)) is not None}
    if len(fused) > 1:
        raise ScheduleError(f"{access} is indexed by {len(fused)} flattened axes and cannot be staged.")
    sources = [_source(nest, access, d, outer, counts, lanes) for d in range(len(access.indices))]
    in_flat: set[int] = set()
    flat: Flat | None = None
    for f in fused:
        parts = tuple(_part(access, sources, part) for part in f.parts)
        in_flat = {s.dim for s in parts if s is not None}
        value = digits(nest, f.name)
        base, inner = _split(value, outer)
        reach = 0
        for position, source in enumerate(parts):
            if source is not None:
                reach += (source.span - 1) // source.phases * f.weight(f.parts[position])
        flat = Flat(f, parts, base, inner.bounds(counts)[1] + reach + 1)
    if access is nest.output:
        _require_dense(nest, stage)
    plain = [s for s in sources if s.dim not in in_flat]
    plain.sort(key=lambda s: (bool(access.indices[s.dim].axes & lanes), -tensor.strides[s.dim]))
    rows: list[Row | Flat] = [Row(s, (s.span - 1) // s.phases + 1) for s in plain]
    if flat is not None:
        rows.append(flat)
    return Buffer(tensor, stage.level, tuple(rows), tuple(s for s in sources if s.phases > 1))


def _split(value: Linear, outer: set[str]) -> tuple[Linear, Linear]:
    """The parts of a linear form that belong to the loops outside and inside a stage."""
    return (
        Linear(0, tuple((s, c) for s, c in value.terms if s in outer)),
        Linear(value.const, tuple((s, c) for s, c in value.terms if s not in outer)),
    )


def _fused_parts(nest: Nest, index: Index) -> frozenset[str]:
    return frozenset(a for a in index.axes if nest.fusion_of(a) is not None)


def _source(
    nest: Nest, access: Access, dim: int, outer: set[str], counts: Mapping[str, int], lanes: set[str]
) -> Source:
    index = access.indices[dim]
    parts = _fused_parts(nest, index)
    if parts and index.divisor > 1:
        raise ScheduleError(f"{access} divides a flattened axis; leave {', '.join(sorted(parts))} unfused.")
    base, inner = _split(index_over_loops(nest, index, parts), outer)
    if any(nest.loops[int(s[1:])].count is None for s, _ in inner.terms):
        raise ScheduleError(
            f"{access} cannot be staged outside the loop over the batch; stage it further in."
        )
    if any(c % index.divisor for _, c in base.terms):
        raise ScheduleError(f"the footprint of {access} moves by a fraction; stage it further out.")
    low, high = inner.bounds(counts)
    low, high = -(-low // index.divisor), high // index.divisor
    base = Linear(low, tuple((s, c // index.divisor) for s, c in base.terms))
    phases = 1
    for axis, coefficient in index.terms:
        if axis in parts:
            phases = abs(coefficient)
        elif axis in lanes:
            step = next(p.step for p in nest.loops if p.axis == axis and p.bind == "lanes")
            phases = abs(coefficient) * step // index.divisor
    return Source(dim, base, max(1, high - low + 1), max(1, phases))


def _part(access: Access, sources: list[Source], part: str) -> Source | None:
    found = [s for s in sources if access.indices[s.dim].coefficient(part)]
    if len(found) > 1 or any(access.indices[s.dim].coefficient(part) < 0 for s in found):
        raise ScheduleError(
            f"{access} is indexed by {part} more than once or backwards and cannot be flattened."
        )
    return found[0] if found else None


def _require_dense(nest: Nest, stage: Stage) -> None:
    """What is copied out must be all computed: the digits inside the stage leave no gaps."""
    for axis in {loop.axis for loop in nest.loops}:
        inner = sorted(p.step for p in nest.loops[stage.level :] if p.axis == axis and p.count != 1)
        if inner and inner[0] != 1:
            raise ScheduleError(
                f"the buffer of {stage.tensor} has gaps along {axis}; stage it outside its phase."
            )
