"""The commands that only look: ``show`` and ``env``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from g3dswap import environment
from g3dswap.options import (
    NOT_BOTH,
    PATH,
    Parsed,
    Shape,
    Source,
    cache_option,
    clean_stdout,
    emit,
    json_option,
    shape_options,
    source_options,
)
from g3dswap.problem import DIRECTIONS
from g3dswap.show import (
    STAGES,
    UNSCHEDULED,
    layer_problem,
    parse_schedule,
    schedule_for,
    stages,
    unscheduled,
)
from g3dswap.show import problem as pass_problem
from g3dswap.stored import open_cache
from g3dswap.tc.kernel import TARGETS, target_of
from g3dswap.tc.schedule import Schedule

SCHEDULE = Parsed("JSON", parse_schedule)


@click.command()
@click.argument("file", type=PATH, required=False)
@click.option("--layer", metavar="NAME", help="The layer of the model, where there are several.")
@source_options
@shape_options
@cache_option
@click.option(
    "--pass",
    "direction",
    type=click.Choice(DIRECTIONS),
    default="forward",
    show_default=True,
    help="Which of the three.",
)
@click.option("--target", type=click.Choice(TARGETS), help="Kernel language; the device's by default.")
@click.option("--stage", type=click.Choice(STAGES), help="One form only; by default all of them.")
@click.option("--schedule", type=SCHEDULE, help="JSON; by default the tuned one, if there is any.")
@json_option
def show(
    file: Path | None,
    layer: str | None,
    source: Source,
    shape: Shape | None,
    cache: Path | None,
    direction: str,
    target: str | None,
    stage: str | None,
    schedule: Schedule | None,
    as_json: bool,
) -> None:
    """Print every form of a convolution's pass: notation, nest, scheduled nest, source text.

    \b
    g3dswap show --arch pkg.mod:resnext101 --input 8x3x16x112x112 --layer layer1.0.conv2
    g3dswap show --channels 64 --size 16x56x56 --kernel 3 --padding 1 --pass grad_input
    """
    if shape and (file or source.arch):
        raise click.UsageError(NOT_BOTH)
    stored = source.read(file) if file else None
    if shape:
        dtype, device = source.dtype or torch.float32, source.device.type
        problem = pass_problem(direction, shape.geometry, dtype, source.layout, device, shape.bias)
    elif source.has_shapes(stored):
        with clean_stdout():
            model = source.model(stored)[0]
            problem = layer_problem(model, source.example_inputs(model) or (), layer, direction)
    else:
        raise click.UsageError("Say which convolution: --channels and --size, or a model's with --input.")
    if stage in UNSCHEDULED and not as_json:  # at once, without looking for a schedule
        click.echo(unscheduled(problem)[stage])
        return
    target = target or target_of(problem.device)
    origin = "given"
    if schedule is None:
        schedule, origin = schedule_for(problem, target, open_cache(cache))
    forms = stages(problem, schedule, target)
    if as_json:
        data = {"problem": str(problem), "target": target, "schedule": schedule.to_json(), "origin": origin}
        emit({**data, **forms}, "", True)
    elif stage:
        click.echo(forms[stage])
    else:
        click.echo(f"{problem}\n{target} schedule ({origin}): {schedule}")
        for name, text in forms.items():
            click.echo(f"\n{name}\n{'-' * len(name)}\n{text}")


@click.command()
@json_option
def env(as_json: bool) -> None:
    """Show versions, devices, the compiler and the cache: what a bug report needs."""
    facts = environment.describe()
    lines = [f"{name:12} {_plain(value)}" for name, value in facts.items()]
    emit(facts, "\n".join(lines), as_json)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)
