"""A program of a CUDA C++ kernel: its place in the grid, its shared memory, its results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ..errors import ScheduleError
from . import batch_text
from .cuda_text import MEET, ROW, CudaText, Names
from .nest import Nest
from .place import Env
from .place_nd import Spot
from .roles import image_and_other
from .schedule import Schedule
from .words import ITEM_BYTES, WARP

ROWS, COLS = 16, 8
"""Of one product of the matrix unit."""
SHARED, MOST_SHARED = 228 * 1024, 227 * 1024
"""Bytes of shared memory of a multiprocessor, and of a program at most, on an H100."""
MOST_CLUSTER = 8
"""Programs of a cluster, on any GPU that has clusters."""
MOST_ACCUMULATORS = 216
"""Registers of a thread that sums may take."""
CROWDED = 190
"""Of those, from which on the compiler spills what it works out ahead."""
MOST_PRODUCTS = 4096
"""Products of the unrolled code of a warp."""
BUFFERS = 2
"""Parts of the image that a program which walks along it has room for."""
APART = 128
"""Bytes that what is in shared memory begins at multiples of."""

Key = tuple[int, ...]


def deep_of(nest: Nest) -> int:
    """How deep one product of the matrix unit is."""
    return 2 * ROW // ITEM_BYTES[nest.tensors[0].dtype]


@dataclass(frozen=True)
class Settings:
    """How programs do what the nest says.

    warps:   of a program.
    buffers: of what is copied in a loop; with two, the next is on its way while one is multiplied.
    teams:   of warps, each of which copies and multiplies steps of that loop of its own.
    whole:   whether parts of tensors that lie together are copied as they lie, and put in order afterwards.
    lines:   whether a product's depth of positions is read along lines of them, and not turned around.
    """

    warps: int
    buffers: int = 1
    teams: int = 1
    whole: bool = False
    lines: bool = False

    @classmethod
    def of(cls, schedule: Schedule) -> Settings:
        hint = schedule.hint
        flags = (bool(hint(name, 0)) for name in ("whole", "lines"))
        return cls(hint("warps", 4), hint("stages", 1), hint("teams", 1), *flags)

    @property
    def threads(self) -> int:
        """Of a program."""
        return self.warps * WARP


class Program(CudaText):
    """What both forms of a product in shared memory have in common.

    serial, unrolled: the loops inside, those of one step left out.
    walks: loops around all that is summed, at each step of which the program has other results.
    parallel: the unrolled ones whose steps have sums of their own.
    apart: the variable of the loop of which each warp has a step; without one, warps share the positions.
    """

    def __init__(self, nest: Nest, settings: Settings) -> None:
        super().__init__(nest)
        self.settings = settings
        self.warps, self.threads = settings.warps, settings.threads
        self.image, self.other = image_and_other(nest)
        loops = [i for i, p in enumerate(nest.loops) if p.bind == "serial" and p.count != 1]
        self.serial = [i for i in loops if nest.is_reduce(nest.loops[i].axis)]
        self.walks = [i for i in loops if i not in self.serial]
        self.unrolled = [i for i, p in enumerate(nest.loops) if p.bind == "unroll" and i >= nest.tile_start]
        self.parallel = [i for i in self.unrolled if not nest.is_reduce(nest.loops[i].axis)]
        self.apart = tuple(f"v{i}" for i, p in enumerate(nest.loops) if p.bind == "warps")
        self.result = nest.tensor(nest.output.tensor)
        self.shared = 0

    def write(self) -> None:
        """Write the function's body."""
        raise NotImplementedError

    def place_in_grid(self) -> None:
        """Loop variables of the grid, and the number of this program's partial result."""
        real = [i for i in self.grid if self.nest.loops[i].count != 1]
        self.emit(*batch_text.definitions(self.nest, "int"))
        if real:
            self.decode(real, "blockIdx.x")
        for own in self.apart:
            self.emit(f"const int {self.names[own]} = warp;")
        partial = "0"
        for i in self.nest.partial_loops:
            own = self.names[f"v{i}"] + (" / share" if self.nest.is_first_of_block(i) else "")
            partial = f"({partial}) * {self.count(i)} + {own if i in real else 0}"
        if self.nest.partial_loops:
            self.emit(f"const i64 partial = {partial};")

    def shares(self, name: str, count: int) -> str:
        """The head of a warp's loop over its part of so many steps: all of them where warps are apart."""
        first, step = ("0", 1) if self.apart else ("warp", self.warps)
        return f"for (int {name} = {first}; {name} < {count}; {name} += {step})"

    @contextmanager
    def looped(self, loops: Sequence[int]) -> Iterator[None]:
        """Loops inside each other that are not unrolled."""
        with ExitStack() as stack:
            for i in loops:
                name = self.names[f"v{i}"]
                self.emit("#pragma unroll 1")
                head = f"for (int {name} = 0; {name} < {self.count(i)}; ++{name})"
                stack.enter_context(self.block(head))
            yield

    @contextmanager
    def rounds(self, name: str, count: str, ahead: bool, members: int = 0) -> Iterator[None]:
        """A loop over so many copies that `fetch` makes; ahead: the next is on its way while one is used.

        members: threads of a team that has copies of its own, or 0 where they are the program's.
        """
        following, whose = f"{name} + 1 < {count}", f", {members}>(team)" if members else ">()"
        self.emit("#pragma unroll 1")
        with self.block(f"for (int {name} = 0; {name} < {count}; ++{name})"):
            self.emit(f"if ({following}) fetch({name} + 1);" if ahead else f"fetch({name});")
            some, every = f"arrived<1{whose}", f"arrived<0{whose}"
            self.emit(f"{following} ? {some} : {every};" if ahead else f"{every};")
            yield
            self.emit(self.meet(members))

    def meet(self, members: int) -> str:
        """How threads wait for each other: those of a team of so many, or, for 0, of the program."""
        return f"meet<{members}>(team);" if members else MEET

    def take(self, size: int) -> int:
        """Where so many bytes of shared memory begin."""
        start = self.shared
        self.shared += -(-size // APART) * APART
        return start

    # The unrolled loops

    def points(self) -> list[Env]:
        """Every point of the unrolled loops."""
        counts = [range(self.nest.loops[i].count or 1) for i in self.unrolled]
        return [dict(zip((f"v{i}" for i in self.unrolled), step)) for step in itertools.product(*counts)]

    def terms(self) -> list[Env]:
        """The points at which both factors may have elements."""
        factors = self.image, self.other
        return [p for p in self.points() if all(self.spotter.spot(f, p) is not None for f in factors)]

    def key(self, point: Env) -> Key:
        """Which sum a point of the unrolled loops adds to."""
        return tuple(point[f"v{i}"] for i in self.parallel)

    def stored(self) -> dict[Key, Env]:
        """One point for each sum that is stored somewhere, those without a term among them."""
        found: dict[Key, Env] = {}
        for point in self.points():
            if self.key(point) not in found and self.spotter.spot(self.nest.output, point) is not None:
                found[self.key(point)] = point
        return found

    def check_size(self, registers: int, products: int) -> None:
        """Note whether sums in so many registers of a thread leave few.

        ScheduleError: they, or so many unrolled products, are too much.
        """
        if registers > MOST_ACCUMULATORS:
            raise ScheduleError(f"sums in {registers} registers of {MOST_ACCUMULATORS}; unroll less.")
        if products > MOST_PRODUCTS:
            raise ScheduleError(f"{products} unrolled products are more than {MOST_PRODUCTS}; unroll less.")
        self.is_crowded = registers > CROWDED

    # Results

    def shift(self) -> str:
        """How far this program's partial result lies behind the first."""
        if not self.nest.partial_loops:
            return ""
        size = math.prod(e for e in self.result.shape[len(self.nest.replicas) :] if e is not None)
        return f" + partial * {size}" + (" * batch" if None in self.result.shape else "")

    def finished(self, value: str, point: Env, names: Names | None = None) -> str:
        """A sum with what is added to it, and the functions of that."""
        for addend in self.nest.addends:
            spot = self.spotter.spot(addend, point)
            if spot is not None:
                once = ["partial == 0"] if self.nest.partial_loops else []
                tests = " && ".join([*once, *filter(None, [self.test(spot, names)])])
                found = f"widen(*({self.where(spot, names)}))"
                value += f" + ({tests} ? {found} : 0.0f)" if tests else f" + {found}"
        return f"pointwise({value})" if self.nest.pointwise else value

    def is_paired(self, spot: Spot) -> bool:
        """Whether an even column and the next one lie together, and are both there or neither."""
        cols = self.along(spot.address, "cols")
        rest = spot.address - self.part(spot.address, self.sides["cols"])
        even = not spot.exact and rest.const % 2 == 0 and not any(factor % 2 for _, factor in rest.terms)
        if not even or any(a % 2 or b != a + 1 for a, b in zip(cols[::2], cols[1::2])):
            return False
        for guard in spot.guards:
            steps = self.along(guard.value, "cols")
            others = guard.value - self.part(guard.value, self.sides["cols"])
            pairs = list(zip(steps[::2], steps[1::2]))
            whole = (
                guard.extent % 2 == 0 and others.const % 2 == 0 and not any(f % 2 for _, f in others.terms)
            )
            if any(a != b for a, b in pairs) and not (
                whole and all(a % 2 == 0 and b == a + 1 for a, b in pairs)
            ):
                return False
        return True
