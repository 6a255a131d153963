"""What the comparison of a network with its conversion found, and what follows from it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from g3dswap.bench.grouped import GroupedPass, Part
from g3dswap.report import Report
from g3dswap.rounds import Times

TRAINING, INFERENCE = KINDS = "training", "inference"
"""Of steps: forward, loss, backward and optimizer; and a forward pass without gradients."""


@dataclass(frozen=True)
class Side:
    """One of the two models. `memory` is the most bytes of a step with its weights; None on a CPU.

    train, inference: launched from Python, by the wall clock; the others the same in CUDA graphs, None
    where there are none.
    """

    train: Times
    inference: Times
    losses: list[float]
    memory: int | None
    train_graph: Times | None = None
    inference_graph: Times | None = None

    def times(self, kind: str, graphs: bool = False) -> Times | None:
        """Of one of KINDS."""
        if graphs:
            return self.train_graph if kind == TRAINING else self.inference_graph
        return self.train if kind == TRAINING else self.inference


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: layers by what became of them, and where the passes' kernels come from."""

    seconds: float
    swapped: int
    kept: int
    skipped: int
    sources: dict[str, int]

    @classmethod
    def of(cls, found: Report, seconds: float) -> Conversion:
        """Of a report."""
        passes = [it for layer in found.swapped for call in layer.calls for it in call.passes]
        sources = dict(sorted(Counter(it.source for it in passes).items()))
        return cls(seconds, len(found.swapped), len(found.kept), len(found.skipped), sources)


@dataclass(frozen=True)
class Compared:
    """Both models of one network in one dtype.

    passes: of the grouped layers, each distinct one. notes: what could not be measured, and why.
    """

    before: Side
    after: Side
    conversion: Conversion
    parameters: int
    passes: list[GroupedPass] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def speedup(self, kind: str, graphs: bool = False) -> float | None:
        """Of a step; None where it was not timed."""
        before, after = self.before.times(kind, graphs), self.after.times(kind, graphs)
        return before.seconds / after.seconds if before and after else None

    def part(self, kind: str) -> Part | None:
        """What the grouped layers take of a step; None where they were not timed."""
        if not self.passes:
            return None
        return Part.of(it for it in self.passes if kind == TRAINING or it.problem.layer_pass == "forward")

    def at_roofline(self, kind: str, graphs: bool = False) -> float | None:
        """Seconds of the step before, if its grouped layers ran at the roofline; may be below zero."""
        part, before = self.part(kind), self.before.times(kind, graphs)
        return before.seconds - part.allowed if part and before else None

    def share(self, kind: str, graphs: bool = False) -> float | None:
        """What the conversion saves of a step over what it could save at most."""
        part = self.part(kind)
        before, after = self.before.times(kind, graphs), self.after.times(kind, graphs)
        if part is None or before is None or after is None or part.allowed <= 0:
            return None
        return (before.seconds - after.seconds) / part.allowed

    @property
    def difference(self) -> float:
        """The largest relative difference of the losses; infinite where one is not finite."""
        pairs = zip(self.before.losses, self.after.losses, strict=True)
        return max(
            abs(a - b) / abs(a) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs
        )
