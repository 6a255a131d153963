"""Fragments of a product's factors in shared memory: where they begin, and the text that loads them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from ..errors import ScheduleError
from .box import Box, aligned, without_conflicts
from .cuda_text import Names
from .linear import Linear
from .nest import Access
from .place import Env
from .program_cuda import COLS, ROWS, Program
from .words import WARP

KEPT = 112
"""Registers of a thread that fragments of the other factor may take; more are read again for each row."""
BANKS = 32
EIGHT = 8
"""Elements of a line that a fragment whose depth is positions has together."""
SAMPLE = 64
"""Lines of a side by which the conflicts of a box are counted."""
At = tuple[int, int]
"""What of a factor a point reads: how far it is from the first element, in bytes, and under which guards."""


def asked_again(lines: Sequence[int], words: Sequence[int]) -> int:
    """How often a bank is asked again where a warp reads these words, each of four bytes, of some lines."""
    found, together = 0, WARP // len(words)
    for first in range(0, len(lines) - together + 1, together):
        banks = [0] * BANKS
        for word in {line + w for line in lines[first : first + together] for w in words}:
            banks[word % BANKS] += 1
        found += max(banks) - 1
    return found


def conflicts_of(
    program: Program, values: Sequence[Linear], side: str, together: int = 0
) -> Callable[[Box], int]:
    """How often a bank is asked again by loads of the first lines along a side, of a box of these indices.

    together: words of a line that lie together and are read at once; 0: those of a fragment's depth.
    """
    lines = program.moves(values, side, range(min(SAMPLE, program.nest.lengths[side])))
    elements = program.moves(values, "depth", range(0, program.chunk, program.pair))

    def found(box: Box) -> int:
        pitches = [dim.pitch for dim in box.dims]

        def words(moves: Iterable[Sequence[int]]) -> list[int]:
            return [sum(x * pitch for x, pitch in zip(step, pitches)) // program.pair for step in moves]

        return asked_again(words(lines), range(together) if together else words(elements))

    return found


def _address_of(
    program: Program, box: Box, access: Access, points: Sequence[Env], sides: tuple[str, str], unit: int
) -> Linear | None:
    """The address in the box at the first point, if fragments are units of elements that lie together.

    sides: the one whose lines are read, and the one along which they have consecutive elements.
    """
    lines, elements = sides
    addresses = [box.address(program.spotter.indices(access, point) or ()) for point in points]
    first = addresses[0]
    at = program.along(first, elements)
    rest = first - program.part(first, program.sides[elements])
    fits = (
        all(
            at[k] % unit == 0 and at[k : k + unit] == list(range(at[k], at[k] + unit))
            for k in range(0, len(at), unit)
        )
        and not any(step % unit for step in program.along(rest, lines))
        and not any(factor % unit for _, factor in (rest - program.part(rest, program.sides[lines])).terms)
        and not any(address.const % unit for address in addresses)
    )
    return first if fits else None


class Fragments:
    """What fragments of both factors have in common.

    is_rounded: whether floats have been rounded to what a product takes.
    """

    program: Program
    is_rounded = False

    @property
    def loads(self) -> str:
        """What the names of functions that load fragments begin with."""
        return "" if self.is_rounded or self.program.pair > 1 else "rounded_"


class RowFragments(Fragments):
    """Fragments of an image whose positions are the rows.

    They come by `ldmatrix` where 16 bytes of a row lie together at a multiple of 16, else as single words.
    """

    def __init__(self, program: Program, box: Box, points: Sequence[Env]) -> None:
        self.program = program
        values = program.spotter.indices(program.image, points[0]) or []
        for unit, whole in itertools.product((program.chunk, program.pair), aligned(box)):
            conflicts = conflicts_of(program, values, "rows", 4 if unit == program.chunk else 0)
            made = without_conflicts(whole, max(unit, whole.width), conflicts)
            address = _address_of(program, made, program.image, points, ("rows", "depth"), unit)
            if address is not None:
                self.box, self.unit = made, unit
                self.row = program.part(address, program.sides["rows"], *program.apart)
                self.at = program.along(address, "depth")
                return
        raise ScheduleError(f"fragments of {program.image} are not consecutive in shared memory.")

    def begin(self, start: str) -> None:
        """Say where the fragments of a tile of rows begin; `start` is where the box does."""
        program, rows = self.program, self.program.sides["rows"]
        length = program.nest.lengths["rows"]

        def row(lane: str) -> str:
            number = f"tile * {ROWS} + {lane}"
            return f"min({number}, {length - 1})" if length % ROWS else number

        def begins(name: str) -> str:
            return f"address(memory) + {start} + ({program.form(self.row, {rows: name})}) * {program.item}"

        at = [place * program.item for place in self.at]
        if self.unit == program.chunk:
            program.emit(f"const int row = {row('lane % 16')};", f"const u32 at = {begins('row')};")
            for step in range(0, len(at), program.deep):
                low, high = at[step], at[step + program.chunk]
                program.emit(f"const u32 at{step // program.deep} = at + (lane / 16 ? {high} : {low});")
            return
        for half in range(2):
            program.emit(f"const int row{half} = {row(f'lane / 4 + {half * ROWS // 2}')};")
            program.emit(f"const u32 start{half} = {begins(f'row{half}')};")
        for step in range(0, len(at), program.chunk):
            a, b, c, d = at[step : step + program.chunk : program.pair]
            program.emit(f"const u32 along{step // program.chunk} =")
            program.emit(f"    lane & 2 ? (lane & 1 ? {d} : {c}) : (lane & 1 ? {b} : {a});")

    def load(self, moved: Linear, step: int) -> None:
        """Load a step of the depth; `moved` is how far it is from where the tile begins, in elements."""
        offset = self.program.form(moved * self.program.item)
        if self.unit == self.program.chunk:
            self.program.emit(f"{self.loads}matrices(a, at{step} + ({offset}));")
            return
        loads = itertools.product((2 * step, 2 * step + 1), range(2))
        for i, (along, half) in enumerate(loads):
            self.program.emit(f"a[{i}] = {self.loads}word(start{half} + along{along} + ({offset}));")


class TapFragments(Fragments):
    """Fragments of the other factor, which lies in shared memory as it does in its tensor.

    own: the loops inside that it depends on, the nearest elements last; their steps are its taps.
    paired: the elements of a register lie together, so that a fragment is read as it is.
    laid: they do not, and warps share what is laid out of them.
    collected: where warps are apart, each collects its own instead.
    kept: each thread has registers for all of them.
    """

    def __init__(self, program: Program, raw: Box, begin: int) -> None:
        self.program, self.begin = program, begin
        spotter, nest = program.spotter, program.nest
        values = spotter.indices(program.other, {})
        assert values is not None
        self.address = raw.address(values)
        self.ties = spotter.ties(program.other, {})
        walks = [f"v{i}" for i in program.walks]
        if any(program.part(form, *walks).terms for form in (self.address, *self.ties)):
            raise ScheduleError(f"{program.other} is another at each step of a walk; walk along positions.")
        inside = [
            i
            for i in (*program.serial, *program.unrolled)
            if any(program.part(form, f"v{i}").terms for form in (self.address, *self.ties))
        ]
        steps = {i: abs(spotter.evaluate(program.part(self.address, f"v{i}"), {f"v{i}": 1})) for i in inside}
        self.own = sorted(inside, key=lambda i: -steps[i])
        self.taps = math.prod(nest.loops[i].count or 1 for i in self.own)
        self.deep, self.cols = nest.lengths["depth"] // program.deep, nest.lengths["cols"] // COLS
        self.parts = self.deep * self.cols
        self.paired = self._is_paired()
        self.laid = not self.paired and not program.apart
        self.collected = not self.paired and not self.laid
        self.place = 0
        registers = self.taps * self.parts * 2
        self.kept = not any(i in program.serial for i in self.own) and registers <= KEPT
        if self.collected and not self.kept:
            raise ScheduleError(f"a warp of its own keeps {registers} registers of {program.other}.")
        mine = {f"v{i}" for i in self.own}
        self.moved = program.part(self.address, *mine)
        if any(not program.variables(symbol) <= mine for symbol, _ in self.moved.terms):
            raise ScheduleError(f"{program.other} is read along its taps and a side at a time.")

    def _is_paired(self) -> bool:
        if self.program.pair == 1:
            return True
        moves = self.program.along(self.address, "depth")
        rest = self.address - self.program.part(self.address, self.program.sides["depth"])
        together = all(a % 2 == 0 and b == a + 1 for a, b in zip(moves[::2], moves[1::2]))
        even = rest.const % 2 == 0 and not any(factor % 2 for _, factor in rest.terms)
        ties = [self.program.along(tie, "depth") for tie in self.ties]
        return together and even and all(tie[::2] == tie[1::2] for tie in ties)

    def _if_tied(self, value: str, names: Names | None = None) -> str:
        test = " && ".join(f"({self.program.form(tie, names)}) == 0" for tie in self.ties)
        return f"{test} ? {value} : 0" if test else value

    def lay_out(self) -> None:
        """Write fragments behind each other, each in the order of lanes."""
        program = self.program
        self.place = program.take(self.taps * self.parts * WARP * 8)
        share = max(1, program.warps // self.parts)  # warps that have the taps of a part
        program.emit("arrived<1>();")
        with program.block():
            program.emit(f"uint2* to = reinterpret_cast<uint2*>(memory + {self.place}) + lane;")
            head = f"int part = warp / {share}; part < {self.parts}; part += {program.warps // share}"
            with program.block(f"for ({head})"):
                self._begin("part")
                program.emit("#pragma unroll")
                with program.block(f"for (int tap = warp % {share}; tap < {self.taps}; tap += {share})"):
                    self._collect("part")
                    place = f"(tap * {self.parts} + part) * {WARP}"
                    program.emit(f"to[{place}] = make_uint2(found[0], found[1]);")

    def _begin(self, part: str) -> None:
        """Say where a lane's elements of a fragment lie at the first tap."""
        program = self.program
        program.emit(f"const u16* const from = reinterpret_cast<const u16*>(memory + {self.begin});")
        program.emit(f"const int cols = {part} % {self.cols} * {COLS} + lane / 4;")
        program.emit("int at[4];", "#pragma unroll")
        with program.block("for (int j = 0; j < 4; ++j)"):
            self._place_in_depth(part)
            program.emit(f"at[j] = {program.form(self.address - self.moved)};")

    def _place_in_depth(self, part: str) -> None:
        deep, chunk = self.program.deep, self.program.chunk
        place = f"{part} / {self.cols} * {deep} + lane % 4 * 2 + j % 2 + j / 2 * {chunk}"
        self.program.emit(f"const int depth = {place};")

    def _collect(self, part: str) -> None:
        """Find a lane's pairs of a fragment at a tap, each element for itself."""
        program = self.program
        if self.own:
            program.decode(self.own, "tap")
        program.emit("u32 found[2] = {};", "#pragma unroll")
        with program.block("for (int j = 0; j < 4; ++j)"):
            if self.ties:
                self._place_in_depth(part)
            element = self._if_tied(f"from[at[j] + ({program.form(self.moved)})]")
            program.emit(f"found[j / 2] |= u32({element}) << j % 2 * 16;")

    def keep(self) -> None:
        """Read all fragments into registers."""
        program = self.program
        program.emit(f"u32 other[{self.taps}][{self.deep}][{self.cols}][2];")
        for step, col in itertools.product(range(self.deep), range(self.cols)):
            part = str(step * self.cols + col)
            with program.block():
                if self.collected:
                    self._begin(part)
                program.emit("#pragma unroll")
                with program.block(f"for (int tap = 0; tap < {self.taps}; ++tap)"):
                    to = f"other[tap][{step}][{col}]"
                    if self.collected:
                        self._collect(part)
                        program.emit(f"{to}[0] = found[0], {to}[1] = found[1];")
                        continue
                    if self.paired and self.own:
                        program.decode(self.own, "tap")
                    self._read(to, "tap", {}, step, col)

    def load(self, point: Env, step: int, col: int) -> str:
        """The name of a fragment, which is read if it is not kept."""
        if self.kept:
            return f"other[{self._tap(point)}][{step}][{col}]"
        self._read("b", self._tap(point), {v: str(value) for v, value in point.items()}, step, col)
        return "b"

    def _read(self, to: str, tap: str, names: Names, step: int, col: int) -> None:
        program = self.program
        if self.laid:
            place = f"(({tap}) * {self.parts} + {step * self.cols + col}) * {WARP} + lane"
            program.emit(f"unpack({to}, reinterpret_cast<const uint2*>(memory + {self.place})[{place}]);")
            return
        begin = step * program.deep
        for half in range(2):
            own = {
                **names,
                program.sides["depth"]: f"(lane % 4 * {program.pair} + {begin + half * program.chunk})",
                program.sides["cols"]: f"(lane / 4 + {col * COLS})",
            }
            at = f"({program.form(self.address, own)}) * {program.item}"
            found = f"{self.loads}word(address(memory) + {self.begin} + {at})"
            program.emit(f"{to}[{half}] = {self._if_tied(found, own)};")

    def _tap(self, point: Env) -> str:
        """The number of a point's tap."""
        form = Linear()
        for i in self.own:
            digit = Linear(point[f"v{i}"]) if f"v{i}" in point else Linear(0, ((f"v{i}", 1),))
            form = form * (self.program.nest.loops[i].count or 1) + digit
        return self.program.form(form)


