"""The options that several commands share, how a wrong value is reported, and what every error becomes."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from g3dswap import checkpoint, program
from g3dswap.arch import DTYPES as DTYPE_NAMES
from g3dswap.arch import (
    Input,
    allow_local_imports,
    build,
    load_weights,
    make_inputs,
    parse_device,
    parse_inputs,
    parse_kwargs,
    parse_triple,
)
from g3dswap.checkpoint import Checkpoint
from g3dswap.errors import ArgumentError, G3DSwapError, G3DSwapWarning, VerificationError, described
from g3dswap.problem import DTYPES, LAYOUTS, Geometry
from g3dswap.program import Layers, Program

Command = Callable[..., Any]

Stored = Checkpoint | Program

EXIT_CODES = """
\b
Exit codes:
  0    done
  1    error: one line on stderr says what and what to do
  2    wrong usage
  3    verification failed
  130  interrupted
"""


class Commands(click.Group):
    """Turns errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except G3DSwapError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(3 if isinstance(error, VerificationError) else 1)
        except torch.OutOfMemoryError as error:
            click.echo(f"error: {described(error)}; use a smaller --input.", err=True)
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted; what was tuned is in the cache.", err=True)
            ctx.exit(130)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    where = "" if issubclass(category, G3DSwapWarning) else f"{filename}:{lineno}: {category.__name__}: "
    click.echo(f"warning: {where}{message}", err=True)


class Parsed(click.ParamType):
    """A parameter whose text one function understands; what it objects to is wrong usage."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except G3DSwapError as error:
            self.fail(str(error), param, ctx)


INPUTS = Parsed("SHAPES", parse_inputs)
KWARGS = Parsed("JSON", parse_kwargs)
TRIPLE = Parsed("N|TxHxW", parse_triple)
DEVICE = Parsed("DEVICE", parse_device)
PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class Source:
    """Where the model and its inputs come from."""

    arch: str | None
    arch_kwargs: dict[str, Any] | None
    inputs: tuple[Input, ...]
    dtype: torch.dtype | None
    device: torch.device
    layout: str
    key: str | None
    trust: bool
    safe_globals: tuple[str, ...] = ()

    def read(self, file: Path) -> Stored:
        """Read a checkpoint, or a program, which brings all that the other options would say."""
        if checkpoint.kind(file) == "program":
            if self.arch or self.inputs or self.dtype or self.layout != "contiguous":
                raise ArgumentError(
                    f"{file} is a torch.export program, which has its shapes and dtypes in it; leave --arch, "
                    "--input, --dtype and --layout out."
                )
            return program.read(file)
        if self.trust or self.safe_globals:
            allow_local_imports()  # a pickled module may be of a class of the user's own
        return checkpoint.read(file, key=self.key, trust=self.trust, safe_globals=self.safe_globals)

    def has_shapes(self, stored: Stored | None) -> bool:
        """It is known what inputs the model meets."""
        return bool(self.inputs) or isinstance(stored, Program)

    def model(self, stored: Stored | None) -> tuple[nn.Module, Stored | None]:
        """The model with the weights that were read, on its device; and those with the fitting prefix."""
        if isinstance(stored, Program):
            return Layers(stored), stored
        if stored and stored.module is not None:
            if self.arch:
                raise ArgumentError(f"{stored.path} holds a whole module; leave --arch out.")
            return self.place(stored.module), stored
        if not self.arch and not (stored and stored.bundle):
            what = f"{stored.path} holds weights only" if stored else "There is no model"
            raise ArgumentError(f"{what}; name the function that builds it with --arch pkg.mod:factory.")
        model = self._built(stored)
        fitted = load_weights(model, stored) if stored else None
        return self.place(model), fitted

    def _built(self, stored: Checkpoint | None) -> nn.Module:
        if self.arch:
            return build(self.arch, self.arch_kwargs or {})
        assert stored is not None and stored.bundle is not None  # or there is no model
        return stored.bundle.network(trust=self.trust)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, dtype and layout."""
        model = model.to(self.device, self.dtype)
        if self.layout != "contiguous":
            for parameter in model.parameters():
                if parameter.dim() == 5:  # Module.to(memory_format=) fails where there are others
                    parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[self.layout])
        return model

    def example_inputs(self, model: nn.Module) -> tuple[Tensor, ...] | None:
        """Inputs as --input says, in the dtype of the model."""
        if isinstance(model, Layers):
            return model.inputs() or None
        floats = (t.dtype for t in model.parameters() if t.is_floating_point())
        dtype = self.dtype or next(floats, torch.float32)
        return make_inputs(self.inputs, dtype, self.device, LAYOUTS[self.layout]) if self.inputs else None


