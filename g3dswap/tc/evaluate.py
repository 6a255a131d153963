"""The values of pointwise expressions: of numbers when a nest is made, of arrays where it is interpreted.

Apart from pointwise.py because of NumPy, which processes that print kernels need not import.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NotationError
from .pointwise import NEGATE, fold
from .syntax import Binary, Call, Expr, Name, Neg, Number, Ref, walk

_NUMPY: dict[str, Callable[..., Any]] = {
    NEGATE: operator.neg, "+": operator.add, "-": operator.sub, "*": operator.mul, "/": np.divide,
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh, "fabs": np.abs,
    "erf": np.vectorize(math.erf, otypes=[np.float64]), "fmax": np.maximum, "fmin": np.minimum,
}  # fmt: skip


def evaluate(expr: Expr, result: NDArray[np.float64]) -> NDArray[np.float64]:
    """The expression of each element, in float64."""

    def number(value: float) -> NDArray[np.float64]:
        return np.asarray(value, np.float64)

    with np.errstate(all="ignore"):
        return np.asarray(fold(expr, result, number, lambda name, args: _NUMPY[name](*args)))


def simplified(expr: Expr, sizes: Mapping[str, int]) -> Expr:
    """The expression with the sizes' values, and with one number for what is made of numbers alone.

    NotationError: an index as a value, or an operation on numbers whose result is not finite.
    """
    match expr:
        case Name(name=name) if name in sizes:
            return _literal(sizes[name], expr)
        case Name(name=name):
            raise NotationError(
                f"'{name}' has no value when a kernel is printed; use numbers and known sizes."
            )
        case Neg(operand=operand):
            found: Expr = Neg(simplified(operand, sizes))
        case Binary(op=op, left=left, right=right):
            found = Binary(op, simplified(left, sizes), simplified(right, sizes))
        case Call(function=function, args=args):
            found = Call(function, tuple(simplified(arg, sizes) for arg in args))
        case _:
            return expr
    if any(isinstance(node, Ref) for node in walk(found)):
        return found
    return _literal(float(evaluate(found, np.zeros(()))), expr)


def _literal(value: float, expr: Expr) -> Expr:
    if not math.isfinite(value):
        raise NotationError(f"'{expr}' is {value}, and a kernel multiplies and adds finite numbers only.")
    number = Number(abs(value))
    return Neg(number) if value < 0 else number
