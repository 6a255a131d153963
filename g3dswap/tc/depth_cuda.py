"""Products whose depth is positions of the image: a gradient in the kernel.

A program copies its parts of both factors to shared memory, in a loop over what it sums, the next on their
way while one is multiplied.  Its warps share the depth, each with all sums, which are added up in a fixed
order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import ScheduleError
from .box import box_of
from .fragments_cuda import DepthFragments
from .nest import Access, Nest
from .place import Env
from .program_cuda import COLS, DEEP, ROWS, Program
from .words import WARP


class DepthProgram(Program):
    """buffers: parts that there is room for."""

    def __init__(self, nest: Nest, warps: int, buffers: int) -> None:
        super().__init__(nest, warps)
        self.buffers = buffers
        self.sums = math.prod(nest.loops[i].count or 1 for i in self.parallel)

    def write(self) -> None:
        lengths = self.nest.lengths
        if lengths["rows"] % ROWS:
            raise ScheduleError(f"{lengths['rows']} rows are no multiple of {ROWS}.")
        self.rows, self.cols = lengths["rows"] // ROWS, lengths["cols"] // COLS
        points = self.terms()
        each = self.rows * self.cols
        self.check_size(self.sums * each * 4, len(points) * each)
        self.nothing = self.take(16)
        self.emit(f"if (thread < 4) reinterpret_cast<u32*>(memory + {self.nothing})[thread] = 0;")
        factors = self.fragments(self.image, "rows", points), self.fragments(self.other, "cols", points)
        before = self.shared
        starts = [self.take(factor.box.size * 2) - before for factor in factors]
        size = self.shared - before
        self.take(size * (self.buffers - 1))
        buffer = f"{before}" + (f" + step % {self.buffers} * {size}" if self.buffers > 1 else "")
        self.emit(f"float sum[{self.sums}][{self.rows}][{self.cols}][4] = {{}};")
        self.emit(f"const int steps = {' * '.join(self.count(i) for i in self.serial) or '1'};")
        with self.block("auto fetch = [&](int step)", "};"):
            if self.serial:
                self.decode(self.serial, "step")
            for factor, start in zip(factors, starts):
                self.copy(factor.box, f"memory + {buffer} + {start}")
        ahead = self.buffers > 1
        if ahead:
            self.emit("if (steps > 0) fetch(0);")
        self.emit("#pragma unroll 1")
        with self.block("for (int step = 0; step < steps; ++step)"):
            self.emit("if (step + 1 < steps) fetch(step + 1);" if ahead else "fetch(step);")
            # A part is two groups of copies.
            self.emit("step + 1 < steps ? arrived<2>() : arrived<0>();" if ahead else "arrived<0>();")
            self.emit(f"const u32 buffer = address(memory) + {buffer};")
            self.multiply(factors, starts, points)
            self.emit("__syncthreads();")
        self.add_up()
        self.store()

    def fragments(self, access: Access, side: str, points: Sequence[Env]) -> DepthFragments:
        variable, level = self.sides[side], self.nest.tile_start
        box = box_of(self, access, points, level, lambda symbol: variable in self.variables(symbol))
        return DepthFragments(self, box, access, side, points)

    def multiply(
        self, factors: tuple[DepthFragments, DepthFragments], starts: Sequence[int], points: Sequence[Env]
    ) -> None:
        """The products of each piece of the depth: each fragment of the image, and all that uses it."""
        image, other = factors
        deep = self.nest.lengths["depth"]
        numbers = {
            key: n
            for n, key in enumerate(
                itertools.product(*(range(self.nest.loops[i].count or 1) for i in self.parallel))
            )
        }
        others = {at: n for n, at in enumerate(dict.fromkeys(other.at(point) for point in points))}
        uses: dict[int, list[tuple[int, int]]] = {}
        for point in points:
            uses.setdefault(image.at(point), []).append((numbers[self.key(point)], others[other.at(point)]))
        self.emit("#pragma unroll 1")
        with self.block(self.shares("piece", -(-deep // DEEP))):
            # `ldmatrix` takes the lines of a left operand and those of a right one in different orders.
            place = f"piece * {DEEP} + lane % 8 + lane / 16 * 8"
            self.emit(f"const int left = {f'min({place}, {deep - 1})' if deep % DEEP else place};")
            self.emit(f"const int right = piece * {DEEP} + lane % 16;")
            if deep % DEEP:  # what is beyond the end is multiplied by zero
                self.emit(f"const bool some = right < {deep};")
            for row in range(self.rows):
                low, high = image.chunks[2 * row : 2 * row + 2]
                begins = f"buffer + {starts[0]} + {image.begins('left')}"
                self.emit(f"const u32 from{row} = {begins} + (lane & 8 ? {high} : {low});")
            self.emit(f"const u32 with = buffer + {starts[1]} + {other.begins('right')};")
            self.emit(f"u32 a[4], b[{len(others)}][{self.cols}][2];")
            for at, number in others.items():
                self.load_other(other, at, number)
            for at in sorted(uses):
                for row in range(self.rows):
                    self.emit(f"transposed(a, from{row} + {at});")
                    for number, fragment in uses[at]:
                        for col in range(self.cols):
                            self.emit(f"multiply(sum[{number}][{row}][{col}], a, b[{fragment}][{col}]);")

    def load_other(self, other: DepthFragments, at: int, number: int) -> None:
        """Load the columns of a right operand, two fragments at a time where there are two."""
        for col in range(0, self.cols, 2):
            chunks = [chunk + at for chunk in other.chunks[col : col + 2]]
            offset = str(chunks[0]) if len(chunks) == 1 else f"(lane / 16 ? {chunks[1]} : {chunks[0]})"
            begin = f"with + {offset}"
            if self.nest.lengths["depth"] % DEEP:
                begin = f"some ? {begin} : address(memory) + {self.nothing}"
            if len(chunks) == 1:
                self.emit(f"transposed(b[{number}][{col}], {begin});")
            else:
                self.emit(f"transposed(b[{number}][{col}], b[{number}][{col + 1}], {begin});")

    @property
    def pieces(self) -> int:
        """Fragments of sums that a warp has."""
        return self.sums * self.rows * self.cols

    @property
    def kept(self) -> int:
        """Sums that a program has in the end."""
        return self.pieces * 4 * WARP * (self.warps if self.apart else 1)

    def add_up(self) -> None:
        """Bring the sums to shared memory: of all warps where they are apart, else one after another adds."""
        self.shared = max(self.shared, self.kept * 4)
        self.emit("float* all = reinterpret_cast<float*>(memory);")
        if self.apart:
            with self.own_sums():
                self.emit(f"all[(warp * {self.pieces * 4} + i) * {WARP} + lane] = own;")
            self.emit("__syncthreads();")
            return
        self.emit("#pragma unroll 1")
        with self.block(f"for (int turn = 0; turn < {self.warps}; ++turn)"):
            with self.block("if (warp == turn)"), self.own_sums():
                self.emit(f"float& to = all[i * {WARP} + lane];", "to = turn ? to + own : own;")
            self.emit("__syncthreads();")

    @contextmanager
    def own_sums(self) -> Iterator[None]:
        """A loop over the sums of a lane."""
        self.emit("#pragma unroll")
        with self.block(f"for (int i = 0; i < {self.pieces * 4}; ++i)"):
            self.emit(f"const float own = sum[i / {self.rows * self.cols * 4}]")
            self.emit(f"    [i / {self.cols * 4} % {self.rows}][i / 4 % {self.cols}][i % 4];")
            yield

    def store(self) -> None:
        spot = self.spotter.spot(self.nest.output, {})
        assert spot is not None
        names = dict.fromkeys(self.apart, f"(e / {self.pieces * 4 * WARP})")
        with self.block(f"for (int e = thread; e < {self.kept}; e += {self.threads})"):
            rest = f" % {self.pieces}" if self.apart else ""
            self.emit(f"const int owner = e % {WARP}, part = e / {WARP} % 4, piece = e / {WARP * 4}{rest};")
            self.emit(
                f"const int rows = piece / {self.cols} % {self.rows} * {ROWS} + part / 2 * 8 + owner / 4;"
            )
            self.emit(f"const int cols = piece % {self.cols} * {COLS} + owner % 4 * 2 + part % 2;")
            if self.parallel:
                self.emit(f"const int number = piece / {self.rows * self.cols};")
                self.decode(self.parallel, "number")
            value = self.finished("all[e]", {}, names)
            there = self.where(spot, names, self.shift())
            self.emit_if(self.test(spot, names), f"narrow({there}, {value});")
