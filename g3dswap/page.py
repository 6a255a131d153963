"""Reports as files: JSON, Markdown, and one HTML page with pictures that needs nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import IO

import jinja2
from markupsafe import Markup

from g3dswap import figures
from g3dswap.containers import atomic_write, check_output
from g3dswap.entries import PassChoice
from g3dswap.errors import ArgumentError
from g3dswap.markdown import escape, table
from g3dswap.problem import DIRECTIONS
from g3dswap.quantities import duration, percent, times
from g3dswap.report import STEP_COLUMNS, STEPS, Report, remainders, step_cells
from g3dswap.shapes import Row, pass_name, printable, source

FORMATS = (".html", ".json", ".md")
TITLE = "g3dswap report"
_CELLS = ("PyTorch", "g3dswap", "speed-up", "source", "error")
_EXPLANATION = (
    "One line for each distinct shape: times as measured when the kernels were chosen, the error against "
    "float64 as ||x - ref|| / ||ref||. kept: PyTorch's own kernel runs the pass, for nothing was faster."
)


def save_report(report: Report, path: str | Path, *, force: bool = False) -> None:
    """Write a report to the file ``path``, whose ending, .html, .md or .json, says how. A page has pictures.

    The file appears whole or not at all; one that exists is replaced only with ``force``.

    Raises:
        ArgumentError: no report, or another ending.
        CheckpointError: the file exists already (and ``force`` is not given), or cannot be written.
    """
    if not isinstance(report, Report):
        raise ArgumentError(
            f"save_report() takes a Report, not {type(report).__name__}; give it g3dswap.report(model)."
        )
    check_path(path, force=force)
    text = {".html": html, ".json": _json, ".md": markdown}[Path(path).suffix.lower()](report)

    def fill(file: IO[bytes]) -> None:
        file.write(text.encode("utf-8", "replace"))

    atomic_write(path, fill, force=force)


def check_path(path: str | Path, *, force: bool = False) -> None:
    """Raise now what ``save_report`` would raise later because of the path."""
    if Path(path).suffix.lower() not in FORMATS:
        raise ArgumentError(f"{path} is no report; name it {', '.join('*' + it for it in FORMATS)}.")
    check_output(path, force=force)


def _json(report: Report) -> str:
    return json.dumps(report.to_dict(), indent=1) + "\n"


# Markdown


def markdown(report: Report) -> str:
    """The report as a Markdown document, without pictures."""
    return "\n".join(_markdown(report)) + "\n"


def _markdown(report: Report) -> Iterator[str]:
    yield f"# {TITLE}"
    yield from ("", _escaped(report.headline))
    if report.machine:
        yield from ("", _escaped(report.machine))
    if report.steps:
        yield from ("", f"## {STEPS}", "")
        cells = [[step.kind, *step_cells(step)] for step in report.steps]
        yield from table(dict(zip(STEP_COLUMNS, map(list, zip(*cells)))), STEP_COLUMNS[:1])
    if report.rows:
        yield from ("", "## Shapes", "", _EXPLANATION, "")
        words = ("outcome", "layers", "geometry", "input", "pass", "source", "note")
        yield from table(_shapes(report.rows), words)
    for title, left, right, pairs in remainders(report):
        yield from ("", f"## {title}", "")
        columns = {left: [_escaped(a) for a, _ in pairs], right: [_escaped(b) for _, b in pairs]}
        yield from table(columns, (left, right))


def _shapes(rows: list[Row]) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {}

    def add(**cells: str) -> None:
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)

    for row in rows:
        head = {
            "outcome": row.outcome,
            "layers": _escaped(row.names),
            "geometry": str(row.geometry),
            "input": str(row.call or ""),
        }
        note = "verified against float64" if row.verified else ""
        note = "; ".join(part for part in (note, row.note if row.outcome != "kept" else "") if part)
        for direction in DIRECTIONS if row.call else ("",):
            choice = row.choice(direction)
            if choice or not row.call:
                cells = dict(zip(_CELLS, _cells(choice)))
                add(**head, **{"pass": pass_name(direction)}, **cells, note=_escaped(note))
                head, note = dict.fromkeys(head, ""), ""
    return columns


def _cells(choice: PassChoice | None) -> list[str]:
    """As `_CELLS` calls them; empty for what is not known."""
    if choice is None:
        return [""] * len(_CELLS)
    ours = "" if choice.native or choice.seconds is None else duration(choice.seconds)
    theirs = "" if choice.native_seconds is None else duration(choice.native_seconds)
    gain = "" if choice.native else times(choice.speedup)
    error = "" if choice.error is None else f"{choice.error:.1e}"
    return [theirs, ours, gain, source(choice), error]


def _escaped(text: str) -> str:
    return escape(printable(text))


# HTML


def html(report: Report) -> str:
    """The report as one page: tables, pictures as inline SVG, no scripts, nothing from elsewhere."""
    text = resources.files("g3dswap").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(printable=printable, pass_name=pass_name)
    pictures = {direction: figures.passes(report.rows, direction) for direction in DIRECTIONS}
    page = environment.from_string(text).render(
        title=TITLE,
        report=report,
        cards=_cards(report),
        steps_title=STEPS,
        step_columns=STEP_COLUMNS,
        steps=[[step.kind, *step_cells(step)] for step in report.steps],
        steps_picture=Markup(figures.steps(report.steps)) if report.steps else "",
        # Markup: matplotlib has escaped what is text in them.
        pictures={name: Markup(svg) for name, svg in pictures.items() if svg},
        explanation=_EXPLANATION,
        columns=_CELLS,
        directions=DIRECTIONS,
        cells=_cells,
        remainders=list(remainders(report)),
    )
    return page.rstrip() + "\n"


def _cards(report: Report) -> list[tuple[str, str]]:
    """The figures that stand large at the top: a number and what it is."""
    total = len(report.swapped) + len(report.kept) + len(report.skipped)
    done = "swapped" if report.kind == "converted" else "would be swapped"
    cards = [(f"{len(report.swapped)} of {total}", f"grouped layers {done}")]
    converted = sum(item.converted for item in report.functional)
    if converted:
        cards.append((str(converted), f"function call{'s' if converted > 1 else ''} converted"))
    for step in report.steps:
        a_step = {"training": "a training", "inference": "an inference"}[step.kind]
        if step.speedup is not None:
            cards.append((times(step.speedup), f"the speed of {a_step} step"))
        cards.append((percent(step.share_before), f"of {a_step} step was grouped convolutions"))
    if report.tuning_seconds >= 0.1:
        cards.append((duration(report.tuning_seconds), "to choose the kernels"))
    return cards
