"""Results for people at a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from g3dswap.bench import text
from g3dswap.bench.results import Results
from g3dswap.bench.rows import Row
from g3dswap.bench.summary import Summary, summarize
from g3dswap.problem import LAYOUTS


def tables(results: Results) -> Iterator[Table]:
    """One for each layout and pass, then the means."""
    summaries = summarize(results.rows)
    for item in summaries:
        yield _layer_table(item, results.of(item.layout, item.direction))
    if summaries:
        yield _mean_table(summaries)


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
            text.ms(row.ours.seconds),
            f"{row.ours.spread:.0%}",
            *(text.ms(row.torch[layout].seconds) for layout in LAYOUTS),
            "kept" if row.kept else text.times(row.same),
            text.times(row.better),
            f"{row.gflops:.1f}",
            text.percent(row.fraction),
            text.error(row),
            f"{row.check.torch_error:.1e}",
        )
    table.add_section()
    means = [text.times(summary.same), text.times(summary.better), "", text.percent(summary.fraction), "", ""]
    table.add_row("geometric mean", "", "", "", "", *means)
    return table


def _mean_table(summaries: list[Summary]) -> Table:
    columns = ("layers", "ours", "same", "better", "NCDHW", "least", "eager", "roof", "PyTorch's")
    table = _table("Geometric means, and the least speed-ups in the same layout", "pass, layout", *columns)
    for item in summaries:
        table.add_row(
            f"{item.direction}, {item.layout}",
            *(str(item.layers), str(item.ours), text.times(item.same), text.times(item.better)),
            text.times(item.contiguous) if item.layout == "contiguous" else "",
            *(text.times(item.slowest), text.times(item.slowest_eager)),
            *(text.percent(item.fraction), text.percent(item.torch_fraction)),
        )
    return table
