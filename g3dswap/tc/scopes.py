"""Indented text in nested scopes, in which every expression is named once, as far out as it is known."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

INDENT = "    "


@dataclass
class _Scope:
    lines: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    known: dict[Hashable, str] = field(default_factory=dict)


class Scopes:
    """The body of a Python function.  Scope 0 is the function, each block is one scope further in.

    An expression that is defined at an outer level lands before the blocks that are open there.
    """

    def __init__(self, reserved: Iterable[str]) -> None:
        self._scopes = [_Scope()]
        self._variables: set[str] = set()
        self.taken = set(reserved)
        self._numbers: dict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))

    @property
    def level(self) -> int:
        """The innermost scope."""
        return len(self._scopes) - 1

    @property
    def lines(self) -> list[str]:
        """The finished lines of the function."""
        return self._scopes[0].lines

    def fresh(self, prefix: str) -> str:
        """A name that is not taken yet: the prefix and a number."""
        name = next(n for i in self._numbers[prefix] if (n := f"{prefix}{i}") not in self.taken)
        self.taken.add(name)
        return name

    def emit(self, line: str) -> None:
        self._write(line, self.level)

    def define(self, prefix: str, expression: str, level: int | None = None) -> str:
        """A name for an expression, the one that it has if it has one; names stay as they are."""
        level = self.level if level is None else level
        if expression.isidentifier():
            return expression
        names = self._scopes[level].names
        if expression not in names:
            names[expression] = self.fresh(prefix)
            self._write(f"{names[expression]} = {expression}", level)
        return names[expression]

    def once(self, key: Hashable, make: Callable[[], str]) -> str:
        """What `make` says, which is asked once for a key in the innermost scope."""
        known = self._scopes[-1].known
        if key not in known:
            known[key] = make()
        return known[key]

    def variable(self, name: str, expression: str) -> str:
        """A variable of the function with a name of its own, written once."""
        if name not in self._variables:
            self._variables.add(name)
            self._write(f"{name} = {expression}", 0)
        return name

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self._scopes.append(_Scope())
        yield
        inner = self._scopes.pop()
        # The head comes last, because what the block needed from outside has been written meanwhile.
        self._write(head, self.level)
        self._scopes[-1].lines.extend(inner.lines or [INDENT * (self.level + 2) + "pass"])

    def _write(self, line: str, level: int) -> None:
        self._scopes[level].lines.append(INDENT * (level + 1) + line)
