"""Pointwise expressions as CUDA C++: one function of a result."""

from __future__ import annotations

from collections.abc import Sequence

from .nest import Nest
from .pointwise import NEGATE, fold, functions

_SELECTED = """
static __device__ __forceinline__ float larger(float a, float b) { return a < b || b != b ? b : a; }
static __device__ __forceinline__ float smaller(float a, float b) { return b < a || b != b ? b : a; }
"""
"""The larger and the smaller of two, NaN where one of them is."""

_NAMES = {"fmax": "larger", "fmin": "smaller"}


def pointwise_cuda(nest: Nest) -> str:
    """``float pointwise(float)``, what the nest does to its result, with what it calls; "" if nothing."""
    if not nest.pointwise:
        return ""
    called = functions(nest.pointwise)
    return "\n".join(
        [
            _SELECTED if called & _NAMES.keys() else "",
            "static __device__ __forceinline__ float pointwise(float x) {",
            *(f"  x = {fold(expr, 'x', _number, _apply)};" for expr in nest.pointwise),
            "  return x;",
            "}",
            "",
        ]
    )


def _number(value: float) -> str:
    return f"{float(value)!r}f"


def _apply(name: str, args: Sequence[str]) -> str:
    if name == NEGATE:
        return f"(-{args[0]})"
    if name in ("+", "-", "*", "/"):
        return f"({f' {name} '.join(args)})"
    return f"{_NAMES.get(name, f'{name}f')}({', '.join(args)})"
