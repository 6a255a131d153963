"""Pointwise expressions: what a nest does to each element of its result once the sum is complete.

Such an expression is made of numbers, operators, functions and the result itself, a reference to the
element that is written.  `fold` is the one way through it: `evaluate` gives its value, the printers its text.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import NotationError
from .syntax import FUNCTIONS, Binary, Call, Expr, Name, Neg, Number, Ref, children, walk

NEGATE = "neg"
"""What `fold` calls the unary minus; every other operator and function has its name in the notation."""

_NUMPY: dict[str, Callable[..., Any]] = {
    NEGATE: operator.neg, "+": operator.add, "-": operator.sub, "*": operator.mul, "/": np.divide,
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh, "fabs": np.abs,
    "erf": np.vectorize(math.erf, otypes=[np.float64]), "fmax": np.maximum, "fmin": np.minimum,
}  # fmt: skip

T = TypeVar("T")


def fold(expr: Expr, result: T, number: Callable[[float], T], apply: Callable[[str, Sequence[T]], T]) -> T:
    """What an expression comes to, parts first.

    Args:
        result: what stands for a reference to the result.
        number: what stands for a literal.
        apply:  an operator or function (`NEGATE` for the unary minus) on its operands.
    """

    def inner(part: Expr) -> T:
        return fold(part, result, number, apply)

    match expr:
        case Number(value=value):
            return number(value)
        case Ref():
            return result
        case Neg(operand=operand):
            return apply(NEGATE, [inner(operand)])
        case Binary(op=op, left=left, right=right):
            return apply(op, [inner(left), inner(right)])
        case Call(function=function, args=args):
            return apply(function, [inner(arg) for arg in args])
    raise NotationError(f"'{expr}' is no number; give its value.")


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


def redirected(expr: Expr, own: Ref) -> Expr:
    """The same expression of another element: where the result's dimensions were looked at in another way."""
    match expr:
        case Ref():
            return own
        case Neg(operand=operand):
            return Neg(redirected(operand, own))
        case Binary(op=op, left=left, right=right):
            return Binary(op, redirected(left, own), redirected(right, own))
        case Call(function=function, args=args):
            return Call(function, tuple(redirected(arg, own) for arg in args))
    return expr


def fault(expr: Expr, own: str) -> str | None:
    """Why an expression is no function of the element `own`, as "O(i, j)", alone; None if it is."""
    nodes = list(nodes_of(expr))
    if not any(isinstance(node, Ref) for node in nodes):
        return f"{expr} is no function of {own}"
    for node in nodes:
        if isinstance(node, Ref) and str(node) != own:
            return f"{expr} reads {node}, not {own} alone"
        if isinstance(node, Call) and FUNCTIONS.get(node.function) != len(node.args):
            return f"{node} is no function of the notation"
        if isinstance(node, Name):
            return f"{expr} has {node}, which is no number"
    return None


def nodes_of(expr: Expr) -> Iterator[Expr]:
    """The nodes of an expression, without the subscripts of its references."""
    yield expr
    for child in () if isinstance(expr, Ref) else children(expr):
        yield from nodes_of(child)


def functions(exprs: Sequence[Expr]) -> set[str]:
    """The names of the functions that expressions call."""
    return {node.function for expr in exprs for node in walk(expr) if isinstance(node, Call)}
