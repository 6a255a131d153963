"""What a benchmark of whole networks found, and the file that keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from g3dswap.bench.compared import KINDS, Compared, Conversion, Side
from g3dswap.bench.grouped import GroupedPass
from g3dswap.bench.measure import Ceilings
from g3dswap.bench.results import write
from g3dswap.errors import ArgumentError
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
        if found := self.compared:
            for side in ("before", "after"):
                losses = data["compared"][side]["losses"]
                data["compared"][side]["losses"] = [x if math.isfinite(x) else None for x in losses]
            data["compared"]["passes"] = [it.to_json() for it in found.passes]
            data["speedup"] = {kind: found.speedup(kind) for kind in KINDS}
            data["speedup_graph"] = {kind: found.speedup(kind, graphs=True) for kind in KINDS}
            data["share"] = {kind: found.share(kind) for kind in KINDS}
            data["share_graph"] = {kind: found.share(kind, graphs=True) for kind in KINDS}
            data["loss_difference"] = found.difference if math.isfinite(found.difference) else None
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
                # Files of earlier versions have none of the following.
                [GroupedPass.from_json(it) for it in compared.get("passes", [])],
                list(compared.get("notes", [])),
            )
        elif not data["skipped"]:
            raise ValueError(f"{data['name']} has neither times nor a reason")
        return cls(data["name"], tuple(data["shape"]), data["dtype"], compared, data["skipped"])


def _side(data: Mapping[str, Any]) -> Side:
    train, inference = Times(**data["train"]), Times(**data["inference"])
    # Files of earlier versions have no times of graphs.
    graphs = [data.get(name) for name in ("train_graph", "inference_graph")]
    train_graph, inference_graph = (None if it is None else Times(**it) for it in graphs)
    for times in (train, inference, train_graph, inference_graph):
        if times and not times.seconds > 0:
            raise ValueError("there are times that are no times")
    losses = [math.nan if x is None else float(x) for x in data["losses"]]
    return Side(train, inference, losses, data["memory"], train_graph, inference_graph)


@dataclass
class NetworkResults:
    """A benchmark of networks as far as it has come.

    ceilings: the device's, for each dtype that a grouped layer was measured in.
    """

    header: dict[str, Any]
    rows: list[NetworkRow] = field(default_factory=list)
    ceilings: dict[str, Ceilings] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Replace a file, wholly or not at all."""
        data = {
            "schema": SCHEMA,
            "kind": KIND,
            "header": self.header,
            "ceilings": {dtype: asdict(it) for dtype, it in self.ceilings.items()},
            "networks": [row.to_json() for row in self.rows],
        }
        write(path, json.dumps(data, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> NetworkResults:
        """Read what `save` wrote; ArgumentError for anything else."""
        try:
            data: Any = strict_json(path.read_text(encoding="utf-8"))
            if (data["schema"], data["kind"]) != (SCHEMA, KIND):
                raise ValueError(f"it is of {data['kind']!r} in schema {data['schema']!r}")
            header, rows = data["header"], [NetworkRow.from_json(row) for row in data["networks"]]
            # Files of earlier versions have no ceilings.
            ceilings = {dtype: Ceilings(**it) for dtype, it in data.get("ceilings", {}).items()}
            return cls({**header, "settings": dict(header["settings"])}, rows, ceilings)
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
