"""The kernels of the operators on real tensors: from a call to the choice for its shape, and to its result.

A call costs a few microseconds of Python: a key is made of all that decides the choice but the batch
size, and looked up in a dictionary that ``choose`` empties when choices change. Whatever our kernels do
not cover goes to PyTorch's convolution unchanged, so that its results, layouts and errors are PyTorch's:
one group, integers and complex numbers, empty tensors, other devices, and arguments that it refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import choose, decided, direct, native
from .choice import Choice
from .problem import DTYPES, transposed_size

Ints = Sequence[int]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]

ONES, ZEROS = (1, 1, 1), (0, 0, 0)

_choices: dict[Any, Choice] = decided.lookup()
_MOST_CHOICES = 10_000


class Conf(NamedTuple):
    """What a call of a layer says beside its tensors, in the order of the operators' schemas.

    These are for all three passes. The forward operator has one argument more, the activation.
    """

    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    tune: str
    cache: str
    transposed: bool
    output_padding: Ints


def conf_of(
    stride: Ints = ONES,
    padding: Ints = ZEROS,
    dilation: Ints = ONES,
    groups: int = 1,
    tune: str = "cached",
    cache: str = "",
    transposed: bool = False,
    output_padding: Ints = ZEROS,
) -> Conf:
    """The arguments of an operator, hashable; the dispatcher leaves out trailing ones that are defaults."""
    return Conf(
        tuple(stride), tuple(padding), tuple(dilation), groups, tune, cache, transposed, tuple(output_padding)
    )


def parted(given: Sequence[Any]) -> tuple[Conf, str]:
    """What a call of the forward operator says beside its tensors, and the activation of its result."""
    return conf_of(*given[:8]), given[8] if len(given) > 8 else ""


def conv3d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *given: Any) -> Tensor:
    """The forward kernel on real CPU and CUDA tensors."""
    shape = input.shape
    conf, activation = parted(given)
    if direct.extension is not None:
        out = direct.extension.forward(input, weight, bias, (*conf, activation))
        if out is not None:
            return out
    if len(shape) == 5 and shape[0]:
        key = (
            "forward", shape[1:], input.stride(), input.dtype, input.device,
            weight.shape, weight.stride(), weight.dtype, weight.device,
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            conf, activation, native.switch_state(input.is_cpu),
        )  # fmt: skip
        choice = _choices.get(key) or _choose(
            key, "forward", input, weight, bias, conf, activation=activation
        )
        if choice is not None:
            if choice.is_native:
                return native.forward(choice.problem, input, weight, bias)
            return _run(choice, input, weight, bias)
    elif len(shape) == 4 and weight.dim() == 5:
        return conv3d(input.unsqueeze(0), weight, bias, *conf, activation).squeeze(0)
    return pytorch(input, weight, bias, conf, activation)


def conv3d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    output_mask: Sequence[bool],
    *given: Any,
) -> Grads:
    """The backward kernel on real CPU and CUDA tensors; None for what ``output_mask`` leaves out."""
    conf = conf_of(stride, padding, dilation, groups, *given)
    if direct.extension is not None:
        found = direct.extension.backward(grad_output, input, weight, (*conf, ""), *map(bool, output_mask))
        if found is not None:
            return found
    if input.dim() == 4 and weight.dim() == 5:
        of_input, of_weight, of_bias = conv3d_backward(
            grad_output.unsqueeze(0), input.unsqueeze(0), weight, *conf[:4], output_mask, *conf[4:]
        )
        return None if of_input is None else of_input.squeeze(0), of_weight, of_bias
    return (
        _gradient("grad_input", grad_output, input, weight, conf) if output_mask[0] else None,
        _gradient("grad_weight", grad_output, input, weight, conf) if output_mask[1] else None,
        grad_output.sum((0, 2, 3, 4)) if output_mask[2] else None,
    )


def _gradient(name: str, grad_output: Tensor, input: Tensor, weight: Tensor, conf: Conf) -> Tensor:
    """One of the two gradients that are convolutions, of 5-D tensors."""
    if input.shape[0]:
        key = (
            name, input.shape[1:], input.stride(), input.dtype, input.device,
            weight.shape, weight.stride(), weight.dtype, weight.device,
            (grad_output.shape[1:], grad_output.dtype, grad_output.device),
            conf, native.switch_state(input.is_cpu),
        )  # fmt: skip
        choice = _choices.get(key) or _choose(key, name, input, weight, None, conf, grad_output)
        if choice is not None:
            if choice.is_native:
                return native.gradient(choice.problem, grad_output, input, weight)
            return _run(choice, grad_output, input, weight)
    mask = [name == "grad_input", name == "grad_weight", False]
    found = pytorch_backward(grad_output, input, weight, conf, mask)[mask.index(True)]
    assert found is not None
    return found


def _run(choice: Choice, *tensors: Tensor | None) -> Tensor:
    """Our kernel on the operands of a layer's pass."""
    layout = choice.problem.memory_format
    operands = native.operands(choice.problem, *tensors)
    return choice.run(
        *(
            x if x is None else x.contiguous(memory_format=layout) if x.dim() == 5 else x.contiguous()
            for x in operands
        )
    )


