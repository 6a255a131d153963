"""Writes the copies from a tensor to its box in shared memory, each thread a few words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .box import WIDEST, Box, Dim
from .cuda_text import CudaText
from .linear import Linear
from .words import ITEM_BYTES

DECODED, NESTED, MOST_NESTED = 15, 6, 32
"""Issue slots of a copy whose place is worked out, of one in an unrolled loop, and the most steps of that."""
MOST_UNROLLED, PART = 16, 8
"""Copies of a thread that are unrolled, all of them; and how many at a time where they are more."""


@dataclass
class Run:
    """A loop of a copy: its steps, how far each moves in the tensor and in the box, and what is to be tested.

    width: how many steps one copy brings.  What lies side by side in the tensor and what does so in the box
    may be two loops: a copy then brings a few steps of the one and a pair of the other.
    """

    count: int
    stride: int
    pitch: int
    tested: Dim | None = None
    width: int = 1

    @property
    def steps(self) -> int:
        return -(-self.count // self.width)

    def goes_on(self, run: Run) -> bool:
        """Whether another loop begins where this one ends, and nothing of either is to be tested."""
        here = run.stride == self.count * self.stride and run.pitch == self.count * self.pitch
        return here and self.tested is None and run.tested is None


def write_copy(text: CudaText, box: Box, to: str, threads: int, thread: str = "thread") -> None:
    """Copy a box by so many threads; `to` is where it begins in shared memory, `thread` each one's number."""
    base, runs, fixed = _frame(text, box)
    with text.block():
        text.emit(f"{text.kind}* to = reinterpret_cast<{text.kind}*>({to});")
        text.emit(f"const {text.kind}* from = {box.tensor} + ({text.form(base, kind='(i64)')});")
        if fixed:
            text.emit(f"const bool here = {' && '.join(fixed)};")

        def copy(to: str, offset: str) -> None:
            _write_one(text, runs, bool(fixed), to, offset)

        write_loops(text, runs, threads, thread, copy)


def write_out(text: CudaText, box: Box, begin: str, threads: int) -> None:
    """Write what a box in shared memory holds to its tensor, by so many threads; `begin` is where it lies."""
    base, runs, fixed = _frame(text, box)

    def put(from_: str, offset: str) -> None:
        put = f"put<{runs[0].width}>(to + ({offset}), {begin} + ({from_}));"
        text.emit_if(_tests(text, runs, False), put)

    with text.block(f"if ({' && '.join(fixed)})" if fixed else ""):
        text.emit(f"auto* to = {box.tensor} + ({text.form(base, kind='(i64)')});")
        write_loops(text, runs, threads, "thread", put)


def _frame(text: CudaText, box: Box) -> tuple[Linear, list[Run], list[str]]:
    """Where a box begins in its tensor, the loops over it, and tests of dimensions that have none."""
    base = Linear()
    for dim in box.dims:
        base = base + dim.base * dim.stride
    fixed = [
        f"(unsigned)({text.form(dim.base)}) < {dim.extent}u"
        for d, dim in enumerate(box.dims)
        if d not in box.order and not is_inside(text, dim)
    ]
    return base, _runs(text, box, base), fixed


