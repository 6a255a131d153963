"""The names, addresses and masks of a Triton kernel: linear forms written as text where they are known."""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterator

from .linear import Linear
from .nest import SIDE_BINDS, VECTOR_BINDS, Nest
from .place import Guard
from .place_nd import Spot, Spotter
from .scopes import Scopes

INT32_MAX = 2**31 - 1
WORDS = " words"
RESERVED = (*keyword.kwlist, "tl", "triton", "range", "kernel", "batch", "pid", "partial")


def parts(nest: Nest, axis: str) -> frozenset[str]:
    """The axes of the nest that a loop's axis stands for."""
    fused = nest.fused_axis(axis)
    return frozenset(fused.parts if fused else (axis,))


def sides_of(role: str) -> tuple[str, str]:
    """The sides that an operand of a matrix product runs along."""
    return ("rows", "depth") if role[0] == "a" else ("depth", "cols")


class Expressions:
    """Writes expressions of one nest into scopes.

    A `role` is the operand of a matrix product that an expression belongs to: depth is the second
    dimension of operand "a" and the first of operand "b".  "a words" and "b words" are operands whose
    elements are words: the side that runs along blocks, of which they have one each, is their second
    dimension.  Elsewhere it is "".

    vectors: the loops whose variables are tiles.
    dims:    the dimension of each loop over lanes.
    sides:   the variables of each side of a matrix product; a second one is that of the side's blocks.
    levels:  the scope in which a variable is known, where that is not the function: its loop's.
    """

    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self.spotter = Spotter(nest)
        self.text = Scopes((*RESERVED, *(t.name for t in nest.tensors)))
        self.names = {f"v{i}": self._variable_name(i) for i in range(len(nest.loops))}
        loops = {f"v{i}": p for i, p in enumerate(nest.loops)}
        self.vectors = {v: p for v, p in loops.items() if p.bind in VECTOR_BINDS and p.count != 1}
        self.dot = any(p.bind == "depth" for p in self.vectors.values())
        ordered = sorted(self.vectors, key=lambda v: nest.fusion_of(loops[v].axis) is not None)
        self.sides = {bind: [v for v in ordered if loops[v].bind == bind] for bind in SIDE_BINDS}
        self.dims = {v: d for d, v in enumerate(v for v, p in self.vectors.items() if p.bind == "lanes")}
        inside = [v for v, p in loops.items() if p.bind == "serial" and p.count != 1]
        self.levels = {v: level for level, v in enumerate(inside, 1)}
        self._known: dict[str, tuple[int, frozenset[str]]] = {}

    def _variable_name(self, i: int) -> str:
        """A readable name for a loop variable: its axis, numbered where the axis has several digits."""
        loop = self.nest.loops[i]
        name = loop.axis.replace("*", "_")
        several = sum(p.axis == loop.axis and p.count != 1 for p in self.nest.loops) > 1
        if several or name in self.text.taken:
            return self.text.fresh(f"{name}_")
        self.text.taken.add(name)
        return name

    def symbol(self, symbol: str, role: str) -> str:
        """The name of a loop variable or quotient, defined if need be."""
        quotient = self.spotter.quotients.get(symbol)
        if quotient is not None:
            form = self.named(quotient.form, role)
            return self.text.define("i", f"{form} {quotient.op} {quotient.number}", self.level(quotient.form))
        if symbol not in self.vectors:
            return self.names[symbol]
        if self.dot:
            return self._along_side(symbol, role)
        rank, dim = len(self.dims), self.dims[symbol]
        subscript = f"[{', '.join(':' if d == dim else 'None' for d in range(rank))}]" if rank > 1 else ""
        arange = f"tl.arange(0, {self.vectors[symbol].count})"
        return self.text.variable(self.names[symbol], arange + subscript)

    def _along_side(self, symbol: str, role: str) -> str:
        """The name of a variable of a side: a digit of the place along it, where the side has blocks."""
        loop = self.vectors[symbol]
        outer, *blocks = self.sides[loop.bind]
        count, block = (self.vectors[v].count or 1 for v in (outer, blocks[0] if blocks else outer))
        if role.endswith(WORDS):
            first, whole = loop.bind != self.blocked(role), False
            name = f"{self.names[outer]}_{role[0]}w"
        else:
            first, whole = loop.bind == "rows" or (loop.bind == "depth" and role == "b"), bool(blocks)
            name = self.names[outer] + (f"_{role}" if loop.bind == "depth" else "") + "_all" * whole
        arange = f"tl.arange(0, {count * block if whole else count})[{':, None' if first else 'None, :'}]"
        self.text.variable(name, arange)
        if not whole:
            return name
        return self.text.define("i", f"{name} {'//' if symbol == outer else '%'} {block}", 0)

    def blocked(self, role: str) -> str | None:
        """The side of an operand that runs along blocks."""
        return next((side for side in sides_of(role) if len(self.sides[side]) > 1), None)

    def level(self, form: Linear) -> int:
        """The scope in which all variables of a form are known."""
        return max((self._facts(symbol)[0] for symbol, _ in form.terms), default=0)

    def reach(self, form: Linear) -> frozenset[str]:
        """The tile variables that a form depends on."""
        return frozenset().union(*(self._facts(symbol)[1] for symbol, _ in form.terms))

    def _facts(self, symbol: str) -> tuple[int, frozenset[str]]:
        """The scope in which a symbol is known, and the tile variables that it depends on."""
        if symbol not in self._known:
            quotient = self.spotter.quotients.get(symbol)
            own = frozenset((symbol,) if symbol in self.vectors else ())
            facts = (self.levels.get(symbol, 0), own)
            self._known[symbol] = (
                facts if quotient is None else (self.level(quotient.form), self.reach(quotient.form))
            )
        return self._known[symbol]

    def sum(self, form: Linear, role: str, wide: bool = False) -> str:
        """The text of a form; the loop over the batch, and all that is `wide`, count in 64 bits."""
        pieces: list[str] = []
        for symbol, coefficient in sorted(form.terms, key=lambda t: t[1] < 0):
            name = self.symbol(symbol, role)
            if wide or symbol not in self.spotter.counts:
                level = self.level(Linear(0, ((symbol, 1),)))
                name = self.text.define("i", f"tl.cast({name}, tl.int64)", level)
            pieces += ["-" if coefficient < 0 else "+"]
            pieces += [name if abs(coefficient) == 1 else f"{name} * {abs(coefficient)}"]
        if form.const or not pieces:
            pieces += ["-" if form.const < 0 else "+", str(abs(form.const))]
        return " ".join(pieces[1:] if pieces[0] == "+" else ["0", *pieces])

    def named(self, form: Linear, role: str) -> str:
        """The name of a form, defined where its variables are known."""
        return self.text.define("i", self.sum(form, role), self.level(form))

    def _by_level(self, form: Linear) -> Iterator[tuple[int, Linear]]:
        """The terms of a form, outermost scope first."""
        levels = [self.level(Linear(0, (term,))) for term in form.terms]
        for level in sorted(set(levels)):
            yield level, Linear(0, tuple(t for t, own in zip(form.terms, levels) if own == level))

    def pointer(self, spot: Spot, role: str, shift: str = "", base: str = "") -> str:
        """The address of a spot: a scalar pointer, moved on where loops begin, and the offset of the tile.

        base: what the address counts from, where that is not the tensor itself.
        """
        wide = self.spotter.span(spot.tensor) > INT32_MAX
        tiled = {term: bool(self.reach(Linear(0, (term,)))) for term in spot.address.terms}
        scalars = Linear(0, tuple(t for t, is_tiled in tiled.items() if not is_tiled))
        tiles = Linear(0, tuple(t for t, is_tiled in tiled.items() if is_tiled))
        base = base or spot.tensor
        pointer = self.text.define("p", f"{base} + {shift}", 0) if shift else base
        for level, part in self._by_level(scalars):
            step = self.sum(part, role, wide)
            # Integers are added to each other before they are added to a pointer.
            step = f"({step})" if len(part.terms) > 1 else step
            pointer = self.text.define("p", f"{pointer} + {step}", level)
        offset = ""
        for level, part in self._by_level(tiles):
            step = self.sum(part, role, wide)
            offset = self.text.define("o", f"{offset} + {step}" if offset else step, level)
        if offset:
            pointer = self.text.define("p", f"{pointer} + {offset}", self.level(spot.address))
        const = spot.address.const
        return f"{pointer} {'-' if const < 0 else '+'} {abs(const)}" if const else pointer

    def mask(self, spot: Spot, role: str) -> tuple[str, frozenset[str]]:
        """The condition under which a spot has an element ("": always), and the tile variables in it."""
        conditions: list[tuple[int, str]] = []
        reach: frozenset[str] = frozenset()
        for guard in spot.guards:
            reach |= self.reach(guard.value)
            conditions += self._guard(guard, role)
        for rest, divisor in spot.exact:
            reach |= self.reach(rest)
            text = f"{self.named(rest, role)} % {divisor} == 0"
            conditions.append((self.level(rest), self.text.define("m", text, self.level(rest))))
        mask = ""
        for level, name in sorted(dict.fromkeys(conditions), key=lambda c: c[0]):
            mask = self.text.define("m", f"{mask} & {name}", level) if mask else name
        return mask, reach

    def _guard(self, guard: Guard, role: str) -> Iterator[tuple[int, str]]:
        """The comparisons of a guard that do not always hold."""
        low, high = guard.value.bounds(self.spotter.counts)
        # 0 <= value < extent as bounds of the form without its constant: equal forms are written once.
        form = Linear(0, guard.value.terms)
        bottom, top = -guard.value.const, guard.extent - guard.value.const
        while True:
            # c * x >= b is x >= ceil(b / c), and x // e >= b is x >= b * e: no division at run time.
            common = math.gcd(*(c for _, c in form.terms))
            bottom, top = -(-bottom // common), -(-top // common)
            form = Linear(0, tuple((s, c // common) for s, c in form.terms))
            quotient = self.spotter.quotients.get(form.terms[0][0])
            if len(form.terms) > 1 or form.terms[0][1] < 0 or quotient is None or quotient.op != "//":
                break
            form = Linear(0, quotient.form.terms)
            bottom, top = (b * quotient.number - quotient.form.const for b in (bottom, top))
        level, text = self.level(form), self.named(form, role)
        if low < 0 and high >= guard.extent and top == bottom + 1:
            yield level, self.text.define("m", f"{text} == {bottom}", level)
            return
        if low < 0:
            yield level, self.text.define("m", f"{text} >= {bottom}", level)
        if high >= guard.extent:
            yield level, self.text.define("m", f"{text} < {top}", level)
