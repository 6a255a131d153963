"""Means over the rows of a benchmark; all of them geometric."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from g3dswap.bench.rows import Row
from g3dswap.problem import DIRECTIONS, LAYOUTS

LARGE = 20e-6
"""Seconds of roofline from which a layer is large: what launches and tails cost weighs little there."""


@dataclass(frozen=True)
class Summary:
    """One layout and pass over all layers."""

    layout: str
    direction: str
    layers: int
    ours: int  # of the layers, how many run a kernel of ours
    same: float
    better: float
    contiguous: float
    slowest: float  # the least `same`
    slowest_layer: str
    slowest_eager: float | None  # the least `same_eager`
    slowest_eager_layer: str | None
    compiled: float | None  # over those layers that torch.compile was timed on
    fraction: float  # of the roofline's speed
    torch_fraction: float  # PyTorch's, in the better of its layouts
    large: int  # how many layers are
    large_fraction: float | None  # of those alone


@dataclass(frozen=True)
class Best:
    """One pass over all layers: our better layout against PyTorch's better layout."""

    direction: str
    layers: int
    better: float
    slowest: float
    slowest_layer: str
    fraction: float
    torch_fraction: float
    large: int
    large_better: float | None
    large_fraction: float | None
    large_torch_fraction: float | None


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """By layout and pass, those that have rows."""
    parts: dict[tuple[str, str], list[Row]] = {(l, d): [] for l in LAYOUTS for d in DIRECTIONS}
    for row in rows:
        parts[row.problem.layout, row.problem.direction].append(row)
    return [_summary(layout, direction, part) for (layout, direction), part in parts.items() if part]


def best(rows: Iterable[Row]) -> list[Best]:
    """By pass, those of which some layer has rows in all layouts."""
    found: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault((row.name, row.batch), {}).setdefault(row.problem.direction, []).append(row)
    bests = []
    for direction in DIRECTIONS:
        both = [part[direction] for part in found.values() if len(part.get(direction, [])) == len(LAYOUTS)]
        if both:
            bests.append(_best(direction, [min(part, key=lambda row: row.ours.seconds) for part in both]))
    return bests


def _summary(layout: str, direction: str, rows: list[Row]) -> Summary:
    slowest = min(rows, key=lambda row: row.same)
    eager = min(((row.same_eager, row.name) for row in rows if row.same_eager is not None), default=None)
    compiled = [row.over_compiled for row in rows if row.over_compiled is not None]
    large = [row for row in rows if row.roofline > LARGE]
    return Summary(
        layout,
        direction,
        layers=len(rows),
        ours=sum(not row.kept for row in rows),
        same=_mean(row.same for row in rows),
        better=_mean(row.better for row in rows),
        contiguous=_mean(row.contiguous for row in rows),
        slowest=slowest.same,
        slowest_layer=slowest.name,
        slowest_eager=eager[0] if eager else None,
        slowest_eager_layer=eager[1] if eager else None,
        compiled=_mean(compiled) if compiled else None,
        fraction=_mean(row.fraction for row in rows),
        torch_fraction=_mean(row.torch_fraction for row in rows),
        large=len(large),
        large_fraction=_mean(row.fraction for row in large) if large else None,
    )


def _best(direction: str, rows: list[Row]) -> Best:
    slowest = min(rows, key=lambda row: row.better)
    large = [row for row in rows if row.roofline > LARGE]
    return Best(
        direction,
        layers=len(rows),
        better=_mean(row.better for row in rows),
        slowest=slowest.better,
        slowest_layer=slowest.name,
        fraction=_mean(row.fraction for row in rows),
        torch_fraction=_mean(row.torch_fraction for row in rows),
        large=len(large),
        large_better=_mean(row.better for row in large) if large else None,
        large_fraction=_mean(row.fraction for row in large) if large else None,
        large_torch_fraction=_mean(row.torch_fraction for row in large) if large else None,
    )


def _mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))
