"""The command line: ``g3dswap inspect | convert | tune | verify | bench | show | cache | env``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from torch import Tensor, nn

import g3dswap
from g3dswap import checkpoint, containers, program, ranks
from g3dswap.arch import load_weights
from g3dswap.bench.command import bench
from g3dswap.cache_commands import cache
from g3dswap.checkpoint import Checkpoint
from g3dswap.endtoend import measure_steps
from g3dswap.errors import ArgumentError
from g3dswap.fused import MARK
from g3dswap.options import (
    EXIT_CODES,
    NOT_BOTH,
    PATH,
    Commands,
    Shape,
    Source,
    Stored,
    cache_option,
    clean_stdout,
    emit,
    force_option,
    json_option,
    print_table,
    shape_options,
    source_options,
    tuning_options,
)
from g3dswap.page import check_path, save_report
from g3dswap.program import Program
from g3dswap.report import Report
from g3dswap.show_commands import env, show


@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="g3dswap")
def main() -> None:
    """Swap slow grouped and depthwise 3D convolutions of PyTorch models for tuned kernels.

    Three options run code: --arch imports the module it names, --safe-global that of the class it names, and
    --trust unpickles a file without restriction. Without them nothing in a checkpoint is executed.
    """


for _command in (bench, cache, show, env):
    main.add_command(_command)

report_option = click.option(
    "--report",
    "report_file",
    type=PATH,
    help="Write the report to this file too: .html is a page with plots, .md Markdown, .json data.",
)
end_to_end_option = click.option(
    "--end-to-end", is_flag=True, help="Time whole steps of the model too, before and after."
)


@main.command()
@click.argument("file", type=PATH, required=False)
@source_options
@cache_option
@end_to_end_option
@report_option
@force_option
@json_option
def inspect(
    file: Path | None,
    source: Source,
    cache: Path | None,
    end_to_end: bool,
    report_file: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Show what a conversion would do; changes nothing.

    Without --arch, list what the weights in FILE tell. With --end-to-end, time the model's steps and say what
    its grouped convolutions take of them: how much there is to gain.
    """
    if report_file:
        check_path(report_file, force=force)
    stored = source.read(file) if file else None
    _check_end_to_end(end_to_end, source, stored)
    if isinstance(stored, Checkpoint) and not source.arch and not (stored.module or stored.bundle):
        if report_file:
            raise click.UsageError("Weights alone give no report: name what builds the model with --arch.")
        _list_weights(stored, as_json)
        return
    with clean_stdout():
        model, _ = source.model(stored)
        inputs = source.example_inputs(model)
        report = _completed(stored, g3dswap.inspect(model, inputs, cache=cache))
        if end_to_end:
            report = replace(report, steps=measure_steps(model, inputs))
    if report_file:
        save_report(report, report_file, force=force)
    emit(report.to_dict(), str(report), as_json)


def _check_end_to_end(wanted: bool, source: Source, stored: Stored | None) -> None:
    if wanted and isinstance(stored, Program):
        raise click.UsageError(
            "A program is not run, so that it has no steps to time: leave --end-to-end out."
        )
    if wanted and not source.inputs:
        raise click.UsageError("Steps are timed on inputs: give their shapes with --input.")


def _completed(stored: Stored | None, report: Report) -> Report:
    """With the convolutions of a program that no layer stands for."""
    if isinstance(stored, Program):
        return replace(report, skipped=[*report.skipped, *stored.skipped])
    return report


