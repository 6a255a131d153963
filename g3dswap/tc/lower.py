"""From a comprehension with concrete sizes and strides to an unscheduled nest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import NotationError
from .evaluate import simplified
from .nest import Access, Axis, Index, Nest, Tensor, verify
from .ranges import Range, affine, bind
from .syntax import Binary, Comprehension, Expr, Ref, Statement


def lower(
    comprehension: Comprehension,
    sizes: Mapping[str, int],
    strides: Mapping[str, tuple[int, ...]],
    dtype: str,
    *,
    batch: str | None = None,
    precision: str = "ieee",
) -> Nest:
    """The nest of a comprehension: a contraction, sums added to its result, and functions of that.

    Args:
        sizes: the value of every size but `batch`.
        strides: of every tensor, in elements; with `dtype` they replace the notation's own types.
        batch: the size that is known at run time only; the index over it is not to be shifted.
        precision: "ieee" or "tf32", what a matrix unit may do with float32 factors.

    Raises:
        NotationError: statements of another form than `+=!` of a product, then sums added to it, then
            expressions of the result alone (`O(i) = fmax(O(i), 0)`).
        RangeError: see `ranges.bind`.
    """
    bound = bind(comprehension, {**sizes, **({batch: 1} if batch else {})})
    first, *rest = comprehension.statements
    if first.op != "+=!":
        raise NotationError(
            f"'{first}' does not begin with '+=!', which a nest needs; write the contraction first."
        )
    ranges = bound.ranges[0]
    sums, pointwise = _epilogue(rest, first.target, bound.ranges)
    known = {name: 1 for name in (batch,) if name} | dict(sizes)

    def access(ref: Ref) -> Access:
        indices = []
        for expr in ref.indices:
            terms, offset, divisor = affine(expr, known, ranges)
            offset += sum(c * ranges[a][0] for a, c in terms.items())
            indices.append(Index(tuple(sorted(terms.items())), offset, divisor))
        return Access(ref.tensor, tuple(indices))

    dims = {p.name: p.dims for p in comprehension.params}
    batch_axes = {
        name
        for ref in first.reads()
        for name, dim in zip(map(str, ref.indices), dims[ref.tensor])
        if batch is not None and dim == batch
    }
    output = access(first.target)
    parallel = output.axes
    axes = tuple(
        Axis(name, None if name in batch_axes else hi - lo, name not in parallel)
        for name, (lo, hi) in ranges.items()
    )
    tensors = []
    for name in (*dims, first.target.tensor):
        shape: tuple[int | None, ...] = bound.tensors[name]
        marks = (
            dims[name]
            if name in dims
            else tuple(batch if str(i) in batch_axes else 0 for i in first.target.indices)
        )
        shape = tuple(None if batch is not None and mark == batch else e for mark, e in zip(marks, shape))
        tensors.append(Tensor(name, shape, strides[name], dtype))
    return verify(
        Nest(
            comprehension.name,
            tuple(tensors),
            axes,
            output,
            tuple(access(ref) for ref in _product(first)),
            tuple(access(ref) for statement in sums for ref in _addends(statement, first.target)),
            tuple(simplified(statement.value, sizes) for statement in pointwise),
            precision=precision,
        ).unscheduled()
    )


def _epilogue(
    rest: Sequence[Statement], target: Ref, ranges: Sequence[Mapping[str, Range]]
) -> tuple[list[Statement], list[Statement]]:
    """What follows the contraction: the sums, and the functions of the result."""
    sums: list[Statement] = []
    pointwise: list[Statement] = []
    for statement, own in zip(rest, ranges[1:]):
        if any(own[index] != ranges[0].get(index) for index in map(str, statement.target.indices)):
            raise NotationError(f"'{statement}' covers a part of {target}; an epilogue covers all of it.")
        if statement.op == "=" and statement.target == target and set(statement.reads()) == {target}:
            pointwise.append(statement)
        elif pointwise:
            raise NotationError(f"'{statement}' adds to what '{pointwise[-1]}' made; add before that.")
        else:
            sums.append(statement)
    return sums, pointwise


def _operands(expr: Expr, op: str, statement: Statement, rule: str) -> list[Ref]:
    """The tensors that `op` joins, from left to right."""
    if isinstance(expr, Ref):
        return [expr]
    if isinstance(expr, Binary) and expr.op == op:
        return _operands(expr.left, op, statement, rule) + _operands(expr.right, op, statement, rule)
    raise NotationError(f"'{expr}' in '{statement}' is not {rule}.")


def _product(statement: Statement) -> list[Ref]:
    return _operands(statement.value, "*", statement, "a product of tensors; a nest contracts a product")


def _addends(statement: Statement, target: Ref) -> list[Ref]:
    rule = "a sum of tensors; an epilogue adds to the result"
    refs = _operands(statement.value, "+", statement, rule)
    if (
        statement.target != target
        or statement.op == "+=!"
        or (statement.op == "=" and refs.count(target) != 1)
    ):
        raise NotationError(
            f"'{statement}' does not add to {target}; an epilogue is '{target} = {target} + ...'."
        )
    return [ref for ref in refs if ref != target or statement.op != "="]
