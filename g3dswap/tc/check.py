"""What a well-formed comprehension can still have wrong, as far as it shows without sizes.

The parser feeds these checks one statement after the other, so that a mistake is reported where
it stands and before anything that follows from it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn, Protocol

from g3dswap.tc.syntax import (
    FUNCTIONS,
    Call,
    Expr,
    Name,
    Number,
    Param,
    Pos,
    Ref,
    Statement,
    children,
    is_size,
    names,
    walk,
)

MAX_DEPTH = 64
"""How deep an expression may nest: bounds the recursion of the parser and of every later pass."""


class Fail(Protocol):
    """Raises the error; the parser's shows the line with a caret."""

    def __call__(self, pos: Pos, message: str) -> NoReturn: ...


class Checks:
    """What a well-formed text can still have wrong; fed one statement after the other."""

    def __init__(self, fail: Fail, params: Sequence[Param], outputs: Sequence[tuple[str, Pos]]) -> None:
        self.fail = fail
        self.params = {param.name: param for param in params}
        self.outputs = dict(outputs)
        self.dims = {dim for param in params for dim in param.dims if isinstance(dim, str)}
        self.ranks = {param.name: len(param.dims) for param in params}
        self.written: set[str] = set()
        self.tensors: set[str] = set()
        for kind, name, pos in [
            *(("parameter", param.name, param.pos) for param in params),
            *(("output", name, pos) for name, pos in outputs),
        ]:
            if name in self.tensors:
                self.fail(pos, f"{kind} {name!r} has the name of another tensor; rename one of them")
            if name in self.dims:
                self.fail(pos, f"{kind} {name!r} has the name of a size; rename one of them")
            self.tensors.add(name)

    def begins(self, name: str, pos: Pos) -> None:
        """A statement begins with this name: it has to be an output."""
        if name in self.params:
            self.fail(
                pos,
                f"{name!r} is a parameter and cannot be written; "
                "a statement begins with an output, and an expression goes on with an operator",
            )
        if name not in self.outputs:
            hint = suggestion(name, self.outputs)
            self.fail(pos, f"{name!r} is not an output; a statement begins with an output{hint}")

    def all_written(self) -> None:
        """The text ends here: every output has a value."""
        for name, pos in self.outputs.items():
            if name not in self.written:
                self.fail(pos, f"no statement writes the output {name!r}; add one or drop the output")

    def statement(self, statement: Statement) -> None:
        """All checks on one statement, given those before it."""
        target = statement.target
        bounds = [bound for where in statement.where for bound in (where.lo, where.hi)]
        for expr in (target, statement.value, *bounds):
            if _height(expr) > MAX_DEPTH:
                self.fail(expr.pos, too_deep())
        self.target(target)
        self.value(statement)
        self.reductions(statement)
        self.wheres(statement)
        if statement.op == "+=" and target.tensor not in self.written:
            why = f"'+=' adds to {target.tensor!r}, which has no value yet"
            self.fail(target.pos, f"{why}; write '+=!' to begin at 0")
        self.written.add(target.tensor)

    def target(self, target: Ref) -> None:
        seen: set[str] = set()
        for index in target.indices:
            if not isinstance(index, Name):
                why = f"{str(index)!r} is not a plain index"
                self.fail(index.pos, f"{why}; a target's subscripts are names, as in O(n,c)")
            self.index(index.name, index.pos)
            if index.name in seen:
                self.fail(
                    index.pos, f"index {index.name!r} is twice in the target; give each dimension its own"
                )
            seen.add(index.name)
        self.rank(target)

    def index(self, name: str, pos: Pos) -> None:
        if name in self.tensors:
            self.fail(pos, f"{name!r} is a tensor and cannot be an index; rename the index")
        if self.is_size(name):
            why = "a parameter's dimension" if name in self.dims else "it begins with a capital letter"
            self.fail(pos, f"{name!r} is a size ({why}) and cannot be an index; use another, lower-case name")

    def is_size(self, name: str) -> bool:
        return name in self.dims or is_size(name)

    def rank(self, ref: Ref) -> None:
        """Subscripts fit the parameter's dimensions; an output's first target sets its own."""
        rank = self.ranks.setdefault(ref.tensor, len(ref.indices))
        if len(ref.indices) != rank:
            param = self.params.get(ref.tensor)
            origin = f"it is declared {param}" if param else "as its first statement wrote it"
            dimensions = f"{_count(rank, 'dimension')} ({origin})"
            self.fail(ref.pos, f"{ref.tensor!r} has {dimensions}, not {len(ref.indices)}")

    def value(self, statement: Statement) -> None:
        for node in walk(statement.value):
            if isinstance(node, Name) and node.name in self.tensors:
                self.fail(node.pos, f"{node.name!r} is a tensor; give its subscripts, as in {node.name}(...)")
            if isinstance(node, Call) and len(node.args) != FUNCTIONS[node.function]:
                takes = _count(FUNCTIONS[node.function], "argument")
                self.fail(node.pos, f"{node.function!r} takes {takes}, not {len(node.args)}")
            if isinstance(node, Ref):
                self.read(statement, node)

    def read(self, statement: Statement, ref: Ref) -> None:
        name = ref.tensor
        if name not in self.tensors:
            if self.is_size(name) and name in self.dims:
                self.fail(ref.pos, f"{name!r} is a size, not a tensor; an operator may be missing behind it")
            hint = suggestion(name, (*self.tensors, *FUNCTIONS))
            self.fail(ref.pos, f"{name!r} is neither a parameter, an output nor a function{hint}")
        same = statement.op == "=" and ref.indices == statement.target.indices
        if name == statement.target.tensor and name in self.written and not same:
            self.fail(
                ref.pos,
                "a statement may read its own target only with '=' and at the element that it writes, "
                f"{statement.target}; go through another output",
            )
        if name in self.outputs and name not in self.written:
            self.fail(ref.pos, f"output {name!r} is read before a statement has written it")
        self.rank(ref)
        for index in ref.indices:
            self.whole(index, "a subscript", "indices, sizes and whole numbers")

    def whole(self, expr: Expr, what: str, parts: str) -> None:
        """Subscripts and bounds are made of whole numbers and names that stand for them."""
        made_of = f"{what} is made of {parts}"
        for node in walk(expr):
            if isinstance(node, Ref | Call):
                self.fail(node.pos, f"{str(node)!r} is a value; {made_of}")
            if isinstance(node, Number) and isinstance(node.value, float):
                self.fail(node.pos, f"{node} is not a whole number; {made_of}")
            if isinstance(node, Name) and node.name in self.tensors:
                self.fail(node.pos, f"{node.name!r} is a tensor; {made_of}")

    def reductions(self, statement: Statement) -> None:
        """An index that the target lacks is summed over, and '=' does not sum."""
        if statement.op != "=":
            return
        kept = names(statement.target)
        for node in walk(statement.value):
            if isinstance(node, Name) and node.name not in kept and not self.is_size(node.name):
                self.fail(
                    node.pos,
                    f"index {node.name!r} is not in the target {statement.target}, and '=' does not sum; "
                    "write '+=!' or add the index to the target",
                )

    def wheres(self, statement: Statement) -> None:
        """Each clause bounds one index of the statement by sizes."""
        used = {*names(statement.target), *names(statement.value)}
        seen: set[str] = set()
        for where in statement.where:
            self.index(where.index, where.pos)
            if where.index in seen:
                self.fail(where.pos, f"index {where.index!r} has two where clauses; keep one")
            if where.index not in used:
                hint = suggestion(where.index, (name for name in used if not self.is_size(name)))
                self.fail(where.pos, f"index {where.index!r} is not in the statement{hint}")
            seen.add(where.index)
            for bound in (where.lo, where.hi):
                self.bound(bound)

    def bound(self, bound: Expr) -> None:
        self.whole(bound, "a bound", "sizes and whole numbers")
        for node in walk(bound):
            if isinstance(node, Name) and not self.is_size(node.name):
                self.fail(node.pos, f"{node.name!r} is an index; a bound is made of sizes and whole numbers")


def _height(expr: Expr) -> int:
    """The longest path from the expression to a leaf, in nodes."""
    height, level = 0, [expr]
    while level:
        height += 1
        level = [child for node in level for child in children(node)]
    return height


def too_deep() -> str:
    return f"an expression nests more than {MAX_DEPTH} deep; split it into several statements"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def suggestion(name: str, known: Iterable[str]) -> str:
    """``(did you mean ...?)`` if a known name is close, whatever its case; else nothing."""
    folded = {other.lower(): other for other in sorted(known)}
    close = difflib.get_close_matches(name.lower(), folded, n=1)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""
