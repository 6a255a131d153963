"""Text to syntax tree: a recursive-descent parser that runs the checks of ``check.py`` as it goes.

``parse`` is the only entry.  Whatever is wrong with a text is a ``NotationError`` that shows the
line with a caret and says what was expected.  White space separates and is otherwise ignored;
``#`` begins a comment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn, TypeVar

from g3dswap.errors import NotationError
from g3dswap.tc.check import MAX_DEPTH, Checks, suggestion, too_deep
from g3dswap.tc.syntax import (
    DTYPES,
    FUNCTIONS,
    KEYWORDS,
    OPERATORS,
    Binary,
    Call,
    Comprehension,
    Expr,
    Name,
    Neg,
    Number,
    Param,
    Pos,
    Ref,
    Statement,
    Where,
)

_MAX_SHOWN = 100  # columns of a source line that a message shows
_TOKEN = re.compile(
    r"(?P<space>\s+|\#[^\n]*)"
    r"|(?P<number>(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+|[0-9]+)"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)"
    r"|(?P<symbol>\+=!|\+=|->|[-+*/=(){},:])"
)
_REMEDIES = {
    "[": "subscripts are written in round brackets, as in I(n,c)",
    "]": "subscripts are written in round brackets, as in I(n,c)",
    ";": "statements need no separator",
    "^": "there are no powers; multiply instead",
    "%": "there is no remainder; the operators are + - * /",
    "!": "to set to zero and then add, write '+=!'",
}

T = TypeVar("T")


class _Token(NamedTuple):
    kind: str  # "number", "name", "symbol" or "end"
    text: str
    pos: Pos

    def __str__(self) -> str:
        return "the end of the text" if self.kind == "end" else repr(self.text)


class _Source:
    """The text and its lines, to show the place of a mistake."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.split("\n")

    def fail(self, pos: Pos, message: str) -> NoReturn:
        """Raise the message with the line and a caret under the column."""
        start = max(0, pos.column - 1 - _MAX_SHOWN // 2)
        shown = self.lines[pos.line - 1][start : start + _MAX_SHOWN]
        # A tab or an unprintable character would move the caret: each shows as one space.
        line = "".join(char if char.isprintable() else " " for char in shown).rstrip()
        caret = " " * (pos.column - 1 - start) + "^"
        raise NotationError(f"line {pos.line}, column {pos.column}: {message}\n  {line}\n  {caret}") from None

    def tokens(self) -> list[_Token]:
        """The tokens, ended by one of kind "end" that stands just behind the last."""
        tokens: list[_Token] = []
        offset, line, begin = 0, 1, 0  # begin: offset of the line's first character
        end = Pos(1, 1)
        while offset < len(self.text):
            pos = Pos(line, offset - begin + 1)
            match = _TOKEN.match(self.text, offset)
            if match is None:
                char = self.text[offset]
                remedy = _REMEDIES.get(char, "names and numbers are made of ASCII letters, digits and '_'")
                self.fail(pos, f"unexpected character {char!r}; {remedy}")
            text, kind = match.group(), match.lastgroup or ""
            offset = match.end()
            if kind == "space":
                if "\n" in text:
                    line += text.count("\n")
                    begin = match.start() + text.rindex("\n") + 1
                continue
            if kind == "number" and re.match(r"[A-Za-z_0-9.]", self.text[offset : offset + 1]):
                self.fail(pos, f"the number {text[:20]} runs into {self.text[offset]!r}; separate them")
            tokens.append(_Token(kind, text, pos))
            end = Pos(line, offset - begin + 1)
        return [*tokens, _Token("end", "", end)]


class _Parser:
    """One method a rule of the grammar; each begins at its first token and ends behind its last."""

    def __init__(self, source: _Source) -> None:
        self.source = source
        self.tokens = source.tokens()
        self.at = 0
        self.depth = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def expected(self, what: str) -> NoReturn:
        self.source.fail(self.token.pos, f"expected {what}, found {self.token}")

    def accept(self, *texts: str) -> _Token | None:
        """Take the token if it is one of these symbols or keywords."""
        token = self.token
        if token.kind in ("symbol", "name") and token.text in texts:
            self.at += 1
            return token
        return None

    def expect(self, text: str, why: str) -> _Token:
        return self.accept(text) or self.expected(f"{text!r} {why}")

    def name(self, what: str) -> _Token:
        token = self.token
        if token.kind != "name":
            self.expected(what)
        if token.text in KEYWORDS or token.text in FUNCTIONS or token.text in DTYPES:
            self.source.fail(token.pos, f"expected {what}, found the reserved word {token.text!r}")
        self.at += 1
        return token

    def listed(self, item: Callable[[], T], what: str) -> tuple[T, ...]:
        """Items between commas up to the closing parenthesis, which is taken too; may be empty."""
        if self.accept(")"):
            return ()
        items = [item()]
        while self.accept(","):
            items.append(item())
        if not self.accept(")"):
            self.expected(f"',' or ')' after {what}")
        return tuple(items)

    def comprehension(self) -> Comprehension:
        pos = self.expect("def", "at the beginning of a comprehension").pos
        name = self.name("the comprehension's name after 'def'").text
        self.expect("(", "before the parameters")
        params = self.listed(self.param, "a parameter")
        self.expect("->", "between the parameters and the outputs")
        self.expect("(", "before the outputs")
        outputs = self.listed(lambda: self.name("an output's name"), "an output")
        if not outputs:
            self.source.fail(self.tokens[self.at - 1].pos, "expected an output's name, found ')'")
        checks = Checks(self.source.fail, params, [(token.text, token.pos) for token in outputs])
        self.expect("{", "before the statements")
        statements = []
        while not self.accept("}"):
            statements.append(self.statement(checks))
            checks.statement(statements[-1])
        if self.token.kind != "end":
            self.expected("the end of the text after '}' (one text holds one comprehension)")
        checks.all_written()
        return Comprehension(name, params, tuple(token.text for token in outputs), tuple(statements), pos=pos)

    def param(self) -> Param:
        token = self.token
        if token.kind != "name" or token.text not in DTYPES:
            hint = suggestion(token.text, DTYPES)
            self.expected(f"a parameter's element type, as in 'float(N,C) I'{hint}")
        self.at += 1
        dims = self.listed(self.dim, "a dimension") if self.accept("(") else ()
        name = self.name(f"the parameter's name after {token.text!r}")
        return Param(token.text, dims, name.text, pos=name.pos)

    def dim(self) -> str | int:
        what = "a dimension (a size's name or a whole number)"
        if self.token.kind == "number":
            value = self.number().value
            if isinstance(value, int):
                return value
            self.at -= 1
            self.expected(what)
        return self.name(what).text

    def statement(self, checks: Checks) -> Statement:
        token = self.token
        if token.kind != "name" or token.text in KEYWORDS:
            self.expected("an operator, a new statement or '}'" if checks.written else "a statement or '}'")
        if self.tokens[self.at + 1].text == "in":
            self.source.fail(token.pos, f"expected ',' between the where clauses, found {token}")
        checks.begins(token.text, token.pos)
        self.at += 1
        self.expect("(", f"and the indices after the output {token.text!r}")
        target = Ref(token.text, self.listed(self.sum, "a subscript"), pos=token.pos)
        op = self.accept(*OPERATORS)
        if op is None:
            self.expected(f"'=', '+=' or '+=!' after the target {token.text}(...)")
        value = self.sum()
        where: list[Where] = []
        if self.accept("where"):
            where.append(self.where())
            while self.accept(","):
                where.append(self.where())
        return Statement(target, op.text, value, tuple(where), pos=token.pos)

    def where(self) -> Where:
        token = self.name("an index, as in 'where t in 0:T'")
        self.expect("in", f"after the index {token.text!r} of a where clause")
        lo = self.sum()
        self.expect(":", f"between the bounds of {token.text!r} (half open, as in 0:T)")
        return Where(token.text, lo, self.sum(), pos=token.pos)

    def sum(self) -> Expr:
        left = self.product()
        while op := self.accept("+", "-"):
            left = Binary(op.text, left, self.product(), pos=left.pos)
        return left

    def product(self) -> Expr:
        left = self.unary()
        while op := self.accept("*", "/"):
            left = Binary(op.text, left, self.unary(), pos=left.pos)
        return left

    def unary(self) -> Expr:
        if self.depth == MAX_DEPTH:
            self.source.fail(self.token.pos, too_deep())
        self.depth += 1
        if minus := self.accept("-"):
            result: Expr = Neg(self.unary(), pos=minus.pos)
        else:
            result = self.atom()
        self.depth -= 1
        return result

    def atom(self) -> Expr:
        token = self.token
        if token.kind == "number":
            return self.number()
        if self.accept("("):
            inner = self.sum()
            if not self.accept(")"):
                self.expected("an operator or ')'")
            return inner
        if token.kind == "name" and token.text in FUNCTIONS:
            self.at += 1
            self.expect("(", f"and the arguments after the function {token.text!r}")
            return Call(token.text, self.listed(self.sum, "an argument"), pos=token.pos)
        name = self.name("an expression")
        if self.accept("("):
            return Ref(name.text, self.listed(self.sum, "a subscript"), pos=name.pos)
        return Name(name.text, pos=name.pos)

    def number(self) -> Number:
        token = self.token
        self.at += 1
        # The length comes first: Python refuses to convert thousands of digits.
        if token.text.isdigit():
            digits = token.text.lstrip("0") or "0"
            if len(digits) > 18:
                self.source.fail(token.pos, "this whole number has more than 18 digits; write a float")
            return Number(int(digits), pos=token.pos)
        value = float(token.text)
        if math.isinf(value):
            self.source.fail(token.pos, f"the number {token.text[:20]} is beyond the range of a double")
        return Number(value, pos=token.pos)


def parse(text: str) -> Comprehension:
    """Read one comprehension and check what can be checked without sizes.

    Raises:
        NotationError: with the line, a caret under the column and what was expected there.
    """
    return _Parser(_Source(text)).comprehension()
