"""The syntax tree of the notation: frozen dataclasses that print back to notation.

::

    Comprehension = "def" name "(" Param,* ")" "->" "(" output,+ ")" "{" Statement* "}"
    Param         = dtype ["(" (size | integer),* ")"] name
    Statement     = Ref ("=" | "+=" | "+=!") Expr ["where" Where,+]
    Where         = index "in" Expr ":" Expr                       # half open
    Expr          = Number | Name | Ref | Call | Neg | Binary      # * and / before + and -

Names that begin with a capital letter, and names of parameters' dimensions, are sizes; every other
name that is not a tensor is an index.  Positions are 1-based and take no part in comparisons, so
``parse(str(tree)) == tree``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64",
    "half", "float16", "bfloat16", "float", "float32", "double", "float64",
)  # fmt: skip
"""Element types, with TC's names for them."""

FUNCTIONS = {"exp": 1, "log": 1, "sqrt": 1, "tanh": 1, "erf": 1, "fabs": 1, "fmax": 2, "fmin": 2}
"""Pointwise functions and how many arguments each takes; fmax and fmin of a NaN are NaN."""

KEYWORDS = ("def", "where", "in")
OPERATORS = ("=", "+=", "+=!")

_SUM, _PRODUCT, _UNARY, _ATOM = 1, 2, 3, 4


class Pos(NamedTuple):
    """Where a node begins in its source text; both count from 1, and (0, 0) is a tree built by hand."""

    line: int
    column: int


NOWHERE = Pos(0, 0)


@dataclass(frozen=True)
class Node:
    """What every node has: its place in the source."""

    pos: Pos = field(default=NOWHERE, compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Number(Node):
    """A literal; never negative (``-1`` is ``Neg(Number(1))``) and finite."""

    value: int | float

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Name(Node):
    """An index or a size."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ref(Node):
    """One element of a tensor; ``x()`` for a tensor without dimensions."""

    tensor: str
    indices: tuple[Expr, ...]

    def __str__(self) -> str:
        return f"{self.tensor}({', '.join(_print(index, dense=True) for index in self.indices)})"


@dataclass(frozen=True)
class Call(Node):
    """A pointwise function, one of ``FUNCTIONS``."""

    function: str
    args: tuple[Expr, ...]

    def __str__(self) -> str:
        return _print(self, dense=False)


@dataclass(frozen=True)
class Neg(Node):
    """``-operand``."""

    operand: Expr

    def __str__(self) -> str:
        return _print(self, dense=False)


@dataclass(frozen=True)
class Binary(Node):
    """``left op right`` with ``op`` one of ``+ - * /``; in a subscript, ``/`` is an exact division."""

    op: str
    left: Expr
    right: Expr

    def __str__(self) -> str:
        return _print(self, dense=False)


Expr = Number | Name | Ref | Call | Neg | Binary


@dataclass(frozen=True)
class Param(Node):
    """An input tensor: each dimension is a size's name or a whole number; ``pos`` is its name's."""

    dtype: str
    dims: tuple[str | int, ...]
    name: str

    def __str__(self) -> str:
        dims = f"({','.join(str(dim) for dim in self.dims)})" if self.dims else ""
        return f"{self.dtype}{dims} {self.name}"


@dataclass(frozen=True)
class Where(Node):
    """``index in lo:hi``: the index takes the values lo, lo + 1, ..., hi - 1."""

    index: str
    lo: Expr
    hi: Expr

    def __str__(self) -> str:
        return f"{self.index} in {_print(self.lo, dense=True)}:{_print(self.hi, dense=True)}"


@dataclass(frozen=True)
class Statement(Node):
    """``target op value where ...``.

    ``=`` stores, ``+=`` adds to what is there, ``+=!`` sets to zero first and then adds; the
    reductions run over every index that the target does not have.
    """

    target: Ref
    op: str
    value: Expr
    where: tuple[Where, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Every index and size of the statement, once: the target's, the value's, the where clauses'."""
        found = [*names(self.target), *names(self.value)]
        for where in self.where:
            found += [where.index, *names(where.lo), *names(where.hi)]
        return tuple(dict.fromkeys(found))

    def reads(self) -> tuple[Ref, ...]:
        """The references in the value, in order of appearance, repeated ones too."""
        return tuple(node for node in walk(self.value) if isinstance(node, Ref))

    def __str__(self) -> str:
        where = f" where {', '.join(str(clause) for clause in self.where)}" if self.where else ""
        return f"{self.target} {self.op} {self.value}{where}"


@dataclass(frozen=True)
class Comprehension(Node):
    """A named list of statements from parameters to outputs."""

    name: str
    params: tuple[Param, ...]
    outputs: tuple[str, ...]
    statements: tuple[Statement, ...]

    def sizes(self) -> tuple[str, ...]:
        """Every size, in order of appearance: what a caller has to bind."""
        dims = [dim for param in self.params for dim in param.dims if isinstance(dim, str)]
        names = [name for statement in self.statements for name in statement.names()]
        return tuple(dict.fromkeys(dims + [name for name in names if is_size(name)]))

    def indices(self, statement: Statement) -> tuple[str, ...]:
        """The statement's indices: the target's in its order, then the others as they appear."""
        sizes = self.sizes()
        return tuple(name for name in statement.names() if name not in sizes)

    def __str__(self) -> str:
        params = ", ".join(str(param) for param in self.params)
        body = "".join(f"  {statement}\n" for statement in self.statements)
        return f"def {self.name}({params}) -> ({', '.join(self.outputs)}) {{\n{body}}}"


def is_size(name: str) -> bool:
    """Whether the name alone says that it is a size: it begins with a capital letter."""
    return name[:1].isupper()


def children(expr: Expr) -> tuple[Expr, ...]:
    """The expressions directly inside one, left to right."""
    match expr:
        case Ref():
            return expr.indices
        case Call():
            return expr.args
        case Neg():
            return (expr.operand,)
        case Binary():
            return (expr.left, expr.right)
    return ()


def walk(expr: Expr) -> Iterator[Expr]:
    """Every node of an expression, each before its children, left to right, without recursion."""
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(children(node)))


def names(expr: Expr) -> list[str]:
    """The indices and sizes of an expression, in order of appearance, repeated ones too."""
    return [node.name for node in walk(expr) if isinstance(node, Name)]


def _precedence(expr: Expr) -> int:
    match expr:
        case Binary(op="+" | "-"):
            return _SUM
        case Binary():
            return _PRODUCT
        case Neg():
            return _UNARY
    return _ATOM


def _print(expr: Expr, *, dense: bool) -> str:
    """Notation with as few parentheses as keep the tree; ``dense`` (subscripts) has no spaces."""

    def operand(inner: Expr, least: int) -> str:
        text = _print(inner, dense=dense)
        return text if _precedence(inner) >= least else f"({text})"

    match expr:
        case Binary():
            own = _precedence(expr)
            op = expr.op if dense else f" {expr.op} "
            # All four operators group to the left, so an equal one on the right needs parentheses.
            return f"{operand(expr.left, own)}{op}{operand(expr.right, own + 1)}"
        case Neg():
            return f"-{operand(expr.operand, _UNARY)}"
        case Call():
            return f"{expr.function}({', '.join(_print(arg, dense=dense) for arg in expr.args)})"
    return str(expr)
