"""Models and inputs from what a command line can say: ``pkg.mod:factory``, JSON, ``8x3x16x112x112``."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from g3dswap.checkpoint import Checkpoint, is_same_tensor
from g3dswap.errors import ArgumentError, ConvertError, described

DTYPES = {
    name: dtype
    for dtype, names in {
        torch.float32: ("float32", "fp32", "float"),
        torch.float64: ("float64", "fp64", "double"),
        torch.bfloat16: ("bfloat16", "bf16"),
        torch.float16: ("float16", "fp16", "half"),
        torch.int64: ("int64", "long"),
        torch.int32: ("int32", "int"),
        torch.uint8: ("uint8",),
        torch.bool: ("bool",),
    }.items()
    for name in names
}
"""The names of dtypes on a command line."""

_SHOWN = 8  # so many keys of a list are named in a message


@dataclass(frozen=True)
class Input:
    """Shape of one example input; no ``dtype`` means the model's."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def parse_inputs(text: str) -> tuple[Input, ...]:
    """``8x3x16x112x112,8x10:int64`` -> two inputs. Raises ArgumentError."""
    return tuple(_parse_input(part.strip()) for part in text.split(","))


def _parse_input(text: str) -> Input:
    shape, colon, name = text.partition(":")
    if not re.fullmatch(r"[1-9][0-9]{0,17}(x[1-9][0-9]{0,17})*", shape, flags=re.ASCII):
        raise ArgumentError(
            f"{text!r} is no shape: write positive extents joined by x, batch first, such as 8x3x16x112x112."
        )
    if colon and name not in DTYPES:
        raise ArgumentError(f"{text!r} has an unknown dtype; use one of {', '.join(DTYPES)}.")
    return Input(tuple(map(int, shape.split("x"))), DTYPES[name] if colon else None)


def parse_triple(text: str) -> tuple[int, int, int]:
    """``3`` or ``1x3x3`` -> three integers. Raises ArgumentError."""
    if not re.fullmatch(r"[0-9]{1,18}(x[0-9]{1,18}x[0-9]{1,18})?", text, flags=re.ASCII):
        raise ArgumentError(f"{text!r} is neither one integer nor three joined by x, such as 1x3x3.")
    values = [int(part) for part in text.split("x")]
    return (values * 3)[0], (values * 3)[1], (values * 3)[2]


def parse_kwargs(text: str) -> dict[str, Any]:
    """A JSON object. Raises ArgumentError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(
            f"{text!r} is no JSON ({error}); write an object such as '{{\"depth\": 101}}'."
        ) from None
    if not isinstance(value, dict):
        raise ArgumentError(f"{text!r} is no JSON object; write one such as '{{\"depth\": 101}}'.")
    return value


def parse_device(text: str | None) -> torch.device:
    """A device that is there; by default the GPU if there is one. Raises ArgumentError."""
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise ArgumentError(f"{text!r} is no device that has kernels; use cpu, cuda or cuda:INDEX.")
    device = torch.device(text)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ArgumentError(
            f"{text!r} is not on this machine, which has {count} CUDA devices; use another or cpu."
        )
    return device


def make_inputs(
    specs: Sequence[Input], dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format
) -> tuple[Tensor, ...]:
    """Reproducible inputs: normally distributed, or zeros and ones where the dtype is no float."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for spec in specs:
        wanted = spec.dtype or dtype
        if wanted.is_floating_point:
            value = torch.randn(spec.shape, generator=generator)
        else:
            value = torch.randint(0, 2, spec.shape, generator=generator)
        value = value.to(device, wanted)
        inputs.append(value.contiguous(memory_format=memory_format) if value.dim() == 5 else value)
    return tuple(inputs)


