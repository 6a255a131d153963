"""Which models can be converted, and which of their layers were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from g3dswap.discover import Site, find, matches, patterns
from g3dswap.entries import Skipped
from g3dswap.errors import ArgumentError, ConvertError
from g3dswap.guard import a_type


@dataclass(frozen=True)
class Selection:
    """The grouped convolutions of a model, and what ``include`` and ``exclude`` say of them."""

    sites: list[Site]
    """Those that can be swapped, or are already."""
    skipped: list[Skipped]
    """Those that cannot."""
    known: dict[int, str]
    """``id(module) -> name`` of both."""
    include: tuple[str, ...] | None
    exclude: tuple[str, ...] | None

    def refused(self, names: tuple[str, ...]) -> str | None:
        """Why a layer of these names was not asked for; None if it was."""
        if self.include is not None and not matches(names, self.include):
            return f"not asked for: include={_quoted(self.include)}"
        if self.exclude is not None and matches(names, self.exclude):
            return f"excluded by exclude={_quoted(self.exclude)}"
        return None

    def check_strict(self) -> None:
        """Raise if a layer that was asked for cannot be swapped."""
        failing = [item for item in self.skipped if not self.refused((item.name, *item.aliases))]
        if failing:
            first = failing[0]
            others = ", ".join(repr(item.name) for item in failing[1:4])
            more = f" (and {others}{', ...' if len(failing) > 4 else ''})" if others else ""
            raise ConvertError(
                f"With strict=True every grouped convolution has to be swapped, and {first.name!r}{more} "
                f"cannot be: {first.reason}; exclude it, or leave strict out."
            )


def _quoted(globs: tuple[str, ...]) -> str:
    return repr(globs[0]) if len(globs) == 1 else repr(list(globs))


def select(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Selection:
    """Find the layers and check the patterns.

    Raises:
        ArgumentError: a pattern that matches no grouped convolution, with suggestions.
    """
    sites, skipped, known = find(model)
    names = [name for site in sites for name in site.names]
    names += [name for item in skipped for name in (item.name, *item.aliases)]
    return Selection(
        sites, skipped, known, patterns(include, "include", names), patterns(exclude, "exclude", names)
    )


def check_model(model: Any, function: str) -> None:
    """Raise unless this is a module that can be changed."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ArgumentError(f"{function}() takes a model, and {model.__name__} is a class; make an instance.")
    if isinstance(model, Mapping) and not isinstance(model, nn.Module):
        raise ArgumentError(
            f"{function}() takes a torch.nn.Module, not {a_type(model)}; build the model and load the "
            "state_dict into it first."
        )
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{function}() takes a torch.nn.Module, not {a_type(model)}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConvertError(
            "The model is TorchScript, whose modules cannot be replaced; convert the Python model instead."
        )
    for name, module in model.named_modules():
        what = _wrapper(module)
        if what:
            where = f"Its part {name!r}" if name else "The model"
            raise ConvertError(f"{where} {what}.")


def _wrapper(module: nn.Module) -> str | None:
    """What is in the way of replacing this module's children, and what to do."""
    if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
        return "is wrapped by torch.compile; convert the original (its _orig_mod) and compile the result"
    if module._compiled_call_impl is not None:
        return "was compiled with .compile(); convert it before"
    for base in type(module).__mro__:
        if base.__module__.startswith("torch."):
            if base.__name__ == "DistributedDataParallel":
                return "is wrapped in DistributedDataParallel; convert its .module and wrap the result"
            if base.__name__ in ("FullyShardedDataParallel", "FSDPModule"):
                return "is sharded by FSDP; convert the model before sharding it"
    return None
