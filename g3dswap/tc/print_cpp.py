"""Prints a scheduled nest as C++ with vector extensions and OpenMP.

Grid loops become one parallel loop over tasks, lanes one vector register, `unroll` straight-line code in
which equal loads are made once, stages copies to a scratch buffer of the thread.  Half types are widened to
float on the way in and rounded on the way out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from ..errors import ScheduleError
from . import batch_text
from .buffers import make_buffer
from .copies_cpp import MEMORY_TYPES, CopyPrinter
from .linear import Linear
from .nest import Access, Nest
from .place import Env, Guard, Place, Placer
from .pointwise_cpp import pointwise_cpp
from .prelude_cpp import prelude

Pointers = dict[tuple[str, tuple[tuple[str, int], ...]], str]
"""The C++ pointer for each (tensor, run-time part of an address)."""

LONGEST_SUM = 32
"""Steps of a loop that one accumulator sums in a row."""

MAX_TERMS = 3000
MAX_ACCUMULATORS = 128
MAX_VECTOR_BYTES = 64


def print_cpp(nest: Nest) -> str:
    """The source text of a kernel.

    It exports ``int run(const void* const* operands, void* out, int64_t batch, int threads)``, which
    returns nonzero when there is no memory for its buffers.

    ScheduleError: the schedule has no meaning for this target (two lane axes, a matrix unit, a gather).
    """
    return _Printer(nest).print()


class _Printer(CopyPrinter):
    def __init__(self, nest: Nest) -> None:
        super().__init__(nest)
        binds = [loop.bind for loop in nest.loops]
        if {"rows", "cols", "depth", "warps"} & set(binds) or binds.count("lanes") > 1:
            raise ScheduleError(f"C++ has one axis of lanes and no matrix unit, not [{', '.join(binds)}].")
        if nest.cluster > 1:
            raise ScheduleError("C++ has no clusters that add up sums; split them over the grid.")
        if tied := [access for access in nest.accesses if access.ties]:
            raise ScheduleError(f"C++ has no packed axes, but {tied[0]} has one; leave it unpacked.")
        if any(len(index.terms) > 1 for index in nest.output.indices):
            raise ScheduleError(f"C++ has no skewed axes, but writes {nest.output}; leave it unskewed.")
        if blocked := [part for fused in nest.fused for part in fused.parts if nest.block(part) > 1]:
            raise ScheduleError(f"C++ flattens whole axes, but {blocked[0]} has digits of its own.")
        self.width = next((p.count or 1 for p in nest.loops if p.bind == "lanes"), 1)
        size = self.width * (8 if self.compute == "double" else 4)
        if size > MAX_VECTOR_BYTES or self.width & (self.width - 1):
            raise ScheduleError(
                f"{self.width} lanes of {self.compute} are no vector of up to {MAX_VECTOR_BYTES} bytes."
            )
        self.buffers = {s.tensor: make_buffer(nest, s) for s in nest.stages}
        self.placer = Placer(nest, self.buffers)
        self.sums = self.sum_levels()
        self.lane_reduces = any(p.bind == "lanes" and nest.is_reduce(p.axis) for p in nest.loops)

    def print(self) -> str:
        nest = self.nest
        grid = range(nest.grid_loops)
        counts = {i: batch_text.count(nest, i, {}) for i in grid}
        starts = {i for i in grid if nest.is_first_of_block(i)}
        for i, name in enumerate(nest.operands):
            memory = MEMORY_TYPES[self.dtype]
            self.emit(f"const {memory}* __restrict const {name} = (const {memory}*)operands[{i}];")
        out_type = self.compute if nest.partial_loops else MEMORY_TYPES[self.dtype]
        self.emit(f"{out_type}* __restrict const {nest.output.tensor} = ({out_type}*)out;")
        for line in batch_text.definitions(nest, "int64_t"):
            self.emit(line)
        self.emit(f"const int64_t tasks = {' * '.join(['(int64_t)1', *(counts[i] for i in grid)])};")
        self.emit("int failed = 0;")
        self.emit("#pragma omp parallel num_threads(threads) if (threads > 1)")
        with self.block(""):
            self.scratch()
            self.emit("#pragma omp for schedule(dynamic) nowait")
            with self.block("for (int64_t task = 0; task < tasks; ++task)"):
                if self.buffers:
                    self.emit("if (!scratch) continue;")
                self.emit("int64_t rest = task;")
                for i in reversed(grid):
                    scale = " * share" if i in starts else ""
                    self.emit(f"const int64_t v{i} = rest % {counts[i]}{scale}; rest /= {counts[i]};")
                self.partial(counts)
                self.level(len(grid), {})
            if self.buffers:
                self.emit("free(scratch);")
        self.emit("return failed;")
        head = f"// {nest.name}\n" + "".join(f"// {line}\n" for line in str(nest).splitlines()[1:])
        signature = 'extern "C" int run(const void* const* operands, void* out, int64_t batch, int threads) {'
        start = head + prelude(self.compute, self.width) + pointwise_cpp(nest, self.compute, self.width)
        return "\n".join([start, signature, *self.lines, "}", ""])

    def scratch(self) -> None:
        """One allocation a thread for all buffers, each on its own cache line."""
        if not self.buffers:
            return
        offset = 0
        places = []
        for name, buffer in self.buffers.items():
            places.append(f"{self.compute}* __restrict const {name}_buffer = scratch + {offset};")
            offset += -(-buffer.size // 64) * 64 + 64
        size = -(-offset * (8 if self.compute == "double" else 4) // 64) * 64
        self.emit(f"{self.compute}* const scratch = ({self.compute}*)aligned_alloc(64, {size});")
        self.emit("if (!scratch) failed = 1;")
        self.lines.extend("    " + p for p in places)

    def partial(self, counts: dict[int, str]) -> None:
        """Each step of a reduction over the grid writes a result of its own."""
        if not self.nest.partial_loops:
            return
        number = "(int64_t)0"
        for i in self.nest.partial_loops:
            own = f"v{i} / share" if self.nest.is_first_of_block(i) else f"v{i}"
            number = f"({number} * {counts[i]} + {own})"
        shape = self.nest.tensor(self.nest.output.tensor).shape
        size = " * ".join("batch" if e is None else str(e) for e in shape)
        self.emit(f"const int64_t partial = {number};")
        self.emit(f"const int64_t shift = partial * ((int64_t){size});")

    # Loops

    def level(self, i: int, env: Env) -> None:
        nest = self.nest
        for stage in nest.stages:
            if stage.level == i and stage.tensor != nest.output.tensor:
                self.copy(self.buffers[stage.tensor], env, out=False)
        if i in self.sums:
            self.declare_accumulators(env, self.sums[i])
        if i == nest.tile_start:
            self.tile(env)
        else:
            self.loop(i, env)
        if i == nest.accumulate_from:
            self.store(env)
        elif i in self.sums:
            outer = [prefix for at, prefix in self.sums.items() if at < i][-1]
            for key in self.accumulators(env):
                self.emit(f"{self.name(key, outer)} += {self.name(key, self.sums[i])};")
        stage_out = nest.stage_of(nest.output.tensor)
        if stage_out is not None and stage_out.level == i:
            self.copy(self.buffers[nest.output.tensor], env, out=True)

    def loop(self, i: int, env: Env) -> None:
        loop = self.nest.loops[i]
        if loop.bind == "unroll" or loop.count == 1:
            for value in range(loop.count or 1):
                with self.block(""):
                    self.level(i + 1, {**env, f"v{i}": value})
            return
        with self.block(f"for (int64_t v{i} = 0; v{i} < {batch_text.count(self.nest, i, {})}; ++v{i})"):
            self.level(i + 1, env)

    # The register tile

    def tile_points(self, env: Env) -> Iterator[Env]:
        loops = [
            (i, p) for i, p in enumerate(self.nest.loops) if i >= self.nest.tile_start and p.bind == "unroll"
        ]
        for values in itertools.product(*(range(p.count or 1) for _, p in loops)):
            yield {**env, **{f"v{i}": v for (i, _), v in zip(loops, values)}}

    def accumulator(self, point: Env) -> tuple[int, ...]:
        return tuple(
            point[f"v{i}"]
            for i, p in enumerate(self.nest.loops)
            if i >= self.nest.tile_start and p.bind == "unroll" and not self.nest.is_reduce(p.axis)
        )

    def accumulators(self, env: Env) -> dict[tuple[int, ...], Env]:
        """One point of the tile for each accumulator that is stored somewhere."""
        found: dict[tuple[int, ...], Env] = {}
        for point in self.tile_points(env):
            key = self.accumulator(point)
            if key not in found and self.placer.place(self.nest.output, point) is not None:
                found[key] = point
        return found

    def name(self, key: tuple[int, ...], prefix: str = "a") -> str:
        return "_".join([prefix, *map(str, key)])

    def sum_levels(self) -> dict[int, str]:
        """The levels at which accumulators are declared, with their prefixes, outermost first.

        A sum of n terms in a row errs by many roundings; so every LONGEST_SUM steps or so, from the inside
        out, sums are carried over to accumulators further out.
        """
        nest, level = self.nest, self.nest.tile_start
        tile = nest.loops[level:]
        run = math.prod(p.count or 1 for p in tile if p.bind == "unroll" and nest.is_reduce(p.axis))
        inner = nest.loops[level - 1].count or 1 if level > nest.accumulate_from else 1
        cuts = []
        if run >= 8 and run * inner > 16 * LONGEST_SUM:
            cuts.append(level)
            run = 1
        while level > nest.accumulate_from + 1:
            level -= 1
            run *= nest.loops[level].count or 1
            if run >= LONGEST_SUM:
                cuts.append(level)
                run = 1
        levels = [nest.accumulate_from, *reversed(cuts)]
        return {at: "a" if at == levels[-1] else f"s{i}" for i, at in enumerate(levels)}

    def declare_accumulators(self, env: Env, prefix: str) -> None:
        keys = self.accumulators(env)
        size = math.prod(p.count or 1 for p in self.nest.loops[self.nest.tile_start :] if p.bind == "unroll")
        if len(keys) > MAX_ACCUMULATORS or size > MAX_TERMS:
            raise ScheduleError(f"a register tile of {len(keys)} accumulators and {size} terms is too large.")
        if keys:
            self.emit("V " + ", ".join(f"{self.name(k, prefix)} = {{}}" for k in keys) + ";")

    def tile(self, env: Env) -> None:
        keys = self.accumulators(env)
        terms: list[tuple[tuple[int, ...], list[Place]]] = []
        for point in self.tile_points(env):
            key = self.accumulator(point)
            places = [self.placer.place(f, point) for f in self.nest.factors]
            if key in keys and all(p is not None for p in places):
                terms.append((key, [p for p in places if p is not None]))
        if not terms:
            return
        distinct = [len({places[f] for _, places in terms}) for f in range(len(self.nest.factors))]
        lanes = [any(places[f].lanes for _, places in terms) for f in range(len(self.nest.factors))]
        stream = max(range(len(distinct)), key=lambda f: (lanes[f], distinct[f]))
        interior = self.interior([p for _, places in terms for p in places])
        if interior is None:
            self.terms(terms, stream, guarded=True)
        elif interior == "true":
            self.terms(terms, stream, guarded=False)
        else:
            with self.block(f"if ({interior})"):
                self.terms(terms, stream, guarded=False)
            with self.block("else"):
                self.terms(terms, stream, guarded=True)

    def interior(self, places: list[Place]) -> str | None:
        """The condition under which no guard of the tile is needed; None if there is no such form."""
        spans: dict[tuple[tuple[tuple[str, int], ...], int], tuple[int, int]] = {}
        for place in places:
            if place.exact:
                return None
            bounds = [(g.value.terms, g.extent, g.value.const, g.value.const) for g in place.guards]
            if place.tail is not None:
                end = place.tail.start.const + self.width - 1
                bounds.append((place.tail.start.terms, place.tail.extent, place.tail.start.const, end))
            for terms, extent, low, high in bounds:
                old = spans.get((terms, extent), (low, high))
                spans[terms, extent] = (min(low, old[0]), max(high, old[1]))
        conditions = []
        for (terms, extent), (low, high) in sorted(spans.items()):
            value = Linear(0, terms)
            bottom, top = value.bounds(self.placer.counts)
            if bottom + low < 0:
                conditions.append(f"{value} >= {-low}")
            if top + high >= extent:
                conditions.append(f"{value} < {extent - high}")
        return " && ".join(conditions) or "true"

    def terms(self, terms: list[tuple[tuple[int, ...], list[Place]]], stream: int, guarded: bool) -> None:
        """Loads and multiply-adds, each streamed load followed by all that uses it."""
        pointers: Pointers = {}
        for _, places in terms:
            for place in places:
                origin = (place.tensor, place.address.terms)
                if origin not in pointers:
                    pointers[origin] = self.fresh("q")
                    self.pointer(pointers[origin], place)
        uses: dict[Place, list[tuple[tuple[int, ...], list[Place]]]] = {}
        for key, places in terms:
            others = [p for f, p in enumerate(places) if f != stream]
            uses.setdefault(places[stream], []).append((key, others))
        ordered = sorted(uses, key=lambda p: (p.address.terms, p.address.const))
        held: dict[Place, str] = {}
        for condition, group in itertools.groupby(
            ordered, key=lambda p: self.condition(p) if guarded else "true"
        ):
            streamed = list(group)
            if condition == "true":
                self.stream(streamed, uses, held, pointers, guarded)
                continue
            # What outlives the guarded block is loaded before it.
            self.hold([o for p in streamed for _, others in uses[p] for o in others], held, pointers, guarded)
            with self.block(f"if ({condition})"):
                self.stream(streamed, uses, held, pointers, guarded)

    def hold(self, places: list[Place], held: dict[Place, str], pointers: Pointers, guarded: bool) -> None:
        """Load, at their first use, the factors that stay in registers while others stream by."""
        for place in places:
            if place not in held:
                held[place] = self.fresh("k")
                self.load(held[place], place, pointers, guarded)

    def stream(
        self,
        places: list[Place],
        uses: dict[Place, list[tuple[tuple[int, ...], list[Place]]]],
        held: dict[Place, str],
        pointers: Pointers,
        guarded: bool,
    ) -> None:
        for place in places:
            name = self.fresh("x")
            self.load(name, place, pointers, guarded, conditional=False)
            for key, others in uses[place]:
                self.hold(others, held, pointers, guarded)
                self.emit(f"{self.name(key)} += {' * '.join([name, *(held[o] for o in others)])};")

    def pointer(self, name: str, place: Place) -> None:
        shift = Linear(0, place.address.terms)
        self.emit(f"const auto* {name} = {self.memory(place.tensor)} + ({shift});")

    def memory(self, tensor: str) -> str:
        return f"{tensor}_buffer" if tensor in self.buffers else tensor

    def condition(self, place: Place) -> str:
        conditions = [self.guard(g) for g in place.guards]
        conditions += [f"({value}) % {divisor} == 0" for value, divisor in place.exact]
        return " && ".join(conditions) or "true"

    def guard(self, guard: Guard) -> str:
        return f"(uint64_t)({guard.value}) < {guard.extent}u"

    def load(
        self,
        name: str,
        place: Place,
        pointers: Pointers,
        guarded: bool,
        conditional: bool = True,
    ) -> None:
        address = f"{pointers[place.tensor, place.address.terms]} + {place.address.const}"
        kind = "V" if place.lanes else "T"
        value = f"widen(*({address}))"
        if place.lanes:
            value = f"load({address})"
            if guarded and place.tail is not None:
                value = f"load_tail({address}, {place.tail.extent} - ({place.tail.start}))"
        condition = self.condition(place) if guarded and conditional else "true"
        if condition != "true":
            value = f"({condition}) ? {value} : {kind}{{}}"
        self.emit(f"const {kind} {name} = {value};")

    # Results

    def store(self, env: Env) -> None:
        for key, point in self.accumulators(env).items():
            place = self.placer.place(self.nest.output, point)
            assert place is not None
            condition = self.condition(place)
            with self.block("" if condition == "true" else f"if ({condition})"):
                self.store_one(self.name(key, self.sums[self.nest.accumulate_from]), place, point)

    def store_one(self, name: str, place: Place, point: Env) -> None:
        shift = " + shift" if self.nest.partial_loops and place.tensor not in self.buffers else ""
        address = f"{self.memory(place.tensor)} + ({place.address}){shift}"
        if self.lane_reduces:
            total = self.fresh("r")
            self.emit(f"T {total} = sum({name});")
            name = total
        for addend in self.nest.addends:
            self.add(name, addend, point)
        if self.nest.pointwise:
            whole = f"pointwise({f'V{{}} + {name}' if self.lane_reduces else name})"
            self.emit(f"{name} = {f'first({whole})' if self.lane_reduces else whole};")
        if not place.lanes:
            self.emit(f"narrow({address}, {name if self.lane_reduces else f'first({name})'});")
        elif place.tail is not None:
            self.emit(f"store_tail({address}, {name}, {place.tail.extent} - ({place.tail.start}));")
        else:
            self.emit(f"store({address}, {name});")

    def add(self, name: str, addend: Access, point: Env) -> None:
        place = self.placer.place(addend, point)
        if place is None:
            return
        origin = (place.tensor, place.address.terms)
        pointer, value = self.fresh("q"), self.fresh("b")
        self.pointer(pointer, place)
        self.load(value, place, {origin: pointer}, guarded=True)
        once = "partial == 0 ? " if self.nest.partial_loops else ""
        otherwise = (" : V{}" if place.lanes else " : T(0)") if once else ""
        self.emit(f"{name} += {once}{value}{otherwise};")
