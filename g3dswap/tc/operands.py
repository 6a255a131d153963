"""Operands of matrix products that are read as words, where a side runs along blocks of elements."""

from __future__ import annotations

from .place_nd import Spot, fixed
from .triton_text import WORDS, Expressions, sides_of
from .words import Word, word


class Operands:
    """How the operands "a" (rows, depth) and "b" (depth, cols) of one nest are read."""

    def __init__(self, write: Expressions, dtype: str) -> None:
        self.write = write
        self.text = write.text
        self.dtype = dtype
        self.lengths = write.nest.lengths

    def variables(self, role: str) -> frozenset[str]:
        """The variables of an operand's two sides; one of words has none for the elements of a block."""
        sides = [self.write.sides[side] for side in sides_of(role)]
        return frozenset(v for own in sides for v in (own[:1] if role.endswith(WORDS) else own))

    def words(self, spot: Spot, role: str) -> Word | None:
        """The words of an operand, if each of its blocks is one."""
        side = self.write.blocked(role)
        if side is None:
            return None
        block = self.write.sides[side][1]
        steps = [fixed(spot, {block: step}) for step in range(self.write.vectors[block].count or 1)]
        if any(block in self.write.reach(form) for step in steps for form in step.forms):
            return None
        found = [word(step, self.dtype) for step in steps]
        if found[0] is None or any(f != (found[0][0], place) for place, f in enumerate(found)):
            return None
        return found[0][0]

    def unpacked(self, wide: Word, name: str, role: str) -> str:
        """The text of an operand, of the words that it was read as."""
        parts = [self.text.define("e", wide.part(name, place)) for place in range(wide.width)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [f"tl.join({a}, {b})" for a, b in zip(parts[:half], parts[half:])]
        joined = parts[0]
        first, second = sides_of(role)
        if self.write.blocked(role) == first:  # else the elements of a word are where they belong, behind it
            elements = range(2, 2 + wide.width.bit_length() - 1)
            joined = f"tl.permute({joined}, ({', '.join(map(str, (1, *elements, 0)))}))"
        # Numbers from here on: Triton would look for an operand behind a reshape in shared memory.
        whole = f"tl.reshape({joined}, ({self.lengths[first]}, {self.lengths[second]}))"
        return f"{whole}.to(tl.{wide.dtype}, bitcast=True)"
