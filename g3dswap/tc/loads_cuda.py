"""Loads of the fragments of both factors of a product whose depth is positions.

Where a line in shared memory is a position, and its rows or columns lie side by side, fragments have to be
turned around.  `ldmatrix` does that with halves; of floats, which are whole words, each lane loads its own.
(Where a line is a row or a column: `lines_cuda`.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from .cuda_text import MEET
from .fragments_cuda import At, DepthFragments, TurnedFragments
from .program_cuda import Program

LINES = "first", "second"
"""Of the lines of a piece, those two that a lane reads words of."""

Factor = TypeVar("Factor", bound=DepthFragments)


class DepthLoads(Generic[Factor]):
    """image, other: the left operand and the right one, which begin at these places.

    A piece of the depth is as deep as one product.  What is beyond the end is multiplied by zero.
    product: the function that multiplies fragments.
    """

    product = "multiply"

    def __init__(self, program: Program, image: Factor, other: Factor, starts: Sequence[str]) -> None:
        self.program, self.image, self.other, self.starts = program, image, other, starts
        self.deep, self.length = program.deep, program.nest.lengths["depth"]
        self.is_cut = self.length % self.deep != 0

    def begin(self) -> None:
        """Say where what a lane reads of a piece begins."""
        raise NotImplementedError

    def load_image(self, row: int, at: At) -> None:
        """Load a row of fragments of the image into `a`."""
        raise NotImplementedError

    def load_other(self, number: int, at: At) -> None:
        """Load all columns of the other factor into `b[number]`."""
        raise NotImplementedError

    def within(self, place: str, many: int = 1) -> str:
        """The same place of so many, or the last one of the depth."""
        return f"min({place}, {self.length - many})" if self.is_cut else place


class TurnedLoads(DepthLoads[TurnedFragments]):
    """By `ldmatrix`, which takes the lines of a left operand and those of a right one in different orders."""

    def __init__(
        self, program: Program, image: TurnedFragments, other: TurnedFragments, starts: Sequence[str]
    ) -> None:
        super().__init__(program, image, other, starts)
        self.nothing = program.take(16)
        program.emit(f"if (thread < 4) reinterpret_cast<u32*>(memory + {self.nothing})[thread] = 0;")
        if program.settings.teams > 1:  # which wait for none but their own threads from now on
            program.emit(MEET)

    def begin(self) -> None:
        emit, rows = self.program.emit, len(self.image.chunks) // 2
        emit(f"const int left = {self.within(f'piece * {self.deep} + lane % 8 + lane / 16 * 8')};")
        emit(f"const int right = piece * {self.deep} + lane % 16;")
        if self.is_cut:
            emit(f"const bool some = right < {self.length};")
        for row in range(rows):
            low, high = self.image.chunks[2 * row : 2 * row + 2]
            begins = f"{self.starts[0]} + {self.image.begins('left')}"
            emit(f"const u32 from{row} = {begins} + (lane & 8 ? {high} : {low});")
        emit(f"const u32 with = {self.starts[1]} + {self.other.begins('right')};")

    def load_image(self, row: int, at: At) -> None:
        self.program.emit(f"transposed(a, from{row} + {at[0]});")

    def load_other(self, number: int, at: At) -> None:
        """Two fragments at a time where there are two."""
        chunks = [chunk + at[0] for chunk in self.other.chunks]
        for col in range(0, len(chunks), 2):
            first, *second = chunks[col : col + 2]
            begin = f"with + {f'(lane / 16 ? {second[0]} : {first})' if second else first}"
            if self.is_cut:
                begin = f"some ? {begin} : address(memory) + {self.nothing}"
            to = ", ".join(f"b[{number}][{col + i}]" for i in range(1 + len(second)))
            self.program.emit(f"transposed({to}, {begin});")


class WordLoads(DepthLoads[TurnedFragments]):
    """Word by word, on two lines of a piece: a lane's elements of a fragment."""

    def begin(self) -> None:
        emit, program = self.program.emit, self.program
        for half, line in enumerate(LINES):
            place = f"piece * {self.deep} + lane % 4 + {half * program.chunk}"
            emit(f"const int {line}_line = {self.within(place)};")
            if self.is_cut:
                emit(f"const bool some_{line} = {place} < {self.length};")
            factors = zip((line, f"with_{line}"), (self.image, self.other), self.starts)
            for name, factor, start in factors:
                begin = f"{start} + {factor.begins(f'{line}_line')}"
                emit(f"const u32 {name} = {begin} + lane / 4 * {program.item};")

    def load_image(self, row: int, at: At) -> None:
        chunks = [chunk + at[0] for chunk in self.image.chunks[2 * row : 2 * row + 2]]
        self._load(
            "a",
            (f"{self.image.loads}word({line} + {chunk})" for line, chunk in itertools.product(LINES, chunks)),
        )

    def load_other(self, number: int, at: At) -> None:
        for col, chunk in enumerate(self.other.chunks):
            words = (
                self._some(line, f"{self.other.loads}word(with_{line} + {chunk + at[0]})") for line in LINES
            )
            self._load(f"b[{number}][{col}]", words)

    def _load(self, to: str, words: Iterable[str]) -> None:
        self.program.emit(*(f"{to}[{i}] = {word};" for i, word in enumerate(words)))

    def _some(self, line: str, word: str) -> str:
        return f"some_{line} ? {word} : 0" if self.is_cut else word
