"""Calls of convolution functions inside a forward, as a run of the model shows them."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from g3dswap.entries import ROOT, Functional, Layer
from g3dswap.meetings import Hook, Meeting
from g3dswap.module import Conv
from g3dswap.trace import function_name, groups_of, place, user_frame

_ARGUMENTS = {
    "conv3d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose3d": (
        *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
}


@dataclass
class Use:
    """Calls of one function at one place that compute the same, but for the size of the input."""

    entry: Functional
    module: Conv | None
    """A layer that computes the same, with the weight of the first call; None for other functions."""
    meetings: list[Meeting] = field(default_factory=list)
    """The distinct inputs, in order."""


class FunctionCalls(TorchFunctionMode):
    """Notes calls of convolution functions with groups > 1 that come from no layer of PyTorch's.

    ``grads``: gradients count, as for `Hook`.
    """

    def __init__(self, model: nn.Module, grads: bool) -> None:
        super().__init__()
        self.names = {id(module): name or ROOT for name, module in model.named_modules()}
        self.grads = grads
        self.found: dict[tuple[str, str, str, int, Layer | None], Use] = {}

    @property
    def uses(self) -> list[Use]:
        """What was noted, in order."""
        return list(self.found.values())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        groups = groups_of(func, args, kwargs)
        if not isinstance(groups, int) or groups <= 1 or _inside_layer():
            return func(*args, **kwargs)
        result = func(*args, **kwargs)  # PyTorch has accepted the arguments
        frame = user_frame(sys._getframe())
        self._note(function_name(func), groups, frame, args, kwargs)
        return result

    def _note(
        self,
        function: str,
        groups: int,
        frame: types.FrameType | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        value = args[0] if args else kwargs.get("input")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        entry = Functional(self._owner(frame), function, groups, place(frame), shape)
        module = None
        if function in _ARGUMENTS:
            module = _as_layer(function, {**dict(zip(_ARGUMENTS[function], args)), **kwargs})
        key = (entry.name, function, entry.where, groups, Layer.of(module) if module else None)
        use = self.found.setdefault(key, Use(entry, module))
        if use.module is not None:
            Hook(use.meetings, self.grads)(use.module, (value,), {})

    def _owner(self, frame: types.FrameType | None) -> str:
        """The module of the model whose forward is running, as the stack shows; ``?`` where there is none."""
        while frame is not None:
            if frame.f_code is _CALL and id(frame.f_locals["self"]) in self.names:
                return self.names[id(frame.f_locals["self"])]
            frame = frame.f_back
        return "?"


_CALL = nn.Module._call_impl.__code__
"""Of the function that runs every forward."""


def _inside_layer() -> bool:
    """Called by a layer of PyTorch's (or a subclass of one): that is a layer, reported as such."""
    frame = sys._getframe(2)
    for _ in range(4):
        if isinstance(frame.f_locals.get("self"), nn.modules.conv._ConvNd):
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


def _as_layer(function: str, given: Mapping[str, Any]) -> Conv | None:
    """A layer that computes what a call with these arguments does; None for what no layer has."""
    weight, bias, groups = given["weight"], given.get("bias"), given["groups"]
    if not isinstance(weight, Tensor) or weight.dim() != 5 or not weight.is_floating_point():
        return None
    transposed = function == "conv_transpose3d"
    first, second = weight.shape[0], weight.shape[1] * groups
    arguments: dict[str, Any] = {
        "in_channels": first if transposed else second,
        "out_channels": second if transposed else first,
        "kernel_size": tuple(weight.shape[2:]),
        "groups": groups,
        "bias": bias is not None,
        "device": "meta",
        **{name: _triple(given[name]) for name in ("stride", "padding", "dilation") if name in given},
    }
    module: Conv
    if transposed:
        module = nn.ConvTranspose3d(**arguments, output_padding=_triple(given.get("output_padding", 0)))
    else:
        module = nn.Conv3d(**arguments)
    module.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return module


def _triple(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(value) * 3 if len(value) == 1 else tuple(value)
    return value


def merge_functional(traced: Sequence[Functional], run: Sequence[Functional]) -> list[Functional]:
    """Calls that tracing found, with what a run showed of them, and those that only the run showed."""
    shown: dict[tuple[str, str], list[Functional]] = {}
    for item in run:
        shown.setdefault((item.name, item.where), []).append(item)
    merged = []
    for item in traced:
        merged += shown.pop((item.name, item.where), [item])
    return merged + [item for items in shown.values() for item in items]
