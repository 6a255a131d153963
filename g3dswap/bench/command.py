"""``g3dswap bench``."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from g3dswap.arch import parse_device
from g3dswap.bench import markdown, table, text
from g3dswap.bench.layers import read_layers
from g3dswap.bench.network_results import NetworkResults, of_networks
from g3dswap.bench.network_run import DTYPES as NETWORK_DTYPES
from g3dswap.bench.network_run import NetworkSettings, bench_networks
from g3dswap.bench.network_tables import section
from g3dswap.bench.networks import SCALES, choose_networks
from g3dswap.bench.plot import check_format, draw
from g3dswap.bench.results import Results
from g3dswap.bench.run import Settings
from g3dswap.bench.run import bench as run_bench
from g3dswap.containers import check_output
from g3dswap.errors import ArgumentError, VerificationError
from g3dswap.options import DEVICE, PATH, Parsed, cache_option, force_option, print_table
from g3dswap.problem import DIRECTIONS, DTYPES, LAYOUTS, dtype_name
from g3dswap.rounds import STATISTICS
from g3dswap.stored import EFFORTS


def _some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
        if unknown := [word for word in words if word not in known]:
            raise ArgumentError(f"{unknown[0]!r} is unknown; give some of {', '.join(known)}, by commas.")
        return words

    return parse


LAYOUT_LIST = Parsed("LAYOUTS", _some_of(tuple(LAYOUTS)))
PASS_LIST = Parsed("PASSES", _some_of(DIRECTIONS))
DTYPE_NAMES = {dtype_name(dtype): dtype for dtype in DTYPES}

FOR_LAYERS = ("layers", "layouts", "passes", "batch", "compile", "csv", "plot", "statistic")
FOR_NETWORKS = ("steps", "scale")


@click.command()
@click.option("--layers", type=PATH, help="JSON file of layers; by default those of real models.")
@click.option("--match", multiple=True, metavar="GLOB", help="Only layers, or networks, of such names.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPE_NAMES)),
    help="By default float32; for networks also bfloat16, by autocast.",
)
@click.option(
    "--layout",
    "layouts",
    type=LAYOUT_LIST,
    default=",".join(LAYOUTS),
    show_default=True,
    help="Memory formats, by commas.",
)
@click.option("--passes", type=PASS_LIST, default=",".join(DIRECTIONS), show_default=True, help="By commas.")
@click.option(
    "--batch", type=click.IntRange(0), help="0: as the file says, the default on a GPU; on a CPU it is 1."
)
@click.option("--device", type=DEVICE, default=lambda: parse_device(None), help="cpu, cuda or cuda:INDEX.")
@click.option(
    "--tune", type=click.Choice(list(EFFORTS)), default="quick", show_default=True, help="How to choose."
)
@cache_option
@click.option("--threads", type=click.IntRange(1), help="Of a CPU; by default as many as PyTorch takes.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    show_default=True,
    help="For measuring each kernel, or the inference and the CUDA graphs of each network.",
)
@click.option(
    "--statistic",
    type=click.Choice(STATISTICS),
    help="The time of a kernel: the median of its runs, the default, or the lower quartile, for a busy "
    "machine. Also with --render and --resume, whose default is the file's.",
)
@click.option("--compile", is_flag=True, help="Time PyTorch's operator under torch.compile too.")
@click.option("--networks", is_flag=True, help="Measure whole networks, before and after conversion.")
@click.option("--steps", type=click.IntRange(2), help="Training steps of each network; by default 50.")
@click.option("--scale", type=click.Choice(SCALES), help="Of the networks; by default full, for large GPUs.")
@click.option("-o", "--output", type=PATH, help="JSON file to write, after every pass of a layer.")
@click.option("--csv", type=PATH, help="Write the rows as CSV too.")
@click.option("--plot", type=PATH, help="Draw the results too, those of --render as well: SVG, PNG or PDF.")
@click.option("--resume", is_flag=True, help="Go on with OUTPUT: do not measure again what it has.")
@click.option(
    "--render", type=PATH, multiple=True, metavar="FILE", help="Print such JSON files as Markdown, and stop."
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@force_option
def bench(
    layers: Path | None,
    match: tuple[str, ...],
    output: Path | None,
    csv: Path | None,
    plot: Path | None,
    resume: bool,
    render: tuple[Path, ...],
    force: bool,
    networks: bool,
    **options: Any,
) -> None:
    """Measure the chosen kernels against PyTorch's, layer by layer or in networks, and write the results.

    \b
    g3dswap bench -o cpu.json
    g3dswap bench --match 'X3D-M*' --passes forward --layout contiguous -o x3d.json
    g3dswap bench --networks --match 'MedNeXt*' -o networks.json
    g3dswap bench --render fp32.json --render bf16.json --plot both.svg

    Exit code 3: a kernel's result was wrong.
    """
    if plot:
        check_format(plot)
        check_output(plot, force=force or resume)
    if render:
        _render(render, options["statistic"], plot)
        return
    if output is None:
        raise click.UsageError("Say where the results go, with -o.")
    for path in (output, csv):
        if path:
            check_output(path, force=force or resume)
    _check_kind(networks)
    with _kept(output):
        if networks:
            click.echo(section(bench_networks(_network_settings(match, options), output, resume)), nl=False)
            click.echo(f"Wrote {output}.")
            return
        results = run_bench(_settings(read_layers(layers, match), options), output, csv, resume)
    _print(results)
    if plot:
        draw([results], plot)
    click.echo(f"Wrote {' and '.join(str(path) for path in (output, csv, plot) if path)}.")
    if wrong := results.wrong():
        raise VerificationError(
            f"{len(wrong)} of {len(results.rows)} kernels were wrong, the first {wrong[0].problem}; "
            "remove them with `g3dswap cache prune` and tune again."
        )


def _check_kind(networks: bool) -> None:
    """UsageError for an option that is for the other kind of benchmark."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") == ParameterSource.COMMANDLINE
        if given and option.name in (FOR_LAYERS if networks else FOR_NETWORKS):
            what = "for layers, not for" if networks else "only for"
            raise click.UsageError(f"{option.opts[0]} is {what} --networks.")


