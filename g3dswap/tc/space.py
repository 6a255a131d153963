"""The schedules of a nest on a target: a good one without timing, the best by model, and how to vary one."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import os
import random
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import ArgumentError, ScheduleError
from . import (
    model_banded,
    model_lanes,
    model_product,
    model_staged,
    model_triton,
    space_banded,
    space_cpp,
    space_lanes,
    space_lines,
    space_product,
    space_staged,
    space_triton,
)
from .compile_cuda import is_available
from .model_cpp import buffers_of, check
from .model_cpp import cost as cost_cpp
from .nest import GRID_BINDS, Nest
from .print_cuda import is_cuda
from .product import Product, is_product
from .program_cuda import MOST_SHARED, Settings
from .schedule import Digit, Schedule, apply
from .source import source

CLIMBS = 6
"""Families of C++ schedules whose tiles are worked out; the model puts the others far behind."""

GLANCE, PROMISING = 48, 8
"""Tiles of a family of Triton schedules that are compared at first, and how many families are then looked at
closely: with these, the best of 108 passes by the model is what it was when all of them were."""

TILES = 300
"""Tiles of a family that are compared then, evenly spread where there are more."""

LEADERS = 6
"""Those of them that are tried with all counts of lanes."""

SHARE = 4
"""Of so many ranked schedules, at least one is of each kind, where there are several."""

HOPELESS = 2.0
"""How many times the best of all a kind's best may take, by the models, for that kind to have its share."""

BANDED = 1.35
"""The model of banded products is the most exact, and the others' estimates are so much too high."""

A_FAMILY = {"cpp": 2, "triton": 6}
"""Most schedules of one family among the ranked ones, so that a wrong model cannot hide the right family."""

CLUSTERS = (9, 0)
"""The compute capability from which on programs are clusters."""

CAPABLE = (8, 0)
"""The compute capability that has what kernels in CUDA C++ use, such as products of bfloat16."""

Tiled = space_triton.Point | space_lanes.Point | Product


