"""Where an access reads or writes, for a target whose lanes have several dimensions and may gather.

Like `place.Placer` it substitutes the unrolled loop variables and decides statically what can be decided.
What is left at run time is written as linear forms over loop variables and *quotients*: symbols for
`form // number` and `form % number`, which decode fused axes and exact divisions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from ..errors import ScheduleError
from .linear import Linear
from .nest import Access, Fused, Index, Nest, digits
from .place import Env, Guard, resolve

T = TypeVar("T")


@dataclass(frozen=True)
class Quotient:
    """The symbol of `form // number` (op "//") or `form % number` (op "%"); the form is never negative."""

    op: str
    form: Linear
    number: int


@dataclass(frozen=True)
class Spot:
    """tensor[address]; outside its guards, or where a numerator of `exact` does not divide, it is zero.

    run: the index of the one dimension whose elements are consecutive in memory, and its extent.
    """

    tensor: str
    address: Linear
    guards: tuple[Guard, ...]
    exact: tuple[tuple[Linear, int], ...]
    run: Guard | None = None

    @property
    def forms(self) -> tuple[Linear, ...]:
        """What its address and its conditions are made of."""
        return self.address, *(guard.value for guard in self.guards), *(rest for rest, _ in self.exact)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Worked out once: a spot of a tile is looked up at many of its points."""
        return hash((self.tensor, self.address, self.guards, self.exact))


def fixed(spot: Spot, env: Env) -> Spot:
    """The same spot where these variables have these values."""

    def at(guard: Guard) -> Guard:
        return replace(guard, value=resolve(guard.value, env))

    exact = tuple((resolve(rest, env), divisor) for rest, divisor in spot.exact)
    run = at(spot.run) if spot.run is not None else None
    return Spot(spot.tensor, resolve(spot.address, env), tuple(map(at, spot.guards)), exact, run)