def pytorch(input: Tensor, weight: Tensor, bias: Tensor | None, conf: Conf, activation: str = "") -> Tensor:
    """The layer by PyTorch's functions."""
    stride, padding, dilation, groups = conf[:4]
    if conf.transposed:
        extra = conf.output_padding
        out = torch.conv_transpose3d(input, weight, bias, stride, padding, extra, groups, dilation)
    else:
        out = torch.conv3d(input, weight, bias, stride, padding, dilation, groups)
    return native.activate(activation, out)


def pytorch_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, conf: Conf, mask: Sequence[bool]
) -> Grads:
    """The layer's gradients by PyTorch's function, of 5-D tensors."""
    options = conf.stride, conf.padding, conf.dilation, conf.transposed, conf.output_padding, conf.groups
    return torch.ops.aten.convolution_backward(
        grad_output, input, weight, [filters(weight, conf)], *options, mask
    )


def _choose(
    key: tuple[Any, ...],
    name: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conf: Conf,
    grad_output: Tensor | None = None,
    activation: str = "",
) -> Choice | None:
    """The choice for a call that is not in the dictionary yet; None where PyTorch has to judge the call."""
    if not covered(input, weight, bias, conf, grad_output):
        return None
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # nothing can be compiled, measured or checked inside a CUDA graph
    more = conf.transposed, conf.output_padding, activation
    problem = native.problem(name, input, weight, bias, *conf[:4], *more)
    choice = choose.resolve(problem, input.shape[0], conf.tune, conf.cache)
    if len(_choices) >= _MOST_CHOICES:  # a model that sees ever new sizes
        decided.changed()
    _choices[key] = choice
    direct.learn(
        choice, name, (*conf, activation), input, weight, bias if grad_output is None else grad_output
    )
    return choice


def covered(
    input: Tensor, weight: Tensor, bias: Tensor | None, conf: Conf, grad_output: Tensor | None = None
) -> bool:
    """Whether a call is one that our kernels do: grouped, floating point, not empty, and without fault."""
    stride, padding, dilation, groups = conf[:4]
    if groups < 2 or input.dim() != 5 or weight.dim() != 5 or input.dtype not in DTYPES:
        return False
    if not len(stride) == len(padding) == len(dilation) == len(conf.output_padding) == 3:
        return False  # PyTorch takes one number for all three dimensions, or says what is wrong
    others = [weight, *(x for x in (bias, grad_output) if x is not None)]
    if any(x.dtype != input.dtype or x.device != input.device for x in others):
        return False
    if input.device.type not in ("cpu", "cuda") or any(x.layout != torch.strided for x in (input, *others)):
        return False
    channels = weight.shape[0] if conf.transposed else weight.shape[1] * groups
    if input.shape[1] != channels or weight.shape[0] % groups or not min(weight.shape):
        return False
    if bias is not None and bias.shape != (filters(weight, conf),):
        return False
    if not (min(stride) > 0 and min(padding) >= 0 and min(dilation) > 0 and min(input.shape[1:]) > 0):
        return False
    # PyTorch allows more than the stride where the dilation is larger. No convolution has that as its input.
    if not all(0 <= more < step for more, step in zip(conf.output_padding, stride)):
        return False
    shape = output_shape(input, weight, conf)
    return min(shape[2:]) > 0 and (grad_output is None or list(grad_output.shape) == shape)


def filters(weight: Tensor, conf: Conf) -> int:
    """The number of channels of the layer's output."""
    return weight.shape[1] * conf.groups if conf.transposed else weight.shape[0]


def output_shape(input: Tensor, weight: Tensor, conf: Conf) -> list[int]:
    """(N, F, TO, HO, WO) of valid 5-D operands; symbolic sizes stay symbolic."""
    options = conf.stride, conf.padding, conf.dilation
    if conf.transposed:
        size = transposed_size(input.shape[2:], weight.shape[2:], *options, conf.output_padding)
    else:
        axes = zip(input.shape[2:], weight.shape[2:], *options)
        size = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in axes]
    return [input.shape[0], filters(weight, conf), *size]
