"""Results as Markdown, one document for several files: means first, then layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from g3dswap.bench import text
from g3dswap.bench.results import Results
from g3dswap.bench.rows import Row
from g3dswap.bench.summary import LARGE, Best, Summary, best, summarize
from g3dswap.markdown import Columns, table
from g3dswap.problem import LAYOUTS
from g3dswap.rounds import Times

_LARGE = f"roof, >{LARGE * 1e6:.0f} us"


def document(files: Sequence[Results]) -> str:
    """A section for each."""
    return "\n".join(line for results in files for line in (*_section(results), ""))


def _section(results: Results) -> Iterator[str]:
    header = results.header
    yield f"## {header['settings']['dtype']}, {header['device']['device_name']}"
    yield ""
    yield from (f"{line}  " for line in text.headline(results).splitlines())
    yield from ("", text.explanation(results), "", text.verdict(results))
    for note in dict.fromkeys(note for row in results.rows for note in row.notes):
        yield from ("", f"No CUDA graph of {note}.")
    summaries, bests = summarize(results.rows), best(results.rows)
    if summaries:
        yield from ("", "Geometric means, our kernels in the input's layout:", "")
        yield from table(_means(summaries))
    if bests:
        yield from ("", "Geometric means, our better layout against PyTorch's better layout:", "")
        yield from table(_best_means(bests))
    for item in summaries:
        yield from ("", f"### {header['settings']['dtype']}, {item.direction}, {item.layout}", "")
        yield from table(_layers(results.of(item.layout, item.direction)))


def _means(items: Sequence[Summary]) -> Columns:
    return {
        "pass": [item.direction for item in items],
        "layout": [item.layout for item in items],
        "layers": [str(item.layers) for item in items],
        "ours": [str(item.ours) for item in items],
        "same": [text.times(item.same) for item in items],
        "better": [text.times(item.better) for item in items],
        "NCDHW": [text.times(item.contiguous) if item.layout == "contiguous" else "" for item in items],
        "torch.compile": [text.times(item.compiled) for item in items],
        "least same": [text.times(item.slowest) for item in items],
        "least same, eager": [text.times(item.slowest_eager) for item in items],
        "roof": [text.percent(item.fraction) for item in items],
        "PyTorch's roof": [text.percent(item.torch_fraction) for item in items],
        f"{_LARGE} (layers)": [_large(item.large_fraction, item.large) for item in items],
    }


def _best_means(items: Sequence[Best]) -> Columns:
    return {
        "pass": [item.direction for item in items],
        "layers": [str(item.layers) for item in items],
        "speed-up": [text.times(item.better) for item in items],
        "least": [f"{text.times(item.slowest)}, {item.slowest_layer}" for item in items],
        "roof": [text.percent(item.fraction) for item in items],
        "PyTorch's roof": [text.percent(item.torch_fraction) for item in items],
        f"speed-up, >{LARGE * 1e6:.0f} us": [text.times(item.large_better) for item in items],
        f"{_LARGE} (layers)": [_large(item.large_fraction, item.large) for item in items],
        f"PyTorch's {_LARGE}": [text.percent(item.large_torch_fraction) for item in items],
    }


def _large(fraction: float | None, layers: int) -> str:
    return f"{text.percent(fraction)} ({layers})" if layers else ""


def _layers(rows: Sequence[Row]) -> Columns:
    columns: Columns = {"layer": [f"{row.name} ({text.shape(row.problem, row.batch)})" for row in rows]}
    columns["roofline"] = [text.ms(row.roofline) for row in rows]
    columns |= _times("ours", rows, ((row.ours, row.fraction) for row in rows))
    columns["ours"] = ["kept" if row.kept else cell for row, cell in zip(rows, columns["ours"])]
    for layout, name in zip(LAYOUTS, ("NCDHW", "ch.last")):
        found = [row.torch[layout] for row in rows]
        columns |= _times(name, rows, ((it, row.roofline / it.seconds) for row, it in zip(rows, found)))
    columns["torch.compile"] = [_compiled(row) for row in rows]
    columns["same"] = [text.times(row.same) for row in rows]
    columns["better"] = [text.times(row.better) for row in rows]
    columns["same, eager"] = [text.times(row.same_eager) for row in rows]
    columns["error"] = [text.error(row) for row in rows]
    columns["PyTorch's"] = [f"{row.check.torch_error:.1e}" for row in rows]
    return columns


def _times(name: str, rows: Sequence[Row], found: Iterable[tuple[Times, float]]) -> Columns:
    """Columns of a contender: ``0.105 +-2%, 63%``, and its eager time where there is one."""
    pairs = list(found)
    marks = [" eager" if times.note else "" for times, _ in pairs]
    cells = [
        f"{text.ms(times.seconds)}{mark} +-{times.spread:.0%}, {text.percent(share)}"
        for (times, share), mark in zip(pairs, marks)
    ]
    eager = [
        ""
        if times.eager_seconds is None
        else f"{text.ms(times.eager_seconds)} +-{times.eager_spread or 0:.0%}"
        for times, _ in pairs
    ]
    if name == "ours":
        eager = ["" if row.kept else cell for row, cell in zip(rows, eager)]
    return {name: cells, f"{name}, eager": eager}


def _compiled(row: Row) -> str:
    """In the better layout."""
    if not row.compiled:
        return ""
    times = min(row.compiled.values(), key=lambda it: it.seconds)
    return f"{text.ms(times.seconds)} +-{times.spread:.0%}, {text.percent(row.roofline / times.seconds)}"