class DepthFragments(Fragments):
    """Fragments of a factor whose positions are the depth."""

    box: Box

    def __init__(self, program: Program, access: Access) -> None:
        self.program, self.access = program, access

    def at(self, point: Env) -> At:
        """How far the fragments of a point are from the box's first element, in bytes."""
        place = self.box.address(self.program.spotter.indices(self.access, point) or ())
        return place.const * self.program.item, 0


class TurnedFragments(DepthFragments):
    """Those that are turned around as they are loaded.

    side: along which eight elements lie together at a multiple of eight, rows of the image or columns.
    """

    def __init__(self, program: Program, box: Box, access: Access, side: str, points: Sequence[Env]) -> None:
        super().__init__(program, access)
        values = program.spotter.indices(access, points[0]) or []
        conflicts = conflicts_of(program, values, "depth", 4 if program.pair > 1 else EIGHT)
        for whole in aligned(box):
            self.box = without_conflicts(whole, max(EIGHT, whole.width), conflicts)
            address = _address_of(program, self.box, access, points, ("depth", side), EIGHT)
            if address is not None:
                self.line = program.part(address, program.sides["depth"], *program.apart)
                self.chunks = [program.item * at for at in program.along(address, side)[::EIGHT]]
                return
        raise ScheduleError(f"fragments of {access} are not consecutive in shared memory.")

    def begins(self, place: str) -> str:
        """Where the line of a place of the depth begins, from the box on."""
        program = self.program
        return f"({program.form(self.line, {program.sides['depth']: place})}) * {program.item}"
