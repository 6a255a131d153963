"""The kernels of the operators on real tensors: from a call to the choice for its shape, and to its result.

A call costs a few microseconds of Python: a key is made of all that decides the choice but the batch
size, and looked up in a dictionary that ``choose`` empties when choices change. Whatever our kernels do
not cover goes to PyTorch's convolution unchanged, so that its results, layouts and errors are PyTorch's:
one group, integers and complex numbers, empty tensors, other devices, and arguments that it refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import choose, native
from .choice import Choice
from .problem import DTYPES

Ints = Sequence[int]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]

ONES, ZEROS = (1, 1, 1), (0, 0, 0)

_choices: dict[Any, Choice] = choose.lookup()
_MOST_CHOICES = 10_000


# The dispatcher does not pass trailing arguments that equal the schema's defaults, hence the defaults here.


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = ONES,
    padding: Ints = ZEROS,
    dilation: Ints = ONES,
    groups: int = 1,
    tune: str = "cached",
    cache: str = "",
) -> Tensor:
    """The forward kernel on real CPU and CUDA tensors."""
    shape = input.shape
    conf = tuple(stride), tuple(padding), tuple(dilation), groups, tune, cache
    if len(shape) == 5 and shape[0]:
        key = (
            "forward", shape[1:], input.stride(), input.dtype, input.device,
            weight.shape, weight.stride(), weight.dtype, weight.device,
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            conf, native.switch_state(input.is_cpu),
        )  # fmt: skip
        choice = _choices.get(key) or _choose(key, "forward", input, weight, bias, conf)
        if choice is not None:
            if choice.is_native:
                return native.forward(choice.problem, input, weight, bias)
            layout = choice.problem.memory_format
            return choice.run(
                input.contiguous(memory_format=layout),
                weight.contiguous(memory_format=layout),
                None if bias is None else bias.contiguous(),
            )
    elif len(shape) == 4 and weight.dim() == 5:
        return conv3d(input.unsqueeze(0), weight, bias, *conf).squeeze(0)
    return torch.conv3d(input, weight, bias, *conf[:4])


def conv3d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    output_mask: Sequence[bool],
    tune: str = "cached",
    cache: str = "",
) -> Grads:
    """The backward kernel on real CPU and CUDA tensors; None for what ``output_mask`` leaves out."""
    conf = tuple(stride), tuple(padding), tuple(dilation), groups, tune, cache
    if input.dim() == 4 and weight.dim() == 5:
        of_input, of_weight, of_bias = conv3d_backward(
            grad_output.unsqueeze(0), input.unsqueeze(0), weight, *conf[:4], output_mask, tune, cache
        )
        return None if of_input is None else of_input.squeeze(0), of_weight, of_bias
    return (
        _gradient("grad_input", grad_output, input, weight, conf) if output_mask[0] else None,
        _gradient("grad_weight", grad_output, input, weight, conf) if output_mask[1] else None,
        grad_output.sum((0, 2, 3, 4)) if output_mask[2] else None,
    )


def _gradient(direction: str, grad_output: Tensor, input: Tensor, weight: Tensor, conf: Any) -> Tensor:
    """One of the two gradients that are convolutions, of 5-D tensors."""
    if input.shape[0]:
        key = (
            direction, input.shape[1:], input.stride(), input.dtype, input.device,
            weight.shape, weight.stride(), weight.dtype, weight.device,
            (grad_output.shape[1:], grad_output.dtype, grad_output.device),
            conf, native.switch_state(input.is_cpu),
        )  # fmt: skip
        choice = _choices.get(key) or _choose(key, direction, input, weight, None, conf, grad_output)
        if choice is not None:
            if choice.is_native:
                return native.run(choice.problem, grad_output, input, weight)
            layout = choice.problem.memory_format
            operands = (grad_output, input, weight)
            return choice.run(*(x.contiguous(memory_format=layout) for x in operands))
    stride, padding, dilation, groups = conf[:4]
    mask = [direction == "grad_input", direction == "grad_weight", False]
    return torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, stride, padding, dilation, False, ZEROS, groups, mask
    )[mask.index(True)]


def _choose(
    key: tuple[Any, ...],
    direction: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conf: Any,
    grad_output: Tensor | None = None,
) -> Choice | None:
    """The choice for a call that is not in the dictionary yet; None where PyTorch has to judge the call."""
    stride, padding, dilation, groups, tune, cache = conf
    if not covered(input, weight, bias, stride, padding, dilation, groups, grad_output):
        return None
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # nothing can be compiled, measured or checked inside a CUDA graph
    problem = native.problem(direction, input, weight, bias, stride, padding, dilation, groups)
    choice = choose.resolve(problem, input.shape[0], tune, cache)
    if len(_choices) >= _MOST_CHOICES:  # a model that sees ever new sizes
        _choices.clear()
    _choices[key] = choice
    return choice


def covered(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    grad_output: Tensor | None = None,
) -> bool:
    """Whether a call is one that our kernels do: grouped, floating point, not empty, and without fault."""
    if groups < 2 or input.dim() != 5 or weight.dim() != 5 or input.dtype not in DTYPES:
        return False
    if not len(stride) == len(padding) == len(dilation) == 3:
        return False  # PyTorch takes one number for all three dimensions, or says what is wrong
    filters = weight.shape[0]
    others = [weight, *(x for x in (bias, grad_output) if x is not None)]
    if any(x.dtype != input.dtype or x.device != input.device for x in others):
        return False
    if input.device.type not in ("cpu", "cuda") or any(x.layout != torch.strided for x in (input, *others)):
        return False
    if input.shape[1] != weight.shape[1] * groups or filters % groups or not min(weight.shape):
        return False
    if bias is not None and bias.shape != (filters,):
        return False
    if not (min(stride) > 0 and min(padding) >= 0 and min(dilation) > 0 and min(input.shape[1:]) > 0):
        return False
    size = output_size(input, weight, stride, padding, dilation)
    expected = (input.shape[0], filters, *size)
    return min(size) > 0 and (grad_output is None or tuple(grad_output.shape) == expected)


def output_size(input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> list[int]:
    """(TO, HO, WO) of valid 5-D operands; symbolic sizes stay symbolic."""
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in sizes]