@dataclass(frozen=True)
class Shape:
    """A convolution given by options instead of a model."""

    geometry: Geometry
    batch: int
    bias: bool

    def source(self, source: Source) -> Source:
        """The same options with the input of this convolution."""
        return replace(source, inputs=(Input(self.geometry.input_shape(self.batch)),))

    def model(self, source: Source) -> nn.Module:
        """A model of this one layer, named ``conv``."""
        g = self.geometry
        conv = nn.Conv3d(
            g.in_channels, g.out_channels, g.kernel, g.stride, g.padding, g.dilation, g.groups, self.bias
        )
        model = nn.Sequential()
        model.add_module("conv", conv)
        return source.place(model)


def _stacked(options: list[Command]) -> Callable[[Command], Command]:
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


def _gathered(
    options: list[Command], name: str, gather: Callable[[dict[str, Any]], Any]
) -> Callable[[Command], Command]:
    """Adds ``options`` and passes what ``gather`` takes from their values as one argument."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            return command(**{name: gather(values)}, **values)

        return _stacked(options)(wrapper)

    return decorate


def _source(values: dict[str, Any]) -> Source:
    dtype = values.pop("dtype")
    return Source(
        arch=values.pop("arch"),
        arch_kwargs=values.pop("arch_kwargs"),
        inputs=values.pop("input") or (),
        dtype=DTYPE_NAMES[dtype] if dtype else None,
        device=values.pop("device"),
        layout=values.pop("layout"),
        key=values.pop("key"),
        trust=values.pop("trust"),
        safe_globals=values.pop("safe_global"),
    )


def _shape(values: dict[str, Any]) -> Shape | None:
    names = ("filters", "groups", "size", "kernel", "stride", "padding", "dilation", "batch", "bias")
    given = {name: values.pop(name) for name in names}
    channels = values.pop("channels")
    if channels is None:
        used = [name for name in ("filters", "groups", "size") if given[name] is not None]
        if used:
            raise click.UsageError(f"--{used[0]} describes a convolution, which needs --channels too.")
        return None
    if given["size"] is None:
        raise click.UsageError("--channels describes a convolution, which needs --size too.")
    geometry = Geometry(
        channels,
        given["filters"] or channels,
        given["groups"] or channels,
        *(given[name] for name in ("size", "kernel", "stride", "padding", "dilation")),
    )
    return Shape(geometry, given["batch"], given["bias"])


def _tuning(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``g3dswap.convert``."""
    return {
        "tune": values.pop("tune"),
        "cache": values.pop("cache"),
        "plan": values.pop("plan"),
        "include": list(values.pop("include")) or None,
        "exclude": list(values.pop("exclude")) or None,
        "min_speedup": values.pop("min_speedup"),
        "strict": values.pop("strict"),
        "functional": values.pop("functional"),
        "progress": not values.pop("quiet"),
    }


_NAMES = [name for name, dtype in DTYPE_NAMES.items() if dtype in DTYPES]

