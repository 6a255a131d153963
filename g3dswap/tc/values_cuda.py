"""What threads read of a factor in shared memory: where its elements lie, and in which words they come."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import partial

from ..errors import ScheduleError
from .arrivals_cuda import Arrival
from .box import Box, aligned, box_of, without_conflicts
from .cuda_text import REGISTER, CudaText
from .fragments_cuda import asked_again
from .linear import Linear
from .nest import Access
from .place import Env

COPIED = 6
"""Issue slots of a copy to shared memory, about, of which a load from there takes one."""

Moves = list[list[int]]


def moves_of(text: CudaText, access: Access, point: Env, lanes: Sequence[Env]) -> Moves:
    """How far the indices of an access move from the first thread to others, at these steps of lanes."""
    values = text.spotter.indices(access, point) or []
    parts = [text.part(value, *lanes[0]) for value in values]
    return [[text.spotter.evaluate(part, step) for part in parts] for step in lanes]


def conflicts(moves: Moves, size: int, width: int, box: Box) -> int:
    """How often a bank is asked again where each thread has a word of so many elements of so many bytes."""
    lines = [sum(x * dim.pitch for x, dim in zip(move, box.dims)) * size // REGISTER for move in moves]
    return asked_again(lines, range(max(1, width * size // REGISTER)))


class Values:
    """box: what is copied."""

    def __init__(
        self,
        text: CudaText,
        access: Access,
        points: Sequence[Env],
        lanes: Sequence[Env],
        runs: int,
        threads: int,
    ) -> None:
        """points: of the unrolled loops, where elements are read, so many times; lanes: of some threads."""
        self.text, self.access = text, access
        self.start = 0
        whole, moves = box_of(text, access, points, text.outside), moves_of(text, access, points[0], lanes)
        indices = [text.spotter.indices(access, point) or [] for point in points]
        if any([i.terms for i in each] != [i.terms for i in indices[0]] for each in indices):
            raise ScheduleError(f"{access} is read at places that move apart.")
        steps = [tuple(i.const - first.const for i, first in zip(each, indices[0])) for each in indices]
        best = math.inf
        # Lines may lie at multiples of any unit: the larger it is, the wider are words, and the box.
        for box, unit in itertools.product(aligned(whole), (1, text.pair, text.chunk)):
            if unit < box.width:
                continue
            made = without_conflicts(box, unit, partial(conflicts, moves, text.item, unit))
            first = made.address(indices[0])
            width = math.gcd(text.chunk, *(factor for _, factor in first.terms))
            places = {
                step: first.const + sum(x * dim.pitch for x, dim in zip(step, made.dims)) for step in {*steps}
            }
            words = _words(places.values(), width)
            again = conflicts(moves, text.item, width, made) / len(moves)
            copies = math.prod(dim.span for dim in made.dims) / made.width / threads
            cost = copies * COPIED + len({*words.values()}) * runs * (1 + again)
            if cost < best:
                best, self.box, self.begins = cost, made, Linear(0, first.terms)
                self.places = {_key(point): places[step] for point, step in zip(points, steps)}
                self.words = words
        self.loaded: set[int] = set()

    def fetch(self, start: int, threads: int) -> None:
        """Begin to copy the box to where it is to lie in shared memory."""
        self.start = start
        Arrival(self.text, self.box).fetch(f"memory + {start}", threads, "thread")

    def begin(self) -> None:
        """Say where a thread's elements begin; what was loaded before is of another step."""
        text, name = self.text, self.access.tensor
        self.loaded.clear()
        begin = f"reinterpret_cast<const {text.kind}*>(memory + {self.start})"
        text.emit(f"const {text.kind}* const from_{name} = {begin} + ({text.form(self.begins)});")

    def place(self, point: Env) -> int:
        """How far a point's element lies from the first."""
        return self.places[_key(point)]

    def load(self, point: Env) -> str:
        """A point's element; its word is loaded where none of it has been."""
        at, name = self.place(point), self.access.tensor
        first, width = self.words[at]
        word = f"{name}_{first}"
        if first not in self.loaded:
            self.loaded.add(first)
            self.text.emit(f"float {word}[{width}];", f"load({word}, from_{name} + {first});")
        return f"{word}[{at - first}]"


def _key(point: Env) -> tuple[int, ...]:
    return tuple(point.values())


def _words(places: Iterable[int], most: int) -> dict[int, tuple[int, int]]:
    """The aligned word in which each of these elements is read: its first element, and how many it has."""
    blocks: dict[int, set[int]] = {}
    for place in places:
        blocks.setdefault(place // most, set()).add(place)
    found: dict[int, tuple[int, int]] = {}
    for wanted in blocks.values():
        width = most
        while width > 1 and min(wanted) // (width // 2) == max(wanted) // (width // 2):
            width //= 2
        found.update((place, (place // width * width, width)) for place in wanted)
    return found