class _Memo(Generic[T]):
    """A function of an environment that looks at these variables only, asked once for their values.

    Most points of a tile differ in what others depend on.
    """

    def __init__(self, make: Callable[[Env], T], variables: Iterable[str]) -> None:
        self.make, self.variables = make, tuple(variables)
        self.known: dict[tuple[int | None, ...], T] = {}

    def __call__(self, env: Env) -> T:
        values = tuple(map(env.get, self.variables))
        if values not in self.known:
            self.known[values] = self.make(env)
        return self.known[values]


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
        self._ended = [axis for axis in sorted(looped) if nest.overshoots(axis)]
        self._cut = [
            part
            for fused in nest.fused
            for part, blocks in zip(fused.parts, fused.extents)
            if nest.is_reduce(part) and blocks * nest.block(part) > (nest.extent(part) or 0)
        ]
        # By identity, for an access takes as long to hash as all the rest.
        self._spots = {
            id(a): _Memo(functools.partial(self._spot, a), self._variables(self._axes(a)))
            for a in nest.accesses
        }
        self._values = {
            id(i): _Memo(functools.partial(self._index, i), self._variables(i.axes))
            for a in nest.accesses
            for i in a.indices
        }

    def spot(self, access: Access, env: Env) -> Spot | None:
        """The spot of an access, or None where its term vanishes whatever the run-time loops do."""
        return self._spots[id(access)](env)

    def _axes(self, access: Access) -> frozenset[str]:
        """The axes that a spot of an access depends on."""
        ends = (*self._ended, *self._cut) if access in self.nest.factors else ()
        return access.axes.union(ends)

    def _variables(self, axes: frozenset[str]) -> Iterator[str]:
        """The loop variables that axes are made of."""
        fused = {found.name for axis in axes if (found := self.nest.fusion_of(axis))}
        return (f"v{i}" for i, p in enumerate(self.nest.loops) if p.axis in axes | fused)

    def _spot(self, access: Access, env: Env) -> Spot | None:
        env = {**self.fixed, **env}
        tensor = self.nest.tensor(access.tensor)
        offset, terms = 0, []
        guards: dict[Guard, None] = {}
        exact: dict[tuple[Linear, int], None] = {}
        if access in self.nest.factors:
            # One zero factor would do for finite numbers, but zero times infinity is none.
            for axis in self._ended:
                end = resolve(digits(self.nest, axis), env)
                if not self._guard(end, self.nest.extent(axis) or 0, guards):
                    return None
            for part in self._cut:
                if not self._guard(self._axis(part, env), self.nest.extent(part) or 0, guards):
                    return None
        runs = []
        for index, extent, stride in zip(access.indices, tensor.shape, tensor.strides):
            found = self._values[id(index)](env)
            if found is None:
                return None
            value, rest = found
            if rest is not None:
                exact[rest, index.divisor] = None
            offset += value.const * stride
            terms += [(symbol, coefficient * stride) for symbol, coefficient in value.terms]
            if extent is not None and not self._guard(value, extent, guards):
                return None
            if stride == 1 and extent is not None and extent > 1:
                runs.append(Guard(value, extent))
        for a, b in access.ties:
            # Equal is 0 <= a - b < 1.
            if not self._guard(self._axis(a, env) - self._axis(b, env), 1, guards):
                return None
        run = runs[0] if len(runs) == 1 else None
        address = self.joined(Linear.of(offset, terms))
        return Spot(access.tensor, address, tuple(guards), tuple(exact), run)

    def indices(self, access: Access, env: Env) -> list[Linear] | None:
        """The values of an access's indices; None: one of them never divides.

        ScheduleError: one divides at run time.
        """
        found = [self._values[id(index)]({**self.fixed, **env}) for index in access.indices]
        if any(pair is not None and pair[1] is not None for pair in found):
            raise ScheduleError(f"{access} divides at run time; unroll what decides it.")
        return None if None in found else [pair[0] for pair in found if pair is not None]

    def ties(self, access: Access, env: Env) -> list[Linear]:
        """What must be zero for an access not to vanish."""
        env = {**self.fixed, **env}
        return [self._axis(a, env) - self._axis(b, env) for a, b in access.ties]

    def evaluate(self, form: Linear, values: Env) -> int:
        """A form where variables have these values, and the others are zero."""

        def of(symbol: str) -> int:
            quotient = self.quotients.get(symbol)
            if quotient is None:
                return values.get(symbol, 0)
            whole = self.evaluate(quotient.form, values)
            return whole // quotient.number if quotient.op == "//" else whole % quotient.number

        return form.const + sum(coefficient * of(symbol) for symbol, coefficient in form.terms)

    def span(self, tensor_name: str) -> int:
        """How far apart two elements of one image can lie."""
        tensor = self.nest.tensor(tensor_name)
        return sum((e - 1) * s for e, s in zip(tensor.shape, tensor.strides) if e is not None)

    def _guard(self, value: Linear, extent: int, guards: dict[Guard, None]) -> bool:
        """Add a guard if one is needed; whether the value is ever inside."""
        low, high = value.bounds(self.counts)
        if low < 0 or high >= extent:
            guards[Guard(value, extent)] = None
        return high >= 0 and low < extent

    def _index(self, index: Index, env: Env) -> tuple[Linear, Linear | None] | None:
        """The value of an index and, where it divides, what must divide at run time; None: it never does."""
        value = Linear(index.offset)
        for axis, coefficient in index.terms:
            value = value + self._axis(axis, env) * coefficient
        if index.divisor == 1:
            return value, None
        whole, rest = self._split(value, index.divisor)
        if rest.const % math.gcd(index.divisor, *(c for _, c in rest.terms)):
            return None
        return whole + self._floor(rest, index.divisor), rest if rest.terms else None

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

    def joined(self, address: Linear) -> Linear:
        """Where rows follow each other in memory, (x // e) * e + x % e is x again."""
        for symbol, coefficient in address.terms:
            quotient = self.quotients.get(symbol)
            if quotient is None or quotient.op != "%":
                continue
            whole = self._names.get(Quotient("//", quotient.form, quotient.number))
            if whole is not None and address.coefficient(whole) == coefficient * quotient.number:
                rest = address.without(symbol).without(whole)
                return self.joined(rest + quotient.form * coefficient)
        return address
