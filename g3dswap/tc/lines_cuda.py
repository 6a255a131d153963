"""Products whose depth is read along lines: positions that lie side by side, as they do in the tensor.

A line is a row of the image or a column of the other factor, and a lane's elements of a fragment are pairs
of its positions: a word of shared memory, or halves of two, where a tap shifts them by an odd number or
positions are two steps apart.

Zeros around a tensor are in its box.  Or its part is copied as it lies, without them, in the widest words;
what a lane then reads beside an image's rows is cleared in its register.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from ..errors import ScheduleError
from .arrivals_cuda import Arrival, LyingArrival
from .box import Box, aligned, lying, without_conflicts
from .cuda_text import REGISTER
from .fragments_cuda import EIGHT, At, DepthFragments, conflicts_of
from .linear import Linear
from .loads_cuda import DepthLoads
from .nest import Access
from .place import Env, Guard
from .program_cuda import Program

PLACES = "near", "far"
"""Of the positions of a piece, where those two pairs begin that a lane reads."""
LOW, HIGH = "0xffffu", "0xffff0000u"
"""The elements of a pair."""
Guards = tuple[Guard, ...]


class LineFragments(DepthFragments):
    """Fragments of one factor.

    side: rows of the image or columns; each is a line.  step: elements between two that are a pair.
    parity: whether lines begin at odd elements, too.
    """

    def __init__(
        self, program: Program, box: Box, access: Access, side: str, points: Sequence[Env], whole: bool
    ) -> None:
        super().__init__(program, access)
        self.side = side
        values = [program.spotter.indices(access, point) or [] for point in points]
        addresses, guards = (self._lying if whole else self._boxed)(box, values)
        self._known: dict[tuple[Guards, int, int, int], list[Guard] | None] = {}
        self.guards = list(dict.fromkeys(guards))
        self.spots = {
            id(point): (address.const * program.item, self.guards.index(own))
            for point, address, own in zip(points, addresses, guards)
        }
        first = addresses[0] + -addresses[0].const
        variables = {program.sides[side], program.sides["depth"]}
        if any(not program.variables(symbol) <= variables for symbol, _ in first.terms):
            raise ScheduleError(f"{access} is read along lines that a program has a part of.")
        place = program.along(first, "depth")
        (self.step, *others) = {b - a for a, b in zip(place[::2], place[1::2])}
        self.line, self.place = (program.part(first, program.sides[s]) for s in (side, "depth"))
        self.parity = any(at % 2 for at in program.along(first, side))
        if others or not 0 < self.step <= 2 or any(at % 2 for at in place[::2]):
            raise ScheduleError(f"pairs of {access} do not lie side by side.")
        if len(self.line.terms) + len(self.place.terms) > len(first.terms) or (self.parity and self.step > 1):
            raise ScheduleError(f"pairs of {access} begin at elements that a side and the depth decide.")

    def _boxed(self, box: Box, values: Sequence[Sequence[Linear]]) -> tuple[list[Linear], list[Guards]]:
        """Of each point, the address of what it reads in the box, which has zeros where the tensor has no
        elements; lines begin at multiples of words."""
        program, made = self.program, aligned(box)[0]
        unit = max(program.pair, made.width)
        self.box = without_conflicts(made, unit, conflicts_of(program, values[0], self.side))
        self.arrival = Arrival(program, self.box)
        return [self.box.address(value) for value in values], [()] * len(values)

    def _lying(self, box: Box, values: Sequence[Sequence[Linear]]) -> tuple[list[Linear], list[Guards]]:
        """The same in a box that has whole dimensions as they lie, and what is to be tested of those."""
        program = self.program
        found = lying(box, conflicts_of(program, values[0], self.side))
        if found is None:
            raise ScheduleError(f"{self.access} is read along lines that a program has a part of.")
        self.box, whole = found
        addresses = [program.spotter.joined(self.box.address(value)) for value in values]
        bounds = [address.bounds(program.spotter.counts) for address in addresses]
        reach = min(low for low, _ in bounds), max(high for _, high in bounds) + program.pair
        self.arrival = LyingArrival(program, self.box, reach)
        return addresses, [self._guards(value, whole) for value in values]

    def _guards(self, values: Sequence[Linear], dims: Iterable[int]) -> Guards:
        """What is to be tested of the indices of some dimensions."""
        found = []
        for d in dims:
            low, high = values[d].bounds(self.program.spotter.counts)
            extent = self.box.dims[d].extent or 1
            if low < 0 or high >= extent:
                found.append(Guard(values[d], extent))
        return tuple(found)

    def at(self, point: Env) -> At:
        """How far a point's elements are from the first, in bytes, and which guards they have."""
        return self.spots[id(point)]

    def tested(self, guards: Guards, number: int, half: int, element: int) -> list[Guard] | None:
        """The guards of one element of a pair that not all lanes pass; None: there is one that no lane does.

        number: of a fragment's eight lines.  half: of a piece, which of its two pairs.
        """
        key = guards, number, half, element
        if key not in self._known:  # most points have the guards of others
            self._known[key] = self._failed(*key)
        return self._known[key]

    def _failed(self, guards: Guards, number: int, half: int, element: int) -> list[Guard] | None:
        begin, length = half * self.program.chunk + element, self.program.nest.lengths["depth"]
        lines = range(number * EIGHT, min((number + 1) * EIGHT, self._lines))
        last = length - self.program.pair + element  # where lanes are that have none
        pieces = range(begin, length, self.program.deep)
        places = [min(p + k, last) for p in (*pieces, last) for k in range(0, EIGHT, self.program.pair)]
        found = []
        for guard in guards:
            passed = {*self._passed(guard, lines, places)}
            if True not in passed:
                return None
            if False in passed:
                found.append(guard)
        return found

    @property
    def _lines(self) -> int:
        """Lines that results are made of; there may be more of them, to fill a fragment."""
        nest, length = self.program.nest, self.program.nest.lengths[self.side]
        loop = next(loop for loop in nest.loops if loop.bind == self.side)
        return min(length, nest.extent(loop.axis) or length)

    def _passed(self, guard: Guard, lines: Iterable[int], places: Iterable[int]) -> Iterator[bool]:
        """Whether lanes pass a guard; both where loops outside decide."""
        program = self.program
        sides = program.sides[self.side], program.sides["depth"]
        own = program.part(guard.value, *sides)
        low, high = (guard.value - own).bounds(program.spotter.counts)
        for line, place in itertools.product(lines, places):
            moved = program.spotter.evaluate(own, {sides[0]: line, sides[1]: place})
            if high + moved >= 0 and low + moved < guard.extent:
                yield True
            if low + moved < 0 or high + moved >= guard.extent:
                yield False


