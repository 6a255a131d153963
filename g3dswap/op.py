"""``torch.ops.g3dswap.conv3d``: a 3D convolution whose three passes each run the kernel chosen for them.

With ``transposed`` it is a transposed one, as in ``torch.convolution``; an ``activation``, one of
``problem.ACTIVATIONS``, is applied to the result, in the same kernel where no gradient is needed. Two
operators, ``conv3d`` and ``conv3d_backward``, as PyTorch's dispatcher sees them: what autograd (to any
order: the derivatives of both are made of the two), autocast, fake tensors and functorch do with them.
What they do with real tensors is in ``execute``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import _C, Tensor
from torch.autograd import forward_ad

from . import direct, execute, native
from .execute import ONES, ZEROS, Conf, Grads, Ints, conf_of, covered, parted
from .problem import DTYPES

# Exact strides: the layout of the operands decides the layout of the result, in the fake kernels as well.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARY = torch.library.Library("g3dswap", "DEF")
_LIBRARY.define(
    "conv3d(Tensor input, Tensor weight, Tensor? bias=None, int[3] stride=1, int[3] padding=0, "
    'int[3] dilation=1, int groups=1, str tune="cached", str cache="", bool transposed=False, '
    'int[3] output_padding=0, str activation="") -> Tensor',
    tags=_TAGS,
)
_LIBRARY.define(
    "conv3d_backward(Tensor grad_output, Tensor input, Tensor weight, int[3] stride, int[3] padding, "
    'int[3] dilation, int groups, bool[3] output_mask, str tune="cached", str cache="", '
    "bool transposed=False, int[3] output_padding=0) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_FORWARD = torch.ops.g3dswap.conv3d.default
_BACKWARD = torch.ops.g3dswap.conv3d_backward.default


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Ints = 1,
    padding: str | int | Ints = 0,
    dilation: int | Ints = 1,
    groups: int = 1,
    *,
    tune: str = "cached",
    cache: str = "",
) -> Tensor:
    """``torch.nn.functional.conv3d``, the same arguments and errors, by the chosen kernels.

    ``tune`` and ``cache`` (a directory, "" for the default one) say how a choice is made at the first
    call of a shape; see ``Grouped3D``.
    """
    stride, dilation = _triple(stride), _triple(dilation)
    if isinstance(padding, str):
        if padding == "valid":
            padding = ZEROS
        elif padding == "same" and stride == ONES and weight.dim() == 5 and input.dim() in (4, 5):
            input, padding = same_padding(input, weight.shape[2:], dilation)
        else:
            return F.conv3d(input, weight, bias, stride, padding, dilation, groups)  # raises
    return call(input, weight, bias, stride, _triple(padding), dilation, groups, tune, cache)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    output_padding: int | Ints = 0,
    groups: int = 1,
    dilation: int | Ints = 1,
    *,
    tune: str = "cached",
    cache: str = "",
) -> Tensor:
    """``torch.nn.functional.conv_transpose3d``, the same arguments and errors; as ``conv3d``."""
    options = _triple(stride), _triple(padding), _triple(dilation), groups, tune, cache
    return call(input, weight, bias, *options, True, _triple(output_padding))


def call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    tune: str,
    cache: str,
    transposed: bool = False,
    output_padding: Ints = ZEROS,
    activation: str = "",
) -> Tensor:
    """``torch.ops.g3dswap.conv3d``, past the dispatcher where it would only cost time.

    The dispatcher's way into Python takes some six microseconds. It is needed for everything that asks
    for what is executed (the compiler, modes, subclasses, functorch, the profiler), and where nobody asks,
    what it would call is known.
    """
    conf = stride, padding, dilation, groups, tune, cache, transposed, output_padding
    if not torch.compiler.is_compiling() and direct.extension is not None and forward_ad._current_level < 0:
        out = direct.extension.call(input, weight, bias, (*conf, activation))
        if out is not None:
            return out
    if groups < 2 or not _unobserved(input, weight, bias):
        return _FORWARD(input, weight, bias, *conf, activation)
    kind = "cuda" if input.is_cuda else "cpu"
    if not torch.is_autocast_enabled(kind):
        return _eager(input, weight, bias, conf, activation)
    input, weight, bias = _cast(kind, input, weight, bias)
    with _C._ExcludeDispatchKeyGuard(_AUTOCAST[kind]):
        return _eager(input, weight, bias, conf, activation)


def _eager(input: Tensor, weight: Tensor, bias: Tensor | None, conf: Any, activation: str) -> Tensor:
    """What the dispatcher would call after autocast."""
    if _recorded(input, weight, bias):
        return native.activate(activation, _Conv3d.apply(input, weight, bias, None, conf))
    return execute.conv3d(input, weight, bias, *conf, activation)


def _recorded(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd is to know of a call on these."""
    return torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _unobserved(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a call on these reaches ``execute`` through autocast and autograd and nothing else."""
    return (
        not torch.compiler.is_compiling()
        and type(input) in _PLAIN
        and type(weight) in _PLAIN
        and (input.is_cpu or input.is_cuda)
        and (weight.is_cpu or weight.is_cuda)
        and input.dtype in DTYPES
        and not input.is_neg()
        and not weight.is_neg()
        and (bias is None or (type(bias) in _PLAIN and not bias.is_neg()))
        and forward_ad._current_level < 0
        and not _C._len_torch_dispatch_stack()
        and not _C._len_torch_function_stack()
        and not _C._are_functorch_transforms_active()
        and not _C._autograd._profiler_enabled()
        and _C._get_tracing_state() is None
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def same_padding(input: Tensor, kernel: Ints, dilation: Ints) -> tuple[Tensor, tuple[int, ...]]:
    """``padding="same"`` of a stride-1 layer: the input to use, and the padding on each side.

    Where the total is odd the input gets the extra zeros at its end, as PyTorch has it.
    """
    total = [d * (k - 1) for d, k in zip(dilation, kernel)]
    if any(t % 2 for t in total):
        input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
    return input, tuple(t // 2 for t in total)


# Autograd. Both operators are bilinear, and the derivatives of each are made of the two. The activation is
# PyTorch's wherever there is something to derive, for what goes into it is needed then.


class _Conv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, keyset: Any, conf: Any) -> Any:
        ctx.save_for_backward(input, weight)
        ctx.conf = conf
        if keyset is None:  # from `call`
            return execute.conv3d(input, weight, bias, *conf)
        return _below(keyset, execute.conv3d, _FORWARD, input, weight, bias, *conf)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        mask, conf = _needed(ctx, 0), ctx.conf
        direct = not torch.is_grad_enabled() and _unobserved(grads[0], input, weight)
        backward = execute.conv3d_backward if direct else _BACKWARD  # as in `call`
        return *backward(grads[0], input, weight, *conf[:4], mask, *conf[4:]), None, None


class _Conv3dBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:3])
        ctx.conf = conf_of(*args[3:7], *args[8:])
        return _below(keyset, execute.conv3d_backward, _BACKWARD, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """``grads`` belong to grad_input, grad_weight and grad_bias; any may be None."""
        grad_output, input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = grads
        conf = ctx.conf
        needs = _needed(ctx, 1)
        results: list[Tensor | None] = [None, None, None]
        if needs[0]:
            terms = []
            if of_input is not None:
                terms.append(_FORWARD(of_input, weight, None, *conf))
            if of_weight is not None:
                terms.append(_FORWARD(input, of_weight, None, *conf))
            if of_bias is not None:
                terms.append(of_bias.view(-1, 1, 1, 1).expand_as(grad_output))
            results[0] = functools.reduce(torch.add, terms) if terms else None
        if needs[1] and of_weight is not None:
            results[1] = _backward(grad_output, input, of_weight, conf, 0)
        if needs[2] and of_input is not None:
            results[2] = _backward(grad_output, of_input, weight, conf, 1)
        return None, *results, *[None] * 9


def _backward(grad_output: Tensor, input: Tensor, weight: Tensor, conf: Conf, which: int) -> Tensor:
    mask = [which == i for i in range(3)]
    return _BACKWARD(grad_output, input, weight, *conf[:4], mask, *conf[4:])[which]


def _needed(ctx: Any, first: int) -> list[bool]:
    """Which of a node's three tensors, ``first`` being the first one's position, this backward is to reach.

    ``ctx.needs_input_grad`` is true of all that require a gradient, although ``torch.autograd.grad`` may
    have been asked for one of them, and PyTorch's own nodes then compute only that one.
    """
    needed = list(ctx.needs_input_grad[first : first + 3])
    for i, (node, _) in enumerate(ctx.next_functions[:3]):  # it has no entry for a bias of None
        if needed[i]:
            needed[i] = _reached(node)
    return needed


def _reached(node: Any) -> bool:
    try:
        return _C._will_engine_execute_node(node)
    except RuntimeError:
        return True  # it refuses to answer for a leaf that was asked for


_AFTER_AUTOGRAD = _C._after_autograd_keyset
_REAL = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)


def _below(keyset: Any, kernel: Any, operator: Any, *args: Any) -> Any:
    """What comes after autograd: our kernel, called without the dispatcher where it would just call it."""
    keyset = keyset & _AFTER_AUTOGRAD
    if keyset.highestPriorityTypeId() in _REAL:
        return kernel(*args)
    return operator.redispatch(keyset, *args)  # fake tensors, functionalization, modes, other devices


def _conv3d_autograd(
    keyset: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *given: Any
) -> Tensor:
    conf, activation = parted(given)
    if (
        conf.groups < 2
        or input.dtype not in DTYPES
        or forward_ad._current_level >= 0
        or _C._are_functorch_transforms_active()
    ):
        return execute.pytorch(input, weight, bias, conf, activation)
    if _recorded(input, weight, bias):
        return native.activate(activation, _Conv3d.apply(input, weight, bias, keyset, conf))
    return _below(keyset, execute.conv3d, _FORWARD, input, weight, bias, *conf, activation)


def _backward_autograd(keyset: Any, *args: Any) -> Any:
    args = (*args[:8], *conf_of(*args[3:7], *args[8:])[4:])
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:3]):
        return _Conv3dBackward.apply(keyset, *args)
    return _below(keyset, execute.conv3d_backward, _BACKWARD, *args)


def _composite(input: Tensor, weight: Tensor, bias: Tensor | None = None, *given: Any) -> Tensor:
    """PyTorch's convolution instead, derivatives included.

    For what our kernels never do, and for forward-mode AD and functorch, which have rules for it.
    """
    return execute.pytorch(input, weight, bias, *parted(given))


def _composite_backward(grad_output: Tensor, input: Tensor, weight: Tensor, *given: Any) -> Grads:
    """PyTorch's backward instead."""
    batched, mask, conf = input.dim() == 5, given[4], conf_of(*given[:4], *given[5:])
    if not batched:
        grad_output, input = grad_output.unsqueeze(0), input.unsqueeze(0)
    of_input, of_weight, of_bias = execute.pytorch_backward(grad_output, input, weight, conf, mask)
    return of_input if batched or of_input is None else of_input.squeeze(0), of_weight, of_bias


# Autocast, fake tensors, and the table of kernels.


_AUTOCAST = {
    "cpu": _C.DispatchKeySet(_C.DispatchKey.AutocastCPU),
    "cuda": _C.DispatchKeySet(_C.DispatchKey.AutocastCUDA),
}


def _cast(
    device: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of the operands of a convolution."""
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        if x.dtype == dtype:  # the most frequent, and `to` takes a microsecond to find out
            return x
        eligible = x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device
        return x.to(dtype) if eligible else x

    return cast(input), cast(weight), None if bias is None else cast(bias)


def _autocast(device: str) -> Any:
    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None = None, *conf: Any) -> Tensor:
        operands = _cast(device, input, weight, bias)
        with _C._ExcludeDispatchKeyGuard(_AUTOCAST[device]):
            return _FORWARD(*operands, *conf)

    return kernel


def _conv3d_fake(input: Tensor, weight: Tensor, bias: Tensor | None = None, *given: Any) -> Tensor:
    if input.dim() == 4 and weight.dim() == 5:
        return _conv3d_fake(input.unsqueeze(0), weight, bias, *given).squeeze(0)
    conf, activation = parted(given)
    if _empty(input) or not covered(input, weight, bias, conf):
        return execute.pytorch(input, weight, bias, conf, activation)
    shape = execute.output_shape(input, weight, conf)
    layout = native.output_format(input, weight, conf.stride, conf.dilation, conf.groups)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


def _backward_fake(grad_output: Tensor, input: Tensor, weight: Tensor, *given: Any) -> Grads:
    mask, conf = given[4], conf_of(*given[:4], *given[5:])
    if input.dim() == 4 or _empty(input) or not covered(input, weight, None, conf, grad_output):
        return _composite_backward(grad_output, input, weight, *given)
    layout = native.output_format(input, weight, conf.stride, conf.dilation, conf.groups)
    return (
        torch.empty_like(input, memory_format=layout) if mask[0] else None,
        torch.empty_like(weight, memory_format=layout) if mask[1] else None,
        grad_output.new_empty(execute.filters(weight, conf)) if mask[2] else None,
    )


def _empty(input: Tensor) -> bool:
    """A batch of none; a symbolic batch is taken for some, as the compiler takes it, without a guard."""
    return isinstance(input.shape[0], int) and input.shape[0] == 0


def _register() -> None:
    forward = execute.conv3d, _conv3d_autograd, _composite, _conv3d_fake
    backward = execute.conv3d_backward, _backward_autograd, _composite_backward, _backward_fake
    for name, (kernel, autograd, composite, fake) in (("conv3d", forward), ("conv3d_backward", backward)):
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, kernel, key)
        for key in ("CompositeExplicitAutograd", "FuncTorchBatched"):
            _LIBRARY.impl(name, composite, key)
        _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(f"g3dswap::{name}", fake, lib=_LIBRARY)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _LIBRARY.impl("conv3d", _autocast(device), key)


def _triple(value: int | Ints) -> tuple[int, ...]:
    """One integer for all three dimensions, or one each; anything else is left for PyTorch to refuse."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 3 if len(values) == 1 else values


_register()
