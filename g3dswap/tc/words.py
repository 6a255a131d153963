"""Wide loads and stores: neighbouring elements that one lane reads or writes as one machine word.

Where the lanes of a tile step by 2 or 4 along consecutive elements (a block of columns to each lane), a
load of one word brings what took as many instructions as it has elements, and shifted reads share it.
A word must lie where a word may lie, and must be inside its tensor as a whole or not at all: extents,
strides and steps are multiples of its width.  Operands are then aligned to `ALIGNMENT` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .linear import Linear
from .place import Guard
from .place_nd import Spot

ALIGNMENT = 16
WORD_BYTES = 8
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
WARP = 32
"""Threads of a GPU that run together."""
SECTOR = 32
"""Bytes that come from a GPU's memory, and go there, together."""
REGISTERS, MOST_REGISTERS = 1 << 16, 255
"""Registers of 32 bits of a multiprocessor and of a thread, on NVIDIA's GPUs of the last ten years."""


@dataclass(frozen=True)
class Word:
    """`width` elements from `spot` on, whose address counts words."""

    spot: Spot
    width: int
    dtype: str

    @property
    def type(self) -> str:
        """The integer type of a word."""
        return f"int{8 * self.width * ITEM_BYTES[self.dtype]}"

    @property
    def base(self) -> tuple[str, str]:
        """A name for the tensor as words, and what it stands for."""
        tensor = self.spot.tensor
        return f"{tensor}_by{self.width}", f"{tensor}.to(tl.pointer_type(tl.{self.type}))"

    @property
    def bits(self) -> int:
        """How many bits an element has."""
        return 8 * ITEM_BYTES[self.dtype]

    def part(self, name: str, position: int) -> str:
        """The text of an element's bits, as an integer, of a word with that name."""
        if self.dtype != "float32":
            name, position = self._half(name, position)
        return f"{f'({name} >> {self.bits})' if position else name}.to(tl.int{self.bits})"

    def _half(self, name: str, position: int) -> tuple[str, int]:
        """The 32 bits of a word of half types that an element is in, and its place there."""
        if self.width != 2:
            name = f"({name} >> 32).to(tl.int32)" if position >= 2 else f"{name}.to(tl.int32)"
        return name, position % 2

    def element(self, name: str, position: int) -> str:
        """The text of an element, in the type that is computed in, of a word with that name."""
        if self.dtype == "float32":
            return f"{self.part(name, position)}.to(tl.float32, bitcast=True)"
        if self.dtype == "bfloat16":  # the upper half of a float32
            name, position = self._half(name, position)
            half = f"({name} & -65536)" if position else f"({name} << 16)"
            return f"{half}.to(tl.float32, bitcast=True)"
        return f"{self.part(name, position)}.to(tl.float16, bitcast=True).to(tl.float32)"

    def text(self, values: list[str]) -> str:
        """The text of a word of computed values."""
        bits = self.bits
        parts = [f"{v}.to(tl.{self.dtype}).to(tl.uint{bits}, bitcast=True)" for v in values]
        while len(parts) > 1:
            bits *= 2
            wide = [f"{p}.to(tl.uint{bits})" for p in parts]
            parts = [f"({a} | ({b} << {bits // 2}))" for a, b in zip(wide[::2], wide[1::2])]
        return f"{parts[0]}.to(tl.{self.type}, bitcast=True)"


def word(spot: Spot, dtype: str) -> tuple[Word, int] | None:
    """The widest word that holds the element at a spot, and the element's place in it."""
    if spot.run is None or spot.exact:
        return None
    value, extent = spot.run.value, spot.run.extent
    width = WORD_BYTES // ITEM_BYTES[dtype]
    while width > 1:
        steps = [extent, value.const - spot.address.const]
        steps += [c for form in (value, spot.address) for _, c in form.terms]
        if not any(step % width for step in steps):
            place = spot.address.const % width
            terms = tuple((s, c // width) for s, c in spot.address.terms)
            whole = Linear(spot.address.const // width, terms)
            spot = replace(spot, address=whole, guards=_whole(spot, width), run=None)
            return Word(spot, width, dtype), place
        width //= 2
    return None


def _whole(spot: Spot, width: int) -> tuple[Guard, ...]:
    """The guards of a spot, that of its run written for the word: equal words then have equal guards."""
    assert spot.run is not None
    value = spot.run.value
    first = Guard(Linear(value.const // width * width, value.terms), spot.run.extent)
    return tuple(first if guard == spot.run else guard for guard in spot.guards)
