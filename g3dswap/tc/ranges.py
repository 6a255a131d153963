"""The range of every index, from concrete sizes.

``affine`` reduces a subscript to ``(sum of coefficient * index + offset) / divisor``; ``infer``
finds the half-open range of each index of one statement; ``bind`` does so for a whole
comprehension and gives the shapes of its outputs.

Where a range comes from, in this order:

1. a ``where`` clause;
2. a dimension that the index subscripts alone, as ``c`` in ``I(n,c)``; all such dimensions agree;
3. otherwise the largest range that keeps every read inside its tensor, found in rounds as in Tensor
   Comprehensions: each round solves the indices that are the only unknown of some subscript.  An
   exact division is bounded as the fraction it is, whether or not it divides.

Reads may leave a tensor (they are zero there) where 1 and 2 say so; writes never may.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from g3dswap.errors import RangeError
from g3dswap.tc.syntax import Binary, Comprehension, Expr, Name, Neg, Number, Ref, Statement, is_size, names

Range = tuple[int, int]
"""Half open: lo, lo + 1, ..., hi - 1."""


class Affine(NamedTuple):
    """``(sum(terms[i] * i) + offset) / divisor``; it has a value only where that divides.

    No coefficient is 0, the divisor is positive, and no whole number above 1 divides all three parts.
    """

    terms: dict[str, int]
    offset: int
    divisor: int


def affine(expr: Expr, sizes: Mapping[str, int], indices: Collection[str]) -> Affine:
    """The expression as an affine function of the indices, sizes taken as their values.

    A quotient of quotients and a sum with quotients become one quotient where that exists for just
    the same values of the indices.

    Raises:
        RangeError: a product of two indices, a division by an index or by zero, a size that is not
            bound, or quotients that have no single equivalent.
    """
    match expr:
        case Number(value=int(value)):
            return Affine({}, value, 1)
        case Name(name=name) if name in indices:
            return Affine({name: 1}, 0, 1)
        case Name(name=name) if name in sizes:
            return Affine({}, sizes[name], 1)
        case Name(name=name):
            raise RangeError(f"size {name!r} is not bound; give its value in sizes")
        case Neg(operand=operand):
            return _scaled(affine(operand, sizes, indices), -1, expr)
        case Binary(op=op, left=left, right=right):
            return _combined(op, affine(left, sizes, indices), affine(right, sizes, indices), expr)
    raise RangeError(
        f"{str(expr)!r} is not a whole number; subscripts are made of indices, sizes and integers"
    )


def _combined(op: str, left: Affine, right: Affine, expr: Expr) -> Affine:
    if op == "+":
        return _added(left, right, expr)
    if op == "-":
        return _added(left, _scaled(right, -1, expr), expr)
    if op == "/":
        if right.terms:
            raise RangeError(
                f"{str(expr)!r} divides by {_listed(right.terms)}; divide by sizes and integers only"
            )
        if right.offset == 0:
            raise RangeError(f"{str(expr)!r} divides by zero; bind the divisor to another value")
        sign = 1 if right.offset > 0 else -1
        terms = {index: sign * factor for index, factor in left.terms.items()}
        return _reduced(terms, sign * left.offset, left.divisor * abs(right.offset), expr)
    if left.terms and right.terms:
        raise RangeError(
            f"{str(expr)!r} multiplies {_listed(left.terms)} by {_listed(right.terms)}, "
            "and a subscript is affine; multiply indices by sizes and integers only"
        )
    # A factor without indices is a whole number: _reduced refuses any other.
    return _scaled(right, left.offset, expr) if right.terms else _scaled(left, right.offset, expr)


def _scaled(value: Affine, factor: int, expr: Expr) -> Affine:
    # (t/2)*2 exists for even t only, which (2*t)/2 would forget: factor and divisor must be coprime.
    if math.gcd(factor, value.divisor) != 1:
        raise RangeError(
            f"{str(expr)!r} multiplies a quotient by {factor}, which has a divisor in common with "
            f"{value.divisor}; divide after the multiplication"
        )
    terms = {index: factor * own for index, own in value.terms.items()}
    return _reduced(terms, factor * value.offset, value.divisor, expr)


def _added(left: Affine, right: Affine, expr: Expr) -> Affine:
    # (t + k)/2 exists for odd t and k, t/2 + k/2 does not: the divisors must be coprime.
    if math.gcd(left.divisor, right.divisor) != 1:
        raise RangeError(
            f"{str(expr)!r} adds two quotients that no single division equals; divide once, after adding"
        )
    terms = {index: factor * right.divisor for index, factor in left.terms.items()}
    for index, factor in right.terms.items():
        terms[index] = terms.get(index, 0) + factor * left.divisor
    offset = left.offset * right.divisor + right.offset * left.divisor
    return _reduced(terms, offset, left.divisor * right.divisor, expr)


def _reduced(terms: Mapping[str, int], offset: int, divisor: int, expr: Expr) -> Affine:
    common = math.gcd(divisor, offset, *terms.values())
    kept = {index: factor // common for index, factor in terms.items() if factor}
    if not kept and divisor != common:
        raise RangeError(f"{str(expr)!r} is {offset}/{divisor}, not a whole number; bind sizes that divide")
    return Affine(kept, offset // common, divisor // common)


@dataclass(frozen=True)
class _Subscript:
    """One subscript of a reference: its place, its value, and the size of the dimension."""

    ref: Ref
    expr: Expr
    value: Affine
    extent: int

    def __str__(self) -> str:
        return f"{str(self.expr)!r} in {self.ref}"


def infer(
    statement: Statement, tensors: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]
) -> dict[str, Range]:
    """The half-open range of every index, the target's first and then the others as they appear.

    Args:
        statement: one statement of a checked comprehension.
        tensors: the shape of every tensor that is read.  The target's may be given too; its
            dimensions then count like those of the tensors that are read.
        sizes: the value of every size.  A name that is not here and begins with a lower-case letter
            is an index.

    Raises:
        RangeError: naming the index, the expression and what to change.
    """
    indices = _indices(statement, sizes)
    subscripts = _subscripts(statement, tensors, sizes, indices)
    ranges = _guarded(statement, sizes)
    for index in indices:
        if index not in ranges and (alone := _alone(index, subscripts)) is not None:
            ranges[index] = alone
    targets = names(statement.target)
    solved: set[str] = set()
    while len(ranges) < len(indices):
        # One round: what is solved in it counts as known only in the next, so that the order in
        # which indices appear changes nothing.
        unknown = [index for index in indices if index not in ranges]
        found = {
            index: limits
            for index in unknown
            if (limits := _solved(index, subscripts, ranges, index in targets)) is not None
        }
        if not found:
            raise _unsolved(unknown, subscripts)
        ranges |= found
        solved |= set(found)
    _check_reads(subscripts, ranges, solved)
    _check_writes(statement.target, tensors, ranges)
    return {index: ranges[index] for index in indices}


def _indices(statement: Statement, sizes: Mapping[str, int]) -> tuple[str, ...]:
    for name in statement.names():
        if name not in sizes and is_size(name):
            raise RangeError(f"size {name!r} in '{statement}' is not bound; give its value in sizes")
    for name in (*names(statement.target), *(where.index for where in statement.where)):
        if name in sizes:
            raise RangeError(f"index {name!r} of '{statement}' is bound as a size; rename one of them")
    return tuple(name for name in statement.names() if name not in sizes)


def _subscripts(
    statement: Statement,
    tensors: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    indices: Collection[str],
) -> list[_Subscript]:
    """The subscripts with a known dimension: of every read, and of the target if its shape is given."""
    refs = statement.reads()
    if statement.target.tensor in tensors:
        refs = (statement.target, *refs)
    found = []
    for ref in refs:
        if ref.tensor not in tensors:
            raise RangeError(
                f"the shape of {ref.tensor!r}, read by '{statement}', is not known; give it in tensors"
            )
        shape = tensors[ref.tensor]
        if len(shape) != len(ref.indices):
            raise RangeError(f"the shape given for {ref} is {shape}; give one size a subscript")
        for expr, extent in zip(ref.indices, shape, strict=True):
            found.append(_Subscript(ref, expr, affine(expr, sizes, indices), extent))
    return found


def _guarded(statement: Statement, sizes: Mapping[str, int]) -> dict[str, Range]:
    ranges = {}
    for where in statement.where:
        lo, hi = (affine(bound, sizes, ()).offset for bound in (where.lo, where.hi))
        if lo > hi:
            raise RangeError(
                f"the range of index {where.index!r}, '{where}', is {lo}:{hi}; give bounds in order"
            )
        ranges[where.index] = (lo, hi)
    return ranges


def _alone(index: str, subscripts: list[_Subscript]) -> Range | None:
    """The range of an index that is a whole subscript somewhere, else None."""
    uses = [use for use in subscripts if isinstance(use.expr, Name) and use.expr.name == index]
    if not uses:
        return None
    first = uses[0]
    for use in uses:
        if use.extent != first.extent:
            raise RangeError(
                f"index {index!r} ranges over {first.extent} in {first.ref} "
                f"and over {use.extent} in {use.ref}; make the sizes agree or add 'where {index} in lo:hi'"
            )
    return 0, first.extent


def _solved(
    index: str, subscripts: list[_Subscript], ranges: Mapping[str, Range], written: bool
) -> Range | None:
    """The largest range that keeps every subscript inside whose only unknown is this index.

    None if there is no such subscript yet.  For the target's index (``written``) it begins at 0 or above.
    """
    lows, highs, tight = [0] if written else [], [], []
    for use in subscripts:
        terms, _, divisor = use.value
        if index not in terms or any(other not in ranges for other in terms if other != index):
            continue
        if use.extent == 0:
            return 0, 0
        low, high = _extremes(use, ranges, without=index)
        # 0 <= factor * index + rest <= last, for the lowest and the highest rest.
        factor, last = terms[index], divisor * (use.extent - 1)
        lows.append(-(low // factor) if factor > 0 else -((high - last) // factor))
        highs.append((last - high) // factor if factor > 0 else low // -factor)
        tight.append(use)
    if not tight:
        return None
    lo, hi = max(lows), min(highs) + 1
    if lo >= hi:
        kept = " and ".join(f"{use} inside its {use.extent}" for use in tight)
        raise RangeError(
            f"no value of index {index!r} keeps {kept}; enlarge the tensor or add 'where {index} in lo:hi'"
        )
    return lo, hi


def _extremes(use: _Subscript, ranges: Mapping[str, Range], without: str | None = None) -> Range:
    """The lowest and the highest value of the numerator, one index left out."""
    low = high = use.value.offset
    for index, factor in use.value.terms.items():
        if index == without:
            continue
        lo, hi = ranges[index]
        if lo == hi:
            raise RangeError(
                f"index {index!r} in {use} has an empty range, which bounds nothing; "
                f"give the other indices of the subscript where clauses"
            )
        low += min(factor * lo, factor * (hi - 1))
        high += max(factor * lo, factor * (hi - 1))
    return low, high


def _unsolved(unknown: list[str], subscripts: list[_Subscript]) -> RangeError:
    index = unknown[0]
    for use in subscripts:
        if index in use.value.terms:
            together = _listed([name for name in use.value.terms if name in unknown])
            return RangeError(
                f"the ranges of {together} depend on one another in {use}; add 'where {index} in lo:hi'"
            )
    return RangeError(
        f"nothing bounds index {index!r}, no subscript depends on it; add 'where {index} in lo:hi'"
    )


def _check_reads(subscripts: list[_Subscript], ranges: Mapping[str, Range], solved: Collection[str]) -> None:
    """Indices solved in one round may share a subscript, which neither was then held to."""
    for use in subscripts:
        own = [index for index in use.value.terms if index in solved]
        if (
            not own
            or use.extent == 0
            or any(lo == hi for lo, hi in (ranges[index] for index in use.value.terms))
        ):
            continue
        low, high = _extremes(use, ranges)
        if low < 0 or high > use.value.divisor * (use.extent - 1):
            raise RangeError(
                f"the ranges of {_listed(own)} that other subscripts allow "
                f"take {use} outside its {use.extent}; add 'where {own[0]} in lo:hi'"
            )


def _check_writes(target: Ref, tensors: Mapping[str, tuple[int, ...]], ranges: Mapping[str, Range]) -> None:
    shape = tensors.get(target.tensor)
    for axis, index in enumerate(names(target)):
        lo, hi = ranges[index]
        if lo < hi and (lo < 0 or (shape is not None and hi > shape[axis])):
            bounds = "below 0" if lo < 0 or shape is None else f"outside 0:{shape[axis]}"
            raise RangeError(
                f"index {index!r} ranges over {lo}:{hi} and writes {target} {bounds}; narrow its range"
            )


@dataclass(frozen=True)
class Bound:
    """A comprehension with concrete sizes: every tensor's shape, and each statement's ranges."""

    tensors: dict[str, tuple[int, ...]]
    ranges: tuple[dict[str, Range], ...]


def bind(
    comprehension: Comprehension,
    sizes: Mapping[str, int],
    outputs: Mapping[str, tuple[int, ...]] | None = None,
) -> Bound:
    """Infer all statements in order; an output's first statement gives its shape unless ``outputs`` does.

    Raises:
        RangeError: as ``infer``; also when a size is not bound or an output's first statement does
            not write all of it.
    """
    missing = [name for name in comprehension.sizes() if name not in sizes]
    if missing:
        raise RangeError(
            f"sizes {', '.join(missing)} of {comprehension.name!r} are not bound; give their values"
        )
    tensors = dict(outputs or {})
    for param in comprehension.params:
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in param.dims)
        if min(shape, default=0) < 0:
            raise RangeError(f"parameter '{param}' has the shape {shape}; bind its dimensions to 0 or more")
        tensors[param.name] = shape
    ranges: list[dict[str, Range]] = []
    written: set[str] = set()
    for statement in comprehension.statements:
        target = statement.target
        found = infer(statement, tensors, sizes)
        if target.tensor not in written:
            shape = tensors.setdefault(target.tensor, tuple(found[index][1] for index in names(target)))
            for index, extent in zip(names(target), shape, strict=True):
                lo, hi = found[index]
                if (lo, hi) != (0, extent):
                    raise RangeError(
                        f"index {index!r} ranges over {lo}:{hi}, so '{statement}' leaves a part of "
                        f"{target.tensor!r} without a value; write all of 0:{extent} first"
                    )
        written.add(target.tensor)
        ranges.append(found)
    return Bound(tensors, tuple(ranges))


def _listed(indices: Collection[str]) -> str:
    return " and ".join(repr(index) for index in indices)
