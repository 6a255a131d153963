"""Products whose rows are positions of the image: a convolution, and its gradient in the input.

A program copies its part of the image and of the kernel to shared memory.  Its warps share the rows; each
keeps the kernel's fragments in registers, where they fit, and reads those of the image at every shift.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ScheduleError
from .box import box_of
from .fragments_cuda import RowFragments, TapFragments
from .linear import Linear
from .place import Env
from .program_cuda import COLS, DEEP, ROWS, Key, Program


class RowsProgram(Program):
    def write(self) -> None:
        lengths, level = self.nest.lengths, len(self.grid)
        if lengths["depth"] % DEEP:
            raise ScheduleError(f"a depth of {lengths['depth']} is no multiple of {DEEP}.")
        points, sums, depth = self.terms(), self.sums(), self.sides["depth"]
        box = box_of(self, self.image, points, level, lambda symbol: depth in self.variables(symbol))
        image = RowFragments(self, box, points)
        start = self.take(image.box.size * 2)
        raw = box_of(self, self.other, [{}], level, lambda symbol: True)
        taps = TapFragments(self, raw, self.take(raw.size * 2))
        self.check_size(len(sums) * taps.cols * 4, len(points) * taps.deep * taps.cols)
        self.copy(raw, f"memory + {taps.begin}")
        self.copy(image.box, f"memory + {start}")
        if not taps.paired:
            taps.lay_out()
        self.emit("arrived<0>();")
        if taps.kept:
            taps.keep()
        with self.block(f"for (int tile = warp; tile < {-(-lengths['rows'] // ROWS)}; tile += {self.warps})"):
            image.begin(start)
            self.emit(f"float sum[{len(sums)}][{taps.cols}][4] = {{}};")
            self.emit("u32 a[4];" if taps.kept else "u32 a[4], b[2];")
            self.multiply(image, taps, sums, points, self.serial)
            self.store(sums, taps.cols)

    def sums(self) -> dict[Key, Env]:
        """One point for each sum that is stored somewhere, those without a term among them."""
        found: dict[Key, Env] = {}
        for point in self.points():
            if self.key(point) not in found and self.spotter.spot(self.nest.output, point) is not None:
                found[self.key(point)] = point
        return found

    def multiply(
        self,
        image: RowFragments,
        taps: TapFragments,
        sums: Mapping[Key, Env],
        points: list[Env],
        loops: list[int],
    ) -> None:
        """The loops that are left, and in them each fragment of the image, followed by all that uses it."""
        if loops:
            name = self.names[f"v{loops[0]}"]
            self.emit("#pragma unroll 1")
            with self.block(f"for (int {name} = 0; {name} < {self.count(loops[0])}; ++{name})"):
                self.multiply(image, taps, sums, points, loops[1:])
            return
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
        length, shift = self.nest.lengths["rows"], self.shift()
        following = {self.sides["cols"]: "(cols + 1)"}
        self.emit("#pragma unroll")
        with self.block("for (int half = 0; half < 2; ++half)"):
            self.emit(f"const int rows = tile * {ROWS} + lane / 4 + half * 8;")
            if length % ROWS:
                self.emit(f"if (rows >= {length}) continue;")
            for number, point in enumerate(sums.values()):
                spot = self.spotter.spot(self.nest.output, point)
                assert spot is not None
                together = self.is_paired(spot)
                for col in range(cols):
                    value = f"sum[{number}][{col}][half * 2"
                    with self.block():
                        self.emit(f"const int cols = {col * COLS} + lane % 4 * 2;")
                        first = self.finished(f"{value}]", point)
                        second = self.finished(f"{value} + 1]", point, following)
                        if together:
                            self.emit_if(
                                self.test(spot),
                                f"narrow2({self.where(spot, None, shift)}, {first}, {second});",
                            )
                            continue
                        self.emit_if(self.test(spot), f"narrow({self.where(spot, None, shift)}, {first});")
                        there = self.where(spot, following, shift)
                        self.emit_if(self.test(spot, following), f"narrow({there}, {second});")
