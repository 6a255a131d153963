"""Products whose rows are positions of the image: a convolution, and its gradient in the input.

A program copies its part of the image and of the kernel to shared memory.  Its warps share the rows; each
keeps the kernel's fragments in registers, where they fit, and reads those of the image at every shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import ScheduleError
from .arrivals_cuda import Arrival, arrivals_of
from .box import WIDEST, box_of
from .cuda_text import MEET, WAIT
from .fragments_cuda import RowFragments, TapFragments
from .linear import Linear
from .nest import Nest
from .place import Env
from .program_cuda import BUFFERS, COLS, ROWS, Key, Program, Settings
from .words import ITEM_BYTES

GAP = 2
"""Elements between the results of two positions, so that those of a warp lie in different banks."""


class RowsProgram(Program):
    """steps: those of a walk, at most, at each of which the program has another part of the image."""

    def __init__(self, nest: Nest, settings: Settings) -> None:
        super().__init__(nest, settings)
        stage = nest.stage_of(self.image.tensor)
        assert stage is not None
        self.outside = stage.level
        counts = [nest.loops[i].count for i in self.walks]
        if self.walks != [*range(len(self.grid), self.outside)] or None in counts:
            raise ScheduleError("a walk is along positions, outside of all sums, with a copy at each step.")
        self.steps = math.prod(filter(None, counts))

    def write(self) -> None:
        length = self.nest.lengths["depth"]
        if length % self.deep:
            raise ScheduleError(f"a depth of {length} is no multiple of {self.deep}.")
        points, sums, depth = self.terms(), self.stored(), self.sides["depth"]
        box = box_of(self, self.image, points, self.outside, lambda symbol: depth in self.variables(symbol))
        image = RowFragments(self, box, points)
        raw = box_of(self, self.other, [{}], len(self.grid), lambda symbol: True)
        taps = TapFragments(self, raw, self.take(raw.size * self.item))
        buffers = min(BUFFERS, self.steps)
        kernel = Arrival(self, raw)
        (part,) = arrivals_of(self, [image.box], self.settings.whole)
        start = self.take(part.fetched)
        size = self.shared - start
        self.take(size * (buffers - 1))
        fetched = f"{start}" + (f" + step % {BUFFERS} * {size}" if self.steps > 1 else "")
        placed = self.take(part.placed)
        self.check_size(len(sums) * taps.cols * 4, len(points) * taps.deep * taps.cols)
        part.clear(f"memory + {placed}", self.threads, "thread")
        self.emit(WAIT)
        self.fetch(kernel, f"memory + {taps.begin}")
        if self.steps == 1:
            self.fetch(part, f"memory + {fetched}")
        else:
            with self.block("auto fetch = [&](int step)", "};"):
                self.decode(self.walks, "step")
                self.fetch(part, f"memory + {fetched}")
            self.emit("fetch(0);")
        if taps.laid:
            taps.lay_out()
        self.emit("arrived<0>();")
        if taps.kept:
            taps.keep()
        image.is_rounded = part.settles
        with self.walk():
            if part.settles:
                part.settle(f"memory + {fetched}", f"memory + {placed}", self.threads, "thread")
                self.emit(MEET)
            self.multiply_tiles(image, taps, part.begin(fetched, f"{placed}"), sums, points)

    def multiply_tiles(
        self,
        image: RowFragments,
        taps: TapFragments,
        begin: str,
        sums: Mapping[Key, Env],
        points: list[Env],
    ) -> None:
        """What a warp does with its tiles of rows, of an image that begins there."""
        with self.block(self.shares("tile", -(-self.nest.lengths["rows"] // ROWS))):
            image.begin(begin)
            self.emit(f"float sum[{len(sums)}][{taps.cols}][4] = {{}};")
            self.emit("u32 a[4];" if taps.kept else "u32 a[4], b[2];")
            with self.looped(self.serial):
                self.multiply(image, taps, sums, points)
            self.store(sums, taps.cols)

    @contextmanager
    def walk(self) -> Iterator[None]:
        """What is done with each part of the image: with the only one, where the program does not walk."""
        if self.steps == 1:
            yield
            return
        with self.rounds("step", " * ".join(map(self.count, self.walks)), ahead=True):
            self.decode(self.walks, "step")
            yield

    def fetch(self, arrival: Arrival, to: str) -> None:
        """Begin to copy a part, as a group of copies of its own."""
        arrival.fetch(to, self.threads, "thread")
        self.emit("committed();")

    def multiply(
        self, image: RowFragments, taps: TapFragments, sums: Mapping[Key, Env], points: list[Env]
    ) -> None:
        """Each fragment of the image, followed by all that uses it."""
        uses: dict[Linear, list[tuple[int, Env]]] = {}
        numbers = {key: number for number, key in enumerate(sums)}
        moving = [f"v{i}" for i in self.serial]
        for point in points:
            if self.key(point) in numbers:
                address = image.box.address(self.spotter.indices(self.image, point) or ())
                moved = self.part(address, *moving) + address.const
                uses.setdefault(moved, []).append((numbers[self.key(point)], point))
        for moved in sorted(uses, key=lambda form: (form.terms, form.const)):
            for step in range(taps.deep):
                image.load(moved, step)
                for number, point in uses[moved]:
                    for col in range(taps.cols):
                        self.emit(f"multiply(sum[{number}][{col}], a, {taps.load(point, step, col)});")

    def store(self, sums: Mapping[Key, Env], cols: int) -> None:
        filters, width = self.together(sums)
        if filters:
            self.store_together(sums, cols, filters, width)
            return
        shift = self.shift()
        following = {self.sides["cols"]: "(cols + 1)"}
        for _, point, first, second in self.results(sums, cols):
            spot = self.spotter.spot(self.nest.output, point)
            assert spot is not None
            there = self.where(spot, None, shift)
            if self.is_paired(spot):
                self.emit_if(self.test(spot), f"narrow2({there}, {first}, {second});")
                continue
            self.emit_if(self.test(spot), f"narrow({there}, {first});")
            there = self.where(spot, following, shift)
            self.emit_if(self.test(spot, following), f"narrow({there}, {second});")

    def results(self, sums: Mapping[Key, Env], cols: int) -> Iterator[tuple[int, Env, str, str]]:
        """Write a loop over a lane's results of a tile; of each pair in it the sum, the point, the values."""
        length, following = self.nest.lengths["rows"], {self.sides["cols"]: "(cols + 1)"}
        self.emit("#pragma unroll")
        with self.block("for (int half = 0; half < 2; ++half)"):
            self.emit(f"const int rows = tile * {ROWS} + lane / 4 + half * 8;")
            if length % ROWS:
                self.emit(f"if (rows >= {length}) continue;")
            for number, point in enumerate(sums.values()):
                for col in range(cols):
                    value = f"sum[{number}][{col}][half * 2"
                    with self.block():
                        self.emit(f"const int cols = {col * COLS} + lane % 4 * 2;")
                        first = self.finished(f"{value}]", point)
                        yield number, point, first, self.finished(f"{value} + 1]", point, following)

    def together(self, sums: Mapping[Key, Env]) -> tuple[int, int]:
        """How many columns of a warp lie side by side, the next warp's behind them, and their widest word.

        No columns: each warp writes its own results.
        """
        nothing = 0, 0
        if not self.apart:
            return nothing
        (own,), width, filters = self.apart, WIDEST // ITEM_BYTES[self.result.dtype], 0
        for point in sums.values():
            spot = self.spotter.spot(self.nest.output, point)
            assert spot is not None
            filters = filters or spot.address.coefficient(own)
            cols = self.along(spot.address, "cols")
            runs = (cols[k : k + filters] for k in range(0, len(cols), filters or 1))
            alone = self.part(spot.address, own) == Linear(0, ((own, filters),))
            if not filters or not alone or any(run != list(range(run[0], run[0] + filters)) for run in runs):
                return nothing
            guards = [guard for guard in spot.guards if self.part(guard.value, own).terms]
            if any(guard.value.coefficient(own) != 1 for guard in guards):
                return nothing
            forms = [spot.address, *(guard.value * filters for guard in guards)]
            steps = [self.warps * filters, *cols[::filters], *(guard.extent * filters for guard in guards)]
            steps += [step for form in forms for step in (form.const, *self._others(form, own))]
            width = math.gcd(width, *steps)
        return filters, width

    def _others(self, form: Linear, own: str) -> list[int]:
        """How far a form moves with each symbol but a warp's own and the columns, which lie side by side."""
        return [c for s, c in form.terms if s != own and self.sides["cols"] not in self.variables(s)]

    def store_together(self, sums: Mapping[Key, Env], cols: int, filters: int, width: int) -> None:
        """Collect the warps' results of a tile in shared memory, and write words of them."""
        each = cols * COLS // filters  # positions of a row
        places, together = ROWS * each, self.warps * filters
        words, pitch = together // width, together + GAP
        begin = self.take(len(sums) * places * pitch * 2)
        self.emit(f"u16* const results = reinterpret_cast<u16*>(memory + {begin});")
        self.emit(f"{MEET}  // those of the tile before are written")
        for number, _, first, second in self.results(sums, cols):
            row = f"({number * ROWS} + lane / 4 + half * 8) * {each}"
            for col, value in (("cols", first), ("(cols + 1)", second)):
                at = f"({row} + {col} / {filters}) * {pitch} + warp * {filters} + {col} % {filters}"
                self.emit(f"narrow(results + {at}, {value});")
        self.emit(MEET)
        with self.block(f"for (int e = thread; e < {places * words}; e += {self.threads})"):
            self.emit(f"const int word = e % {words} * {width}, place = e / {words};")
            self.emit(f"const int cols = place % {each} * {filters} + word % {filters};")
            self.emit(f"const int rows = tile * {ROWS} + place / {each};")
            if self.nest.lengths["rows"] % ROWS:
                self.emit(f"if (rows >= {self.nest.lengths['rows']}) continue;")
            self.emit(f"const u16* const from = results + place * {pitch} + word;")
            names = {self.apart[0]: f"(word / {filters})"}
            for number, point in enumerate(sums.values()):
                spot = self.spotter.spot(self.nest.output, point)
                assert spot is not None
                put = f"put<{width}>({self.where(spot, names)}, from + {number * places * pitch});"
                self.emit_if(self.test(spot, names), put)
