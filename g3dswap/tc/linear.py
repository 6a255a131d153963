"""Linear forms over named symbols: what indices, addresses and guards are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A linear form over named symbols (loop variables, opaque run-time expressions)."""

    const: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(const: int, terms: Iterable[tuple[str, int]]) -> Linear:
        total: dict[str, int] = {}
        for symbol, coefficient in terms:
            total[symbol] = total.get(symbol, 0) + coefficient
        return Linear(const, tuple(sorted((s, c) for s, c in total.items() if c)))

    def __add__(self, other: Linear | int) -> Linear:
        if isinstance(other, int):
            return Linear(self.const + other, self.terms)
        if not self.terms or not other.terms:
            return Linear(self.const + other.const, self.terms or other.terms)
        return Linear.of(self.const + other.const, (*self.terms, *other.terms))

    def __sub__(self, other: Linear) -> Linear:
        return self + other * -1

    def __mul__(self, factor: int) -> Linear:
        return Linear(self.const * factor, tuple((s, c * factor) for s, c in self.terms) if factor else ())

    def coefficient(self, symbol: str) -> int:
        return dict(self.terms).get(symbol, 0)

    def without(self, symbol: str) -> Linear:
        return Linear(self.const, tuple((s, c) for s, c in self.terms if s != symbol))

    def bounds(self, counts: Mapping[str, int]) -> tuple[int, int]:
        """The smallest and largest value when each symbol runs over [0, counts[symbol])."""
        low = high = self.const
        for symbol, coefficient in self.terms:
            reach = coefficient * (counts[symbol] - 1)
            low, high = low + min(reach, 0), high + max(reach, 0)
        return low, high

    def __str__(self) -> str:
        parts = [s if c == 1 else f"{s}*{c}" for s, c in self.terms]
        if self.const or not parts:
            parts.append(str(self.const))
        return " + ".join(parts)
