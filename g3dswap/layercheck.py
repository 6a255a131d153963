"""One layer before and after the swap: outputs and gradients on random data, against float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g3dswap import native, workload
from g3dswap.discover import Meeting
from g3dswap.fused import NOTHING, Fusion
from g3dswap.module import Conv
from g3dswap.problem import LAYOUTS

MOST_IMAGES = 2
"""The batch is a run-time argument of every kernel, so that a small one shows what a large one would."""


def check_layer(
    conv: Conv,
    meeting: Meeting,
    swap: Callable[[Any], nn.Module],
    bounds: Mapping[str, float],
    fusion: Fusion = NOTHING,
) -> str | None:
    """What is wrong with the swapped layer on this kind of input; None if nothing is.

    With a ``fusion`` it is compared with the layer and what follows it in the model, one after the other.

    The layer's class and arguments are checked on random weights, in a copy without the hooks: forward
    and those gradients that a training step needs. The bound is that of a kernel: twice the error of PyTorch
    on the same data, or the floor of the dtype, or what tuning measured (``bounds``, by direction), whichever
    is largest. Float64 convolutions are slow: of a large layer only some groups are computed in float64,
    and the rest is compared with PyTorch's result.
    """
    device = meeting.device
    generator = torch.Generator(device).manual_seed(0)
    batch = max(1, min(meeting.batch, MOST_IMAGES))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=meeting.dtype)

    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        weight = torch.empty_like(conv.weight, dtype=meeting.dtype, device=device)
        weight.data.copy_(normal(*conv.weight.shape))
        bias = None if conv.bias is None else normal(*conv.bias.shape)
        twin = _conv(conv, meeting, conv.groups, weight.detach(), bias).eval()
        value = normal(batch, conv.in_channels, *meeting.size)
        value = value.contiguous(memory_format=LAYOUTS[meeting.layout])
        with torch.no_grad():
            shape = native.unsearched(partial(twin, value)).shape
        grad = normal(*shape).contiguous(memory_format=LAYOUTS[meeting.layout])
        theirs = native.unsearched(partial(_passes, twin, value, grad, meeting))
        ours = _passes(swap(twin), value, grad, meeting)
        # Of input and output, the one whose channels come first in the weight.
        groups = _affordable(conv, value.shape if conv.transposed else shape, device.type)
        given = weight, bias, value, grad, meeting
        reference = native.unsearched(partial(_reference, conv, groups, *given))
        if fusion:
            theirs["forward"] = _followed(theirs["forward"], fusion, range(conv.groups), conv.groups)
            reference["forward"] = _followed(reference["forward"], fusion, groups, conv.groups)
    for name, wanted in reference.items():
        dim = 1 if name in ("forward", "grad_input") else 0
        own = native.error(_part(theirs[name], groups, conv.groups, dim), wanted)
        bound = max(2 * own, native.FLOORS[meeting.dtype], bounds.get(name, 0.0))
        error = native.error(_part(ours[name], groups, conv.groups, dim), wanted)
        # Both are within their errors of the exact result, so they cannot be further apart than this.
        if not error <= bound or not workload.distance(ours[name], theirs[name]) <= 2 * bound:
            return f"{name.replace('_', '-')} has a relative error of {error:.2g}, {bound:.2g} is allowed"
    return None


def _conv(conv: Conv, meeting: Meeting, groups: int, weight: Tensor, bias: Tensor | None) -> Conv:
    """A convolution with the arguments of ``conv``, but this many of its groups and these weights."""
    arguments: dict[str, Any] = {
        "in_channels": groups * (conv.in_channels // conv.groups),
        "out_channels": groups * (conv.out_channels // conv.groups),
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": groups,
        "bias": bias is not None,
        "padding_mode": conv.padding_mode,
        "device": "meta",
        "dtype": weight.dtype,
    }
    result: Conv
    if conv.transposed:
        extra: Any = meeting.output_padding or conv.output_padding
        result = nn.ConvTranspose3d(**arguments, output_padding=extra)
    else:
        result = nn.Conv3d(**arguments)
    result.weight = nn.Parameter(weight)
    result.bias = None if bias is None else nn.Parameter(bias)
    return result


def _passes(layer: Any, value: Tensor, grad: Tensor, meeting: Meeting) -> dict[str, Tensor]:
    """Forward and the gradients that are needed, by name."""
    value = value.detach().requires_grad_(meeting.grad_input)
    for parameter in layer.parameters():
        parameter.requires_grad_(meeting.grad_weight)
    with torch.enable_grad():
        out = layer(value)
        targets = {"grad_input": value} if meeting.grad_input else {}
        if meeting.grad_weight:
            targets["grad_weight"] = layer.weight
            if layer.bias is not None:
                targets["grad_bias"] = layer.bias
        found = torch.autograd.grad(out, list(targets.values()), grad) if targets else ()
    return {"forward": out.detach(), **dict(zip(targets, found))}


def _affordable(conv: Conv, shape: torch.Size, device: str) -> list[int]:
    """The groups whose float64 result can be waited for; the last is always among them."""
    flops = 2 * prod(shape) * prod(conv.weight.shape[1:])
    return workload.spread(conv.groups, int(workload.REFERENCE_FLOPS[device] * conv.groups / max(flops, 1)))


def _reference(
    conv: Conv,
    groups: list[int],
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    grad: Tensor,
    meeting: Meeting,
) -> dict[str, Tensor]:
    """The same passes of some groups in float64."""

    def part(tensor: Tensor, dim: int) -> Tensor:
        return _part(tensor.detach(), groups, conv.groups, dim).double().contiguous()

    layer = _conv(conv, meeting, len(groups), part(weight, 0), None if bias is None else part(bias, 0))
    return _passes(layer, part(value, 1), part(grad, 1), meeting)


def _followed(out: Tensor, fusion: Fusion, groups: Sequence[int], count: int) -> Tensor:
    """What the layers after a convolution make of its result, or of these of its groups."""
    norm = fusion.norm
    if norm is not None:
        wide = torch.promote_types(out.dtype, torch.float32)
        mean, var, weight, bias = (
            None if item is None else _part(item.detach(), groups, count, 0).to(wide)
            for item in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        out = F.batch_norm(out, mean, var, weight, bias, eps=norm.eps)
    return native.activate(fusion.kind, out)


def _part(tensor: Tensor, groups: Sequence[int], count: int, dim: int) -> Tensor:
    """The slices of these groups along a dimension that all groups share."""
    width = tensor.shape[dim] // count
    index = [group * width + item for group in groups for item in range(width)]
    return tensor.index_select(dim, torch.tensor(index, device=tensor.device))
