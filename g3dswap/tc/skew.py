"""Skewing: an axis that is read at shifted positions becomes a banded matrix product.

A factor that is read at w + kw gives a matrix unit nothing to contract where there are few channels.  Of a
block of `count` positions, w = count * w' + wi, it reads one patch, ws = wi + kw::

    O(w) += I(w + kw) * K(kw)     is   O(count*w + wi) += I(count*w + ws) * K(ws - wi)

Now ws is a depth and wi a side of the product, at the price of multiplying by zero where ws - wi is outside
of K.  Where w is a reduction (a gradient in K), every wi makes a partial result of its own::

    dK(kw) += dO(w) * I(w + kw)   is   dK(wi; ws - wi) += dO(count*w + wi) * I(count*w + ws)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ScheduleError
from .nest import Access, Axis, Index, Nest, result_of, verify
from .pack import image_of, inner_name
from .pointwise import redirected

MOST = 256
"""Positions of a block, and elements of a word."""


@dataclass(frozen=True, order=True)
class Skew:
    """axis: the positions; count: how many of them are a block.
    word:  where a patch begins, and its length, are multiples of so many elements, for wide loads."""

    axis: str
    count: int
    word: int = 1


def patch_name(axis: str) -> str:
    """The elements that a block of an axis reads."""
    return f"{axis}s"


def shifted_by(nest: Nest, axis: str) -> tuple[Index, str] | None:
    """Of the shifted factor, the index that adds a step of another axis to `axis`, and that other axis.

    None: there is no such index, or it adds more, or divides.
    """
    for index in nest.factors[image_of(nest)].indices:
        others = [name for name, _ in index.terms if name != axis]
        if axis in index.axes and len(others) == 1 and index.divisor == 1:
            return index, others[0]
    return None


def skewed(nest: Nest, skew: Skew) -> Nest:
    """The unscheduled nest with an axis skewed.

    ScheduleError: the axis is not read at shifted positions, or a part of the nest has no skewed form.
    """
    found = shifted_by(nest, skew.axis) if len(nest.factors) == 2 else None
    if found is None or not 1 <= skew.count <= MOST or not 1 <= skew.word <= MOST:
        raise ScheduleError(f"{skew.axis} of {nest.name} cannot be skewed by {skew.count}.")
    index, side = found
    summed = nest.axis(skew.axis).reduce
    extents = nest.extent(skew.axis), nest.extent(side)
    if nest.is_reduce(side) == summed or None in extents:
        raise ScheduleError(f"{skew.axis} and {side} of {nest.name} are not a position and a reduction.")
    if summed and (nest.addends or nest.pointwise or None in nest.tensor(nest.output.tensor).shape):
        raise ScheduleError(f"sums of {nest.name} cannot be left in parts, as skewing {skew.axis} would.")
    whole, sides = (extent or 0 for extent in extents)
    step, stride = index.coefficient(skew.axis), index.coefficient(side)
    # The patch: ws = step * wi + stride * kw - low, and where it begins in the tensor.
    low = min(0, step * (skew.count - 1)) + min(0, stride * (sides - 1))
    length = abs(step) * (skew.count - 1) + abs(stride) * sides
    lead = (index.offset + low) % skew.word
    low, length = low - lead, -(-(length + lead) // skew.word) * skew.word
    inner, patch = inner_name(skew.axis), patch_name(skew.axis)
    sign = 1 if stride > 0 else -1
    tap = Index(((patch, sign), (inner, -sign * step)), sign * low, abs(stride))
    read = Index(((skew.axis, step * skew.count), (patch, 1)), index.offset + low)

    def changed(access: Access) -> Access:
        return replace(access, indices=tuple(map(of, access.indices)))

    def of(own: Index) -> Index:
        if own == index:
            return read
        if own.is_axis(side):
            return tap
        if side in own.axes:
            raise ScheduleError(f"{nest.name} reads at {own}, so that {skew.axis} cannot be skewed.")
        coefficient = own.coefficient(skew.axis)
        rest = tuple(term for term in own.terms if term[0] != skew.axis)
        block = ((skew.axis, coefficient * skew.count), (inner, coefficient))
        return replace(own, terms=(*block, *rest)) if coefficient else own

    blocks = Axis(skew.axis, -(-whole // skew.count), summed)
    new = {skew.axis: blocks, side: Axis(patch, length, nest.is_reduce(side))}
    axes = [new.get(own.name, own) for own in nest.axes]
    # Among the parallel axes, which come before the reductions.
    place = next(i for i, own in enumerate(axes) if own.reduce) if summed else axes.index(blocks) + 1
    axes.insert(place, Axis(inner, skew.count))
    output = changed(nest.output)
    tensors, replicas = nest.tensors, nest.replicas
    if summed:
        output = replace(output, indices=(Index(((inner, 1),)), *output.indices))
        tensors = tuple(t.repeated(skew.count) if t.name == output.tensor else t for t in tensors)
        replicas = (inner, *replicas)
    made = replace(
        nest,
        tensors=tensors,
        axes=tuple(axes),
        output=output,
        factors=tuple(map(changed, nest.factors)),
        addends=tuple(map(changed, nest.addends)),
        pointwise=tuple(redirected(expr, result_of(output)) for expr in nest.pointwise),
        replicas=replicas,
        _by_name={},
    )
    return verify(made.unscheduled())
