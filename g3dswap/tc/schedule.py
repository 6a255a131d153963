"""A schedule: how a nest is run, as data, and its application to a nest.

A schedule is independent of the extents of the nest where it can be: an axis's outermost digit takes
the rest of the extent, so the same schedule fits another image size.  It is written as a list of digits::

    n rest grid | g rest grid | t rest serial | c rest serial | kt rest unroll | t 4 unroll | h*w 16 lanes

The order is the loop order, outermost first.  Of the digits of one axis, an earlier one is more
significant; a `phase` digit is the least significant wherever it stands, which is how an axis is split
by a stride (t = 2 * t' + phase) so that an exact division is decided at compile time.  The digits of a
part of a fused axis are less significant than the fused axis's: "h*w 128 lanes | w 4 unroll" gives each
lane a block of four columns; where that block is bound to a side of a product too, the side runs along
both.  What is packed or skewed (`pack`, `skew`) has axes of its own to split.  "n rest grid | n 8 serial"
gives a program up to eight steps of the batch: fewer where there would be too few programs (`nest.Blocks`).
Of a reduction, each step on the grid makes a partial result; steps of a "cluster" are programs too, a few,
that add up theirs by themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import NestError, ScheduleError
from .nest import BINDS, SIDE_BINDS, Fused, Loop, Nest, Stage, verify_loops
from .pack import packed
from .skew import Skew, skewed


@dataclass(frozen=True, order=True)
class Digit:
    axis: str
    count: int | None
    bind: str
    phase: bool = False

    def __str__(self) -> str:
        count = "rest" if self.count is None else str(self.count)
        return f"{self.axis} {count} {self.bind}{' phase' if self.phase else ''}"


@dataclass(frozen=True)
class Schedule:
    """One point of the search space.

    digits: the loops, outermost first.
    fuse:   axes to flatten, each group row-major under the name "h*w".
    stage:  (tensor, level): copy the tensor's footprint to a buffer inside the first `level` loops.
    hints:  numbers for the target that do not change the meaning (warps, pipeline stages).
    pack:   (axis, count): blocks of a batch axis that become one block-diagonal product.
    skew:   blocks of a shifted axis that become a banded product.
    """

    digits: tuple[Digit, ...]
    fuse: tuple[tuple[str, ...], ...] = ()
    stage: tuple[tuple[str, int], ...] = ()
    hints: tuple[tuple[str, int], ...] = ()
    pack: tuple[tuple[str, int], ...] = ()
    skew: tuple[Skew, ...] = ()

    def __str__(self) -> str:
        text = "".join(f"pack {axis} by {count}; " for axis, count in self.pack)
        text += "".join(f"skew {s.axis} by {s.count} in words of {s.word}; " for s in self.skew)
        text += " | ".join(map(str, self.digits))
        for tensor, level in self.stage:
            text += f"; stage {tensor}@{level}"
        return text + "".join(f"; {name}={value}" for name, value in self.hints)

    def hint(self, name: str, default: int) -> int:
        return dict(self.hints).get(name, default)

    @property
    def warp_lanes(self) -> float:
        """Lanes of each warp; those kernels compile longest whose warps have more of them than threads."""
        lanes = math.prod(d.count or 1 for d in self.digits if d.bind == "lanes")
        return lanes / self.hint("warps", 4)

    def to_json(self) -> dict[str, Any]:
        return {
            "digits": [str(d) for d in self.digits],
            "fuse": [list(group) for group in self.fuse],
            "stage": [list(pair) for pair in self.stage],
            "hints": dict(self.hints),
            # Only where there are any: what was tuned before there were these reads as it was written.
            **({"pack": dict(self.pack)} if self.pack else {}),
            **({"skew": [[s.axis, s.count, s.word] for s in self.skew]} if self.skew else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """The inverse of `to_json`; ScheduleError when the data is anything else."""
        try:
            schedule = cls(
                digits=tuple(_parse_digit(text) for text in data["digits"]),
                fuse=tuple(tuple(str(a) for a in group) for group in data["fuse"]),
                stage=tuple((str(tensor), int(level)) for tensor, level in data["stage"]),
                hints=_numbers(data["hints"]),
                pack=_numbers(data.get("pack", {})),
                skew=tuple(Skew(str(axis), int(n), int(word)) for axis, n, word in data.get("skew", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ScheduleError(
                f"a schedule is a mapping with digits, fuse, stage and hints, not {str(data)[:80]!r} "
                f"({error}); tune the layer again."
            ) from error
        return schedule


def _numbers(data: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((str(name), int(number)) for name, number in data.items()))


def _parse_digit(text: str) -> Digit:
    axis, count, bind, *phase = text.split()
    if bind not in BINDS or phase not in ([], ["phase"]):
        raise ValueError(f"no digit: {text!r}")
    number = None if count == "rest" else int(count)
    if number is not None and not 1 <= number <= 1 << 20:
        raise ValueError(f"a count of {number} in {text!r}")
    return Digit(axis, number, bind, bool(phase))


def fused_name(parts: Sequence[str]) -> str:
    return "*".join(parts)


def apply(nest: Nest, schedule: Schedule) -> Nest:
    """The nest with the schedule's packed and skewed axes, loops, fused axes and stages, verified.

    ScheduleError: the schedule does not fit this nest (it names other axes, cuts the batch, ...).
    """
    staged = {tensor for tensor, _ in schedule.stage}
    try:
        nest = rewritten(nest, schedule.pack, schedule.skew)
        fused = tuple(_fuse(nest, parts, staged, schedule) for parts in schedule.fuse)
        scheduled = replace(nest, fused=fused, loops=(), stages=(), _by_name={})
        loops = _loops(scheduled, schedule)
        stages = tuple(Stage(tensor, level) for tensor, level in schedule.stage)
        return verify_loops(replace(scheduled, loops=loops, stages=stages, _by_name={}))
    except (NestError, KeyError) as error:
        raise ScheduleError(f"schedule [{schedule}] does not fit nest {nest.name}: {error}") from error


@functools.lru_cache(maxsize=256)
def rewritten(nest: Nest, pack: tuple[tuple[str, int], ...], skew: tuple[Skew, ...]) -> Nest:
    """The nest with axes packed and skewed: what the digits of a schedule split."""
    for axis, count in pack:
        nest = packed(nest, axis, count)
    for each in skew:
        nest = skewed(nest, each)
    return nest


def _fuse(nest: Nest, parts: tuple[str, ...], staged: set[str], schedule: Schedule) -> Fused:
    """Flatten axes; where lanes read a staged tensor at shifted positions, rows are padded so that a shift
    in any part is one constant step of the flat index."""
    if any(d.axis == fused_name(parts) and d.bind in SIDE_BINDS for d in schedule.digits):
        staged = set()
    extents = []
    for position, part in enumerate(parts):
        extent = nest.axis(part).extent
        if extent is None:
            raise ScheduleError(f"the batch axis {part} cannot be flattened into {fused_name(parts)}.")
        reach = 0
        for access in nest.factors:
            if position == 0 or access.tensor not in staged:
                continue
            for index in access.indices:
                coefficient = index.coefficient(part)
                if coefficient:
                    spans = (abs(c) * ((nest.axis(a).extent or 1) - 1) for a, c in index.terms if a != part)
                    reach = max(reach, sum(spans) // abs(coefficient))
        block = math.prod(d.count or 1 for d in schedule.digits if d.axis == part)
        extents.append(-(-(extent + reach) // block))
    return Fused(fused_name(parts), parts, tuple(extents))


def _loops(nest: Nest, schedule: Schedule) -> tuple[Loop, ...]:
    known = {*(a.name for a in nest.axes), *(f.name for f in nest.fused)}
    if unknown := {d.axis for d in schedule.digits} - known:
        raise ScheduleError(f"nest {nest.name} has no axis {min(unknown)!r}, which [{schedule}] splits.")
    counts: dict[int, int | None] = {}
    steps: dict[int, int] = {}
    own: dict[str, list[int]] = {}
    for i in sorted(range(len(schedule.digits)), key=lambda i: schedule.digits[i].phase):
        own.setdefault(schedule.digits[i].axis, []).append(i)  # phases are the least significant digits
    for axis, places in own.items():
        if any(schedule.digits[i].count is None for i in places[1:]):
            raise ScheduleError(f"only the first digit of {axis} can take the rest in [{schedule}].")
        extent = nest.extent(axis)
        inner = math.prod(schedule.digits[i].count or 1 for i in places)
        step = 1
        for i in reversed(places):
            count = schedule.digits[i].count
            steps[i] = 1 if count is None and extent is None else step  # of the batch, a block's first step
            if count is None and extent is not None:
                count = max(1, -(-extent // inner))
            counts[i] = count
            step *= count or 1
    return tuple(Loop(d.axis, counts[i], steps[i], d.bind) for i, d in enumerate(schedule.digits))


def serial(nest: Nest) -> Schedule:
    """The schedule of the unscheduled nest: one serial loop for each axis."""
    return Schedule(tuple(Digit(a.name, None, "serial") for a in nest.axes))
