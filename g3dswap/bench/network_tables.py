"""Results of whole networks as Markdown: what they hold for, and a table for each thing that was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from g3dswap.bench import text
from g3dswap.bench.compared import INFERENCE, KINDS, TRAINING, Compared
from g3dswap.bench.network_results import NetworkResults, NetworkRow
from g3dswap.bench.steps import WARM_UP
from g3dswap.markdown import WORDS, Columns, table
from g3dswap.rounds import Times

Found = Sequence[tuple[NetworkRow, Compared]]

_EAGER = (
    "Milliseconds of a training step (forward, loss, backward, SGD) and of a forward pass in eval mode "
    "without gradients, launched from Python, by the wall clock, before and after g3dswap.convert: medians "
    f"of alternating rounds, the first {WARM_UP} steps left out; +- is the interquartile range. bfloat16: "
    "autocast."
)
_GRAPHS = (
    "The same as CUDA graphs, a whole step in each, between two events of the GPU: what its work takes where "
    "the host does not limit it. Medians of replays, one graph after another."
)
_GROUPED = (
    "Milliseconds that the kernels of grouped convolutions take of a step, of swapped and kept layers alike: "
    "the sum over all calls of PyTorch's kernels (before), of those that run after the conversion (after), "
    "and of their rooflines, each max(bytes / copy bandwidth, flops / speed of a matrix product). Training "
    "is forward, grad-input and grad-weight, inference the forward passes. Each distinct kernel was timed "
    "alone on cold data in the layer's layout{how}. Step at the roofline: the step before, less what "
    "PyTorch's kernels take beyond the roofline, which is all that a conversion could save. Saved: the part "
    "of that by which the step became shorter, launched from Python or in CUDA graphs."
)
_CONVERSION = (
    "GiB: the most memory of a training step, with weights and optimizer. Losses: the largest relative "
    "difference over the steps, from equal weights, batches and seeds. Then what became of the grouped "
    "layers, where the kernels of the swapped ones' passes come from, and how long the conversion took."
)


def section(results: NetworkResults) -> str:
    """Markdown: what it holds for, tables with a line for each network and dtype, and what was left out."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: NetworkResults) -> Iterator[str]:
    header, settings = results.header, results.header["settings"]
    yield f"## Whole networks, {header['device']['device_name']}"
    yield ""
    facts = [text.gpu(header["gpu"])] if "gpu" in header else []
    facts += [f"{dtype}: {text.ceilings(it)}" for dtype, it in results.ceilings.items()]
    facts += [
        f"{settings['steps']} steps, tune {settings['tune']}, {settings['scale']} scale, {header['date']}",
        ", ".join(f"{name} {value}" for name, value in header["versions"].items()),
    ]
    yield from (f"{line}  " for line in facts)
    found = [(row, row.compared) for row in results.rows if row.compared]
    if found:
        yield from _part("Launched from Python", _EAGER, _steps(found, graphs=False))
        graphs = [it for it in found if any(it[1].speedup(kind, graphs=True) for kind in KINDS)]
        if graphs:
            yield from _part("In CUDA graphs", _GRAPHS, _steps(graphs, graphs=True))
        grouped = [it for it in found if it[1].passes]
        if grouped:
            how = ", in CUDA graphs of many calls" if "gpu" in header else ""
            yield from _part("Grouped convolutions", _GROUPED.format(how=how), _grouped(grouped))
        yield from _part("Conversion", _CONVERSION, _conversion(found))
    for row, it in found:
        yield from (line for note in it.notes for line in ("", f"{row.name}, {row.dtype}: {note}."))
    for row in results.rows:
        if not row.compared:
            yield from ("", f"{row.name}, {row.dtype}: {row.skipped}")


def _part(title: str, explanation: str, columns: Columns) -> Iterator[str]:
    yield from ("", f"### {title}", "", explanation, "")
    yield from table(columns, (*WORDS, "step"))


def _steps(found: Found, graphs: bool) -> Columns:
    """Times of both kinds of step, and the speed-ups."""
    columns = _names(found)
    for kind, name in ((TRAINING, "step"), (INFERENCE, "inference")):
        columns |= {
            f"{name} before": [_time(it.before.times(kind, graphs)) for _, it in found],
            f"{name} after": [_time(it.after.times(kind, graphs)) for _, it in found],
            f"{name} speed-up": [text.times(it.speedup(kind, graphs)) for _, it in found],
        }
    return columns


def _grouped(found: Found) -> Columns:
    """A line for each kind of step."""
    lines = [(row, it, kind, part) for row, it in found for kind in KINDS if (part := it.part(kind))]
    columns = _names([(row, it) for row, it, _, _ in lines])
    columns["step"] = [kind for _, _, kind, _ in lines]
    columns["kernels before"] = [text.ms(part.before) for *_, part in lines]
    columns["kernels after"] = [text.ms(part.after) for *_, part in lines]
    columns["at the roofline"] = [text.ms(part.roofline) for *_, part in lines]
    for graphs, where in ((False, ""), (True, ", graphs")):
        limits = [it.at_roofline(kind, graphs) for _, it, kind, _ in lines]
        columns[f"step at the roofline{where}"] = ["" if it is None else text.ms(it) for it in limits]
        columns[f"saved{where}"] = [_share(it.share(kind, graphs)) for _, it, kind, _ in lines]
    return columns


def _conversion(found: Found) -> Columns:
    compared = [it for _, it in found]
    done = [it.conversion for it in compared]
    return {
        **_names(found),
        "GiB before": [_gib(it.before.memory) for it in compared],
        "GiB after": [_gib(it.after.memory) for it in compared],
        "losses": [f"{it.difference:.1e}" for it in compared],
        "swapped / kept / skipped": [f"{it.swapped} / {it.kept} / {it.skipped}" for it in done],
        "kernels of passes": [", ".join(f"{n} {name}" for name, n in it.sources.items()) for it in done],
        "converted in": [f"{it.seconds:.1f} s" for it in done],
    }


def _names(found: Found) -> Columns:
    return {
        "network": [f"{row.name} ({'x'.join(map(str, row.shape))})" for row, _ in found],
        "dtype": [row.dtype for row, _ in found],
    }


def _time(times: Times | None) -> str:
    return "" if times is None else f"{text.ms(times.seconds)} +-{times.spread:.0%}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _gib(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 2**30:.2f}"