def build(arch: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Import the module that ``pkg.mod:factory`` names (no other) and call the factory.

    The current directory comes first on the import path, as with ``python -m``. What the code
    prints goes to stderr. Raises ArgumentError and ConvertError.
    """
    name, _, attributes = arch.partition(":")
    if name.endswith(".py"):
        module = os.path.basename(name).removesuffix(".py")
        raise ArgumentError(
            f"--arch {arch} names a file; name its module, {module}:{attributes}, and run this there."
        )
    if not all(part.isidentifier() for part in [*name.split("."), *attributes.split(".")]):
        raise ArgumentError(f"--arch {arch} is not of the form pkg.mod:factory.")
    allow_local_imports()
    with contextlib.redirect_stdout(sys.stderr):
        factory = _import(arch, name)
        for attribute in attributes.split("."):
            factory = _attribute(arch, factory, attribute)
        if isinstance(factory, nn.Module) or not callable(factory):
            raise ArgumentError(
                f"--arch {arch} is a {type(factory).__name__}; name a class or function that returns a model."
            )
        _check_kwargs(arch, factory, kwargs)
        try:
            model = factory(**kwargs)
        except (Exception, SystemExit) as error:
            raise ConvertError(f"--arch {arch} raised {described(error)}; check --arch-kwargs.") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"--arch {arch} returned a {type(model).__name__}, no torch.nn.Module.")
    return model


def allow_local_imports() -> None:
    """Let modules in the current directory be imported until the process ends, as ``python -m`` does.

    Only for users who asked for code to be run: without that, a file such as ``./numpy.py`` beside a
    downloaded checkpoint must not be.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _import(arch: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ArgumentError(
                f"--arch {arch}: there is no module {error.name}; install it or run this in its directory."
            ) from None
        raise ConvertError(f"--arch {arch}: importing {name} raised {described(error)}.") from error
    except (Exception, SystemExit) as error:
        raise ConvertError(f"--arch {arch}: importing {name} raised {described(error)}.") from error


def _attribute(arch: str, owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        known = [n for n in dir(owner) if not n.startswith("_") and callable(getattr(owner, n, None))]
        close = difflib.get_close_matches(name, known, 3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "name a factory that is in it."
        raise ArgumentError(f"--arch {arch}: {owner.__name__} has no {name}; {remedy}") from None


def _check_kwargs(arch: str, factory: Any, kwargs: Mapping[str, Any]) -> None:
    """Tell wrong arguments from errors inside the factory, where its signature is known."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise ArgumentError(f"--arch {arch}: {error}; set its arguments with --arch-kwargs.") from None


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Load a checkpoint strictly; returns it with the prefix that fitted. Raises ConvertError."""
    fitted = checkpoint.fit(model.state_dict())
    state, wanted = fitted.state_dict, model.state_dict()
    problems = []
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        missing, unexpected = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
        problems = re.findall(r"size mismatch for (\S+): .*?\[(.*?)\].*?\[(.*?)\]", str(error))
        if not problems:
            raise ConvertError(f"{checkpoint.path} does not load: {described(error)}.") from error
    # Of tied weights a file may have one only.
    loaded = wanted.keys() - set(missing)
    missing = [k for k in missing if not any(is_same_tensor(wanted[k], wanted[other]) for other in loaded)]
    parts = []
    if missing:
        parts.append(f"lacks {_counted(missing)}")
    if unexpected:
        parts.append(f"has {_counted(unexpected)} too many")
    if problems:
        shapes = [
            f"{name} of {_times(theirs)} where the model has {_times(ours)}"
            for name, theirs, ours in problems
        ]
        parts.append(f"has other shapes ({_listed(shapes)})")
    if parts:
        raise ConvertError(
            f"{checkpoint.path} does not fit the model: it {', '.join(parts)}; "
            "check --arch, --arch-kwargs and --key."
        )
    return fitted


def _counted(keys: Sequence[str]) -> str:
    return f"{len(keys)} key{'s' if len(keys) > 1 else ''} ({_listed(keys)})"


def _listed(names: Sequence[str]) -> str:
    more = f", ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _times(shape: str) -> str:
    return shape.replace(", ", "x") or "a scalar"
