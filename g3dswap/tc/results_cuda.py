"""Results of a program that are collected in shared memory as they lie in their tensor.

What the threads of a warp have is rarely what lies together in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from .box import WIDEST, box_of, without_conflicts
from .copies_cuda import write_out
from .cuda_text import MEET, REGISTER, CudaText
from .linear import Linear
from .place import Env
from .values_cuda import conflicts, moves_of
from .words import ITEM_BYTES


class Results:
    """size: bytes of a result.  bytes: of all of them."""

    def __init__(self, text: CudaText, points: Sequence[Env], lanes: Sequence[Env]) -> None:
        """points: one for each of a thread's results; lanes: what some threads have of the lanes' loops."""
        self.text, self.access = text, text.nest.output
        self.size = ITEM_BYTES[text.nest.tensor(self.access.tensor).dtype]
        moves = moves_of(text, self.access, points[0], lanes)
        box = box_of(text, self.access, points, text.outside)
        self.box = without_conflicts(box, box.width, partial(conflicts, moves, self.size, 1))
        self.bytes = self.box.size * self.size

    def address(self, point: Env) -> Linear:
        """Where a result lies among them."""
        return self.box.address(self.text.spotter.indices(self.access, point) or [])

    def begin(self, place: int) -> None:
        """Say where they are collected, when what is there in shared memory has been used."""
        kind = "u16" if self.size == 2 else "float"
        self.text.emit(MEET, f"{kind}* const results = reinterpret_cast<{kind}*>(memory + {place});")

    def write(self, threads: int) -> None:
        """Write all of them to memory, when all have been kept."""
        self.text.emit(MEET)
        write_out(self.text, self.box, "results", threads)


def put(text: CudaText, how: str, there: str, values: Sequence[str], size: int, test: str = "") -> None:
    """Put results of so many bytes there as one word; how: by `write` to memory, `keep` to shared memory."""
    if len(values) * size < REGISTER:
        text.emit_if(test, f"narrow({there}, {values[0]});")
        return
    with text.block(f"if ({test})" if test else ""):
        text.emit(f"const float some[] = {{{', '.join(values)}}};")
        text.emit(
            f"u32 word[{len(values) * size // REGISTER}];", "pack(word, some);", f"{how}({there}, word);"
        )


def in_words(addresses: Sequence[Linear], size: int, tests: Sequence[str] | None = None) -> list[list[int]]:
    """Which elements, by number, make each word, of elements of so many bytes at these addresses.

    tests: what elements of a word have in common.
    """
    order = sorted(range(len(addresses)), key=lambda number: addresses[number].const)
    steps = [factor for _, factor in addresses[0].terms]
    found: list[list[int]] = []
    while order:
        begin, width = addresses[order[0]], math.gcd(WIDEST // size, addresses[order[0]].const, *steps)
        while True:
            word = order[:width]
            together = [addresses[number] for number in word] == [begin + i for i in range(width)]
            if together and (tests is None or len({tests[number] for number in word}) == 1):
                break
            width //= 2
        found.append(word)
        order = order[width:]
    return found
