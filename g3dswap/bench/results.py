"""What a benchmark found: its rows, their means, and the file that keeps them."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from g3dswap.bench.device import HEADER
from g3dswap.bench.measure import Ceilings
from g3dswap.bench.rows import Row
from g3dswap.bench.summary import best, summarize
from g3dswap.errors import ArgumentError
from g3dswap.problem import LAYOUTS
from g3dswap.tc.entries import atomic_write_text, strict_json

SCHEMA = 1


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
            "best": [asdict(item) for item in best(self.rows)],
            "rows": [row.to_json() for row in self.rows],
        }

    def by(self, statistic: str) -> Results:
        """The same with the times, and all that follows from them, by another statistic."""
        rows = [row.by(statistic) for row in self.rows]
        return Results({**self.header, "statistic": statistic}, self.ceilings, rows)

    def of(self, layout: str, direction: str) -> list[Row]:
        """The rows of a layout and pass."""
        at = layout, direction
        return [row for row in self.rows if (row.problem.layout, row.problem.direction) == at]

    def wrong(self) -> list[Row]:
        """The rows whose kernel failed its check."""
        return [row for row in self.rows if not row.check.correct]

    def save(self, path: Path) -> None:
        """Replace a file, wholly or not at all."""
        write(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def save_csv(self, path: Path) -> None:
        """One line a row, without what is the same for all."""
        text = io.StringIO()
        lines = [_flat(row) for row in self.rows]
        writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        write(path, text.getvalue())

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
            header["settings"].setdefault("compile", False)  # which earlier versions could not do
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
            f"{name}_eager_ms": None if times.eager_seconds is None else times.eager_seconds * 1e3,
        }
    for layout in LAYOUTS:
        compiled = row.compiled.get(layout)
        data[f"compiled_{layout}_ms"] = compiled and compiled.seconds * 1e3
    data |= {"speedup_same": row.same, "speedup_better": row.better, "speedup_contiguous": row.contiguous}
    data |= {"speedup_same_eager": row.same_eager, "speedup_compiled": row.over_compiled}
    data |= {"gflops": row.gflops, "roofline_ms": row.roofline * 1e3, "roofline_fraction": row.fraction}
    return {**data, **asdict(row.check)}


def write(path: Path, text: str) -> None:
    """Replace a file, wholly or not at all; ArgumentError where that cannot be."""
    try:
        atomic_write_text(path, text)
    except OSError as error:
        raise ArgumentError(
            f"{path} cannot be written ({error.strerror or error}); choose another file or make room."
        ) from None
