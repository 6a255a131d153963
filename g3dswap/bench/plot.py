"""Results as a picture: shares of the roofline and speed-ups, layer by layer."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from g3dswap.bench.results import Results
from g3dswap.bench.rows import Row
from g3dswap.errors import ArgumentError
from g3dswap.figures import OURS, SMALL, THEIRS, WITHIN, finish
from g3dswap.problem import DIRECTIONS, LAYOUTS

FORMATS = (".svg", ".png", ".pdf")
COLOURS = {"contiguous": "#0072b2", "channels_last_3d": "#56b4e9"}
WIDTH, LINE, MARGIN = 13.0, 0.2, 1.3  # inches: of the picture, of a layer in a panel, around the layers


def check_format(path: Path) -> None:
    """ArgumentError for a file that no picture can be written to."""
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(f"{path} is no picture; name it {', '.join('*' + it for it in FORMATS)}.")


def draw(files: Sequence[Results], path: Path) -> None:
    """Write a picture with a part for each of the results, in the format that the name asks for."""
    check_format(path)
    shown = [results for results in files if results.rows]
    if not shown:
        raise ArgumentError("There is nothing to draw: the results have no rows; measure some layers first.")
    heights = [2 * (LINE * len(_names(results.rows)) + MARGIN) for results in shown]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")  # outside pyplot: needs no screen
    parts = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, results in zip(parts, shown):
        _draw(part, results)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ArgumentError(
            f"{path} cannot be written ({error.strerror or error}); choose another file or make room."
        ) from None


def _draw(part: SubFigure, results: Results) -> None:
    header = results.header
    passes = [it for it in DIRECTIONS if any(row.problem.direction == it for row in results.rows)]
    names = _names(results.rows)
    title = f"{header['device']['device_name']}, {header['settings']['dtype']}"
    part.suptitle(title, x=0.01, horizontalalignment="left", weight="bold")
    panels = part.subplots(2, len(passes), sharex="row", sharey=True, squeeze=False)
    for direction, above, below in zip(passes, *panels):
        rows = [row for row in results.rows if row.problem.direction == direction]
        _shares(above, rows, names)
        _speed_ups(below, rows, names)
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=SMALL)
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first layer on top
    values = [100 * share for row in results.rows for share in (row.fraction, row.torch_fraction)]
    panels[0, 0].set_xlim(0.8 * min(values), 1.2 * max(100, *values))
    values = [row.same for row in results.rows]
    panels[1, 0].set_xlim(min(0.8, 0.9 * min(values)), 2.5 * max(2, *values))  # room for the numbers
    handles = [handle for axes in panels[:, 0] for handle in axes.get_legend_handles_labels()[0]]
    part.legend(handles=handles, fontsize=SMALL + 1, loc="upper right", ncols=len(handles), frameon=False)


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows))


def _short(name: str) -> str:
    """Without what the model's name has in parentheses and what stands in most layers' names."""
    return re.sub(r" \([^)]*\)", "", name).replace("res_blocks.", "").replace("branch2.", "")


def _shares(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    """A line from PyTorch's dot to ours for each layer; on a logarithmic scale its length is the gain."""
    best: dict[str, Row] = {}
    for row in rows:
        best[row.name] = min(row, best.get(row.name, row), key=lambda it: it.ours.seconds)
    places = [names.index(name) for name in best]
    ours = [100 * row.fraction for row in best.values()]
    theirs = [100 * row.torch_fraction for row in best.values()]
    axes.hlines(places, theirs, ours, color=WITHIN, linewidth=2, zorder=1)
    axes.scatter(theirs, places, s=18, color=THEIRS, label="PyTorch", zorder=2)
    axes.scatter(ours, places, s=18, color=OURS, label="g3dswap", zorder=3)
    means = [statistics.geometric_mean(values) for values in (ours, theirs)]
    for mean, colour in zip(means, (OURS, THEIRS)):
        axes.axvline(mean, color=colour, linestyle=":", linewidth=1)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xscale("log")
    finish(
        axes,
        f"{rows[0].problem.direction}: share of the roofline, better layouts\n"
        f"geometric means {means[0]:.2g} %, PyTorch {means[1]:.2g} %",
        "{:g} %",
    )


def _speed_ups(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    """A bar for each layer and layout, from 1 on, and its number."""
    layouts = [it for it in LAYOUTS if any(row.problem.layout == it for row in rows)]
    height = 0.8 / len(layouts)
    means = []
    for number, layout in enumerate(layouts):
        part = [row for row in rows if row.problem.layout == layout]
        shift = (number - (len(layouts) - 1) / 2) * height
        places = [names.index(row.name) + shift for row in part]
        gains = [row.same - 1 for row in part]
        bars = axes.barh(places, gains, height, left=1, color=COLOURS[layout], label=layout)
        texts = ["kept" if row.kept else f"{row.same:.3g}x" for row in part]
        axes.bar_label(bars, texts, fontsize=SMALL - 2, padding=2)
        means.append(f"{statistics.geometric_mean([row.same for row in part]):.3g}x")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    title = f"{rows[0].problem.direction}: speed-up in the same layout\ngeometric means {', '.join(means)}"
    finish(axes, title, "{:g}x")