def write_loops(
    text: CudaText, runs: list[Run], threads: int, thread: str, one: Callable[[str, str], None]
) -> None:
    """Loops of so many threads over all steps; `one` writes what is done at each, of which it is told how far
    it is in the box and in the tensor."""
    inside = _goes_inside(runs, threads)
    decoded = runs[:-1] if inside else runs
    total = math.prod(run.steps for run in decoded)
    turns = -(-total // threads)
    if not text.is_crowded and turns * (runs[-1].steps if inside else 1) <= MOST_UNROLLED:
        unrolled = turns  # so that the compiler works out their places once, outside of a loop around them
    else:
        unrolled = 1 if inside else min(PART, turns)
    text.emit(f"#pragma unroll {unrolled}")
    with text.block(f"for (int nth = 0; nth < {turns}; ++nth)"):
        text.emit(f"const int e = {thread} + nth * {threads};")
        if total % threads:
            text.emit(f"if (nth == {turns - 1} && e >= {total}) break;")
        rest = "e"
        for place, run in enumerate(decoded):
            scale = f" * {run.width}" if run.width > 1 else ""
            if place == len(decoded) - 1:
                text.emit(f"const int x{place} = {rest}{scale};")
            else:
                text.emit(
                    f"const int x{place} = {rest} % {run.steps}{scale}, e{place} = {rest} / {run.steps};"
                )
                rest = f"e{place}"
        to, offset = (
            " + ".join(f"x{place} * {step}" for place, step in enumerate(steps))
            for steps in ((run.pitch for run in runs), (run.stride for run in runs))
        )
        if not inside:
            one(to, offset)
            return
        place, run = len(decoded), runs[-1]
        text.emit("#pragma unroll")
        with text.block(f"for (int x{place} = 0; x{place} < {run.count}; x{place} += {run.width})"):
            one(to, offset)


def _goes_inside(runs: list[Run], threads: int) -> bool:
    """Whether the outermost loop goes inside: what its steps have in common is worked out once then."""
    if len(runs) == 1 or runs[-1].steps > MOST_NESTED:
        return False
    within, last = math.prod(run.steps for run in runs[:-1]), runs[-1].steps
    rounds, nested = -(-within * last // threads), -(-within // threads) * last
    return nested * NESTED < rounds * DECODED


def _write_one(text: CudaText, runs: list[Run], fixed: bool, to: str, offset: str) -> None:
    first, pair = runs[0], next((place for place, run in enumerate(runs) if place and run.width > 1), None)
    text.emit(f"const bool some = {_tests(text, runs, fixed) or 'true'};")
    if pair is None:
        text.emit(f"copy<{first.width * text.item}>(to + ({to}), from + ({offset}), some);")
        return
    text.emit(f"const bool more = {_tests(text, runs, fixed, pair) or 'true'};")
    text.emit(f"const u16* const at = from + ({offset});")
    text.emit(f"turn<{first.width}>(to + ({to}), {first.pitch}, at, at + {runs[pair].stride}, some, more);")


def _tests(text: CudaText, runs: list[Run], fixed: bool, next_of: int | None = None) -> str:
    """Whether the tensor has an element, or the next one along a loop; "" where it always has."""
    tests = ["here"] if fixed else []
    for place, run in enumerate(runs):
        step = f"x{place}{' + 1' if place == next_of else ''}"
        if run.tested is not None:
            tests.append(f"(unsigned)({text.form(run.tested.base)} + {step}) < {run.tested.extent}u")
        if place == next_of and run.count % run.width:
            tests.append(f"{step} < {run.count}")
    return " && ".join(tests)


def _runs(text: CudaText, box: Box, base: Linear) -> list[Run]:
    """The loops of a copy, the nearest elements first, so that neighbouring threads read those."""
    dims = sorted((box.dims[d] for d in box.order), key=lambda dim: dim.stride)
    runs = merged(Run(d.span, d.stride, d.pitch, None if is_inside(text, d) else d) for d in dims)
    first = runs[0]
    if first.stride == first.pitch == 1:
        first.width = box.width
        steps = [first.count, base.const, *(factor for _, factor in base.terms)]
        steps += [step for run in runs[1:] for step in (run.stride, run.pitch)]
        widest = math.gcd(WIDEST // ITEM_BYTES[text.nest.tensor(box.tensor).dtype], *steps)
        if first.tested is None and widest > first.width:
            first.width = widest
        return runs
    if text.pair == 1:
        return runs  # an element is a word, wherever it goes
    for run in runs[1:]:  # what lies side by side in the box is far apart in the tensor
        even = not any(other.pitch % 2 for other in runs if other is not run)
        if run.pitch == 1 and even and (run.count % 2 == 0 or box.width % 2 == 0):
            run.width = 2
            first.width = math.gcd(first.count, box.turned)
    return runs


def merged(runs: Iterable[Run]) -> list[Run]:
    """The same loops, those in one that follow each other in the tensor and in the box."""
    found: list[Run] = []
    for run in runs:
        if found and found[-1].goes_on(run):
            found[-1].count *= run.count
        else:
            found.append(run)
    return found


def is_inside(text: CudaText, dim: Dim) -> bool:
    """Whether the tensor has all elements of a dimension of a box."""
    if dim.extent is None:
        return True
    counts = text.spotter.counts
    if any(symbol not in counts for symbol, _ in dim.base.terms):
        return False
    low, high = dim.base.bounds(counts)
    return low >= 0 and high + dim.span <= dim.extent
