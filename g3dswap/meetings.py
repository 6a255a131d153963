"""The inputs that a convolution meets when its model runs, as far as they decide which kernels it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g3dswap import native
from g3dswap.module import Conv
from g3dswap.problem import transposed_size


@dataclass(frozen=True)
class Meeting:
    """One kind of input that a layer met."""

    batch: int
    size: tuple[int, int, int]
    """T, H, W of the layer's input, before any padding."""
    dtype: torch.dtype
    """What the convolution computes in; under autocast not the input's own."""
    layout: str
    device: torch.device
    grad_input: bool
    grad_weight: bool
    output_padding: tuple[int, ...] = ()
    """What the call's ``output_size`` made of a transposed layer's; empty for the layer's own."""


class Hook:
    """A forward pre-hook that notes what a layer meets."""

    def __init__(self, meetings: list[Meeting], grads: bool) -> None:
        self.meetings = meetings
        self.grads = grads

    def __call__(self, module: Conv, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        value = args[0] if args else kwargs.get("input")
        if not isinstance(value, Tensor) or value.dim() not in (4, 5):
            return  # The layer itself will say what is wrong with it.
        shape = tuple(value.shape) if value.dim() == 5 else (1, *value.shape)
        extra = _asked_for(module, value, args[1] if len(args) > 1 else kwargs.get("output_size"))
        if module.transposed and min(_size(module, shape[2:], extra)) < 1:
            return  # The result is empty.
        trains = self.grads and module.weight.requires_grad
        # Where a part of the forward runs without recording (re-entrant activation checkpointing, which
        # recomputes it later), the input says nothing: then assume what the weight says.
        needs = value.requires_grad if torch.is_grad_enabled() else trains
        meeting = Meeting(
            batch=shape[0],
            size=(shape[2], shape[3], shape[4]),
            dtype=compute_dtype(value),
            layout=layout_of(module, value),
            device=value.device,
            grad_input=self.grads and needs,
            grad_weight=trains,
            output_padding=extra,
        )
        if meeting not in self.meetings:
            self.meetings.append(meeting)


def _size(module: Any, size: Sequence[int], extra: Sequence[int]) -> list[int]:
    """The size that a transposed layer makes of this one."""
    options = module.kernel_size, module.stride, module.padding, module.dilation
    return transposed_size(size, *options, extra or module.output_padding)


def _asked_for(module: Conv, value: Tensor, output_size: Any) -> tuple[int, ...]:
    """The output padding that a transposed layer's ``output_size`` means, where it is not the layer's own."""
    if output_size is None or not isinstance(module, nn.ConvTranspose3d):
        return ()
    layer: Any = module
    options = layer.stride, layer.padding, layer.kernel_size, 3, layer.dilation
    extra = tuple(layer._output_padding(value, list(output_size), *options))
    return () if extra == tuple(layer.output_padding) else extra


def compute_dtype(value: Tensor) -> torch.dtype:
    """The dtype that a convolution of this input computes in: autocast's, if it is on."""
    kind = value.device.type
    if value.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return value.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


def layout_of(module: Conv, value: Tensor) -> str:
    """The layout in which PyTorch would compute and return the layer's output."""
    image = value if value.dim() == 5 else value.unsqueeze(0)
    image = image.detach().to(compute_dtype(value))
    if module.padding_mode != "zeros":
        # Circular padding, for one, returns a contiguous tensor whatever it gets.
        image = F.pad(image, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    chosen = native.output_format(image, module.weight, module.stride, module.dilation, module.groups)
    return "channels_last_3d" if chosen == torch.channels_last_3d else "contiguous"
