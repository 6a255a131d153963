"""One row of a benchmark, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from g3dswap.bench.measure import Check
from g3dswap.choice import problem_from_json, problem_to_json
from g3dswap.problem import LAYOUTS, Problem
from g3dswap.rounds import Times


@dataclass(frozen=True)
class Row:
    """One pass of one layer in one layout."""

    model: str
    layer: str
    count: int
    kind: str
    batch: int
    problem: Problem
    source: str
    reason: str
    schedule: dict[str, Any] | None
    ours: Times
    torch: dict[str, Times]  # by layout
    check: Check
    roofline: float  # seconds
    compiled: dict[str, Times] = field(default_factory=dict)  # PyTorch's by torch.compile, by layout

    @property
    def key(self) -> tuple[str, str, int, Problem]:
        """What a file holds one row of."""
        return self.model, self.layer, self.batch, self.problem

    @property
    def name(self) -> str:
        """The model's name and the layer's."""
        return f"{self.model} {self.layer}"

    @property
    def kept(self) -> bool:
        """The choice is PyTorch's own kernel: `ours` is its time."""
        return self.schedule is None

    @property
    def same(self) -> float:
        """Speed-up over PyTorch in the same layout: 1 where its own kernel is the choice."""
        return 1.0 if self.kept else self.torch[self.problem.layout].seconds / self.ours.seconds

    @property
    def same_eager(self) -> float | None:
        """The same, launched from Python; None where that was not timed."""
        if self.kept:
            return None if self.ours.eager_seconds is None else 1.0
        return _ratio(self.torch[self.problem.layout].eager_seconds, self.ours.eager_seconds)

    @property
    def over_compiled(self) -> float | None:
        """Speed-up over the better layout of PyTorch under torch.compile."""
        return _ratio(min((it.seconds for it in self.compiled.values()), default=None), self.ours.seconds)

    @property
    def better(self) -> float:
        """Speed-up over PyTorch in the better of its layouts."""
        return self.torch_best / self.ours.seconds

    @property
    def contiguous(self) -> float:
        """Speed-up over PyTorch's NCDHW kernel."""
        return self.torch["contiguous"].seconds / self.ours.seconds

    @property
    def torch_best(self) -> float:
        """PyTorch's time in the better of its layouts, in seconds."""
        return min(times.seconds for times in self.torch.values())

    @property
    def gflops(self) -> float:
        """Of the direct algorithm."""
        return self.problem.flops(self.batch) / self.ours.seconds / 1e9

    @property
    def fraction(self) -> float:
        """Of the roofline's speed."""
        return self.roofline / self.ours.seconds

    @property
    def torch_fraction(self) -> float:
        """Of the roofline's speed, PyTorch in the better of its layouts."""
        return self.roofline / self.torch_best

    def by(self, statistic: str) -> Row:
        """The same with its times by another statistic."""
        torch = {layout: times.by(statistic) for layout, times in self.torch.items()}
        compiled = {layout: times.by(statistic) for layout, times in self.compiled.items()}
        return replace(self, ours=self.ours.by(statistic), torch=torch, compiled=compiled)

    @property
    def notes(self) -> list[str]:
        """What could not be timed in a CUDA graph, and why; the launches from Python count then."""
        times = {"ours": self.ours, **{f"PyTorch in {layout}": it for layout, it in self.torch.items()}}
        times |= {f"torch.compile in {layout}": it for layout, it in self.compiled.items()}
        return [f"{name}: {it.note}" for name, it in times.items() if it.note]

    def to_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        check = {k: v if math.isfinite(v) else None for k, v in asdict(self.check).items()}
        return {
            **vars(self),
            "problem": problem_to_json(self.problem),
            "ours": asdict(self.ours),
            "torch": {layout: asdict(times) for layout, times in self.torch.items()},
            "compiled": {layout: asdict(times) for layout, times in self.compiled.items()},
            "check": check,
            "flops": self.problem.flops(self.batch),
            "bytes": self.problem.bytes(self.batch),
            "gflops": self.gflops,
            "roofline_fraction": self.fraction,
            "speedup": {
                "same": self.same,
                "same_eager": self.same_eager,
                "better": self.better,
                "contiguous": self.contiguous,
                "compiled": self.over_compiled,
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The inverse; KeyError, TypeError, ValueError or AttributeError for anything else."""
        fields = {name: data[name] for name in cls.__dataclass_fields__ if name != "compiled"}
        # Files of earlier versions have neither of these.
        compiled, problem = data.get("compiled", {}), {"transposed": False, **data["problem"]}
        check: dict[str, Any] = {k: math.inf if v is None else v for k, v in data["check"].items()}
        fields |= {
            "problem": problem_from_json(problem),
            "ours": Times(**data["ours"]),
            "torch": {layout: Times(**times) for layout, times in data["torch"].items()},
            "compiled": {layout: Times(**times) for layout, times in compiled.items()},
            "check": Check(**check),
        }
        row = cls(**fields)
        if set(row.torch) != set(LAYOUTS):
            raise ValueError(f"PyTorch's times are of the layouts {', '.join(row.torch)}")
        for times in (row.ours, *row.torch.values(), *row.compiled.values()):
            if not min(times.seconds, times.low, times.median, times.high, row.roofline) > 0:
                raise ValueError(f"{row.name} has times that are no times")
        return row


def _ratio(slow: float | None, fast: float | None) -> float | None:
    return slow / fast if slow is not None and fast is not None else None
