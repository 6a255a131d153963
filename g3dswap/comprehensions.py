"""The three passes of a convolution as tensor comprehensions, over a grouped view of its tensors.

n batch, g group, c input channel in the group, f filter in the group, t h w space, kt kh kw kernel;
S stride, P padding, D dilation.  A reference outside its tensor reads as zero.

A transposed convolution computes forward what the convolution of the same weight computes as its input's
gradient, and may add a bias to it. What a forward pass applies to its result is one more statement.
"""

from __future__ import annotations

from functools import cache

from .problem import Problem
from .tc.lower import lower
from .tc.nest import Nest
from .tc.parser import parse
from .tc.syntax import Comprehension

FORWARD = """
def forward(float(N,G,C,T,H,W) I, float(G,F,C,KT,KH,KW) K) -> (O) {
  O(n,g,f,t,h,w) +=! I(n,g,c, t*ST + kt*DT - PT, h*SH + kh*DH - PH, w*SW + kw*DW - PW) * K(g,f,c,kt,kh,kw)
    where t in 0:TO, h in 0:HO, w in 0:WO
}
"""

FORWARD_BIAS = """
def forward_bias(float(N,G,C,T,H,W) I, float(G,F,C,KT,KH,KW) K, float(G,F) B) -> (O) {
  O(n,g,f,t,h,w) +=! I(n,g,c, t*ST + kt*DT - PT, h*SH + kh*DH - PH, w*SW + kw*DW - PW) * K(g,f,c,kt,kh,kw)
    where t in 0:TO, h in 0:HO, w in 0:WO
  O(n,g,f,t,h,w) = O(n,g,f,t,h,w) + B(g,f) where t in 0:TO, h in 0:HO, w in 0:WO
}
"""

GRAD_INPUT = """
def grad_input(float(N,G,F,TO,HO,WO) dO, float(G,F,C,KT,KH,KW) K) -> (dI) {
  dI(n,g,c,t,h,w) +=! dO(n,g,f, (t+PT-kt*DT)/ST, (h+PH-kh*DH)/SH, (w+PW-kw*DW)/SW) * K(g,f,c,kt,kh,kw)
    where t in 0:T, h in 0:H, w in 0:W
}
"""

GRAD_INPUT_BIAS = """
def grad_input_bias(float(N,G,F,TO,HO,WO) dO, float(G,F,C,KT,KH,KW) K, float(G,C) B) -> (dI) {
  dI(n,g,c,t,h,w) +=! dO(n,g,f, (t+PT-kt*DT)/ST, (h+PH-kh*DH)/SH, (w+PW-kw*DW)/SW) * K(g,f,c,kt,kh,kw)
    where t in 0:T, h in 0:H, w in 0:W
  dI(n,g,c,t,h,w) = dI(n,g,c,t,h,w) + B(g,c) where t in 0:T, h in 0:H, w in 0:W
}
"""

GRAD_WEIGHT = """
def grad_weight(float(N,G,F,TO,HO,WO) dO, float(N,G,C,T,H,W) I) -> (dK) {
  dK(g,f,c,kt,kh,kw) +=! dO(n,g,f,t,h,w) * I(n,g,c, t*ST + kt*DT - PT, h*SH + kh*DH - PH, w*SW + kw*DW - PW)
    where kt in 0:KT, kh in 0:KH, kw in 0:KW
}
"""

ACTIVATIONS = {
    "relu": "fmax({y}, 0)",
    "silu": "{y} / (1 + exp(-{y}))",
    "gelu": "0.5 * {y} * (1 + erf(sqrt(0.5) * {y}))",
    "gelu_tanh": "0.5 * {y} * (1 + tanh(0.7978845608028654 * ({y} + 0.044715 * {y} * {y} * {y})))",
    "hardswish": "{y} * fmin(fmax({y} + 3, 0), 6) * (1 / 6)",
}
"""The activations of ``problem.ACTIVATIONS`` in the notation; ``{y}`` is the result."""

RESULTS = {"forward": "O(n,g,f,t,h,w)", "grad_input": "dI(n,g,c,t,h,w)"}
"""What the passes write that may be a layer's forward pass."""

BATCH = "N"


@cache
def _parsed(text: str) -> Comprehension:
    return parse(text)


def comprehension(problem: Problem) -> Comprehension:
    """The notation of a problem's pass."""
    if problem.direction == "grad_weight":
        return _parsed(GRAD_WEIGHT)
    if problem.direction == "forward":
        text = FORWARD_BIAS if problem.bias else FORWARD
    else:
        text = GRAD_INPUT_BIAS if problem.bias else GRAD_INPUT
    if problem.activation:
        result = RESULTS[problem.direction]
        statement = f"{result} = {ACTIVATIONS[problem.activation].format(y=result)}"
        text = text.rstrip().removesuffix("}") + f"  {statement}\n}}\n"
    return _parsed(text)


def nest(problem: Problem) -> Nest:
    """The unscheduled nest of a problem, with the strides of its layout.

    Tensors are the plain five-dimensional ones, contiguous in the problem's layout; their grouped
    view (channel = group * channels in the group + c) needs strides only.
    """
    geometry = problem.geometry
    groups = geometry.groups
    channels, filters = geometry.in_channels // groups, geometry.out_channels // groups
    sizes = {"G": groups, "C": channels, "F": filters}
    for names, values in (
        (("T", "H", "W"), geometry.size),
        (("TO", "HO", "WO"), geometry.output_size),
        (("KT", "KH", "KW"), geometry.kernel),
        (("ST", "SH", "SW"), geometry.stride),
        (("PT", "PH", "PW"), geometry.padding),
        (("DT", "DH", "DW"), geometry.dilation),
    ):
        sizes.update(zip(names, values))
    last = problem.layout == "channels_last_3d"
    image = _image_strides(groups, channels, geometry.size, last)
    result = _image_strides(groups, filters, geometry.output_size, last)
    kt, kh, kw = geometry.kernel
    volume = kt * kh * kw
    weight = (filters * channels * volume, channels * volume, volume, kh * kw, kw, 1)
    if last:
        weight = (
            filters * channels * volume,
            channels * volume,
            1,
            kh * kw * channels,
            kw * channels,
            channels,
        )
    strides = {
        "I": image,
        "dI": image,
        "O": result,
        "dO": result,
        "K": weight,
        "dK": weight,
        "B": (channels if problem.transposed else filters, 1),
    }
    dtype = str(problem.dtype).removeprefix("torch.")
    return lower(comprehension(problem), sizes, strides, dtype, batch=BATCH, precision=problem.precision)


def _image_strides(groups: int, channels: int, size: tuple[int, int, int], last: bool) -> tuple[int, ...]:
    """Strides of (n, g, c, t, h, w)."""
    t, h, w = size
    every = groups * channels
    if last:
        return (every * t * h * w, channels, 1, h * w * every, w * every, every)
    return (every * t * h * w, channels * t * h * w, t * h * w, h * w, w, 1)
