"""Pictures of a report, as SVG to stand in a page: steps of the model, and each pass by distinct shapes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from g3dswap.entries import Step
from g3dswap.quantities import duration
from g3dswap.shapes import Row, pass_name

OURS, THEIRS, WITHIN = "#0072b2", "#d55e00", "#bbbbbb"
SMALL = 7  # points
PAGE = 8.5  # points, in the pictures of a page
CROWDED = 500.0  # the ratio of the ends of a logarithmic axis from which on only decades are named
WIDTH, LINE, MARGIN = 4.6, 0.27, 0.8  # inches: of a picture, of a line in it, above and below the lines
LONGEST = 22  # letters of a layer's name beside a picture


def steps(found: Sequence[Step]) -> str:
    """A bar for each step before and after, and in it the part of the grouped convolutions."""
    bars = []
    for step in found:
        bars.append((f"{step.kind}, before", step.before.seconds, step.share_before))
        if step.after is not None and step.share_after is not None:
            bars.append((f"{step.kind}, after", step.after.seconds, step.share_after))
    figure, axes = _figure(len(bars))
    places = range(len(bars))
    whole = axes.barh(places, [1e3 * seconds for _, seconds, _ in bars], 0.62, color=WITHIN, label="rest")
    axes.barh(
        places,
        [1e3 * seconds * share for _, seconds, share in bars],
        0.62,
        color=OURS,
        label="grouped convolutions",
    )
    axes.bar_label(whole, [duration(seconds) for _, seconds, _ in bars], fontsize=PAGE, padding=3)
    axes.set_yticks(places, [name for name, _, _ in bars], fontsize=PAGE)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.12e3 * max(seconds for _, seconds, _ in bars))
    finish(axes, "time of a step", "{:g} ms", PAGE, "left")
    _legend(axes)
    return _svg(figure, "steps")


def passes(rows: Sequence[Row], direction: str) -> str | None:
    """A line from PyTorch's dot to ours for each shape; None where no times of both are known.

    On the logarithmic scale the length of the line is the gain.
    """
    found = [line for row in rows for line in _line(row, direction)]
    if not found:
        return None
    figure, axes = _figure(len(found))
    places = range(len(found))
    theirs, ours = [line.theirs for line in found], [line.ours for line in found]
    axes.hlines(places, ours, theirs, color=WITHIN, linewidth=2, zorder=1)
    axes.scatter(theirs, places, s=20, color=THEIRS, label="PyTorch", zorder=2)
    axes.scatter(ours, places, s=20, color=OURS, label="g3dswap", zorder=3)
    low, high = min(*ours, *theirs), max(*ours, *theirs)
    axes.set_xlim(low / 1.6, high * (high / low) ** 0.2 * 1.8)  # room for the numbers
    for place, line in enumerate(found):
        right = max(line.ours, line.theirs), place
        axes.annotate(line.text, right, (5, 0), textcoords="offset points", va="center", fontsize=PAGE)
    # Names may hold dollars.
    axes.set_yticks(places, [line.name for line in found], fontsize=PAGE, parse_math=False)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xscale("log")
    finish(axes, pass_name(direction), "{:g} ms", PAGE, "left")
    _legend(axes)
    return _svg(figure, direction)


class _Line(NamedTuple):
    """Of one shape: milliseconds, and the speed-up in words."""

    name: str
    theirs: float
    ours: float
    text: str


def _line(row: Row, direction: str) -> Iterator[_Line]:
    choice = row.choice(direction)
    if choice is None or not choice.native_seconds:
        return
    name, theirs = _label(row), 1e3 * choice.native_seconds
    if choice.native:
        yield _Line(name, theirs, theirs, "kept")
    elif choice.seconds:
        yield _Line(name, theirs, 1e3 * choice.seconds, f"{choice.speedup:.1f}x")


def finish(
    axes: Axes,
    title: str,
    pattern: str,
    size: float = SMALL,
    side: Literal["left", "center"] = "center",
) -> None:
    """What all pictures have in common: a title, numbers below by the pattern, and few lines."""
    axes.set_title(title, fontsize=size + 2, loc=side)
    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < CROWDED else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: pattern.format(value)))
    axes.tick_params(axis="x", labelsize=size)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def _legend(axes: Axes) -> None:
    """Above the picture, opposite the title."""
    axes.legend(
        fontsize=PAGE,
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        borderpad=0.1,
        columnspacing=1,
        handletextpad=0.4,
        handlelength=1.2,
    )


def _figure(lines: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, LINE * lines + MARGIN), layout="constrained")  # needs no screen
    return figure, figure.subplots()


def _label(row: Row) -> str:
    """The end of the first name, where names differ, and how many there are."""
    name = row.members[0]
    name = name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
    return name if len(row.members) == 1 else f"{len(row.members)} x {name}"


def _svg(figure: Figure, salt: str) -> str:
    """The element alone, the same for the same picture, with text as text of the page's font."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
