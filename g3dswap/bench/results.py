"""What a benchmark found: its rows, their means, and the file that keeps them."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from g3dswap.bench.measure import Ceilings, Check, Times
from g3dswap.choice import problem_from_json, problem_to_json
from g3dswap.errors import ArgumentError
from g3dswap.problem import DIRECTIONS, LAYOUTS, Problem
from g3dswap.tc.entries import atomic_write_text, strict_json

SCHEMA = 1
HEADER: dict[str, tuple[str, ...]] = {
    "device": ("device_name", "capability", "cores"),
    "versions": ("torch", "compiler", "g3dswap"),
    "settings": ("dtype", "batch", "tune", "seconds"),
}
"""What a header has at least; beside it `date` and `statistic`."""


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

    def by(self, statistic: str) -> Row:
        """The same with its times by another statistic."""
        torch = {layout: times.by(statistic) for layout, times in self.torch.items()}
        return replace(self, ours=self.ours.by(statistic), torch=torch)

    def to_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        check = {k: v if math.isfinite(v) else None for k, v in asdict(self.check).items()}
        return {
            **vars(self),
            "problem": problem_to_json(self.problem),
            "ours": asdict(self.ours),
            "torch": {layout: asdict(times) for layout, times in self.torch.items()},
            "check": check,
            "flops": self.problem.flops(self.batch),
            "bytes": self.problem.bytes(self.batch),
            "gflops": self.gflops,
            "roofline_fraction": self.fraction,
            "speedup": {"same": self.same, "better": self.better, "contiguous": self.contiguous},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The inverse; KeyError, TypeError, ValueError or AttributeError for anything else."""
        fields = {name: data[name] for name in cls.__dataclass_fields__}
        check: dict[str, Any] = {k: math.inf if v is None else v for k, v in data["check"].items()}
        fields |= {
            "problem": problem_from_json(data["problem"]),
            "ours": Times(**data["ours"]),
            "torch": {layout: Times(**times) for layout, times in data["torch"].items()},
            "check": Check(**check),
        }
        row = cls(**fields)
        if set(row.torch) != set(LAYOUTS):
            raise ValueError(f"PyTorch's times are of the layouts {', '.join(row.torch)}")
        for times in (row.ours, *row.torch.values()):
            if not min(times.seconds, times.low, times.median, times.high, row.roofline) > 0:
                raise ValueError(f"{row.name} has times that are no times")
        return row


@dataclass(frozen=True)
class Summary:
    """One layout and pass over all layers; means are geometric."""

    layout: str
    direction: str
    layers: int
    ours: int  # of the layers, how many run a kernel of ours
    same: float
    better: float
    contiguous: float
    slowest: float  # the least `same`
    slowest_layer: str
    fraction: float  # of the roofline's speed
    torch_fraction: float  # PyTorch's, in the better of its layouts


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """By layout and pass, those that have rows."""
    parts: dict[tuple[str, str], list[Row]] = {(l, d): [] for l in LAYOUTS for d in DIRECTIONS}
    for row in rows:
        parts[row.problem.layout, row.problem.direction].append(row)
    return [_summary(layout, direction, part) for (layout, direction), part in parts.items() if part]


def _summary(layout: str, direction: str, rows: list[Row]) -> Summary:
    mean = statistics.geometric_mean
    slowest = min(rows, key=lambda row: row.same)
    return Summary(
        layout,
        direction,
        layers=len(rows),
        ours=sum(not row.kept for row in rows),
        same=mean([row.same for row in rows]),
        better=mean([row.better for row in rows]),
        contiguous=mean([row.contiguous for row in rows]),
        slowest=slowest.same,
        slowest_layer=slowest.name,
        fraction=mean([row.fraction for row in rows]),
        torch_fraction=mean([row.roofline / row.torch_best for row in rows]),
    )


@dataclass
class Results:
    """A benchmark as far as it has come.

    header:    device, versions, settings and dates: what the figures hold for.
    ceilings:  the device's, measured at the start.
    """

    header: dict[str, Any]
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "schema": SCHEMA,
            "header": self.header,
            "ceilings": asdict(self.ceilings),
            "summary": [asdict(item) for item in summarize(self.rows)],
            "rows": [row.to_json() for row in self.rows],
        }

    def by(self, statistic: str) -> Results:
        """The same with the times, and all that follows from them, by another statistic."""
        rows = [row.by(statistic) for row in self.rows]
        return Results({**self.header, "statistic": statistic}, self.ceilings, rows)

    def wrong(self) -> list[Row]:
        """The rows whose kernel failed its check."""
        return [row for row in self.rows if not row.check.correct]

    def save(self, path: Path) -> None:
        """Replace a file, wholly or not at all."""
        _write(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def save_csv(self, path: Path) -> None:
        """One line a row, without what is the same for all."""
        text = io.StringIO()
        lines = [_flat(row) for row in self.rows]
        writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        _write(path, text.getvalue())

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote; ArgumentError for anything else."""
        try:
            data: Any = strict_json(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}, and this version reads {SCHEMA}")
            ceilings = Ceilings(float(data["ceilings"]["bandwidth"]), dict(data["ceilings"]["product"]))
            header = data["header"]
            for part, names in HEADER.items():
                header[part] = {**header[part], **{name: header[part][name] for name in names}}
            rows = [Row.from_json(row) for row in data["rows"]]
            return cls({**header, "date": str(header["date"])}, ceilings, rows).by(header["statistic"])
        except OSError as error:
            raise ArgumentError(
                f"{path} cannot be read ({error.strerror or error}); give a file that bench wrote."
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ArgumentError(
                f"{path} is no result of g3dswap bench ({type(error).__name__}: {error}); measure again."
            ) from None


def _flat(row: Row) -> dict[str, Any]:
    data = {"model": row.model, "layer": row.layer, "batch": row.batch}
    data |= {"direction": row.problem.direction, "layout": row.problem.layout}
    data |= {"geometry": str(row.problem.geometry), "source": row.source, "kept": row.kept}
    for name, times in (("ours", row.ours), *((f"torch_{layout}", row.torch[layout]) for layout in LAYOUTS)):
        data |= {
            f"{name}_ms": times.seconds * 1e3,
            f"{name}_spread": times.spread,
            f"{name}_runs": times.runs,
        }
    data |= {"speedup_same": row.same, "speedup_better": row.better, "speedup_contiguous": row.contiguous}
    data |= {"gflops": row.gflops, "roofline_ms": row.roofline * 1e3, "roofline_fraction": row.fraction}
    return {**data, **asdict(row.check)}


def _write(path: Path, text: str) -> None:
    try:
        atomic_write_text(path, text)
    except OSError as error:
        raise ArgumentError(
            f"{path} cannot be written ({error.strerror or error}); choose another file or make room."
        ) from None
