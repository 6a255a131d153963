"""Pointwise expressions as C++ on vectors: each function that a nest calls, and the nest's own.

The single-precision functions are polynomials on reduced arguments, with errors of a few units in the last
place, so that all lanes are done at once; the others call the compiler's mathematical library lane by lane.
"""

from __future__ import annotations

from collections.abc import Sequence

from .nest import Nest
from .pointwise import NEGATE, TANH, fold, functions

_SELECTED = """
static inline V fmax_v(V a, V b) { return (a < b) | (b != b) ? b : a; }
static inline V fmin_v(V a, V b) { return (b < a) | (b != b) ? b : a; }
"""

_BY_LANE = """
static inline V @NAME@_v(V x) {
  for (int i = 0; i < WIDTH; ++i) x[i] = __builtin_@NAME@@SUFFIX@(x[i]);
  return x;
}
"""

# exp(x) = 2^n exp(r) with |r| <= log(2) / 2; 2^n in two factors, for n reaches below the normal numbers.
_EXP = """
typedef int32_t N __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t U __attribute__((vector_size(WIDTH * 4)));
static inline V power_of_two(N n) { return (V)((U)(n + 127) << 23); }
static inline V exp_v(V x) {
  x = x > 89.0f ? V{} + 89.0f : x;
  x = x < -104.0f ? V{} - 104.0f : x;
  V n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  n = n == n ? n : V{};
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = 0.0013941386f * r + 0.0083633354f;
  p = p * r + 0.041666374f;
  p = p * r + 0.16666576f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  N k = __builtin_convertvector(n, N), half = k >> 1;
  return p * power_of_two(half) * power_of_two(k - half);
}
"""

_TANH = """
static inline V tanh_v(V x) {
  V s = x * x, p = V{} + @LAST@f;
@STEPS@
  V far = 1.0f - 2.0f / (exp_v(x + x) + 1.0f);
  return s < @LIMIT@f ? x + x * s * p : far;
}
"""

# Chebyshev fits: erf(x) / x in x^2 up to 1, and the logarithm of erfc(x) from there to 4, where erf is 1.
_ERF = """
static inline V erf_v(V x) {
  V s = x * x, p = s * -9.680134e-06f + 0.00011270544f;
  p = p * s - 0.00084847113f;
  p = p * s + 0.005221075f;
  p = p * s - 0.026865445f;
  p = p * s + 0.11283783f;
  p = p * s - 0.37612638f;
  p = p * s + 1.1283792f;
  V t = x < 0.0f ? -x : x;
  t = t > 4.0f ? V{} + 4.0f : t;
  V q = t * 6.9228079e-09f - 2.1786019e-05f;
  q = q * t + 0.00044194512f;
  q = q * t - 0.0042066538f;
  q = q * t + 0.02521266f;
  q = q * t - 0.108424394f;
  q = q * t - 0.63321518f;
  q = q * t - 1.1295806f;
  q = q * t + 0.00018845754f;
  V far = 1.0f - exp_v(q);
  return s < 1.0f ? x * p : x < 0.0f ? -far : far;
}
"""


def pointwise_cpp(nest: Nest, compute: str) -> str:
    """``V pointwise(V)``, what the nest does to its result, and all that it calls; "" if it does nothing.

    compute: "float" or "double", the type of the lanes.
    """
    if not nest.pointwise:
        return ""
    lines = [f"  x = {fold(expr, 'x', _number, _apply)};" for expr in nest.pointwise]
    own = "\n".join(["static inline V pointwise(V x) {", *lines, "  return x;", "}", ""])
    return _functions(functions(nest.pointwise), compute) + own


def _number(value: float) -> str:
    return f"(V{{}} + T({float(value)!r}))"


def _apply(name: str, args: Sequence[str]) -> str:
    if name == NEGATE:
        return f"(-{args[0]})"
    return f"({f' {name} '.join(args)})" if name in ("+", "-", "*", "/") else f"{name}_v({', '.join(args)})"


def _functions(called: set[str], compute: str) -> str:
    """The definitions of functions, in the order in which they call one another."""
    text = _SELECTED.lstrip() if called & {"fmax", "fmin"} else ""
    whole = {"exp": _EXP, "tanh": _tanh(), "erf": _ERF} if compute == "float" else {}
    if whole.keys() & called:
        text += "".join(whole[name] for name in ("exp", *sorted(called - {"exp"})) if name in whole)
    for name in sorted(called - whole.keys() - {"fmax", "fmin"}):
        text += _BY_LANE.replace("@NAME@", name).replace("@SUFFIX@", "f" if compute == "float" else "")
    return text


def _tanh() -> str:
    limit, coefficients = TANH["float32"]
    steps = "\n".join(f"  p = p * s + {c!r}f;" for c in reversed(coefficients[:-1]))
    text = _TANH.replace("@LAST@", repr(coefficients[-1])).replace("@STEPS@", steps)
    return text.replace("@LIMIT@", repr(limit))
