"""Pointwise expressions: what a nest does to each element of its result once the sum is complete.

Such an expression is made of numbers, operators, functions and the result itself, a reference to the
element that is written.  `fold` is the one way through it: `evaluate` (of evaluate.py) gives its value, the
printers its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ..errors import NotationError
from .syntax import FUNCTIONS, Binary, Call, Expr, Name, Neg, Number, Ref, children, walk

NEGATE = "neg"
"""What `fold` calls the unary minus; every other operator and function has its name in the notation."""

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
