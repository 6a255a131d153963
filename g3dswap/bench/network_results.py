"""What a benchmark of whole networks found: the file that keeps it, and its table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from g3dswap.bench import text
from g3dswap.bench.results import write
from g3dswap.bench.steps import WARM_UP, Compared, Conversion, Side
from g3dswap.errors import ArgumentError
from g3dswap.markdown import Columns, table
from g3dswap.rounds import Times
from g3dswap.tc.entries import strict_json

SCHEMA = 1
KIND = "networks"
"""What such a file says that it is of."""


@dataclass(frozen=True)
class NetworkRow:
    """One network in one dtype; `skipped` says why there is nothing to compare."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    compared: Compared | None
    skipped: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What a file holds one row of."""
        return self.name, self.dtype

    def to_json(self) -> dict[str, Any]:
        """Everything, with what follows from it; numbers that are none are None."""
        data: dict[str, Any] = {**asdict(self), "shape": list(self.shape)}
        if self.compared:
            for side in ("before", "after"):
                losses = data["compared"][side]["losses"]
                data["compared"][side]["losses"] = [x if math.isfinite(x) else None for x in losses]
            difference = self.compared.difference
            data["speedup"] = {
                "train": self.compared.train_speedup,
                "inference": self.compared.inference_speedup,
            }
            data["loss_difference"] = difference if math.isfinite(difference) else None
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NetworkRow:
        """The inverse; KeyError, TypeError or ValueError for anything else."""
        compared = data["compared"]
        if compared is not None:
            compared = Compared(
                _side(compared["before"]),
                _side(compared["after"]),
                Conversion(**compared["conversion"]),
                compared["parameters"],
            )
        elif not data["skipped"]:
            raise ValueError(f"{data['name']} has neither times nor a reason")
        return cls(data["name"], tuple(data["shape"]), data["dtype"], compared, data["skipped"])


def _side(data: Mapping[str, Any]) -> Side:
    train, inference = Times(**data["train"]), Times(**data["inference"])
    if not min(train.seconds, inference.seconds) > 0:
        raise ValueError("there are times that are no times")
    losses = [math.nan if x is None else float(x) for x in data["losses"]]
    return Side(train, inference, losses, data["memory"])


@dataclass
class NetworkResults:
    """A benchmark of networks as far as it has come."""

    header: dict[str, Any]
    rows: list[NetworkRow] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Replace a file, wholly or not at all."""
        rows = [row.to_json() for row in self.rows]
        data = {"schema": SCHEMA, "kind": KIND, "header": self.header, "networks": rows}
        write(path, json.dumps(data, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> NetworkResults:
        """Read what `save` wrote; ArgumentError for anything else."""
        try:
            data: Any = strict_json(path.read_text(encoding="utf-8"))
            if (data["schema"], data["kind"]) != (SCHEMA, KIND):
                raise ValueError(f"it is of {data['kind']!r} in schema {data['schema']!r}")
            header, rows = data["header"], [NetworkRow.from_json(row) for row in data["networks"]]
            return cls({**header, "settings": dict(header["settings"])}, rows)
        except OSError as error:
            raise ArgumentError(
                f"{path} cannot be read ({error.strerror or error}); give a file that bench wrote."
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(
                f"{path} is no result of g3dswap bench --networks ({type(error).__name__}: {error}); "
                "measure again."
            ) from None


def of_networks(path: Path) -> bool:
    """Whether a file says that it is of networks; any other is for `Results.load` to judge."""
    try:
        data: Any = strict_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("kind") == KIND


def section(results: NetworkResults) -> str:
    """Markdown: what it holds for, a line for each network and dtype, and what was left out."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: NetworkResults) -> Iterator[str]:
    header, settings = results.header, results.header["settings"]
    yield f"## Whole networks, {header['device']['device_name']}"
    yield ""
    gpu = [text.gpu(header["gpu"])] if "gpu" in header else []
    versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
    steps = f"{settings['steps']} steps, tune {settings['tune']}, {settings['scale']} scale, {header['date']}"
    yield from (f"{line}  " for line in (*gpu, steps, versions))
    yield ""
    yield (
        "Milliseconds of a training step (forward, loss, backward, SGD) and of a forward pass in eval mode "
        f"without gradients, eager, before and after g3dswap.convert: medians of alternating rounds, the "
        f"first {WARM_UP} steps left out; +- is the interquartile range. Losses: the largest relative "
        "difference over the steps, from equal weights, batches and seeds. bfloat16: autocast."
    )
    found = [(row, row.compared) for row in results.rows if row.compared]
    if found:
        yield ""
        yield from table(_columns(found))
    for row in results.rows:
        if not row.compared:
            yield from ("", f"{row.name}, {row.dtype}: {row.skipped}")


def _columns(found: list[tuple[NetworkRow, Compared]]) -> Columns:
    rows, compared = [row for row, _ in found], [it for _, it in found]
    done = [it.conversion for it in compared]
    return {
        "network": [f"{row.name} ({'x'.join(map(str, row.shape))})" for row in rows],
        "dtype": [row.dtype for row in rows],
        "step before": [_time(it.before.train) for it in compared],
        "after": [_time(it.after.train) for it in compared],
        "speed-up": [text.times(it.train_speedup) for it in compared],
        "inference before": [_time(it.before.inference) for it in compared],
        "inference after": [_time(it.after.inference) for it in compared],
        "inference speed-up": [text.times(it.inference_speedup) for it in compared],
        "GiB before": [_gib(it.before.memory) for it in compared],
        "GiB after": [_gib(it.after.memory) for it in compared],
        "losses": [f"{it.difference:.1e}" for it in compared],
        "swapped / kept / skipped": [f"{it.swapped} / {it.kept} / {it.skipped}" for it in done],
        "kernels of passes": [", ".join(f"{n} {name}" for name, n in it.sources.items()) for it in done],
        "converted in": [f"{it.seconds:.1f} s" for it in done],
    }


def _time(times: Times) -> str:
    return f"{text.ms(times.seconds)} +-{times.spread:.0%}"


def _gib(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 2**30:.2f}"