@contextlib.contextmanager
def _kept(output: Path) -> Iterator[None]:
    """Says what an interruption leaves."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"{output} has what was measured; --resume goes on with it.", err=True)
        raise


def _render(files: tuple[Path, ...], statistic: str | None, plot: Path | None) -> None:
    found = [NetworkResults.load(path) if of_networks(path) else Results.load(path) for path in files]
    layers = [it.by(statistic or it.header["statistic"]) for it in found if isinstance(it, Results)]
    if plot:
        draw(layers, plot)
    parts = [markdown.document(layers)] if layers else []
    parts += [section(it) for it in found if isinstance(it, NetworkResults)]
    click.echo("\n".join(parts), nl=False)


def _network_settings(match: Sequence[str], options: dict[str, Any]) -> NetworkSettings:
    dtype = options["dtype"]
    if dtype not in (None, *NETWORK_DTYPES):
        raise click.UsageError(f"--dtype {dtype} is not for --networks; give {' or '.join(NETWORK_DTYPES)}.")
    return NetworkSettings(
        choose_networks(match),
        options["device"],
        (dtype,) if dtype else NETWORK_DTYPES,
        options["scale"] or "full",
        options["steps"] or 50,
        options["seconds"],
        options["tune"],
        options["cache"],
        options["threads"] or 0,
        not options["quiet"],
    )


def _settings(layers: Sequence[Any], options: dict[str, Any]) -> Settings:
    device: torch.device = options["device"]
    batch = options["batch"]
    if batch is None:
        batch = 1 if device.type == "cpu" else 0
    return Settings(
        layers,
        device,
        DTYPE_NAMES[options["dtype"] or "float32"],
        options["layouts"],
        options["passes"],
        batch,
        options["tune"],
        options["cache"],
        options["threads"] or 0,
        options["seconds"],
        options["statistic"],
        not options["quiet"],
        options["compile"],
    )


def _print(results: Results) -> None:
    click.echo(text.headline(results))
    for item in table.tables(results):
        print_table(item)
    for words in (text.explanation(results), text.verdict(results)):
        click.echo(textwrap.fill(words, 100))