source_options = _gathered(
    [
        click.option(
            "--arch",
            metavar="PKG.MOD:FACTORY",
            help="Function or class that builds the model. Imports PKG.MOD and so runs its code; "
            "looked for in the current directory first.",
        ),
        click.option("--arch-kwargs", type=KWARGS, help="Arguments of the factory, as a JSON object."),
        click.option(
            "--input",
            type=INPUTS,
            help="Shapes of the model's inputs, such as 8x3x16x112x112; several by commas, each with an "
            "optional :dtype.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(_NAMES),
            help="Move the model and its inputs to this dtype to tune for it; the file keeps its own.",
        ),
        click.option(
            "--device",
            type=DEVICE,
            default=lambda: parse_device(None),
            help="cpu, cuda or cuda:INDEX; the GPU if there is one.",
        ),
        click.option(
            "--layout",
            type=click.Choice(list(LAYOUTS)),
            default="contiguous",
            show_default=True,
            help="Memory format of the model and its inputs.",
        ),
        click.option("--key", help="Entry of the file that holds the weights, dotted for deeper ones."),
        click.option(
            "--trust", is_flag=True, help="Unpickle the file without restriction, which runs any code in it."
        ),
        click.option(
            "--safe-global",
            multiple=True,
            metavar="PKG.CLASS",
            help="Let the file use this class or function too, whose module is imported; may be repeated.",
        ),
    ],
    "source",
    _source,
)

shape_options = _gathered(
    [
        click.option("--channels", type=click.IntRange(1), help="Input channels of one convolution."),
        click.option("--filters", type=click.IntRange(1), help="Its output channels; by default as many."),
        click.option("--groups", type=click.IntRange(1), help="Its groups; by default as many: depthwise."),
        click.option("--size", type=TRIPLE, help="Its input's TxHxW."),
        click.option("--kernel", type=TRIPLE, default="3", show_default=True, help="Its kernel's size."),
        click.option("--stride", type=TRIPLE, default="1", show_default=True, help="Its stride."),
        click.option("--padding", type=TRIPLE, default="0", show_default=True, help="Zeros on each side."),
        click.option("--dilation", type=TRIPLE, default="1", show_default=True, help="Its dilation."),
        click.option(
            "--batch", type=click.IntRange(1), default=1, show_default=True, help="Images of its input."
        ),
        click.option("--bias/--no-bias", default=False, help="Whether it has a bias."),
    ],
    "shape",
    _shape,
)

cache_option = click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Directory of the options cache."
)


def tuning_options(default: str) -> Callable[[Command], Command]:
    """Options of ``g3dswap.convert``, with the default of --tune."""
    options = [
        click.option(
            "--tune",
            type=click.Choice(["none", "cached", "quick", "full"]),
            default=default,
            show_default=True,
            help="How much to measure.",
        ),
        cache_option,
        click.option("--plan", type=PATH, help="Take the choices from this plan file instead of tuning."),
        click.option("--include", multiple=True, metavar="GLOB", help="Only layers of such names."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="No layers of such names."),
        click.option(
            "--min-speedup",
            type=click.FloatRange(1.0),
            default=1.05,
            show_default=True,
            help="Keep a layer where the gain is smaller.",
        ),
        click.option("--strict", is_flag=True, help="A layer that must be skipped is an error."),
        click.option(
            "--functional", is_flag=True, help="Convert calls of F.conv3d and F.conv_transpose3d too."
        ),
        click.option("--quiet", is_flag=True, help="No progress bar."),
    ]
    return _gathered(options, "tuning", _tuning)


def print_table(table: Table) -> None:
    """As wide as the terminal; in a pipe as wide as it needs to be, so that no name is folded."""
    width = None if sys.stdout.isatty() else 1000
    Console(markup=False, highlight=False, width=width).print(table)


NOT_BOTH = "Give either a model or a convolution (--channels ...), not both."


def emit(data: Any, text: str, as_json: bool) -> None:
    """Print one or the other on stdout."""
    click.echo(json.dumps(data, indent=2, default=str) if as_json else text)


@contextlib.contextmanager
def clean_stdout() -> Iterator[None]:
    """What a model prints in its forward goes to stderr, so that stdout is what the command says."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")
