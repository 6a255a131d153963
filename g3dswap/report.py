"""What a conversion did to a model, layer by layer, as data and as a table for a terminal.

A report is stored on the converted model as plain JSON-able data, so that it survives ``copy.deepcopy`` and
pickling, and so that a model of which nothing was swapped can still be unpickled without g3dswap.
"""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from g3dswap.entries import (
    ROOT,
    Call,
    Functional,
    Kept,
    Layer,
    PassChoice,
    Skipped,
    Swapped,
    Untraced,
)
from g3dswap.errors import ArgumentError
from g3dswap.module import Grouped
from g3dswap.problem import DIRECTIONS

ATTRIBUTE = "_g3dswap_report"
"""Name of the attribute of the converted root module that holds ``Report.to_dict()``."""

SCHEMA = 1


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
    tuning_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dictionaries, strings and numbers, fit for ``json.dumps``."""
        data = {"schema": SCHEMA, **asdict(self)}
        for item in [*data["swapped"], *data["kept"]]:
            for call in item["calls"]:
                for choice in call["passes"]:
                    ours = PassChoice(**choice)
                    choice["speedup"] = ours.speedup
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
            tuning_seconds=float(data["tuning_seconds"]),
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
            arguments[key] = Layer.from_dict(value)
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

    Its lists are ``.swapped``, ``.kept``, ``.skipped``, ``.functional`` and ``.untraced``; ``print`` shows a
    table and ``to_dict()`` gives JSON-able data. A model that holds swapped
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
    if report.swapped:
        parts.append(_block("Swapped" if done else "Would be swapped", _swapped_table(report.swapped)))
    if report.kept:
        rows = _grouped((item, f"{item.geometry}\n{item.reason}") for item in report.kept)
        title = "Kept as they were" if done else "Would be kept as they are"
        parts.append(_block(title, _two_columns("layers", "because", rows)))
    if report.skipped:
        rows = _grouped((item, f"{item.kind}: {item.reason}") for item in report.skipped)
        parts.append(_block("Skipped", _two_columns("layers", "because", rows)))
    if report.functional:
        rows = [(item.name, _functional(item)) for item in report.functional]
        title = "Function calls with groups > 1, not replaced (a layer in their place would be)"
        parts.append(_block(title, _two_columns("inside", "call", rows)))
    if report.untraced:
        rows = [(item.name, _untraced(item)) for item in report.untraced]
        title = "Not traceable by torch.fx; layers found in the module tree instead"
        parts.append(_block(title, _two_columns("part", "because", rows)))
    return [line.rstrip() for part in parts for line in part.splitlines()]


def _headline(report: Report) -> str:
    total = len(report.swapped) + len(report.kept) + len(report.skipped)
    if not total:
        return "g3dswap: no 3D convolution layer with groups > 1 in this model, nothing to swap."
    done = "swapped" if report.kind == "converted" else "would be swapped"
    layers = "layer" if total == 1 else "layers"
    text = (
        f"g3dswap: {len(report.swapped)} of {total} grouped {layers} {done}, "
        f"{len(report.kept)} kept, {len(report.skipped)} skipped"
    )
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


def _two_columns(left: str, right: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=box.ASCII2, show_lines=True)
    table.add_column(left, ratio=2, overflow="fold")
    table.add_column(right, ratio=5, overflow="fold")
    for row in rows:
        # Text, not str: names such as "[0]" are not console markup.
        table.add_row(*(Text(cell) for cell in row))
    table.expand = True
    return table


def _grouped(items: Iterable[tuple[Kept | Skipped | Swapped, str]]) -> list[tuple[str, str]]:
    """One row for all the items with the same text."""
    rows: dict[str, list[Kept | Skipped | Swapped]] = {}
    for item, text in items:
        rows.setdefault(text, []).append(item)
    return [(_names(members), text) for text, members in rows.items()]


def _names(items: Sequence[Kept | Skipped | Swapped]) -> str:
    """``layer1.0.conv2 and 2 more``, with a count in front where there are several."""
    first = items[0]
    text = first.name
    if len(items) > 1:
        text = f"{len(items)} x {text} ... {items[-1].name}"
    if first.aliases and len(items) == 1:
        text += f" (shared with {', '.join(first.aliases)})"
    return text


def _swapped_table(items: Sequence[Swapped]) -> Table:
    table = Table(box=box.ASCII2, show_lines=True, expand=True)
    table.add_column("layers", ratio=5, overflow="fold")
    for direction in DIRECTIONS:
        table.add_column(direction.replace("_", "-"), ratio=3, overflow="fold")
    rows: dict[tuple[Any, ...], list[Swapped]] = {}
    for item in items:
        rows.setdefault((item.geometry, item.calls, item.note, item.verified), []).append(item)
    for (geometry, calls, note, verified), members in rows.items():
        head = f"{_names(members)}\n{geometry}"
        if verified:
            head += "\nverified against float64"
        if not calls:
            table.add_row(Text(f"{head}\n{note}" if note else head), *[Text("")] * len(DIRECTIONS))
        for call in calls:
            cells = [_cell(call.passes, direction) for direction in DIRECTIONS]
            text = f"{head}\n{call}" if not note else f"{head}\n{call}\n{note}"
            table.add_row(Text(text), *(Text(cell) for cell in cells))
    return table


def _cell(passes: Sequence[PassChoice], direction: str) -> str:
    """Speed-up and source, then both times; ``-`` for a pass that is not needed."""
    choice = next((item for item in passes if item.direction == direction), None)
    if choice is None:
        return "-"
    if choice.native:
        return "PyTorch" if not choice.native_seconds else f"PyTorch\n{_time(choice.native_seconds)}"
    if choice.speedup is None:
        return choice.source
    times = f"{_time(choice.native_seconds)} ->\n{_time(choice.seconds)}"
    return f"{choice.speedup:.1f}x {choice.source}\n{times}"


def _time(seconds: float | None) -> str:
    """Three digits with the unit that fits."""
    if seconds is None:
        return "?"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _functional(item: Functional) -> str:
    text = f"{item.function} with groups={item.groups}"
    if item.shape:
        text += f" on {'x'.join(str(size) for size in item.shape)}"
    return f"{text}, {item.where}" if item.where else text


def _untraced(item: Untraced) -> str:
    layers = f" ({item.layers} grouped layer{'s' if item.layers != 1 else ''} inside)" if item.layers else ""
    return f"{item.reason}{layers}"