class LineLoads(DepthLoads[LineFragments]):
    """By words, each of which is loaded once for all points of a piece."""

    def __init__(
        self, program: Program, image: LineFragments, other: LineFragments, starts: Sequence[str]
    ) -> None:
        super().__init__(program, image, other, starts)
        if self.length % program.pair:
            raise ScheduleError(f"lines of {self.length} positions are no pairs.")
        self.known: dict[str, str] = {}
        self.places: Sequence[str] = PLACES
        if self.length <= program.chunk:
            self.product, self.places = "multiply_half", PLACES[:1]
            self.is_cut = self.length < program.chunk

    def begin(self) -> None:
        emit, program = self.program.emit, self.program
        self.known = {}
        for half, name in enumerate(self.places):
            place = f"piece * {program.deep} + lane % 4 * 2 + {half * program.chunk}"
            emit(f"const int {name} = {self.within(place, program.pair)};")
            if self.is_cut:
                emit(f"const bool some_{name} = {place} < {self.length};")
        for name, factor, start in zip(("left", "right"), (self.image, self.other), self.starts):
            for number in range(program.nest.lengths[factor.side] // EIGHT):
                self._begin_line(f"{name}{number}", factor, number, start)

    def _begin_line(self, name: str, factor: LineFragments, number: int, start: str) -> None:
        """Say where a lane's line begins, and at which of its pairs' elements the words do."""
        emit, program = self.program.emit, self.program
        line = program.form(factor.line, {program.sides[factor.side]: _line(number)})
        emit(f"const int {name} = {line};")
        begin = name
        if factor.parity:
            emit(f"const u32 {name}_even = {name} & 1 ? 0x5432 : 0x3210;")
            emit(f"const u32 {name}_odd = {name} & 1 ? 0x7654 : 0x5432;")
            begin = f"({name} & ~1)"
        for place in self.places:
            along = program.form(factor.place, {program.sides["depth"]: place})
            emit(f"const u32 {name}_{place} = {start} + ({begin} + {along}) * {program.item};")

    def load_image(self, row: int, at: At) -> None:
        pairs = [
            self._pair("left", self.image, 2 * row + number, half, at)
            for half, number in itertools.product(range(len(self.places)), range(2))
        ]
        self.program.emit(*(f"a[{i}] = {pair};" for i, pair in enumerate(pairs)))

    def load_other(self, number: int, at: At) -> None:
        for col in range(self.program.nest.lengths["cols"] // EIGHT):
            for half, place in enumerate(self.places):
                pair = self._pair("right", self.other, col, half, at)
                found = f"some_{place} ? {pair} : 0" if self.is_cut else pair
                self.program.emit(f"b[{number}][{col}][{half}] = {found};")

    def _pair(self, name: str, factor: LineFragments, number: int, half: int, at: At) -> str:
        """A lane's two elements of a line, so far from the first; zero outside of the tensor."""
        mask = self._mask(factor, factor.guards[at[1]], number, half)
        if mask is None:
            return "0"
        offset, line = at[0] // self.program.item, f"{name}{number}"
        begin, behind = f"{line}_{PLACES[half]}", offset + factor.step
        if factor.parity:
            low, high = (self._word(begin, offset // 2 + n) for n in range(2))
            found = f"__byte_perm({low}, {high}, {line}_{'odd' if offset % 2 else 'even'})"
        elif offset % 2 == 0 and factor.step == 1:
            found = self._word(begin, offset // 2)
        else:
            low, high = self._word(begin, offset // 2), self._word(begin, behind // 2)
            chosen = f"0x{'76' if behind % 2 else '54'}{'32' if offset % 2 else '10'}"
            found = f"__byte_perm({low}, {high}, {chosen})"
        return f"{found} & {mask}" if mask else found

    def _word(self, begin: str, number: int) -> str:
        return self._named("word", f"word({begin} + {number * REGISTER})")

    def _mask(self, factor: LineFragments, guards: Guards, number: int, half: int) -> str | None:
        """The elements of a pair that are in the tensor, if some lanes have others; None: there are none."""
        own = [factor.tested(guards, number, half, element) for element in range(2)]
        if own == [None, None]:
            return None
        if own == [[], []]:
            return ""
        low, high = (self._test(factor, tested, number, half, n) for n, tested in enumerate(own))
        return self._named("mask", f"({low} ? {LOW} : 0) | ({high} ? {HIGH} : 0)")

    def _test(
        self, factor: LineFragments, tested: Sequence[Guard] | None, number: int, half: int, element: int
    ) -> str:
        if not tested:
            return "false" if tested is None else "true"
        program, place = self.program, PLACES[half] + (" + 1" if element else "")
        names = {program.sides[factor.side]: _line(number), program.sides["depth"]: f"({place})"}
        tests = (f"(unsigned)({program.form(guard.value, names)}) < {guard.extent}u" for guard in tested)
        return f"({' && '.join(tests)})"

    def _named(self, kind: str, value: str) -> str:
        """The name of a register with this value, which is worked out once in a piece."""
        if value not in self.known:
            self.known[value] = f"{kind}{len(self.known)}"
            self.program.emit(f"const u32 {self.known[value]} = {value};")
        return self.known[value]


def _line(number: int) -> str:
    """A lane's line of eight."""
    return f"(lane / 4 + {number * EIGHT})"