class Space:
    """The search space of one nest on one target ("cpp" or "triton").

    Everything is deterministic; randomness comes from the generators that are passed in.
    batch: at which kernels of a GPU are compared: it says how many programs they have.
    """

    def __init__(
        self, nest: Nest, target: str, threads: int | None = None, batch: int = space_triton.BATCH
    ) -> None:
        if target not in ("cpp", "triton"):
            raise ArgumentError(f"target {target!r} is unknown; use 'cpp' or 'triton'.")
        self.nest = nest
        self.target = target
        self.threads = threads or os.cpu_count() or 1
        self.batch = max(1, batch)

    def cost(self, schedule: Schedule) -> float:
        """Model seconds; infinite for a schedule that is not legal here."""
        try:
            scheduled = apply(self.nest, schedule)
            if scheduled.cluster > 1 and not self._has_clusters:
                return math.inf
            if self.target == "cpp":
                buffers = buffers_of(scheduled)
                check(scheduled, buffers)
                return cost_cpp(scheduled, buffers, self.threads)
            warps, batch = schedule.hint("warps", 4), self.batch
            if is_cuda(schedule):
                model = model_staged if is_product(schedule) else model_lanes
                return model.cost(scheduled, Settings.of(schedule), batch, self._room)
            if schedule.skew and is_product(schedule):
                ahead, across = schedule.hint("ahead", 0), schedule.hint("across", 0)
                return BANDED * model_banded.cost(scheduled, warps, ahead, bool(across), batch)
            if is_product(schedule):
                return model_product.cost(scheduled, warps, schedule.hint("stages", 2), batch)
            return model_triton.cost(scheduled, warps, batch)
        except ScheduleError:
            return math.inf

    @functools.cached_property
    def _room(self) -> int:
        """Bytes of shared memory that a program can have; asked for once, and not for each schedule."""
        return shared_bytes()

    @functools.cached_property
    def _has_clusters(self) -> bool:
        """Whether the current GPU has clusters of programs; without one, an H100 is meant, which does."""
        return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= CLUSTERS

    @functools.cached_property
    def _families(self) -> list[list[tuple[float, Schedule]]]:
        """Schedules with their model seconds, best first within a family, best family first."""
        families = self._cpp_families() if self.target == "cpp" else self._triton_families()
        ordered = [sorted(f, key=lambda pair: (pair[0], str(pair[1]))) for f in families if f]
        if not ordered:
            raise ScheduleError(
                f"no schedule of {self.nest.name} fits target {self.target}; use another kernel for it."
            )
        return sorted(ordered, key=lambda f: f[0][0])

    def _cpp_families(self) -> list[list[tuple[float, Schedule]]]:
        families = []
        for point in itertools.islice(self._cpp_starts(), CLIMBS):
            families.append(self._legal(space_cpp.climb(self.nest, point, self.threads)))
        return families

    def _cpp_starts(self) -> Iterator[space_cpp.Point]:
        """A legal point of each family, the cheapest first; the model is asked before what is legal."""
        waiting: list[tuple[float, int, space_cpp.Point, Iterator[space_cpp.Point]]] = []
        number = itertools.count()

        def wait(points: Iterator[space_cpp.Point]) -> None:
            for point in points:
                cost = space_cpp.estimate(self.nest, point, self.threads)
                if cost < math.inf:
                    return heapq.heappush(waiting, (cost, next(number), point, points))

        for lanes in space_cpp.lane_axes(self.nest):
            for staged in space_cpp.stage_sets(self.nest, lanes):
                wait(space_cpp.starts(self.nest, lanes, staged))
        while waiting:
            *_, point, others = heapq.heappop(waiting)
            if space_cpp.is_legal(self.nest, point):
                yield point
            else:
                wait(others)

    def _legal(self, seen: dict[space_cpp.Point, float]) -> list[tuple[float, Schedule]]:
        """The cheapest points of a family that are legal, as many as are ranked."""
        found: list[tuple[float, Schedule]] = []
        met = ((cost, point.schedule(self.nest), point) for point, cost in seen.items() if cost < math.inf)
        for cost, schedule, point in sorted(met, key=lambda it: (it[0], str(it[1]))):
            if space_cpp.is_legal(self.nest, point):
                found.append((cost, schedule))
                if len(_diverse(found)) == A_FAMILY["cpp"]:
                    break
        return found

    def _triton_families(self) -> list[list[tuple[float, Schedule]]]:
        every: list[tuple[Sequence[Tiled], Callable[[Container[Any]], Iterable[Tiled]]]]
        cuda = (space_staged, space_lines, space_lanes) if has_cuda() else ()
        spaces = (space_triton, space_product, space_banded, *cuda)
        every = [family for space in spaces for family in space.families(self.nest, self.batch)]
        glances = [{point: self._costed(point) for point in _spread(first, GLANCE)} for first, _ in every]
        best = [min((cost for cost, _ in seen.values()), default=math.inf) for seen in glances]
        worth = max(sorted(best)[:PROMISING], default=math.inf)
        families = []
        for (first, rest), seen, cost in zip(every, glances, best):
            if cost <= worth:
                seen |= {point: self._costed(point) for point in _spread(first, TILES) if point not in seen}
                leaders = {point.tile for point in sorted(seen, key=lambda p: seen[p][0])[:LEADERS]}
                seen |= {point: self._costed(point) for point in rest(leaders) if point not in seen}
            families.append([pair for pair in seen.values() if pair[0] < math.inf])
        return families

    def _costed(self, point: Tiled) -> tuple[float, Schedule]:
        schedule = point.schedule(self.nest)
        return self.cost(schedule), schedule

    def default(self) -> Schedule:
        """The best schedule by the model that prints.  ScheduleError: there is none."""
        for _, schedule in sorted((pair for f in self._families for pair in f[:2]), key=lambda p: p[0]):
            if self._prints(schedule):
                return schedule
        raise ScheduleError(
            f"no schedule of {self.nest.name} prints for {self.target}; use another kernel for it."
        )

    def ranked(self, limit: int, rng: random.Random) -> list[Schedule]:
        """Up to `limit` schedules, best first by the model, at most a few of each family."""
        del rng  # the ranking needs no chance; the signature is the tuner's
        pairs = sorted(
            (pair for f in self._families for pair in _diverse(f)[: A_FAMILY[self.target]]),
            key=lambda p: (p[0], str(p[1])),
        )
        kinds: dict[tuple[bool, ...], list[tuple[float, Schedule]]] = {}
        for pair in pairs:
            kinds.setdefault(_kind(pair[1]), []).append(pair)
        ranks = {schedule: rank for rank, (_, schedule) in enumerate(pairs)}
        # Each kind has a model of its own, and a product in TF32 may not be exact enough.
        places = dict(ranks)
        for kind in kinds.values():
            if kind[0][0] <= HOPELESS * pairs[0][0]:
                places.update((s, min(ranks[s], SHARE * rank)) for rank, (_, s) in enumerate(kind))
        return sorted(ranks, key=lambda s: (places[s], ranks[s]))[:limit]

    def mutate(self, schedule: Schedule, rng: random.Random) -> Schedule:
        """A legal schedule that differs from this one in a choice or two, or the schedule itself."""
        for _ in range(20):
            changed = self._vary(schedule, rng)
            if changed != schedule and self.cost(changed) < math.inf:
                return changed
        return schedule

    def crossover(self, a: Schedule, b: Schedule, rng: random.Random) -> Schedule:
        """The lanes and order of one parent with tile counts of either; a parent if that is not legal."""
        if rng.random() < 0.5:
            a, b = b, a
        theirs = {(d.axis, d.bind): d.count for d in b.digits if d.bind == "unroll" and not d.phase}
        digits = tuple(
            Digit(d.axis, theirs.get((d.axis, d.bind), d.count), d.bind)
            if d.bind == "unroll" and not d.phase and rng.random() < 0.5
            else d
            for d in a.digits
        )
        child = replace(a, digits=digits)
        return child if self.cost(child) < math.inf else a

    def any(self, rng: random.Random, printable: bool = True) -> Schedule:
        """Any legal schedule, however slow: what the tests draw from."""
        for _ in range(2000):
            if self.target == "cpp":
                schedule = space_cpp.random_point(self.nest, rng).schedule(self.nest)
            else:
                schedule = space_triton.random_point(self.nest, rng).schedule(self.nest)
            if self.cost(schedule) < math.inf and (not printable or self._prints(schedule)):
                return schedule
        raise ScheduleError(f"no random schedule of {self.nest.name} is legal for {self.target}.")

    def _vary(self, schedule: Schedule, rng: random.Random) -> Schedule:
        if self.target == "cpp":
            return space_cpp.mutate(self.nest, space_cpp.Point.of(schedule), rng).schedule(self.nest)
        if is_product(schedule):
            banded = space_banded if schedule.skew else space_product
            staged = space_lines if schedule.hint("lines", 0) else space_staged
            space = staged if is_cuda(schedule) else banded
            return space.mutate(self.nest, Product.of(schedule), rng, self.batch).schedule(self.nest)
        if is_cuda(schedule):
            lanes = space_lanes.Point.of(schedule, self.nest)
            return space_lanes.mutate(self.nest, lanes, rng).schedule(self.nest)
        point = space_triton.Point.of(schedule)
        return space_triton.mutate(self.nest, point, rng, self.batch).schedule(self.nest)

    def _prints(self, schedule: Schedule) -> bool:
        try:
            source(apply(self.nest, schedule), schedule, self.target)
        except ScheduleError:
            return False
        return True


