"""Packing: a few steps of a batch axis become one block-diagonal product.

A batch axis g indexes both factors and the output, so a product sees one of its steps at a time, which may
be too few channels for a matrix unit.  Packed by p, g splits into blocks g and steps gi < p, and one factor
is read at steps gj of its own::

    O(g,f) += I(g,c) * K(g,f,c)    is    O(g,gi,f) += I(g,gj,c) * K(g,gi,f,c) [gi == gj]

Now gj*c is a depth of p times the channels and gi*f a side of p times the filters, at the price of p times
the multiplications.  Where c is a parallel axis (a gradient in K), so is gj: all pairs of steps are
multiplied, and the tie says which of them are results.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import ScheduleError
from .nest import Access, Axis, Index, Nest, Tensor, result_of, verify
from .pointwise import redirected


def inner_name(axis: str) -> str:
    """The steps inside a block of a packed axis."""
    return f"{axis}i"


def copy_name(axis: str) -> str:
    """The same steps, as the factor is read at that is indexed by a copy of the axis."""
    return f"{axis}j"


def packed(nest: Nest, axis: str, count: int) -> Nest:
    """The unscheduled nest with blocks of `count` steps of an axis packed.

    ScheduleError: it is no batch axis of a product of two, or `count` does not divide it.
    """
    extent = nest.axis(axis).extent if ("axis", axis) in nest._by_name else None
    if extent is None or count < 2 or extent % count:
        raise ScheduleError(f"{axis} of {nest.name} cannot be packed by {count}, which must divide it.")
    if len(nest.factors) != 2 or any(axis not in a.axes for a in (*nest.factors, nest.output)):
        raise ScheduleError(f"{axis} does not index two factors and the output of {nest.name}.")
    chosen = image_of(nest)
    neighbour = _neighbour(nest, nest.factors[chosen], axis)
    kind = nest.axis(neighbour).reduce
    tie = ((inner_name(axis), copy_name(axis)),)
    factors = [_split(f, axis, copy_name(axis) if i == chosen else None) for i, f in enumerate(nest.factors)]
    output = _split(nest.output, axis)
    if kind:
        factors[1 - chosen] = replace(factors[1 - chosen], ties=tie)
    else:
        output = replace(output, ties=tie)
    axes: list[Axis] = []
    for own in nest.axes:
        if own.name == axis:
            axes += [Axis(axis, extent // count), Axis(inner_name(axis), count)]
        elif own.name == neighbour:
            axes += [Axis(copy_name(axis), count, kind), own]
        else:
            axes.append(own)
    accesses = {a.tensor: a for a in nest.accesses}
    tensors = tuple(_split_tensor(t, accesses[t.name], axis, count) for t in nest.tensors)
    addends = tuple(_split(a, axis) for a in nest.addends)
    changed = replace(
        nest,
        tensors=tensors,
        axes=tuple(axes),
        factors=tuple(factors),
        output=output,
        addends=addends,
        pointwise=tuple(redirected(expr, result_of(output)) for expr in nest.pointwise),
        _by_name={},
    )
    return verify(changed.unscheduled())


def image_of(nest: Nest) -> int:
    """Which factor is read at shifted positions: the first such, or the first of all if none is."""
    known: int | None = nest._by_name.get(("image", ""))
    if known is None:  # a search asks a dozen times for each schedule
        shifted = (any(_is_shifted(index) for index in f.indices) for f in nest.factors)
        known = next((place for place, found in enumerate(shifted) if found), 0)
        nest._by_name["image", ""] = known
    return known


def _is_shifted(index: Index) -> bool:
    """Whether an index adds axes, other than those that one axis was split into, or divides."""
    (first, _), *rest = index.terms or (("", 0),)
    return index.divisor > 1 or [name for name, _ in rest] not in ([], [inner_name(first)])


def _neighbour(nest: Nest, access: Access, axis: str) -> str:
    """The axis behind a packed one in an access: the two are to be one side of a product."""
    place = next((d for d, index in enumerate(access.indices) if index.is_axis(axis)), len(access.indices))
    for index in access.indices[place + 1 : place + 2]:
        if len(index.terms) == 1 and index.is_axis(index.terms[0][0]):
            return index.terms[0][0]
    raise ScheduleError(f"{axis} has no axis behind it in {access}, with which {nest.name} could be packed.")


def _split(access: Access, axis: str, steps: str | None = None) -> Access:
    """An access with blocks and steps where the axis was; `steps` is the copy if it is read at that."""
    indices: list[Index] = []
    for index in access.indices:
        if index.is_axis(axis):
            indices += [Index(((axis, 1),)), Index(((steps or inner_name(axis), 1),))]
        elif axis in index.axes:
            raise ScheduleError(f"{access} adds {axis} to something, so that it cannot be packed.")
        else:
            indices.append(index)
    return replace(access, indices=tuple(indices))


def _split_tensor(tensor: Tensor, access: Access, axis: str, count: int) -> Tensor:
    """The same memory with two dimensions where the packed axis indexes one."""
    shape: list[int | None] = []
    strides: list[int] = []
    for index, extent, stride in zip(access.indices, tensor.shape, tensor.strides):
        if index.is_axis(axis) and extent is not None:
            shape += [extent // count, count]
            strides += [stride * count, stride]
        else:
            shape.append(extent)
            strides.append(stride)
    return replace(tensor, shape=tuple(shape), strides=tuple(strides))
