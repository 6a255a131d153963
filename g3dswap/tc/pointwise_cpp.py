"""Pointwise expressions as C++ on vectors: each function that a nest calls, and the nest's own.

In single precision exp, tanh and erf are polynomials or quotients of them, with errors of a few units in the
last place, so that all lanes are done at once. What else there is calls the C library lane by lane.
"""

from __future__ import annotations

from collections.abc import Sequence

from .nest import Nest
from .pointwise import NEGATE, fold, functions

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

# exp(x) = 2^n exp(r) with |r| <= log(2) / 2.
_EXP = """
static inline V exp_v(V x) {
  x = x > 89.0f ? V{} + 89.0f : x;
  x = x < -104.0f ? V{} - 104.0f : x;
  V n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = 0.0013941386f * r + 0.0083633354f;
  p = p * r + 0.041666374f;
  p = p * r + 0.16666576f;
  p = p * r + 0.5f;
  return scaled(p * r * r + r + 1.0f, n);
}
"""

# In two factors, since n reaches below the normal numbers.
_SCALED = """
typedef int32_t N __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t U __attribute__((vector_size(WIDTH * 4)));
static inline V power_of_two(N n) { return (V)((U)(n + 127) << 23); }
static inline V scaled(V x, V n) {  // x * 2^n
  N k = __builtin_convertvector(n == n ? n : V{}, N), half = k >> 1;
  return x * power_of_two(half) * power_of_two(k - half);
}
"""

# A whole register of AVX-512 is scaled by one instruction.
_SCALED_WHOLE = f"""
#if defined(__AVX512F__)
static inline V scaled(V x, V n) {{ return (V)__builtin_ia32_scalefps512_mask(x, n, x, 0xffff, 4); }}
#else{_SCALED}#endif
"""

# f(x) = x p(x^2) / q(x^2) up to a limit, from where it is 1 to rounding, odd as it is.
_ODD = """
static inline V @NAME@_v(V x) {
  V s = x * x, p = V{} + @P@f, q = V{} + @Q@f;
@STEPS@
  V y = x * p / q;
  y = x > @LIMIT@f ? V{} + 1.0f : y;
  return x < -@LIMIT@f ? V{} - 1.0f : y;
}
"""

_RATIONALS = {
    "erf": (
        3.92,
        (1.1283792, 0.19039936, 0.052747776, 0.0037653073, 0.00028487504, 2.0501345e-06),
        (1.0, 0.50206978, 0.11410617, 0.014968601, 0.0011624588, 3.8091798e-05),
    ),
    "tanh": (
        9.01,
        (1.0, 0.13680396, 0.0038689310, 2.8019636e-05, 3.0614324e-08, -1.2225212e-11),
        (1.0, 0.47013729, 0.027248046, 0.00039396949, 1.2882177e-06),
    ),
}
"""Limit, p and q, coefficients from the lowest up: least squares at Chebyshev nodes, reweighted by the error
until that is even, which leaves a relative error of 2e-8 and 1e-9."""


def pointwise_cpp(nest: Nest, compute: str, width: int) -> str:
    """``V pointwise(V)``, what the nest does to its result, and all that it calls; "" if it does nothing.

    compute: "float" or "double", the type of the lanes; width: how many there are.
    """
    if not nest.pointwise:
        return ""
    lines = [f"  x = {fold(expr, 'x', _number, _apply)};" for expr in nest.pointwise]
    own = "\n".join(["static inline V pointwise(V x) {", *lines, "  return x;", "}", ""])
    return _functions(functions(nest.pointwise), compute, width) + own


def _number(value: float) -> str:
    return f"(V{{}} + T({float(value)!r}))"


def _apply(name: str, args: Sequence[str]) -> str:
    if name == NEGATE:
        return f"(-{args[0]})"
    return f"({f' {name} '.join(args)})" if name in ("+", "-", "*", "/") else f"{name}_v({', '.join(args)})"


def _functions(called: set[str], compute: str, width: int) -> str:
    """The definitions of functions, in the order in which they call one another."""
    text = _SELECTED.lstrip() if called & {"fmax", "fmin"} else ""
    whole: set[str] = set()
    if compute == "float":
        whole = called & {"exp", *_RATIONALS}
        text += (_SCALED_WHOLE if width == 16 else _SCALED) + _EXP if "exp" in whole else ""
        text += "".join(_odd(name) for name in sorted(whole - {"exp"}))
    for name in sorted(called - whole - {"fmax", "fmin"}):
        text += _BY_LANE.replace("@NAME@", name).replace("@SUFFIX@", "f" if compute == "float" else "")
    return text


def _odd(name: str) -> str:
    limit, p, q = _RATIONALS[name]
    steps = [f"  {n} = {n} * s + {c!r}f;" for n, own in (("p", p), ("q", q)) for c in reversed(own[:-1])]
    text = _ODD.replace("@NAME@", name).replace("@LIMIT@", repr(limit)).replace("@STEPS@", "\n".join(steps))
    return text.replace("@P@", repr(p[-1])).replace("@Q@", repr(q[-1]))
