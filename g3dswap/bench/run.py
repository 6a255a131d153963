"""The benchmark: every layer and pass in turn, each result stored at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from g3dswap import native
from g3dswap.bench.device import agree, describe, gpu_facts, prepared
from g3dswap.bench.layers import BenchLayer
from g3dswap.bench.measure import ceilings, measure_pass
from g3dswap.bench.results import Results
from g3dswap.bench.rows import Row
from g3dswap.choose import Chooser
from g3dswap.errors import G3DSwapWarning
from g3dswap.problem import DIRECTIONS, LAYOUTS, Problem, dtype_name
from g3dswap.rounds import STATISTICS
from g3dswap.stored import open_cache


@dataclass(frozen=True)
class Settings:
    """What to measure, and how.

    layouts: those whose choices are measured; PyTorch is measured in all of them.
    batch:   of every layer; 0: the one that the layers' file gives.
    threads: PyTorch's and the kernels'; 0: as many as PyTorch takes.
    seconds: what each contender may take; each of the device's ceilings takes four times that.
    statistic: of the runs' times, "median" or "quartile"; None: that of the file, "median" in a new one.
    compile: time PyTorch's operator under torch.compile too.
    """

    layers: Sequence[BenchLayer]
    device: torch.device
    dtype: torch.dtype = torch.float32
    layouts: Sequence[str] = tuple(LAYOUTS)
    passes: Sequence[str] = DIRECTIONS
    batch: int = 1
    tune: str = "quick"
    cache: Path | None = None
    threads: int = 0
    seconds: float = 0.5
    statistic: str | None = None
    progress: bool = True
    compile: bool = False

    def said(self) -> dict[str, Any]:
        """What a file says of them; the rest may differ between the runs that it is from."""
        return {
            "dtype": dtype_name(self.dtype),
            "batch": self.batch,
            "tune": self.tune,
            "seconds": self.seconds,
            "compile": self.compile,
        }

    def problem(self, layer: BenchLayer, direction: str, layout: str) -> Problem:
        """A pass of a layer under PyTorch's present switches."""
        kind = self.device.type
        return Problem(
            direction,
            layer.geometry,
            self.dtype,
            layout,
            kind,
            bias=layer.bias and direction == "forward",
            precision=native.precision(self.dtype, kind),
            deterministic=native.deterministic(kind),
        )


def bench(settings: Settings, output: Path, csv: Path | None = None, resume: bool = False) -> Results:
    """Measure all layers and write `output` (JSON), and `csv`, after each pass.

    With `resume`, what `output` has already is not measured again; ArgumentError if that was measured
    under other conditions. A KeyboardInterrupt loses only the pass that it stops.
    """
    with prepared(settings.device, settings.threads):
        results = _begun(settings, output, resume)
        known = {row.key for row in results.rows}
        todo = [
            (layer, direction)
            for layer in settings.layers
            for direction in settings.passes
            if not all(key in known for key in _keys(settings, layer, direction))
        ]
        chooser = Chooser(open_cache(settings.cache), settings.tune, progress=settings.progress)
        chooser.expect(len(todo) * len(settings.layouts))
        # While one is measured nothing compiles, so what is tuned already is compiled before, side by side.
        chooser.prepare(
            (problem, batch, layer) for it in todo for _, layer, batch, problem in _keys(settings, *it)
        )
        _save(results, output, csv)
        said: set[str] = set()
        with tqdm(total=len(todo), unit="pass", disable=not settings.progress, dynamic_ncols=True) as bar:
            for layer, direction in todo:
                bar.set_description_str(f"{layer.name} {direction}")
                rows = _rows(settings, chooser, results, layer, direction, said)
                new = {row.key for row in rows}
                results.rows = [row for row in results.rows if row.key not in new] + rows
                _save(results, output, csv)
                bar.update()
    return results


def _rows(
    settings: Settings,
    chooser: Chooser,
    results: Results,
    layer: BenchLayer,
    direction: str,
    said: set[str],
) -> list[Row]:
    """Choose and measure one pass of a layer: a row for each layout."""
    batch = settings.batch or layer.batch
    problems = {layout: settings.problem(layer, direction, layout) for layout in LAYOUTS}
    choices = {layout: chooser.choose(problems[layout], batch, layer.layer) for layout in settings.layouts}
    if chooser.interrupted:  # it has kept what was tuned; a choice that was cut short is not worth a row
        raise KeyboardInterrupt
    found = measure_pass(choices, problems, batch, settings.seconds, settings.compile)
    rows = [
        Row(
            layer.model,
            layer.layer,
            layer.count,
            layer.kind,
            batch,
            choice.problem,
            choice.source,
            choice.reason,
            choice.schedule,
            found.ours[layout],
            found.torch,
            found.checks[layout],
            results.ceilings.roofline(choice.problem, batch),
            found.compiled,
        ).by(results.header["statistic"])
        for layout, choice in choices.items()
    ]
    _say(rows, [f"torch.compile in {layout}: {why}" for layout, why in found.failed.items()], said)
    return rows


def _say(rows: Sequence[Row], failures: Sequence[str], said: set[str]) -> None:
    """Warn of each reason once for why a time is missing."""
    notes = [f"no CUDA graph of {note}; its launches from Python count" for row in rows for note in row.notes]
    for note in (*notes, *(f"no time of {failure}" for failure in failures)):
        if note not in said:
            said.add(note)
            warnings.warn(
                f"{rows[0].name}, {rows[0].problem.direction}: {note}.", G3DSwapWarning, stacklevel=2
            )


def _keys(settings: Settings, layer: BenchLayer, direction: str) -> list[tuple[str, str, int, Problem]]:
    batch = settings.batch or layer.batch
    problems = (settings.problem(layer, direction, layout) for layout in settings.layouts)
    return [(layer.model, layer.layer, batch, problem) for problem in problems]


def _save(results: Results, output: Path, csv: Path | None) -> None:
    results.save(output)
    if csv:
        results.save_csv(csv)


def _begun(settings: Settings, output: Path, resume: bool) -> Results:
    """The results so far: those of the file, if it is to be gone on with, else none."""
    header = describe(settings.device, settings.said())
    header["statistic"] = settings.statistic or STATISTICS[0]
    if not resume or not output.exists():
        found = ceilings(settings.device.type, settings.dtype, 4 * settings.seconds)
        if settings.device.type == "cuda":
            header["gpu"] = gpu_facts()  # now, when its clocks are those of a busy device
        return Results(header, found)
    results = Results.load(output)
    results = results.by(settings.statistic or results.header["statistic"])
    agree(results.header, header, output)
    results.header["resumed"] = [*results.header.get("resumed", []), header["date"]]
    return results
