"""Evaluates a nest, scheduled or not, in float64 with NumPy: the oracle for the printers.

It runs the loops as they stand: every digit of every axis, overshoot included.  For a staged access it
also works out where in the buffer the element would lie and that the buffer gives the same element back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ..errors import NestError
from .buffers import Buffer, Flat, make_buffer
from .evaluate import evaluate
from .linear import Linear
from .nest import Access, Nest, digits

CHUNK = 1 << 20

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def interpret(nest: Nest, arrays: Mapping[str, Floats], batch: int = 1) -> Floats:
    """The output of a nest.

    arrays: every operand, in the shape that the comprehension gives it (`batch` for the batch).
    """
    counts = nest.counts(batch)
    shapes = {t.name: [batch if e is None else e for e in t.shape] for t in nest.tensors}
    # A schedule may look at one dimension of a tensor as two.
    arrays = {name: arrays[name].reshape(shapes[name]) for name in nest.operands}
    result = np.zeros(shapes[nest.output.tensor])
    buffers = {s.tensor: make_buffer(nest, s) for s in nest.stages}
    for env in _iterations(counts):
        if nest.shares:  # blocks have been counted; their loop's variable is the first step of each
            share = nest.shares.share(batch)
            env |= {f"v{i}": env[f"v{i}"] * share for i in range(len(counts)) if nest.is_first_of_block(i)}
        axes = {a.name: _axis_value(nest, a.name, env) for a in nest.axes}
        live = np.ones((), bool)
        for a in nest.axes:
            live = live & (axes[a.name] < (batch if a.extent is None else a.extent))
        value: Floats = np.ones(())
        for factor in nest.factors:
            index, inside = _locate(nest, factor, axes, batch)
            if factor.tensor in buffers:
                _check_buffer(nest, buffers[factor.tensor], index, inside & live, axes, env)
            value = value * np.where(inside, arrays[factor.tensor][index], 0.0)
        target, inside = _locate(nest, nest.output, axes, batch)
        if nest.output.tensor in buffers:
            _check_buffer(nest, buffers[nest.output.tensor], target, inside & live, axes, env)
        value = np.where(live & inside, value, 0.0)
        np.add.at(
            result, tuple(np.broadcast_arrays(*target, value)[:-1]), np.broadcast_arrays(*target, value)[-1]
        )
    result = result.sum(axis=tuple(range(len(nest.replicas))))
    indices = nest.output.indices[len(nest.replicas) :]
    whole = {
        index.terms[0][0]: np.arange(e).reshape([-1 if i == d else 1 for i in range(result.ndim)])
        for d, (index, e) in enumerate(zip(indices, result.shape))
        if len(index.terms) == 1
    }
    for addend in nest.addends:
        index, inside = _locate(nest, addend, whole, batch)
        result = result + np.where(inside, arrays[addend.tensor][index], 0.0)
    for expr in nest.pointwise:
        result = evaluate(expr, result)
    return result


def _iterations(counts: list[int]) -> Iterator[dict[str, Ints]]:
    """All values of the loop variables, in pieces of bounded size: outer loops one by one, inner at once."""
    inner = len(counts)
    while inner and math.prod(counts[inner - 1 :]) <= CHUNK:
        inner -= 1
    grids = np.indices(counts[inner:], sparse=True)
    fixed = {f"v{i + inner}": np.asarray(grid) for i, grid in enumerate(grids)}
    for outer in itertools.product(*map(range, counts[:inner])):
        yield {**{f"v{i}": np.asarray(v) for i, v in enumerate(outer)}, **fixed}


def _value(linear: Linear, env: Mapping[str, Ints]) -> Ints:
    total = np.asarray(linear.const)
    for symbol, coefficient in linear.terms:
        total = total + env[symbol] * coefficient
    return total


def _axis_value(nest: Nest, axis: str, env: Mapping[str, Ints]) -> Ints:
    fused = nest.fusion_of(axis)
    if fused is None:
        return _value(digits(nest, axis), env)
    flat = _value(digits(nest, fused.name), env) // fused.weight(axis)
    block = flat if axis == fused.parts[0] else flat % fused.extents[fused.parts.index(axis)]
    return block * nest.block(axis) + _value(digits(nest, axis), env)


def _locate(
    nest: Nest, access: Access, axes: Mapping[str, Ints], batch: int
) -> tuple[tuple[Ints, ...], NDArray[np.bool_]]:
    """Where an access reads, clipped into the tensor, and whether it is inside."""
    inside = np.ones((), bool)
    where = []
    for index, extent in zip(access.indices, nest.tensor(access.tensor).shape):
        number = np.asarray(index.offset)
        for axis, coefficient in index.terms:
            number = number + axes[axis] * coefficient
        size = batch if extent is None else extent
        value = number // index.divisor
        inside = inside & (number % index.divisor == 0) & (value >= 0) & (value < size)
        where.append(np.clip(value, 0, max(size - 1, 0)))
    for a, b in access.ties:
        inside = inside & (axes[a] == axes[b])
    return tuple(where), inside


def _check_buffer(
    nest: Nest, buffer: Buffer, index: tuple[Ints, ...], inside: NDArray[np.bool_],
    axes: Mapping[str, Ints], env: Mapping[str, Ints],
) -> None:  # fmt: skip
    """Every element that is read or written through a buffer must have its own place there."""

    def require(condition: NDArray[np.bool_], what: str) -> None:
        if not np.all(condition | ~inside):
            raise NestError(f"{nest.name}: the buffer of {buffer.tensor.name} does not hold {what}.")

    for row in buffer.rows:
        if not isinstance(row, Flat):
            x = index[row.source.dim] - _value(row.source.base, env)
            require((x >= 0) & (x < row.source.span), f"dimension {row.source.dim}")
            require(x // row.source.phases < row.extent, f"dimension {row.source.dim}")
            continue
        fused = row.fused
        place = _value(digits(nest, fused.name), env)
        steps = {}
        for part, source in zip(fused.parts, row.parts):
            if source is not None:
                steps[part] = (index[source.dim] - _value(source.base, env)) // source.phases
                place = place + (steps[part] - axes[part]) * fused.weight(part)
        require(
            (place >= _value(row.base, env)) & (place < _value(row.base, env) + row.extent), "the flat index"
        )
        for part, step in steps.items():
            found = place // fused.weight(part)
            if part != fused.parts[0]:
                found = found % fused.extents[fused.parts.index(part)]
            require(found == step, f"{part} where the flat index looks for it")
