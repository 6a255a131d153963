"""Where an access reads or writes, for a target whose lanes have several dimensions and may gather.

Like `place.Placer` it substitutes the unrolled loop variables and decides statically what can be decided.
What is left at run time is written as linear forms over loop variables and *quotients*: symbols for
`form // number` and `form % number`, which decode fused axes and exact divisions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .linear import Linear
from .nest import Access, Fused, Index, Nest, digits
from .place import Env, Guard, resolve


@dataclass(frozen=True)
class Quotient:
    """The symbol of `form // number` (op "//") or `form % number` (op "%"); the form is never negative."""

    op: str
    form: Linear
    number: int


@dataclass(frozen=True)
class Images:
    """`value < batch - block * step`: the last block of images may have fewer than the others.

    step: the variable that counts blocks.
    """

    value: Linear
    step: str
    block: int


@dataclass(frozen=True)
class Spot:
    """tensor[address]; outside its guards, or where a numerator of `exact` does not divide, it is zero.

    images: a guard that the batch decides.
    run: the index of the one dimension whose elements are consecutive in memory, and its extent.
    """

    tensor: str
    address: Linear
    guards: tuple[Guard, ...]
    exact: tuple[tuple[Linear, int], ...]
    run: Guard | None = None
    images: Images | None = None


class Spotter:
    """Finds the spots of one nest.

    counts: how many values each symbol takes, the loop over the batch left out.
    """

    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self.counts = {f"v{i}": p.count for i, p in enumerate(nest.loops) if p.count is not None}
        self.fixed = {f"v{i}": 0 for i, p in enumerate(nest.loops) if p.count == 1}
        self.quotients: dict[str, Quotient] = {}
        self._names: dict[Quotient, str] = {}
        looped = {p.axis for p in nest.loops if nest.is_reduce(p.axis) and nest.fusion_of(p.axis) is None}
        self._ends = [
            (digits(nest, axis), nest.extent(axis) or 0) for axis in sorted(looped) if nest.overshoots(axis)
        ]
        self._cut = [
            part
            for fused in nest.fused
            for part, blocks in zip(fused.parts, fused.extents)
            if nest.is_reduce(part) and blocks * nest.block(part) > (nest.extent(part) or 0)
        ]

    def spot(self, access: Access, env: Env) -> Spot | None:
        """The spot of an access, or None where its term vanishes whatever the run-time loops do."""
        env = {**self.fixed, **env}
        tensor = self.nest.tensor(access.tensor)
        address = Linear()
        guards: dict[Guard, None] = {}
        exact: dict[tuple[Linear, int], None] = {}
        if access in self.nest.factors:
            # One zero factor would do for finite numbers, but zero times infinity is none.
            for end, reach in self._ends:
                if not self._guard(resolve(end, env), reach, guards):
                    return None
            for part in self._cut:
                if not self._guard(self._axis(part, env), self.nest.extent(part) or 0, guards):
                    return None
        runs = []
        for index, extent, stride in zip(access.indices, tensor.shape, tensor.strides):
            value = self._index(index, env, exact)
            if value is None:
                return None
            address = address + value * stride
            if extent is not None and not self._guard(value, extent, guards):
                return None
            if stride == 1 and extent is not None and extent > 1:
                runs.append(Guard(value, extent))
        for a, b in access.ties:
            # Equal is 0 <= a - b < 1.
            if not self._guard(self._axis(a, env) - self._axis(b, env), 1, guards):
                return None
        run = runs[0] if len(runs) == 1 else None
        images = self._images(access, env)
        return Spot(access.tensor, self._joined(address), tuple(guards), tuple(exact), run, images)

    def variables(self, form: Linear) -> Iterator[str]:
        """The loop variables that a form depends on."""
        for symbol, _ in form.terms:
            if symbol in self.quotients:
                yield from self.variables(self.quotients[symbol].form)
            else:
                yield symbol

    def span(self, tensor_name: str) -> int:
        """How far apart two elements of one image, or one block of images, can lie."""
        tensor = self.nest.tensor(tensor_name)
        return sum((e - 1) * s for e, s in zip(tensor.shape, tensor.strides) if e is not None)

    def _images(self, access: Access, env: Env) -> Images | None:
        for axis in self.nest.axes:
            if axis.inner and axis.name in access.axes:
                ((step, _),) = digits(self.nest, axis.name).terms
                return Images(self._axis(axis.inner, env), step, self.nest.images)
        return None

    def _guard(self, value: Linear, extent: int, guards: dict[Guard, None]) -> bool:
        """Add a guard if one is needed; whether the value is ever inside."""
        low, high = value.bounds(self.counts)
        if low < 0 or high >= extent:
            guards[Guard(value, extent)] = None
        return high >= 0 and low < extent

    def _index(self, index: Index, env: Env, exact: dict[tuple[Linear, int], None]) -> Linear | None:
        value = Linear(index.offset)
        for axis, coefficient in index.terms:
            value = value + self._axis(axis, env) * coefficient
        if index.divisor == 1:
            return value
        whole, rest = self._split(value, index.divisor)
        if rest.const % math.gcd(index.divisor, *(c for _, c in rest.terms)):
            return None
        if rest.terms:
            exact[rest, index.divisor] = None
        return whole + self._floor(rest, index.divisor)

    def _axis(self, axis: str, env: Env) -> Linear:
        """The value of an axis; a part of a fused one is decoded from the flat index, innermost first."""
        fused = self.nest.fusion_of(axis)
        own = resolve(digits(self.nest, axis), env)
        return own if fused is None else self._block(fused, axis, env) * self.nest.block(axis) + own

    def _block(self, fused: Fused, axis: str, env: Env) -> Linear:
        value = resolve(digits(self.nest, fused.name), env)
        for part, extent in zip(reversed(fused.parts[1:]), reversed(fused.extents[1:])):
            if part == axis:
                return self._modulo(value, extent)
            whole, rest = self._split(value, extent)
            value = whole + self._floor(rest, extent)
        return value

    def _split(self, value: Linear, number: int) -> tuple[Linear, Linear]:
        """whole and rest with value = number * whole + rest, rest never negative and as small as can be."""
        whole = Linear(0, tuple((s, c // number) for s, c in value.terms if c % number == 0))
        rest = Linear(value.const, tuple((s, c) for s, c in value.terms if c % number))
        shift = rest.bounds(self.counts)[0] // number
        return whole + shift, rest + -shift * number

    def _floor(self, rest: Linear, number: int) -> Linear:
        low, high = rest.bounds(self.counts)
        if low // number == high // number:
            return Linear(low // number)
        return self._symbol(Quotient("//", rest, number), high // number + 1)

    def _modulo(self, value: Linear, number: int) -> Linear:
        rest = self._split(value, number)[1]
        high = rest.bounds(self.counts)[1]
        if high < number:
            return rest
        return self._symbol(Quotient("%", rest, number), number)

    def _symbol(self, quotient: Quotient, count: int) -> Linear:
        if quotient not in self._names:
            name = f"q{len(self._names)}"
            self._names[quotient] = name
            self.quotients[name] = quotient
            self.counts[name] = count
        return Linear(0, ((self._names[quotient], 1),))

    def _joined(self, address: Linear) -> Linear:
        """Where rows follow each other in memory, (x // e) * e + x % e is x again."""
        for symbol, coefficient in address.terms:
            quotient = self.quotients.get(symbol)
            if quotient is None or quotient.op != "%":
                continue
            whole = self._names.get(Quotient("//", quotient.form, quotient.number))
            if whole is not None and address.coefficient(whole) == coefficient * quotient.number:
                rest = address.without(symbol).without(whole)
                return self._joined(rest + quotient.form * coefficient)
        return address
