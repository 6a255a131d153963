"""The second stage of a reduction that is split over the grid: its partial results are summed by a nest too.

PyTorch's sum and the conversion of its result take two launches and, for some thousand numbers, several times
as long as the reduction itself; this takes one, and adds in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .lower import lower
from .nest import Nest
from .parser import parse
from .schedule import Digit, Schedule
from .space_triton import power
from .words import WARP

TOTAL = """
def total(float(N,S,E) P) -> (O) {
  O(i) +=! P(n,s,i)
}
"""
TILE = 256
"""Partial results that a program adds at a time, one in each thread: some of each of its elements."""
ELEMENTS = (8, 64)
"""Elements of a program, at least and at most."""
AHEAD = 8
"""Loads of a thread that are under way together: each takes as long as all that a program does beside."""
PROGRAMS = 200
"""Where a result has few elements, a program has few of them and adds more of their parts at a time."""


def total(nest: Nest) -> tuple[Nest, Schedule] | None:
    """The nest that sums the partial results of a scheduled one, and a schedule of it for Triton.

    None: there are none, or the batch is not the outermost of them, so that no strides are fixed.
    """
    counts = nest.partial_counts
    if not counts or None in counts[1:]:
        return None
    batched = counts[0] is None
    known = math.prod(c for c in counts if c is not None)
    result = nest.tensor(nest.output.tensor)
    elements = math.prod(e for e in result.shape[len(nest.replicas) :] if e is not None)
    if None in result.shape:
        return None
    sizes = {"S": known, "E": elements, **({} if batched else {"N": 1})}
    strides = {"P": (known * elements, elements, 1), "O": (1,)}
    dtype = "float64" if result.dtype == "float64" else "float32"
    made = lower(parse(TOTAL), sizes, strides, dtype, batch="N" if batched else None)
    tensors = tuple(replace(t, dtype=result.dtype) if t.name == "O" else t for t in made.tensors)
    fewest, most = ELEMENTS
    share = max(1, elements // PROGRAMS)
    lanes = max(fewest, min(most, 1 << share.bit_length() - 1))
    parts = power(known, TILE // lanes)
    digits = [Digit("i", None, "grid"), Digit("n", None, "serial"), Digit("s", None, "serial")]
    digits += [Digit("s", parts, "lanes"), Digit("i", lanes, "lanes")]
    warps = max(1, lanes * parts // WARP)
    hints = ("ahead", AHEAD), ("warps", warps)
    return replace(made, tensors=tensors, _by_name={}), Schedule(tuple(digits), (), (), hints)