def _spread(points: Sequence[Tiled], most: int) -> Sequence[Tiled]:
    """At most so many of them, evenly spread."""
    return points[:: -(-len(points) // most)] if points else points


def has_cuda() -> bool:
    """Whether kernels in CUDA C++ are worth trying: there is a compiler, and the GPU has the instructions."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABLE
    return torch.version.hip is None and not old and is_available()


def shared_bytes() -> int:
    """Bytes of shared memory that a program can have on the current GPU, or on an H100 without one."""
    if not torch.cuda.is_available():
        return MOST_SHARED
    # Of a multiprocessor's, 1 KiB of each program is the system's.
    return torch.cuda.get_device_properties().shared_memory_per_multiprocessor - 1024


def _kind(schedule: Schedule) -> tuple[bool, ...]:
    """Schedules of one kind have one model."""
    return is_product(schedule), bool(schedule.skew) and not is_cuda(schedule), is_cuda(schedule)


def _diverse(family: list[tuple[float, Schedule]]) -> list[tuple[float, Schedule]]:
    """The schedules of a family, of each register tile only the best order and stage levels."""
    tiles: dict[tuple[Digit, ...], tuple[float, Schedule]] = {}
    for pair in family:
        tiles.setdefault(tuple(d for d in pair[1].digits if d.bind not in (*GRID_BINDS, "serial")), pair)
    return list(tiles.values())
