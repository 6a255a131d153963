"""Sums on vector units of factors that lie in shared memory: each thread has a block of results.

A program copies what it reads of both factors, the image with the zeros around it, so that no thread tests
where it is.  A thread reads neighbouring elements as one word, and what several of its results need once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from ..errors import ScheduleError
from .cuda_text import WAIT
from .nest import Nest
from .place import Env
from .place_nd import Spot
from .program_cuda import Key, Program, Settings
from .results_cuda import Results, in_words, put
from .values_cuda import Values
from .words import ITEM_BYTES, SECTOR, WARP

SAMPLE = 64
"""Threads by which conflicts are counted."""
SCATTERED = 1.5
"""How many times as many sectors as it fills a warp may touch in a store."""


class LanesProgram(Program):
    """lanes: the loops of which each thread has a step.  members: how many threads have one."""

    def __init__(self, nest: Nest, settings: Settings) -> None:
        super().__init__(nest, settings)
        self.lanes = [i for i, p in enumerate(nest.loops) if p.bind == "lanes"]
        self.members = math.prod(nest.loops[i].count or 1 for i in self.lanes)
        self.runs = math.prod(nest.loops[i].count or 1 for i in self.serial)
        if self.members > self.threads:
            raise ScheduleError(f"{self.members} lanes are more than {self.threads} threads.")
        if any(nest.is_reduce(nest.loops[i].axis) for i in self.lanes):
            raise ScheduleError("lanes of a program with shared memory have results of their own.")
        stage = nest.stage_of(self.image.tensor)
        if self.walks or len(nest.stages) > 1 or stage is None or stage.level != len(self.grid):
            raise ScheduleError(f"lanes share {self.image.tensor}, which is staged once for all their sums.")
        if nest.fused or nest.partial_loops or any(access.ties for access in nest.accesses):
            raise ScheduleError(
                "lanes that share memory run along single axes of what is neither packed nor split."
            )

    def write(self) -> None:
        points, sums = self.terms(), self.stored()
        self.check_size(len(sums), len(points))
        some = [self.step(thread) for thread in range(min(SAMPLE, self.members))]
        accesses = self.image, self.other
        self.emit(WAIT)
        image, other = (Values(self, a, points, some, self.runs, self.threads) for a in accesses)
        for values in (image, other):
            values.fetch(self.take(values.box.size * self.item), self.threads)
        self.emit("committed();", "arrived<0>();")
        self.decode(self.lanes, "thread")
        self.emit(f"float sum[{len(sums)}] = {{}};")
        numbers = {key: number for number, key in enumerate(sums)}
        with self.members_only(), self.looped(self.serial):
            self.add([p for p in points if self.key(p) in numbers], numbers, image, other)
        self.store([*sums.values()], some)

    def members_only(self) -> AbstractContextManager[None]:
        """What only threads do that have a step of the lanes."""
        alone = self.members < self.threads
        return self.block(f"if (thread < {self.members})") if alone else nullcontext()

    def step(self, thread: int) -> Env:
        """The variables of a thread's lanes."""
        found = {}
        for i in reversed(self.lanes):
            count = self.nest.loops[i].count or 1
            found[f"v{i}"], thread = thread % count, thread // count
        return found

    def add(self, points: Sequence[Env], numbers: Mapping[Key, int], image: Values, other: Values) -> None:
        """Each element of the image, followed by all that uses it."""
        image.begin()
        other.begin()
        for point in sorted(points, key=image.place):
            total = f"sum[{numbers[self.key(point)]}]"
            self.emit(f"{total} = fmaf({image.load(point)}, {other.load(point)}, {total});")

    def store(self, points: Sequence[Env], some: Sequence[Env]) -> None:
        """Write all results, those of a thread that lie together as words.

        points: one for each sum.  Where a warp's words lie apart, results are collected in shared memory
        first.
        """
        found = (self.spotter.spot(self.nest.output, point) for point in points)
        spots = [spot for spot in found if spot is not None]  # of what is stored, all
        tests = [self.test(spot) for spot in spots]
        words = in_words([spot.address for spot in spots], ITEM_BYTES[self.result.dtype], tests)
        if self._touched(spots[words[0][0]], len(words[0]), some[:WARP]) <= SCATTERED:
            self.put("write", points, words, [self.where(spot) for spot in spots], tests)
            return
        results = Results(self, points, some)
        addresses = [results.address(point) for point in points]
        self.shared = max(self.shared, results.bytes)
        results.begin(0)  # where the factors were
        places = [f"results + ({self.form(address)})" for address in addresses]
        self.put("keep", points, in_words(addresses, results.size), places, [""] * len(points))
        results.write(self.threads)

    def put(
        self,
        how: str,
        points: Sequence[Env],
        words: Sequence[Sequence[int]],
        places: Sequence[str],
        tests: Sequence[str],
    ) -> None:
        """Put each thread's results, as these words of them, in their places."""
        size = ITEM_BYTES[self.result.dtype]
        with self.members_only():
            for word in words:
                values = [self.finished(f"sum[{number}]", points[number]) for number in word]
                put(self, how, places[word[0]], values, size, tests[word[0]])

    def _touched(self, spot: Spot, width: int, warp: Sequence[Env]) -> float:
        """How many times as many sectors a warp's store of a word of so many results touches as it fills."""
        size = ITEM_BYTES[self.result.dtype]
        lanes = self.part(spot.address, *warp[0])
        begins = [self.spotter.evaluate(lanes, step) * size for step in warp]
        sectors = {byte // SECTOR for begin in begins for byte in (begin, begin + width * size - 1)}
        return len(sectors) * SECTOR / (len(begins) * width * size)
