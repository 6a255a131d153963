"""Results for people: tables for a terminal of 100 columns, and Markdown for a README."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.table import Table

from g3dswap.bench.results import Results, Row, Summary, summarize
from g3dswap.problem import DIRECTIONS, LAYOUTS, Problem

_EXPLANATION = (
    "Times in ms, by the {statistic} of the runs; +- is the interquartile range. Speed-ups over PyTorch in "
    "the same layout (same), the better of its layouts (better) and NCDHW, of which the means are geometric. "
    "kept: PyTorch's own kernel is the choice. Roof: share of the roofline's speed."
)


def explanation(results: Results) -> str:
    """What the columns are."""
    statistic = {"quartile": "lower quartile"}.get(results.header["statistic"], results.header["statistic"])
    return _EXPLANATION.format(statistic=statistic)


def verdict(results: Results) -> str:
    """How the results compared with float64."""
    ours = [row for row in results.rows if not row.kept]
    if wrong := results.wrong():
        return f"{len(wrong)} of the {len(ours)} kernels that are not PyTorch's gave WRONG results."
    if not ours:
        return "PyTorch's own kernels are the choice everywhere."
    worst = max(row.check.error / row.check.bound for row in ours)
    return (
        f"All {len(ours)} kernels that are not PyTorch's matched float64, with at most {worst:.0%} of the "
        "error that is allowed: twice that of PyTorch's kernel, or the dtype's floor."
    )


def headline(results: Results) -> str:
    """Device, versions and settings, on a few lines."""
    header, device = results.header, results.header["device"]
    settings, limits = header["settings"], results.ceilings
    threads = f", {device['threads']} threads" if "threads" in device else ""
    products = {name: f"{value / 1e9:.0f} GFLOP/s" for name, value in limits.product.items()}
    several = len(products) > 1
    product = ", ".join(f"{text} ({name})" if several else text for name, text in products.items())
    versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
    batch = f"batch {settings['batch']}" if settings["batch"] else "the layers' own batches"
    return "\n".join(
        [
            f"{device['device_name']}, {device['capability']}, {device['cores']} cores{threads}",
            f"copy {limits.bandwidth / 1e9:.1f} GB/s, matrix product {product}",
            f"{settings['dtype']}, {batch}, tune {settings['tune']}, {header['date']}",
            versions,
        ]
    )


def tables(results: Results) -> Iterator[Table]:
    """One for each layout and pass, then the means."""
    summaries = summarize(results.rows)
    for item in summaries:
        yield _layer_table(item, _rows(results, item.layout, item.direction))
    if summaries:
        yield _mean_table(summaries)


def _rows(results: Results, layout: str, direction: str) -> list[Row]:
    return [row for row in results.rows if (row.problem.layout, row.problem.direction) == (layout, direction)]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _layer_table(summary: Summary, rows: list[Row]) -> Table:
    table = _table(
        f"{summary.direction}, {summary.layout}",
        "layer",
        *("ours", "+-", "NCDHW", "ch.last", "same", "better", "GFLOP/s", "roof", "error", "PyTorch's"),
    )
    for row in rows:
        table.add_row(
            row.name,
            _ms(row.ours.seconds),
            f"{row.ours.spread:.0%}",
            *(_ms(row.torch[layout].seconds) for layout in LAYOUTS),
            "kept" if row.kept else _times(row.same),
            _times(row.better),
            f"{row.gflops:.1f}",
            _percent(row.fraction),
            _error(row),
            f"{row.check.torch_error:.1e}",
        )
    table.add_section()
    means = [_times(summary.same), _times(summary.better), "", _percent(summary.fraction), "", ""]
    table.add_row("geometric mean", "", "", "", "", *means)
    return table


def _mean_table(summaries: list[Summary]) -> Table:
    table = _table("Geometric means", "pass, layout", *_MEAN_COLUMNS)
    for item in summaries:
        table.add_row(f"{item.direction}, {item.layout}", *_mean_cells(item))
    return table


_MEAN_COLUMNS = ("layers", "ours", "same", "better", "NCDHW", "least same", "roof", "torch roof")


def _mean_cells(item: Summary) -> tuple[str, ...]:
    ncdhw = _times(item.contiguous) if item.layout == "contiguous" else ""
    return (
        *(str(item.layers), str(item.ours), _times(item.same), _times(item.better), ncdhw),
        *(_times(item.slowest), _percent(item.fraction), _percent(item.torch_fraction)),
    )


def markdown(results: Results) -> str:
    """The means, then one table a layout with a layer on each line."""
    summaries = summarize(results.rows)
    lines = [f"{line}  " for line in headline(results).splitlines()] + [
        "",
        explanation(results),
        "",
        verdict(results),
        "",
    ]
    lines += _markdown_row("pass", "layout", *_MEAN_COLUMNS)
    lines += [_rule(2, len(_MEAN_COLUMNS))]
    for item in summaries:
        lines += _markdown_row(item.direction, item.layout, *_mean_cells(item))
    for layout in LAYOUTS:
        if any(item.layout == layout for item in summaries):
            lines += ["", *_markdown_layers(results, layout)]
    return "\n".join(lines) + "\n"


def _markdown_layers(results: Results, layout: str) -> Iterator[str]:
    cells: dict[tuple[str, int, str], dict[str, str]] = {}
    for row in results.rows:
        if row.problem.layout == layout:
            at = (row.name, row.batch, _shape(row.problem, row.batch))
            cells.setdefault(at, {})[row.problem.direction] = _cell(row)
    passes = [direction for direction in DIRECTIONS if any(direction in found for found in cells.values())]
    yield f"Input in {layout}; ours / PyTorch's NCDHW / its channels_last_3d, speed-up over its better:"
    yield ""
    yield from _markdown_row("layer", *passes)
    yield _rule(1, len(passes))
    for (name, _, shape), found in cells.items():
        yield from _markdown_row(f"{name} ({shape})", *(found.get(direction, "") for direction in passes))


def _cell(row: Row) -> str:
    """``0.12 / 0.53 / 2.93, 4.3x``; a choice that failed its check is said to be wrong."""
    ours = "kept" if row.kept else _ms(row.ours.seconds)
    theirs = " / ".join(_ms(row.torch[layout].seconds) for layout in LAYOUTS)
    return f"{ours} / {theirs}, {_times(row.better)}" + ("" if row.check.correct else " WRONG")


def _markdown_row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"]


def _rule(left: int, right: int) -> str:
    return f"| {' | '.join(['---'] * left + ['---:'] * right)} |"


def _shape(problem: Problem, batch: int) -> str:
    """``4x64x50x50x50 g64 k3x3x3 s1x1x1``."""
    g = problem.geometry
    size, taps, stride = ("x".join(map(str, values)) for values in (g.input_shape(batch), g.kernel, g.stride))
    filters = f" f{g.out_channels}" if g.out_channels != g.in_channels else ""
    dilation = f" d{'x'.join(map(str, g.dilation))}" if set(g.dilation) != {1} else ""
    return f"{size}{filters} g{g.groups} k{taps} s{stride}{dilation}"


def _error(row: Row) -> str:
    text = f"{row.check.error:.1e}" if math.isfinite(row.check.error) else "inf"
    return text if row.check.correct else f"WRONG {text}"


def _ms(seconds: float) -> str:
    """Three significant digits, as milliseconds."""
    value = seconds * 1e3
    if value >= 100:
        return f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 2
    return f"{value:.{min(digits, 4)}f}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def _times(factor: float) -> str:
    return f"{factor:.2f}x" if factor < 100 else f"{factor:.0f}x"
