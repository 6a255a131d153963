"""What a conversion did to a model, layer by layer, as data and as a table for a terminal.

A report is stored on the converted model as plain JSON-able data, so that it survives ``copy.deepcopy`` and
pickling, and so that a model of which nothing was swapped can still be unpickled without g3dswap.
"""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from g3dswap.entries import (
    ROOT,
    Call,
    Functional,
    FusedInto,
    Kept,
    Layer,
    NotFused,
    PassChoice,
    Skipped,
    Step,
    Swapped,
    Untraced,
)
from g3dswap.errors import ArgumentError
from g3dswap.module import Grouped
from g3dswap.problem import DIRECTIONS, device_facts
from g3dswap.quantities import duration, percent
from g3dswap.shapes import (
    Row,
    gathered,
    names,
    of_call,
    of_pytorch,
    of_untraced,
    pass_name,
    printable,
    rows,
    source,
)

ATTRIBUTE = "_g3dswap_report"
"""Name of the attribute of the converted root module that holds ``Report.to_dict()``."""

SCHEMA = 2


@dataclass(frozen=True)
class Report:
    """What was swapped, kept and skipped, and why. ``str()`` is a table for people."""

    kind: str = "converted"
    """``converted``, or ``inspected``: nothing was changed, ``swapped`` is what a conversion would swap."""
    swapped: list[Swapped] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    functional: list[Functional] = field(default_factory=list)
    untraced: list[Untraced] = field(default_factory=list)
    fused: list[FusedInto] = field(default_factory=list)
    unfused: list[NotFused] = field(default_factory=list)
    tuning_seconds: float = 0.0
    steps: tuple[Step, ...] = ()
    """Whole steps of the model, where ``measure_steps`` timed them."""
    machine: str = ""
    """The devices and versions that it was made on."""

    @property
    def rows(self) -> list[Row]:
        """One for each distinct shape, of swapped and kept layers and of function calls."""
        return rows(self.swapped, self.kept, self.functional)

    @property
    def headline(self) -> str:
        """The whole in one sentence."""
        return _headline(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dictionaries, strings and numbers, fit for ``json.dumps``."""
        data = {"schema": SCHEMA, **asdict(self)}
        for item in [*data["swapped"], *data["kept"], *data["functional"]]:
            for call in item["calls"]:
                for choice in call["passes"]:
                    ours = PassChoice(**choice)
                    choice["speedup"] = ours.speedup
        for item, step in zip(data["steps"], self.steps):
            item["speedup"] = step.speedup
            item["share_before"], item["share_after"] = step.share_before, step.share_after
        plain: dict[str, Any] = _plain(data)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`."""
        if data.get("schema") != SCHEMA:
            raise ArgumentError(
                f"The report has schema {data.get('schema')!r}, this version of g3dswap reads {SCHEMA}: "
                "convert the model again."
            )
        return cls(
            kind=data["kind"],
            swapped=[Swapped(**_revive(item)) for item in data["swapped"]],
            kept=[Kept(**_revive(item)) for item in data["kept"]],
            skipped=[Skipped(**_revive(item)) for item in data["skipped"]],
            functional=[Functional(**_revive(item)) for item in data["functional"]],
            untraced=[Untraced(**_revive(item)) for item in data["untraced"]],
            # A report from before layers were fused has neither.
            fused=[FusedInto(**_revive(item)) for item in data.get("fused", [])],
            unfused=[NotFused(**_revive(item)) for item in data.get("unfused", [])],
            tuning_seconds=float(data["tuning_seconds"]),
            steps=tuple(Step.from_dict(item) for item in data["steps"]),
            machine=data["machine"],
        )

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _plain(value: Any) -> Any:
    """Tuples become lists, recursively, so that a JSON round trip changes nothing."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _revive(item: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of one entry from its dictionary."""
    arguments: dict[str, Any] = {}
    for key, value in item.items():
        if key == "geometry":
            arguments[key] = None if value is None else Layer.from_dict(value)
        elif key == "calls":
            # The speed-up is there for readers of the JSON; here it is a property.
            arguments[key] = tuple(Call.from_dict(_without_speedups(call)) for call in value)
        elif isinstance(value, list):
            arguments[key] = tuple(value)
        else:
            arguments[key] = value
    return arguments


def _without_speedups(call: Mapping[str, Any]) -> dict[str, Any]:
    known = {item.name for item in fields(PassChoice)}
    passes = [{key: value for key, value in choice.items() if key in known} for choice in call["passes"]]
    return {**call, "passes": passes}


def machine(kinds: Collection[str]) -> str:
    """The devices of these kinds (``cpu``, ``cuda``) and PyTorch's version, as a report states them."""
    parts = []
    for kind in ("cuda", "cpu"):
        if kind in kinds:
            facts = device_facts(kind)
            threads = f" ({facts['threads']} threads)" if facts.get("threads", 1) > 1 else ""
            parts.append(f"{facts['device_name']}{threads}")
    return ", ".join([*parts, f"PyTorch {torch.__version__}"]) if parts else ""


def store(model: nn.Module, report: Report) -> None:
    """Put the report on the root module of a converted model."""
    # Not through nn.Module.__setattr__: user classes override it.
    model.__dict__[ATTRIBUTE] = report.to_dict()


def stored(model: nn.Module) -> Report | None:
    """The report that :func:`store` left on this module, if any."""
    data = model.__dict__.get(ATTRIBUTE)
    return None if data is None else Report.from_dict(data)


def forget(model: nn.Module) -> None:
    """Take the report off again."""
    model.__dict__.pop(ATTRIBUTE, None)


def report(model: nn.Module) -> Report:
    """What ``convert`` did to this model.

    Its lists are ``.swapped``, ``.kept``, ``.skipped``, ``.functional``, ``.untraced``, ``.fused`` and
    ``.unfused``; ``print`` shows a table and ``to_dict()`` gives JSON-able data. A model that holds swapped
    layers without having been converted (or a part of a converted one) has them listed without their times.

    Raises:
        ArgumentError: the argument is not a module, or has nothing of g3dswap in it.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"report() takes a converted torch.nn.Module, not {type(model).__name__}.")
    known = stored(model)
    if known is not None:
        return known
    swapped = [
        Swapped(name or ROOT, Layer.of(module), note="not converted as a part of this model")
        for name, module in model.named_modules()
        if isinstance(module, Grouped)
    ]
    if not swapped:
        raise ArgumentError(
            f"This {type(model).__name__} was not converted by g3dswap.convert: there is nothing to report; "
            "g3dswap.inspect(model) shows what a conversion would do."
        )
    return Report(swapped=swapped)


# The table. Plain ASCII: it is also printed into pipes, logs and files of any encoding.

_MINIMUM_WIDTH = 60
_MAXIMUM_WIDTH = 120


def _lines(report: Report) -> list[str]:
    """The whole text, without trailing blanks."""
    done = report.kind == "converted"
    parts = [textwrap.fill(_headline(report), _width())]
    if report.machine:
        parts.append(textwrap.fill(printable(report.machine), _width()))
    if report.steps:
        parts.append(_block(STEPS, _step_table(report.steps)))
    for outcome, title in (
        ("swapped", "Swapped" if done else "Would be swapped"),
        ("converted", "Function calls that are converted"),
    ):
        found = [row for row in report.rows if row.outcome == outcome]
        if found:
            parts.append(_block(title, _pass_table(found)))
    for title, left, right, cells in remainders(report):
        parts.append(_block(title, _two_columns(left, right, cells)))
    return [line.rstrip() for part in parts for line in part.splitlines()]


STEPS = "Steps of the model (training: forward and backward; inference: forward without gradients)"
STEP_COLUMNS = ("step", "before", "after", "speed-up", "share of grouped convolutions")


def remainders(report: Report) -> Iterator[tuple[str, str, str, list[tuple[str, str]]]]:
    """What is not swapped, and why: a title, the names of two columns, and their cells."""
    done = report.kind == "converted"
    if report.kept:
        cells = gathered(
            (item, "\n".join([str(item.geometry), *map(of_pytorch, item.calls), item.reason]))
            for item in report.kept
        )
        yield "Kept as they were" if done else "Would be kept as they are", "layers", "because", cells
    if report.skipped:
        cells = gathered((item, f"{item.kind}: {item.reason}") for item in report.skipped)
        yield "Skipped", "layers", "because", cells
    if report.fused:
        yield "Fused for inference", "layer", "what is in it", [(names([i]), str(i)) for i in report.fused]
    if report.unfused:
        cells = gathered((item, item.reason) for item in report.unfused)
        yield "Not, or not further, fused", "layers", "because", cells
    if report.functional:
        cells = [(item.name, of_call(item)) for item in report.functional]
        asked = any(item.converted or item.reason for item in report.functional)
        title = "Function calls with groups > 1"
        yield (
            title if asked else f"{title}, not converted: that takes functional=True",
            "inside",
            "call",
            cells,
        )
    if report.untraced:
        cells = [(item.name, of_untraced(item)) for item in report.untraced]
        yield "Not traceable by torch.fx; layers found in the module tree instead", "part", "because", cells


def _headline(report: Report) -> str:
    total = len(report.swapped) + len(report.kept) + len(report.skipped)
    converted = sum(item.converted for item in report.functional)
    if not total and not converted:
        return "g3dswap: no 3D convolution layer with groups > 1 in this model, nothing to swap."
    done = "swapped" if report.kind == "converted" else "would be swapped"
    layers = "layer" if total == 1 else "layers"
    text = (
        f"g3dswap: {len(report.swapped)} of {total} grouped {layers} {done}, "
        f"{len(report.kept)} kept, {len(report.skipped)} skipped"
    )
    if converted:
        text += f", {converted} function call{'s' if converted > 1 else ''} converted"
    if report.tuning_seconds >= 0.1:
        text += f"; choosing kernels took {report.tuning_seconds:.1f} s"
    return text + "."


def _block(title: str, table: Table) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=_width(), color_system=None, force_terminal=False).print(table)
    return f"\n{textwrap.fill(title, _width())}\n{buffer.getvalue()}"


def _width() -> int:
    """Columns of the terminal, or 80 where there is none, within reason."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, _MINIMUM_WIDTH), _MAXIMUM_WIDTH)


def _text(cell: str) -> Text:
    """Text, not str: names such as "[0]" are not console markup."""
    return Text(printable(cell))


def _two_columns(left: str, right: str, cells: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=box.ASCII2, show_lines=True)
    table.add_column(left, ratio=2, overflow="fold")
    table.add_column(right, ratio=5, overflow="fold")
    for row in cells:
        table.add_row(*map(_text, row))
    table.expand = True
    return table


def _step_table(steps: Sequence[Step]) -> Table:
    table = Table(box=box.ASCII2, show_lines=True)
    for title in STEP_COLUMNS:
        table.add_column(title, overflow="fold")
    for step in steps:
        table.add_row(step.kind, *step_cells(step))
    return table


def step_cells(step: Step) -> list[str]:
    """Time before and after, the speed-up, and what the grouped convolutions take of it."""
    before = f"{duration(step.before.seconds)} +-{step.before.spread:.0%}"
    if step.after is None:
        return [before, "", "", f"{percent(step.share_before)} of it"]
    after = f"{duration(step.after.seconds)} +-{step.after.spread:.0%}"
    return [
        before,
        after,
        f"{step.speedup:.2f}x",
        f"{percent(step.share_before)} -> {percent(step.share_after)}",
    ]


def _pass_table(found: Sequence[Row]) -> Table:
    table = Table(box=box.ASCII2, show_lines=True, expand=True)
    table.add_column("layers", ratio=5, overflow="fold")
    for direction in DIRECTIONS:
        table.add_column(pass_name(direction), ratio=3, overflow="fold")
    for row in found:
        head = [row.names, str(row.geometry)]
        head += ["verified against float64"] if row.verified else []
        head += [str(row.call)] if row.call else []
        head += [row.note] if row.note else []
        table.add_row(_text("\n".join(head)), *(_text(_cell(row, direction)) for direction in DIRECTIONS))
    return table


def _cell(row: Row, direction: str) -> str:
    """Speed-up and source, then both times and the error; ``-`` for a pass that is not needed."""
    choice = row.choice(direction)
    if choice is None:
        return "-" if row.call else ""
    if choice.native:
        return (
            "PyTorch kept"
            if not choice.native_seconds
            else f"PyTorch kept\n{duration(choice.native_seconds)}"
        )
    lines = [source(choice)]
    if choice.speedup is not None:
        lines = [f"{choice.speedup:.1f}x {source(choice)}"]
        lines += [f"{duration(choice.native_seconds)} ->", duration(choice.seconds)]
    if choice.error is not None:
        lines.append(f"err {choice.error:.1e}")
    return "\n".join(lines)
