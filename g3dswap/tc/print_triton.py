"""Prints a scheduled nest as a Triton kernel.

Grid loops are decoded from one flat program id, lanes become the dimensions of a tile, `unroll` becomes
straight-line code in which equal loads are made once, and rows, cols and depth become a matrix product.
Every address and mask that does not change inside a loop is made outside it; loads stay at the tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from ..errors import ScheduleError
from .nest import SIDE_BINDS, VECTOR_BINDS, Access, Loop, Nest
from .operands import Operands
from .place import Env
from .place_nd import Spot
from .pointwise_triton import pointwise_triton
from .triton_text import WORDS, Expressions, parts
from .words import REGISTERS, Word, word

MAX_TERMS = 2000
MAX_ACCUMULATORS = 128
MAX_TILE = 1 << 16
MIN_DOT = 16

Key = tuple[int, ...]


def print_triton(nest: Nest, ahead: int = 0, across: bool = False) -> str:
    """The source text of a module with one function, ``kernel(*operands, out, batch)``.

    ahead:  how many loads are begun before the matrix products of earlier ones; or, where there are none, how
            many steps of the innermost loop begin theirs together.
    across: whether neighbouring lanes load the words of neighbouring blocks of an operand, or of one block.
    It is to be launched on one program for each step of the grid loops, in one dimension.

    ScheduleError: the schedule has no meaning for this target (stages, lanes that are no power of two,
    a matrix product of float64, ...).
    """
    _check(nest)
    return _Printer(nest, ahead, across).print()


def _check(nest: Nest) -> None:
    """The rules of this target."""
    if nest.stages:
        raise ScheduleError(f"Triton has no stages, but {nest.stages[0].tensor} has one; leave it out.")
    if nest.shares:
        raise ScheduleError("Triton has no blocks of the batch; give a program one step of it, or all.")
    if nest.cluster > 1:
        raise ScheduleError("Triton has no clusters that add up sums; split them over the grid.")
    if any(p.bind == "warps" for p in nest.loops):
        raise ScheduleError("Triton has no loops over warps; use lanes.")
    vectors = [p for p in nest.loops if p.bind in VECTOR_BINDS]
    for p in vectors:
        count = p.count or 0
        if count & (count - 1):
            raise ScheduleError(f"{count} {p.bind} of {p.axis} are no power of two; a tile's sides must be.")
    if {p.bind for p in vectors} - {"lanes"}:
        binds = [p.bind for p in vectors if nest.fusion_of(p.axis) is None]
        if sorted(binds) != sorted(SIDE_BINDS):
            raise ScheduleError(f"a matrix product has one loop each of rows, cols and depth, not {binds}.")
        _check_dot(nest, vectors)
        size = max(map(math.prod, itertools.combinations(nest.lengths.values(), 2)))
    else:
        size = math.prod(p.count or 1 for p in vectors)
    if size > MAX_TILE:
        raise ScheduleError(f"a tile of {size} elements is too large; use at most {MAX_TILE}.")


def _check_dot(nest: Nest, loops: list[Loop]) -> None:
    dtype, lengths = nest.tensors[0].dtype, nest.lengths
    if dtype == "float64" or len(nest.factors) != 2:
        raise ScheduleError(f"no matrix unit multiplies {len(nest.factors)} factors of {dtype}; use lanes.")
    for p in loops:
        if lengths[p.bind] < MIN_DOT:
            raise ScheduleError(f"{lengths[p.bind]} {p.bind} of {p.axis} are too few; use {MIN_DOT} or more.")
        if nest.is_reduce(p.axis) != (p.bind == "depth"):
            kind = "a reduction" if p.bind == "depth" else "a parallel axis"
            raise ScheduleError(f"{p.bind} run along {p.axis}, but must run along {kind}.")
    axes = {p.bind: parts(nest, p.axis) for p in loops if nest.fusion_of(p.axis) is None}
    used = [sorted(bind for bind, own in axes.items() if own & factor.axes) for factor in nest.factors]
    if sorted(used) != [["cols", "depth"], ["depth", "rows"]]:
        raise ScheduleError(
            f"a matrix product is over rows, depth and cols, depth; the factors are over {used}."
        )


class _Printer:
    def __init__(self, nest: Nest, ahead: int, across: bool) -> None:
        self.nest = nest
        self.ahead = ahead
        self.across = across
        self.write = Expressions(nest)
        self.text = self.write.text
        self.spot = self.write.spotter.spot
        self.dtype = nest.tensors[0].dtype
        self.result = nest.tensor(nest.output.tensor).dtype
        self.compute = "float64" if self.dtype == "float64" else "float32"
        self.vectors = self.write.vectors
        self.sums = [d for v, d in self.write.dims.items() if nest.is_reduce(self.vectors[v].axis)]
        self.roles = self._roles()
        self.operands = Operands(self.write, self.dtype)
        lanes = [p.count or 1 for p in self.vectors.values()]
        self.sides = [nest.lengths[b] for b in ("rows", "cols")] if self.write.dot else lanes
        self.terms = 0

    def _roles(self) -> list[str]:
        """For each factor, which operand of the matrix product it is."""
        if not self.write.dot:
            return ["" for _ in self.nest.factors]
        rows = next(p.axis for p in self.vectors.values() if p.bind == "rows")
        return ["a" if f.axes & parts(self.nest, rows) else "b" for f in self.nest.factors]

    def print(self) -> str:
        nest = self.nest
        self.grid()
        self.level(nest.grid_loops, {})
        head = [f"# {line}" for line in str(nest).splitlines()]
        imports = ["", "import triton", "import triton.language as tl", "", ""]
        parameters = ", ".join([*nest.operands, nest.output.tensor, "batch", "early: tl.constexpr = False"])
        begin = ["    if early:  # than the kernel before has ended"]
        begin += ["        tl.extra.cuda.gdc_launch_dependents()"] if nest.partial_counts else []
        begin += ["        tl.extra.cuda.gdc_wait()"]
        # Triton would compile a batch of 1 or of a multiple of 16 in, and compile again for others.
        signature = ['@triton.jit(do_not_specialize=["batch"])', f"def kernel({parameters}):"]
        return "\n".join([*head, *imports, *signature, *begin, *self.text.lines, ""])

    # Loops

    def grid(self) -> None:
        """Loop variables of the grid, and the number of this program's partial result."""
        real = [i for i in range(self.nest.grid_loops) if self.nest.loops[i].count != 1]
        rest = "tl.program_id(0)"
        for i in reversed(real):
            name = self.write.names[f"v{i}"]
            if i == real[0]:
                self.text.variable(name, rest)
                break
            rest = self.text.variable("pid", rest) if i == real[-1] else self.text.define("rest", rest)
            self.text.variable(name, f"{rest} % {self.count(i)}")
            rest = f"{rest} // {self.count(i)}"
        partial = ""
        for i in self.nest.partial_loops:
            name = self.write.names[f"v{i}"] if i in real else "0"
            partial = f"({partial}) * {self.count(i)} + {name}" if partial else name
        if partial:
            self.text.variable("partial", partial)

    def count(self, i: int) -> str:
        count = self.nest.loops[i].count
        return "batch" if count is None else str(count)

    def level(self, i: int, env: Env) -> None:
        nest = self.nest
        if i == nest.accumulate_from:
            self.declare_accumulators(env)
        if i == nest.tile_start:
            self.tile(env)
        elif nest.loops[i].bind == "unroll" or nest.loops[i].count == 1:
            for value in range(nest.loops[i].count or 1):
                self.level(i + 1, {**env, f"v{i}": value})
        else:
            steps = f"range({self.count(i)})"
            innermost = all(loop.count == 1 for loop in nest.loops[i + 1 : nest.tile_start])
            if innermost and self.ahead > 1 and not self.write.dot:
                # The compiler moves no load to before the sum of an earlier step.
                steps = f"tl.range({self.count(i)}, loop_unroll_factor={self.ahead})"
            with self.text.block(f"for {self.write.names[f'v{i}']} in {steps}:"):
                self.level(i + 1, env)
        if i == nest.accumulate_from:
            self.store(env)

    # The register tile

    def load(self, prefix: str, spot: Spot, role: str, condition: str = "") -> str:
        """The name of a load, made if need be; where the tensor has no element it is zero."""
        return self.text.once((spot, role, condition), lambda: self.loaded(prefix, spot, role, condition))

    def loaded(self, prefix: str, spot: Spot, role: str, condition: str) -> str:
        """The name of a load that may share its instruction with others."""
        if role:
            wide = self.operands.words(spot, role)
            if wide is not None:
                return self.text.define(
                    prefix, self.operands.unpacked(wide, self.read_words(wide, role), role)
                )
            return self.read(prefix, spot, role, condition)
        found = None if condition or not self.write.reach(spot.address) else word(spot, self.dtype)
        if found is not None:
            wide, place = found
            return self.text.define(prefix, wide.element(self.read_words(wide), place), self.home(spot))
        if self.dtype == "bfloat16":
            # A shift, for ptxas makes a conversion again for each use and holds registers for it.
            alone = Word(spot, 1, self.dtype)
            bits = self.read("bits", spot, role, condition, self.text.variable(*alone.base))
            return self.text.define(prefix, alone.element(bits, 0), self.home(spot))
        return self.read(prefix, spot, role, condition)

    def home(self, spot: Spot) -> int:
        """The outermost scope in which a spot stays the same."""
        return max(self.write.level(form) for form in spot.forms)

    def begin(self, prefix: str, spot: Spot, role: str) -> None:
        """Load what a later product takes; words stay words until then."""
        wide = self.operands.words(spot, role) if role else None
        if wide is None:
            self.load(prefix, spot, role)
        else:
            self.read_words(wide, role)

    def read_words(self, wide: Word, role: str = "") -> str:
        """The name of one load instruction of words."""
        return self.read("w", wide.spot, role and role + WORDS, "", self.text.variable(*wide.base))

    def read(self, prefix: str, spot: Spot, role: str, condition: str, base: str = "") -> str:
        """The name of one load instruction; a word, which `base` points to, is not converted."""
        pointer = self.write.pointer(spot, role, base=base)
        mask, reach = self.write.mask(spot, role)
        if role:
            reach |= self.operands.variables(role)
        pointer = self.spread(pointer, spot, role, reach)
        if role.endswith(WORDS) and self.across:
            # Triton gives neighbouring lanes what it knows to be consecutive, else the first dimension.
            pointer = f"tl.max_contiguous({pointer}, (1, 1))"
        mask = " & ".join(m for m in (condition, mask) if m)
        other = "0" if base else "0.0"
        text = f"tl.load({pointer}, mask={mask}, other={other})" if mask else f"tl.load({pointer})"
        if self.dtype != self.compute and not role and not base:
            text += f".to(tl.{self.compute})"
        return self.text.define(prefix, text, self.text.level if role else self.home(spot))

    def rounded(self, name: str) -> str:
        """A factor of a matrix product: a float32 as the nearest TF32, which the unit would truncate it to.

        NaN stays NaN, and infinity infinity.
        """
        if self.dtype != "float32" or self.nest.precision != "tf32":
            return name
        bits = f"(({name}.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)"
        return self.text.define("r", f"tl.where({name} == {name}, {bits}, {name})")

    def spread(self, pointer: str, spot: Spot, role: str, reach: frozenset[str]) -> str:
        """A pointer in the shape of all that is in `reach`: of a mask, or an operand of a matrix product."""
        missing = sorted(reach - self.write.reach(spot.address))
        return " + ".join([pointer, *(f"{self.write.symbol(symbol, role)} * 0" for symbol in missing)])

    def tile_points(self, env: Env) -> Iterator[tuple[Key, Env]]:
        """Every point of the unrolled tile and the key of its accumulator."""
        nest = self.nest
        start = nest.tile_start
        loops = {f"v{i}": p for i, p in enumerate(nest.loops) if i >= start and p.bind == "unroll"}
        parallel = [not nest.is_reduce(p.axis) for p in loops.values()]
        for values in itertools.product(*(range(p.count or 1) for p in loops.values())):
            yield tuple(itertools.compress(values, parallel)), {**env, **dict(zip(loops, values))}

    def accumulators(self, env: Env) -> dict[Key, Env]:
        """One point of the tile for each accumulator that is stored somewhere."""
        found: dict[Key, Env] = {}
        for key, point in self.tile_points(env):
            if key not in found and self.spot(self.nest.output, point) is not None:
                found[key] = point
        return found

    def name(self, key: Key) -> str:
        return "_".join(["acc", *map(str, key)])

    def declare_accumulators(self, env: Env) -> None:
        loops = self.nest.loops[self.nest.tile_start :]
        self.terms += math.prod(p.count or 1 for p in loops if p.bind == "unroll")
        # Before the points of a tile that is far too large are listed.
        if self.terms > MAX_TERMS:
            raise ScheduleError(f"{self.terms} unrolled terms are more than {MAX_TERMS}; unroll less.")
        keys = self.accumulators(env)
        if len(keys) > MAX_ACCUMULATORS:
            raise ScheduleError(f"{len(keys)} accumulators are more than {MAX_ACCUMULATORS}; unroll less.")
        registers = len(keys) * math.prod(self.sides) * (2 if self.compute == "float64" else 1)
        if registers > REGISTERS:
            raise ScheduleError(
                f"accumulators in {registers} registers, where a program has {REGISTERS}; "
                "use fewer lanes or unroll less."
            )
        shape = f"({', '.join(map(str, self.sides))}{',' if len(self.sides) == 1 else ''})"
        for key in keys:
            self.text.emit(f"{self.name(key)} = tl.zeros({shape}, tl.{self.compute})")

    def tile(self, env: Env) -> None:
        """Loads and multiply-adds, each streamed load followed by all that uses it."""
        keys = self.accumulators(env)
        terms: list[tuple[Key, list[Spot]]] = []
        for key, point in self.tile_points(env):
            spots = [s for f in self.nest.factors if (s := self.spot(f, point)) is not None]
            if key in keys and len(spots) == len(self.nest.factors):
                terms.append((key, spots))
        if not terms:
            return
        stream = self.streamed([spots for _, spots in terms])
        for _, spots in terms:
            for f, spot in enumerate(spots):
                if f != stream:
                    self.load("k", spot, self.roles[f])
        uses: dict[Spot, list[tuple[Key, list[Spot]]]] = {}
        for key, spots in terms:
            uses.setdefault(spots[stream], []).append((key, spots))
        order = sorted(uses, key=lambda s: (s.address.terms, s.address.const))
        for i, spot in enumerate(order):
            # Nothing is loaded past the barriers of a matrix product, so loads are begun some products ahead.
            for later in order[i + 1 : i + 1 + self.ahead]:
                self.begin("x", later, self.roles[stream])
            for key, spots in uses[spot]:
                self.multiply(self.name(key), [self.load("x", s, r) for s, r in zip(spots, self.roles)])

    def streamed(self, terms: list[list[Spot]]) -> int:
        """The factor with the most to load; the others are held in registers meanwhile."""
        sizes = []
        for f, spot in enumerate(terms[0]):
            tile = math.prod(self.vectors[v].count or 1 for v in self.write.reach(spot.address))
            sizes.append(len({spots[f] for spots in terms}) * tile)
        return sizes.index(max(sizes))

    def multiply(self, accumulator: str, factors: list[str]) -> None:
        if not self.write.dot:
            self.text.emit(f"{accumulator} += {' * '.join(factors)}")
            return
        a, b = (self.rounded(factors[self.roles.index(role)]) for role in ("a", "b"))
        precision = f', input_precision="{self.nest.precision}"' if self.dtype == "float32" else ""
        self.text.emit(f"{accumulator} = tl.dot({a}, {b}, {accumulator}{precision})")

    # Results

    def store(self, env: Env) -> None:
        words: dict[Word, dict[int, tuple[Spot, str]]] = {}
        single: list[tuple[Spot, str]] = []
        for key, point in self.accumulators(env).items():
            spot = self.spot(self.nest.output, point)
            assert spot is not None
            value = self.total(self.name(key), point)
            tiled = self.write.reach(spot.address) and not self.sums and not self.nest.partial_counts
            found = word(spot, self.result) if tiled else None
            if found is None:
                single.append((spot, value))
            else:
                words.setdefault(found[0], {})[found[1]] = (spot, value)
        for whole, elements in words.items():
            if len(elements) < whole.width:
                single += elements.values()
                continue
            text = whole.text([elements[place][1] for place in range(whole.width)])
            self.write_out(whole.spot, text, self.text.variable(*whole.base))
        for spot, value in single:
            if not self.nest.partial_counts and self.result != self.compute:
                value = f"{value}.to(tl.{self.result})"
            self.write_out(spot, value)

    def total(self, value: str, point: Env) -> str:
        """An accumulator's value summed over the lanes of reductions, with the epilogue."""
        if len(self.sums) == len(self.write.dims) > 0:
            value = self.outcome(f"tl.sum({value})")
        else:
            for dim in self.sums:
                value = self.outcome(f"tl.sum({value}, axis={dim}, keep_dims=True)")
        for addend in self.nest.addends:
            value = self.add(value, addend, point)
        return pointwise_triton(self.nest, value, self.compute, self.outcome)

    def write_out(self, spot: Spot, value: str, base: str = "") -> None:
        pointer = self.write.pointer(spot, "", self.shift(), base)
        mask, reach = self.write.mask(spot, "")
        pointer = self.spread(pointer, spot, "", reach)
        self.text.emit(f"tl.store({pointer}, {value}{f', mask={mask}' if mask else ''})")

    def shift(self) -> str:
        """How far this program's partial result lies behind the first, in elements ("": there is one)."""
        if not self.nest.partial_loops:
            return ""
        shape = self.nest.tensor(self.nest.output.tensor).shape
        size = ["batch"] * (None in shape) + [str(math.prod(e for e in shape if e is not None))]
        return self.text.define("shift", " * ".join(["tl.cast(partial, tl.int64)", *size]), 0)

    def outcome(self, expression: str) -> str:
        # A name of its own even for an equal text: accumulators change.
        name = self.text.fresh("r")
        self.text.emit(f"{name} = {expression}")
        return name

    def add(self, value: str, addend: Access, point: Env) -> str:
        spot = self.spot(addend, point)
        if spot is None:
            return value
        once = self.text.define("m", "partial == 0", 0) if self.nest.partial_loops else ""
        return self.outcome(f"{value} + {self.load('b', spot, '', once)}")
