"""How a program whose warps share the depth of a product adds up their sums, and writes the results.

Sums go to shared memory as they lie in the product, those of as many warps at a time as there is room for.
Then each thread has results, neighbouring threads neighbouring ones, and adds up what belongs to each in a
fixed order: the same sum of every warp, and the replicas of a skewed axis, whose results are diagonals.
Programs of a cluster then add up what each of them has found, and each writes a part of the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import ScheduleError
from .cuda_text import MEET
from .fragments_cuda import BANKS
from .program_cuda import COLS, MOST_SHARED, ROWS, SHARED, Program
from .words import MOST_REGISTERS, REGISTERS

BESIDE = 64
"""Registers of a thread beside its sums, about."""
RESERVED = 1024
"""Bytes of shared memory that each program takes beside its own."""
BETWEEN = 4
"""How many banks of shared memory neighbouring columns or sums are apart."""
SIDES = "rows", "cols"


@dataclass(frozen=True)
class _Digit:
    """A loop over results or over what is added up for one, or an axis that a side runs along.

    near: how far apart its steps lie in the result.  rows, cols: how far in the product.
    """

    name: str
    count: int
    near: int = 0
    rows: int = 0
    cols: int = 0


class DepthSums:
    """sums: products of each warp, of so many rows and columns of fragments."""

    def __init__(self, program: Program, sums: int, rows: int, cols: int) -> None:
        self.program, self.nest = program, program.nest
        self.sums, self.rows, self.cols = sums, rows, cols
        registers = min(MOST_REGISTERS, BESIDE + sums * rows * cols * 4)
        programs = max(1, REGISTERS // (registers * program.threads))
        room = max(program.shared, min(MOST_SHARED, SHARED // programs - RESERVED))
        self._lie_apart(BETWEEN)
        if program.apart and program.warps * self.size * 4 > MOST_SHARED:
            self._lie_apart(0)
        slots = program.warps if program.apart else min(program.warps, room // (self.size * 4))
        self.slots = max(1, slots)
        program.shared = max(program.shared, self.slots * self.size * 4)

    def _lie_apart(self, banks: int) -> None:
        """Lay out the sums: columns lie behind each other, and they and whole sums so many banks apart.

        A warp writes eight rows of every other column, and reads rows or sums that follow each other.
        """
        self.pitch = self.rows * ROWS + banks
        self.each = self.cols * COLS * self.pitch
        self.each += (banks - self.each) % BANKS
        self.size = self.sums * self.each

    def add_up(self) -> None:
        """Bring the sums of all warps to shared memory; those without room there are added to others."""
        emit, block = self.program.emit, self.program.block
        each, turns = self.rows * self.cols, -(-self.program.warps // self.slots)
        emit("float* const all = reinterpret_cast<float*>(memory);", "#pragma unroll 1")
        with block(f"for (int turn = 0; turn < {turns}; ++turn)"):
            with block(f"if (warp / {self.slots} == turn)"):
                emit(f"float* const to = all + warp % {self.slots} * {self.size};", "#pragma unroll")
                with block(f"for (int i = 0; i < {self.sums * each * 2}; ++i)"):
                    emit(f"const int number = i / {each * 2}, row = i / {self.cols * 2} % {self.rows};")
                    emit(f"const int col = i / 2 % {self.cols}, half = i % 2;")
                    emit("const float* const own = sum[number][row][col] + half * 2;")
                    emit(f"const int rows = row * {ROWS} + half * 8 + lane / 4;")
                    emit(f"const int cols = col * {COLS} + lane % 4 * 2;")
                    emit(f"float* const at = to + number * {self.each} + cols * {self.pitch} + rows;")
                    for place, value in (("0", "own[0]"), (self.pitch, "own[1]")):
                        added = f"turn ? at[{place}] + {value} : {value}" if turns > 1 else value
                        emit(f"at[{place}] = {added};")
            emit(MEET)

    def store(self) -> None:
        """Write the results."""
        program = self.program
        spot = program.spotter.spot(self.nest.output, {})
        assert spot is not None
        loops = [*program.parallel, *(int(own[1:]) for own in program.apart)]
        results = [self._loop(i, spot.address.coefficient(f"v{i}")) for i in loops]
        places, added, begin = self._places()
        results = sorted([*results, *places], key=lambda digit: digit.near)
        there = program.where(spot, None, program.shift())
        written = program.test(spot), f"narrow({there}, {program.finished('found', {})});"
        if self.nest.cluster > 1:
            self._store_together(results, begin, added, written)
            return
        with self._each(results, begin, "thread", program.threads):
            self._find(added)
            program.emit_if(*written)

    def _store_together(
        self,
        results: Sequence[_Digit],
        begin: Mapping[str, int],
        added: Sequence[_Digit],
        written: tuple[str, str],
    ) -> None:
        """Keep what this program has found where others of its cluster read it, and write a part of all."""
        program, cluster = self.program, self.nest.cluster
        behind = self.slots * self.size
        program.emit(f"float* const own = all + {behind};")
        program.shared = max(program.shared, (behind + math.prod(digit.count for digit in results)) * 4)
        with self._each(results, begin, "thread", program.threads):
            self._find(added)
            program.emit("own[e] = found;")
        program.emit("meet_cluster();")
        first = f"blockIdx.x % {cluster} * {program.threads} + thread"
        with self._each(results, begin, first, cluster * program.threads):
            program.emit("float found = 0.0f;", "#pragma unroll", f"for (int i = 0; i < {cluster}; ++i)")
            program.emit("  found += of_program(i, own + e);")
            program.emit_if(*written)
        program.emit("meet_cluster();")  # until then others read what this program has found

    @contextmanager
    def _each(
        self, results: Sequence[_Digit], begin: Mapping[str, int], first: str, step: int
    ) -> Iterator[None]:
        """A thread's loop over results `e`, from the first in such steps, and where each is found."""
        total = math.prod(digit.count for digit in results)
        with self.program.block(f"for (int e = {first}; e < {total}; e += {step})"):
            self._decode(results)
            for side in SIDES:
                steps = ((digit.name, getattr(digit, side)) for digit in results)
                moved = "".join(f" + {name} * {step}" for name, step in steps if step)
                self.program.emit(f"const int {side} = {begin[side]}{moved};")
            yield

    def _loop(self, i: int, near: int) -> _Digit:
        """A loop of the nest whose steps have sums of their own."""
        loop = self.nest.loops[i]
        return _Digit(self.program.names[f"v{i}"], loop.count or 1, near)

    def _decode(self, digits: Sequence[_Digit]) -> None:
        """The digits of `e`, the first the least significant."""
        rest = "e"
        for digit in digits[:-1]:
            name, count = digit.name, digit.count
            self.program.emit(f"const int {name} = {rest} % {count}, {name}_rest = {rest} / {count};")
            rest = f"{name}_rest"
        self.program.emit(f"const int {digits[-1].name} = {rest};")

    def _find(self, added: Sequence[_Digit]) -> None:
        """Add up what belongs to one result."""
        program, number = self.program, "0"
        for i in program.parallel:
            number = f"({number}) * {program.count(i)} + {program.names[f'v{i}']}"
        own = "".join(f" + {program.names[name]} * {self.size}" for name in program.apart)
        place = f"({number}) * {self.each} + cols * {self.pitch} + rows"
        program.emit(f"const float* const from = all + {place}{own};")
        program.emit("float found = 0.0f;")
        heads, place = [], "0"
        shared = [] if program.apart else [_Digit("slot", self.slots)]
        for digit in (*added, *shared):
            step = self.size if digit in shared else digit.cols * self.pitch + digit.rows
            heads += [
                "#pragma unroll",
                f"for (int {digit.name} = 0; {digit.name} < {digit.count}; ++{digit.name})",
            ]
            place += f" + {digit.name} * {step}"
        program.emit(*heads, f"  found += from[{place}];")

    def _places(self) -> tuple[list[_Digit], list[_Digit], dict[str, int]]:
        """Digits of the places of results in the product, of their replicas, and where the first result is.

        Of a skewed axis, a tap's result is at the element `tap * divisor - step * replica - offset` of the
        patch, for each replica: that is where the index of the result is the tap (`skew`).
        """
        nest, result = self.nest, self.program.result
        parts = {part.name: part for side in SIDES for part in self._parts(side)}
        begin = dict.fromkeys(SIDES, 0)
        found, added = [], []
        first = len(nest.replicas)
        dims = zip(nest.output.indices[first:], result.shape[first:], result.strides[first:])
        for index, extent, stride in dims:
            replica = next((name for name, _ in index.terms if name in nest.replicas), None)
            if replica is None:
                continue
            (patch,) = (name for name, _ in index.terms if name != replica)
            own, inner = (self._taken(parts, name) for name in (patch, replica))
            sign, step = index.coefficient(patch), index.coefficient(replica)
            scale, moved = sign * index.divisor, -sign * step
            found.append(_Digit(f"{patch}_tap", extent or 1, stride, own.rows * scale, own.cols * scale))
            rows, cols = inner.rows + own.rows * moved, inner.cols + own.cols * moved
            added.append(_Digit(replica, inner.count, 0, rows, cols))
            begin["rows"] -= sign * index.offset * own.rows
            begin["cols"] -= sign * index.offset * own.cols
        for tie in nest.output.ties:
            if parts.keys() >= {*tie}:
                a, b = (parts.pop(name) for name in tie)
                found.append(_Digit(a.name, a.count, a.near + b.near, a.rows + b.rows, a.cols + b.cols))
        return [*found, *parts.values()], added, begin

    def _taken(self, parts: dict[str, _Digit], name: str) -> _Digit:
        """Take an axis from the parts of the sides. ScheduleError: it is not on a side."""
        if name not in parts and self.nest.extent(name) != 1:
            raise ScheduleError(f"{name} is split over programs, but replicas are added up in one.")
        return parts.pop(name, _Digit(name, 1))

    def _parts(self, side: str) -> Iterator[_Digit]:
        """The axes that a side runs along, each whole if they are several or one is skewed."""
        nest, variable = self.nest, self.program.sides[side]
        loop = nest.loops[int(variable[1:])]
        fused = nest.fused_axis(loop.axis)
        # Of a side that is longer than its axis, the rest is of no result.
        alone = loop.axis, min(loop.count or 1, nest.extent(loop.axis) or 1)
        axes = zip(fused.parts, fused.extents) if fused else [alone]
        covered = math.prod(p.count or 1 for p in nest.loops if p.axis == loop.axis)
        skewed = {
            name for index in nest.output.indices for name in index.axes if index.axes & {*nest.replicas}
        }
        if (fused or loop.axis in skewed) and covered > nest.lengths[side]:
            raise ScheduleError(f"{loop.axis} is split over programs, but its sums are added up in one.")
        for name, extent in axes:
            weight = fused.weight(name) if fused else 1
            yield _Digit(name, extent, self._near(name), **{side: weight})

    def _near(self, axis: str) -> int:
        """How far apart in memory the results of two steps of an axis lie."""
        first, result = len(self.nest.replicas), self.program.result
        dims = zip(self.nest.output.indices[first:], result.strides[first:])
        return sum(stride * index.coefficient(axis) for index, stride in dims)
