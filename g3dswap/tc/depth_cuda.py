"""Products whose depth is positions of the image: a gradient in the kernel.

A program copies its parts of both factors to shared memory, in a loop over what it sums, the next on their
way while one is multiplied.  Its warps share the depth, each with all sums, which are added up in a fixed
order.  Where a part is too small for so many warps, each team of them has a part of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from ..errors import ScheduleError
from .arrivals_cuda import Arrival, arrivals_of
from .box import Box, box_of
from .cuda_text import MEET, WAIT
from .fragments_cuda import At, DepthFragments, TurnedFragments
from .lines_cuda import LineFragments, LineLoads
from .loads_cuda import DepthLoads, TurnedLoads, WordLoads
from .nest import Access, Nest
from .place import Env
from .program_cuda import COLS, ROWS, Program, Settings
from .sums_cuda import DepthSums
from .words import WARP


class DepthProgram(Program):
    """members: threads of a team.  sums: of a warp, each a product."""

    def __init__(self, nest: Nest, settings: Settings) -> None:
        super().__init__(nest, settings)
        warps, teams = settings.warps, settings.teams
        if self.walks:
            raise ScheduleError("a program that sums positions has the same results throughout.")
        if warps % teams or (self.apart and teams > 1):
            raise ScheduleError(f"{teams} teams of {warps} warps; teams are equal, and share their groups.")
        self.buffers, self.teams = settings.buffers, teams
        self.members = self.threads // teams
        self.sums = math.prod(nest.loops[i].count or 1 for i in self.parallel)
        if settings.lines and self.pair == 1:
            raise ScheduleError("lines of positions are read as pairs of a half type.")
        turned = TurnedLoads if self.pair > 1 else WordLoads
        self.loads: type[DepthLoads[Any]] = LineLoads if settings.lines else turned

    def write(self) -> None:
        lengths = self.nest.lengths
        if lengths["rows"] % ROWS:
            raise ScheduleError(f"{lengths['rows']} rows are no multiple of {ROWS}.")
        self.rows, self.cols = lengths["rows"] // ROWS, lengths["cols"] // COLS
        points = self.terms()
        each = self.rows * self.cols
        self.check_size(self.sums * each * 4, len(points) * each)
        factors, parts = self.factors(points)
        before = self.shared
        starts = [self.take(part.fetched) - before for part in parts]
        size = self.shared - before
        self.take(size * (self.buffers * self.teams - 1))
        behind = self.shared
        places = [self.take(part.placed) - behind for part in parts]
        room = self.shared - behind
        self.take(room * (self.teams - 1))
        buffer = f"{before}" + (f" + round % {self.buffers} * {size}" if self.buffers > 1 else "")
        own, step, rounds = f"{behind}", "round", "steps"
        if self.teams > 1:
            self.emit(f"const int team = thread / {self.members}, member = thread % {self.members};")
            buffer += f" + team * {size * self.buffers}"
            own += f" + team * {room}"
            step, rounds = f"round * {self.teams} + team", f"(steps + {self.teams - 1} - team) / {self.teams}"
        begins = [
            part.begin(f"buffer + {start}", f"address(memory) + {own} + {place}")
            for part, start, place in zip(parts, starts, places)
        ]
        for factor, part in zip(factors, parts):
            factor.is_rounded = part.settles
        image, other = factors
        loads = self.loads(self, image, other, begins)
        for part, place in zip(parts, places):
            part.clear(f"memory + {own} + {place}", self.members, self.member)
        self.emit(WAIT)
        self.emit(f"float sum[{self.sums}][{self.rows}][{self.cols}][4] = {{}};")
        self.emit(f"const int steps = {' * '.join(self.count(i) for i in self.serial) or '1'};")
        self.emit(f"const int rounds = {rounds};")
        with self.block("auto fetch = [&](int round)", "};"):
            self.emit(f"const int step = {step};")
            if self.serial:
                self.decode(self.serial, "step")
            for part, start in zip(parts, starts):
                part.fetch(f"memory + {buffer} + {start}", self.members, self.member)
            self.emit("committed();")
        ahead, members = self.buffers > 1, self.members if self.teams > 1 else 0
        if ahead:
            self.emit("if (rounds > 0) fetch(0);")
        with self.rounds("round", "rounds", ahead, members):
            self.emit(f"const u32 buffer = address(memory) + {buffer};")
            if any(part.settles for part in parts):
                for part, start, place in zip(parts, starts, places):
                    there = f"memory + {buffer} + {start}", f"memory + {own} + {place}"
                    part.settle(*there, self.members, self.member)
                self.emit(self.meet(members))
            self.multiply(loads, points)
        if self.teams > 1:
            self.emit(MEET)
        sums = DepthSums(self, self.sums, self.rows, self.cols)
        sums.add_up()
        sums.store()

    @property
    def member(self) -> str:
        """The number of a thread in its team."""
        return "member" if self.teams > 1 else "thread"

    def shares(self, name: str, count: int) -> str:
        if self.teams == 1:
            return super().shares(name, count)
        return f"for (int {name} = member / {WARP}; {name} < {count}; {name} += {self.warps // self.teams})"

    def factors(self, points: Sequence[Env]) -> tuple[list[DepthFragments], list[Arrival]]:
        """The fragments of both factors, and how what they are read from arrives."""
        both = (self.image, "rows"), (self.other, "cols")
        whole = self.settings.whole
        if self.settings.lines:
            lines = [
                LineFragments(self, self.box(access, "depth", points), access, side, points, whole)
                for access, side in both
            ]
            return [*lines], [factor.arrival for factor in lines]
        found = [
            TurnedFragments(self, self.box(access, side, points), access, side, points)
            for access, side in both
        ]
        return [*found], arrivals_of(self, [factor.box for factor in found], whole)

    def box(self, access: Access, along: str, points: Sequence[Env]) -> Box:
        """What a program reads of a factor at a time; elements along a side lie together."""
        variable, level = self.sides[along], self.nest.tile_start
        return box_of(self, access, points, level, lambda symbol: variable in self.variables(symbol))

    def multiply(self, loads: DepthLoads[Any], points: Sequence[Env]) -> None:
        """The products of each piece of the depth: each fragment of the image, and all that uses it."""
        image, other = loads.image, loads.other
        deep = self.nest.lengths["depth"]
        numbers = {
            key: n
            for n, key in enumerate(
                itertools.product(*(range(self.nest.loops[i].count or 1) for i in self.parallel))
            )
        }
        others = {at: n for n, at in enumerate(dict.fromkeys(other.at(point) for point in points))}
        uses: dict[At, list[tuple[int, int]]] = {}
        for point in points:
            uses.setdefault(image.at(point), []).append((numbers[self.key(point)], others[other.at(point)]))
        self.emit("#pragma unroll 1")
        with self.block(self.shares("piece", -(-deep // self.deep))):
            loads.begin()
            self.emit(f"u32 a[4], b[{len(others)}][{self.cols}][2];")
            for at, number in others.items():
                loads.load_other(number, at)
            for at in sorted(uses):
                for row in range(self.rows):
                    loads.load_image(row, at)
                    for number, fragment in uses[at]:
                        for col in range(self.cols):
                            self.emit(
                                f"{loads.product}(sum[{number}][{row}][{col}], a, b[{fragment}][{col}]);"
                            )
