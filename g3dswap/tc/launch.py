"""What a runtime makes of a compiled kernel: something that launches it, from Python or from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Entry:
    """Where a compiled kernel begins, for those who launch it without Python.

    address:  of a C++ function, or the driver's handle of a GPU's.
    programs: how many there are; with blocks, for each block of the run-time extent.
    block:    steps of such a block, at most (``Blocks.most``); 0: there are none.
    threads:  of a program; 0 for a C++ function.
    shared:   bytes of memory that the threads of a program share.
    early:    whether it may be launched before the kernel before it has ended.
    """

    address: int
    programs: int = 1
    block: int = 0
    threads: int = 0
    shared: int = 0
    early: bool = False


class Launch(Protocol):
    """A compiled kernel."""

    def __call__(self, operands: Sequence[torch.Tensor], out: torch.Tensor, batch: int) -> None:
        """Compute ``out``, which lies in memory as the nest says, like the operands."""

    def entry(self) -> Entry | None:
        """Where it begins, on the current device; None where only Python can launch it."""