def _list_weights(stored: Checkpoint, as_json: bool) -> None:
    """The 5-D weights; their shapes do not tell the groups, nor convolutions from transposed ones."""
    weights = {k: v for k, v in stored.state_dict.items() if isinstance(v, Tensor) and v.dim() == 5}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in weights.items()}
    if as_json:
        rows = [{"name": k, "shape": list(v.shape), "dtype": dtypes[k]} for k, v in weights.items()]
        emit({"file": str(stored.path), "groups": None, "weights": rows}, "", True)
        return
    if weights:
        table = Table("weight", "filters", "channels/group", "kernel", "dtype", box=None, pad_edge=False)
        for name, value in weights.items():
            filters, channels, *kernel = map(str, value.shape)
            table.add_row(name, filters, channels, "x".join(kernel), dtypes[name])
        print_table(table)
    click.echo(
        f"{len(weights)} five-dimensional weights in {stored.path}; their groups are unknown without the "
        "model: add --arch pkg.mod:factory."
    )


@main.command()
@click.argument("file", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="File to write, in the format of FILE.")
@source_options
@tuning_options("quick")
@click.option(
    "--verify",
    type=click.Choice(["layers", "model", "none"]),
    default="layers",
    show_default=True,
    help="Compare with float64 each swapped layer, which stays as it was if it fails, or the whole model "
    "too, where a failure writes nothing.",
)
@click.option(
    "--fuse",
    is_flag=True,
    help="For inference: fold batch norms and apply activations inside the layers before them. "
    "Needs --arch, or a whole module.",
)
@end_to_end_option
@report_option
@force_option
@json_option
def convert(
    file: Path,
    output: Path,
    source: Source,
    tuning: dict[str, Any],
    verify: str,
    fuse: bool,
    end_to_end: bool,
    report_file: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Convert the model of FILE, check it, and write it to OUTPUT.

    OUTPUT loads where FILE loaded, with --fuse into a model that was fused: convert(model.eval(), fuse=True).
    The choices of kernels go beside it: fast.pth, fast.plan.json. Both appear whole or not at all.
    """
    plan = output.with_suffix(".plan.json")
    for path in (output, plan):
        containers.check_output(path, force=force)
    if report_file:
        check_path(report_file, force=force)
        if report_file.resolve() in (output.resolve(), plan.resolve()):
            raise click.UsageError(f"{report_file} is what the conversion writes; name another --report.")
    stored = source.read(file)
    _check_end_to_end(end_to_end, source, stored)
    if not source.has_shapes(stored) and (verify == "model" or not tuning["plan"]):
        raise click.UsageError("Kernels are tuned for shapes: give the model's with --input, or a --plan.")
    if isinstance(stored, Program) and verify == "model":
        raise click.UsageError("A program is not run while it is converted: use g3dswap verify afterwards.")
    if isinstance(stored, Program) and fuse:
        raise click.UsageError("A program's layers are not fused: fuse the model, then export it.")
    if isinstance(stored, Checkpoint) and stored.module is not None and source.dtype:
        raise ArgumentError(f"{file} holds a whole module, which --dtype would change; leave --dtype out.")
    with clean_stdout():
        model, fitted = source.model(stored)
        inputs = source.example_inputs(model)
        if fuse:
            model.eval()
            tuning["fuse"] = True
        # Only a comparison of whole models needs the original beside the converted one.
        options = {"inplace": verify != "model", "verify": verify != "none", **tuning}
        fast = g3dswap.convert(model, inputs, **options)
        if verify == "model":
            g3dswap.verify(model, fast, inputs).check()
        if end_to_end:
            measure_steps(fast, inputs)
    report = _completed(stored, g3dswap.report(fast))
    _write_both(output, plan, fitted or stored, fast.to("cpu"), force)
    written = [str(output), str(plan)]
    if report_file:
        save_report(report, report_file, force=force)
        written.append(str(report_file))
    data = {**report.to_dict(), "output": str(output), "plan": str(plan)}
    emit(data, f"{report}\nWrote {', '.join(written[:-1])} and {written[-1]}.", as_json)


def _write_both(output: Path, plan: Path, stored: Stored, fast: nn.Module, force: bool) -> None:
    """The plan first, since it is small; if the checkpoint then fails, the plan is as it was before."""
    previous = plan.read_bytes() if plan.exists() else None
    g3dswap.save_plan(fast, plan)
    try:
        if isinstance(stored, Program):
            stored.write(output, fast, force=force)
        else:
            checkpoint.write(output, stored, fast, force=force)
    except BaseException:
        if previous is None:
            plan.unlink()
        else:
            plan.write_bytes(previous)
        raise


@main.command()
@click.argument("file", type=PATH, required=False)
@source_options
@shape_options
@tuning_options("quick")
@json_option
def tune(
    file: Path | None, source: Source, shape: Shape | None, tuning: dict[str, Any], as_json: bool
) -> None:
    """Tune the layers of a model, or one convolution given by options, into the cache.

    \b
    g3dswap tune --arch pkg.mod:resnext101 --input 8x3x16x112x112
    g3dswap tune --channels 64 --size 16x56x56 --kernel 3 --padding 1 --batch 8

    Several GPUs share the work under torchrun: torchrun --nproc-per-node=4 -m g3dswap tune ...
    """
    if shape and (file or source.arch):
        raise click.UsageError(NOT_BOTH)
    stored = source.read(file) if file else None
    if not shape and not source.has_shapes(stored):
        raise click.UsageError("Kernels are tuned for shapes: give the model's with --input.")
    with clean_stdout(), ranks.joined() as rank:
        if shape:
            source = shape.source(source)
        tuning["progress"] &= rank == 0
        model = shape.model(source) if shape else source.model(stored)[0]
        inputs = source.example_inputs(model)
        for value in inputs or () if shape else ():
            value.requires_grad_()  # in a network there is a layer before this one
        fast = g3dswap.convert(model, inputs, inplace=True, **tuning)
    if rank == 0:
        report = g3dswap.report(fast)
        emit(report.to_dict(), str(report), as_json)


@main.command()
@click.argument("original", type=PATH)
@click.argument("converted", type=PATH)
@source_options
@tuning_options("cached")
@json_option
def verify(original: Path, converted: Path, source: Source, tuning: dict[str, Any], as_json: bool) -> None:
    """Compare outputs and gradients of two files' models with float64.

    The choices come from the plan beside CONVERTED, if there is one. Exit code 3: they differ.
    """
    first, second = (source.read(file) for file in (original, converted))
    beside = converted.with_suffix(".plan.json")
    if tuning["plan"] is None and beside.exists():
        tuning["plan"] = beside
    if isinstance(first, Program) and isinstance(second, Program):
        _verify_programs(original, converted, source.trust, tuning["plan"], as_json)
        return
    if not source.inputs:
        raise click.UsageError("Outputs are compared on inputs: give their shapes with --input.")
    with clean_stdout():
        before = source.model(first)[0]
        inputs = source.example_inputs(before)
        if isinstance(second, Checkpoint) and _is_folded(second):
            # Its weights fit a model that was fused, whatever weights that had.
            after = g3dswap.convert(before.eval(), inputs, fuse=True, verify=False, **tuning)
            load_weights(after, second)
        else:
            after = source.model(second)[0]
            after = g3dswap.convert(after, inputs, inplace=True, verify=False, **tuning)
        verification = g3dswap.verify(before, after, inputs)
    emit(verification.to_dict(), str(verification), as_json)
    verification.check()


def _is_folded(stored: Checkpoint) -> bool:
    """Whether a file holds weights that batch norms were folded into."""
    return stored.module is None and any(name.rpartition(".")[2] == MARK for name in stored.keys)


def _verify_programs(original: Path, converted: Path, trust: bool, plan: Path | None, as_json: bool) -> None:
    """Compare what two programs compute on the inputs that the first was exported on."""
    before, arguments, keywords = program.load(original, trust=trust)
    after, _, _ = program.load(converted, trust=trust)
    if plan:
        g3dswap.use_plan(plan)
    verification = g3dswap.verify(before, after, arguments, example_kwargs=keywords)
    emit(verification.to_dict(), str(verification), as_json)
    verification.check()
