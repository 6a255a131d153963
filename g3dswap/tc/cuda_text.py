"""The lines of a CUDA C++ kernel: names of loop variables, linear forms, addresses and conditions as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from . import batch_text
from .linear import Linear
from .nest import SIDE_BINDS, Nest
from .place_nd import Spot, Spotter
from .words import ITEM_BYTES

INDENT = "  "
REGISTER, ROW = 4, 16
"""Bytes of a register, and of a row that `ldmatrix` loads, of which a product's depth has two."""
MEET = "__syncthreads();"
"""How the threads of a program wait for each other."""
WAIT = "wait_for_others();"
"""How they wait for the kernel before: until then, nothing is read from memory or written to it."""
Names = Mapping[str, str]
"""Of variables, where they do not go by their own."""


class CudaText:
    """Lines of a function, and expressions of one nest in them.

    Variables of the grid and of loops go by their axis and place, those of a product's sides by the side.
    outside: how many loops are outside of what is staged and multiplied at a time.
    is_crowded: whether a thread's registers are nearly all taken, so that nothing is to be kept in more.
    """

    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self.spotter = Spotter(nest)
        # Of a factor's elements: bytes and type, and how many make a register, a row, the depth of a product.
        self.item = ITEM_BYTES[nest.tensors[0].dtype]
        self.kind = "u16" if self.item == 2 else "float"
        self.pair, self.chunk, self.deep = (size // self.item for size in (REGISTER, ROW, 2 * ROW))
        self.lines: list[str] = []
        self._indent = 1
        self.names = {
            f"v{i}": p.bind if p.bind in SIDE_BINDS else f"{p.axis.replace('*', '_')}_{i}"
            for i, p in enumerate(nest.loops)
        }
        self.sides = {p.bind: f"v{i}" for i, p in enumerate(nest.loops) if p.bind in SIDE_BINDS}
        self.grid = range(nest.grid_loops)
        self.outside = len(self.grid)
        self.is_crowded = False

    def emit(self, *lines: str) -> None:
        self.lines += [INDENT * self._indent + line for line in lines]

    def emit_if(self, test: str, statement: str) -> None:
        self.emit(f"if ({test}) {statement}" if test else statement)

    @contextmanager
    def block(self, head: str = "", end: str = "}") -> Iterator[None]:
        self.emit(f"{head} {{".lstrip())
        self._indent += 1
        yield
        self._indent -= 1
        self.emit(end)

    def count(self, i: int) -> str:
        """How often a loop runs."""
        return batch_text.count(self.nest, i, self.names)

    def decode(self, loops: Sequence[int], number: str) -> None:
        """Variables of these loops from the number of a step of all of them, the last the fastest."""
        for place, i in enumerate(reversed(loops)):
            name, count = self.names[f"v{i}"], self.count(i)
            scale = " * share" if self.nest.is_first_of_block(i) else ""
            if place == len(loops) - 1:
                self.emit(f"const int {name} = {number}{scale};")
                break
            self.emit(f"const int {name} = {number} % {count}{scale}, {name}_rest = {number} / {count};")
            number = f"{name}_rest"

    # Linear forms

    def form(self, form: Linear, names: Names | None = None, kind: str = "") -> str:
        """The text of a form; kind: a cast of each term."""
        pieces = [
            f"{kind}{self._symbol(symbol, names)}{f' * {factor}' if factor != 1 else ''}"
            for symbol, factor in form.terms
        ]
        if form.const or not pieces:
            pieces.append(str(form.const))
        return " + ".join(pieces)

    def _symbol(self, symbol: str, names: Names | None) -> str:
        quotient = self.spotter.quotients.get(symbol)
        if quotient is None:
            return (names or {}).get(symbol, self.names[symbol])
        # What is divided is never negative, and unsigned divisions by constants take fewer instructions.
        return f"(int)((unsigned)({self.form(quotient.form, names)}) {quotient.op[0]} {quotient.number}u)"

    def variables(self, symbol: str) -> frozenset[str]:
        """The loop variables that a symbol is made of."""
        quotient = self.spotter.quotients.get(symbol)
        if quotient is None:
            return frozenset((symbol,))
        return frozenset().union(*(self.variables(inner) for inner, _ in quotient.form.terms))

    def part(self, form: Linear, *chosen: str) -> Linear:
        """The terms of a form that depend on these variables."""
        return Linear(0, tuple(term for term in form.terms if self.variables(term[0]) & {*chosen}))

    def is_outer(self, level: int) -> Callable[[str], bool]:
        """Whether a symbol is made of loops outside of a level only."""
        outer = {f"v{i}" for i in range(level)}
        return lambda symbol: self.variables(symbol) <= outer

    def along(self, form: Linear, side: str) -> list[int]:
        """How far a form has moved at each step of a side."""
        return [moved for (moved,) in self.moves([form], side, range(self.nest.lengths[side]))]

    def moves(self, values: Iterable[Linear], side: str, at: Iterable[int]) -> list[list[int]]:
        """How far each index has moved at these steps of a side."""
        variable = self.sides[side]
        parts = [self.part(value, variable) for value in values]
        return [[self.spotter.evaluate(part, {variable: step}) for part in parts] for step in at]

    # Addresses in memory

    def where(self, spot: Spot, names: Names | None = None, shift: str = "") -> str:
        """The pointer to a spot; what belongs to the loops outside counts in 64 bits."""
        outer = self.is_outer(self.outside)
        far = Linear(0, tuple(term for term in spot.address.terms if outer(term[0])))
        near = spot.address - far
        return f"{spot.tensor}{shift} + ({self.form(far, names, '(i64)')}) + ({self.form(near, names)})"

    def test(self, spot: Spot, names: Names | None = None) -> str:
        """The condition under which a spot has an element ("": always)."""
        tests = [f"(unsigned)({self.form(g.value, names)}) < {g.extent}u" for g in spot.guards]
        tests += [f"({self.form(rest, names)}) % {number} == 0" for rest, number in spot.exact]
        return " && ".join(tests)
