"""Pointwise expressions as Triton: statements on tiles, each with a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .nest import Nest
from .pointwise import NEGATE, fold

_FUNCTIONS = {
    "exp": "tl.exp({})",
    "log": "tl.log({})",
    "sqrt": "tl.sqrt({})",
    "erf": "tl.erf({})",
    "fabs": "tl.abs({})",
    "fmax": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "fmin": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
}

_TANH = {
    "float32": (0.4225, (-0.33333334, 0.13333292, -0.053956736, 0.021748774, -0.008279478, 0.0022215622)),
    "float64": (
        0.09,
        (
            -0.3333333333333333, 0.1333333333332946, -0.05396825395920932, 0.021869487729979938,
            -0.008863200174565789, 0.0035912834236614985, -0.001444589576037322, 0.0005109241496061606,
        ),
    ),
}  # fmt: skip
"""Where x^2 is below the first number, tanh(x) = x + x^3 * p(x^2), to rounding, with p fitted at
Chebyshev nodes and its coefficients from the lowest up.  Elsewhere 1 - 2 / (exp(2 x) + 1) loses no digits."""


def pointwise_triton(nest: Nest, value: str, compute: str, name: Callable[[str], str]) -> str:
    """What the nest makes of `value`, the name of its result so far.

    compute: "float32" or "float64"; name: gives an expression a name.
    """

    def number(literal: float) -> str:
        # Triton takes a bare literal for a float32 wherever no tensor says otherwise.
        return (
            repr(float(literal)) if compute == "float32" else f"tl.full((), {float(literal)!r}, tl.float64)"
        )

    def apply(function: str, args: Sequence[str]) -> str:
        if function == NEGATE:
            return name(f"-{args[0]}")
        if function == "tanh":
            return _tanh(args[0], compute, name)
        if function in _FUNCTIONS:
            return name(_FUNCTIONS[function].format(*args))
        return name(f" {function} ".join(args))

    for expr in nest.pointwise:
        value = fold(expr, value, number, apply)
    return value


def _tanh(value: str, compute: str, name: Callable[[str], str]) -> str:
    """Triton has no tanh that its interpreter runs too."""
    limit, coefficients = _TANH[compute]
    square = name(f"{value} * {value}")
    series = repr(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        series = name(f"{series} * {square} + {coefficient!r}")
    near = name(f"{value} + {value} * {square} * {series}")
    far = name(f"1.0 - 2.0 / (tl.exp({value} + {value}) + 1.0)")
    return name(f"tl.where({square} < {limit!r}, {near}, {far})")
