"""PyTorch's own convolution kernels: what a choice falls back to, is timed against and is held to.

Operands of a pass, in order, here and wherever a pass is run:

* forward: input, weight, and the bias or None
* grad_input: grad_output, input (only its shape counts), weight, and the bias if there is one
* grad_weight: grad_output, input, weight (only its shape counts)

In a problem of a transposed layer these are the operands of its convolution: what the layer takes is the
convolution's grad_output, and the gradient of what it returns is the convolution's input; see `operands`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import _C, Tensor

from .errors import ArgumentError
from .problem import Geometry, Problem, Triple, layer_pass, transposed_size

T = TypeVar("T")

# An error that no candidate has to go below, as ||out - ref|| / ||ref||. A result that is exact but
# for its rounding to 16 bits has about half the unit roundoff (eps / 2), so that is the floor there.
# fp32 and fp64 sums are rounded at every step, and their order alone moves the error by some eps.
FLOORS = {
    torch.float64: 4 * torch.finfo(torch.float64).eps,
    torch.float32: 4 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2,
    torch.float16: torch.finfo(torch.float16).eps / 2,
}

PERIOD = 1048583
"""Random numbers are drawn up to this many (a prime: no stride repeats them early) and then repeated."""

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, torch.relu_),
    "silu": (F.silu, partial(F.silu, inplace=True)),
    "gelu": (F.gelu, torch.ops.aten.gelu_.default),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_.default, approximate="tanh"),
    ),
    "hardswish": (F.hardswish, partial(F.hardswish, inplace=True)),
}
"""PyTorch's functions for the activations of a problem, and the same in place."""

_CUDNN_CONV = ("cuda", "conv")  # where PyTorch keeps the TF32 switch of torch.backends.cudnn.conv


def problem(
    name: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool = False,
    output_padding: Sequence[int] = (0, 0, 0),
    activation: str = "",
) -> Problem:
    """The problem that a layer's pass ``name`` on these 5-D tensors poses under PyTorch's present switches.

    The bias and the activation count in a forward pass only.
    """
    kind = input.device.type
    layout = output_format(input, weight, stride, dilation, groups)
    channels, size = input.shape[1], list(input.shape[2:])
    if transposed:
        channels = weight.shape[1] * groups
        size = transposed_size(size, weight.shape[2:], stride, padding, dilation, output_padding)
    return Problem(
        layer_pass(name, transposed),
        Geometry(
            channels,
            weight.shape[0],
            groups,
            _triple(size),
            _triple(weight.shape[2:]),
            _triple(stride),
            _triple(padding),
            _triple(dilation),
        ),
        input.dtype,
        "channels_last_3d" if layout == torch.channels_last_3d else "contiguous",
        kind,
        bias=bias is not None and name == "forward",
        precision=precision(input.dtype, kind),
        deterministic=deterministic(kind),
        transposed=transposed,
        activation=activation if name == "forward" else "",
    )


def operands(problem: Problem, *tensors: T | None) -> tuple[T | None, ...]:
    """A problem's operands from those of the layer's pass, which is itself one of the three.

    They differ for a transposed layer only. Its forward pass has no tensor of the output's shape to give.
    """
    if not problem.transposed:
        return tensors
    if problem.layer_pass == "forward":
        input, weight, bias = tensors
        return input, None, weight, bias
    grad_output, input, weight = tensors
    return (grad_output, weight, None) if problem.layer_pass == "grad_input" else (input, grad_output, weight)


def run(problem: Problem, *tensors: Tensor | None) -> Tensor:
    """The pass by PyTorch's kernel; any batch size, any strides."""
    return _compute(problem, tensors)


def reference(problem: Problem, *tensors: Tensor | None) -> Tensor:
    """The pass in float64 on the operands' device, contiguous.

    PyTorch's float64 kernels are the plain ones (unfold and matrix product on a CPU); the tests hold
    them to an independent implementation.
    """
    wide = [None if x is None else x.detach().double().contiguous() for x in tensors]
    return unsearched(partial(_compute, problem, wide))


def error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; infinite where ``out`` is not finite or has another shape."""
    if out.shape != ref.shape:
        return float("inf")
    ref = ref.detach().double()
    distance = float(torch.linalg.vector_norm(out.detach().double() - ref))
    norm = float(torch.linalg.vector_norm(ref))
    relative = distance / norm if norm else (0.0 if distance == 0 else float("inf"))
    return relative if relative == relative else float("inf")  # NaN compares unequal to itself


def bound(problem: Problem, *tensors: Tensor | None, ref: Tensor | None = None) -> float:
    """The largest error a candidate may have on these operands.

    Twice that of PyTorch's own kernel for the same operands, layout and switches, or the floor of the
    dtype if that is more. ``ref`` saves computing the reference again.
    """
    if ref is None:
        ref = reference(problem, *tensors)
    with switches(problem):
        own = error(run(problem, *tensors), ref)
    return max(2 * own, FLOORS[problem.dtype])


def random_operands(
    problem: Problem, batch: int, seed: int = 0, device: torch.device | str | None = None
) -> list[Tensor | None]:
    """Normally distributed operands for ``run``, in the problem's dtype and layout."""
    device = problem.device if device is None else device
    generator = torch.Generator(device).manual_seed(seed)
    g = problem.geometry

    def normal(shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        drawn = torch.randn(min(count, PERIOD), generator=generator, device=device, dtype=problem.dtype)
        x = drawn.repeat(-(-count // PERIOD))[:count].view(shape) if count > PERIOD else drawn.view(shape)
        return x.contiguous(memory_format=problem.memory_format) if len(shape) == 5 else x

    image, weight = normal(g.input_shape(batch)), normal(g.weight_shape())
    bias = normal((problem.bias_size,)) if problem.bias else None
    if problem.direction == "forward":
        return [image, weight, bias]
    return [normal(g.output_shape(batch)), image, weight, *([] if bias is None else [bias])]


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """With cuDNN's search for its fastest kernels."""
    with _cudnn(True, _C._get_cudnn_deterministic()):
        yield


def unsearched(call: Callable[[], T]) -> T:
    """What a call gives without cuDNN's search for its fastest kernels, which takes longer than one run.

    What PyTorch takes for a shape without a search it takes ever after, also where the user wants a search (a
    training step of MedNeXt took 1.6 times as long).  So this runs deterministic kernels, which PyTorch
    remembers apart from the others; and those of a user who wants deterministic ones are searched after all.
    """
    if not deterministic("cuda"):
        # Where there is no deterministic one for a shape, PyTorch says so.
        with _cudnn(False, True), contextlib.suppress(RuntimeError):
            return call()
    return call()


@contextlib.contextmanager
def _cudnn(benchmark: bool, deterministic: bool) -> Iterator[None]:
    # Not through torch.backends, which refuses once somebody has called disable_global_flags.
    before = _C._get_cudnn_benchmark(), _C._get_cudnn_deterministic()
    _C._set_cudnn_benchmark(benchmark)
    _C._set_cudnn_deterministic(deterministic)
    try:
        yield
    finally:
        _C._set_cudnn_benchmark(before[0])
        _C._set_cudnn_deterministic(before[1])


@contextlib.contextmanager
def switches(problem: Problem) -> Iterator[None]:
    """PyTorch's TF32 and determinism switches for convolutions as ``problem`` has them; restored after."""
    if problem.device != "cuda":
        yield
        return
    # Not through torch.backends: it refuses after disable_global_flags, which PyTorch's test modules call.
    before = _C._get_fp32_precision_getter(*_CUDNN_CONV), _C._get_cudnn_deterministic()
    _set_switches(problem.precision, problem.deterministic)
    try:
        yield
    finally:
        _set_switches(*before)


def _set_switches(precision: str, deterministic: bool) -> None:
    _C._set_fp32_precision_setter(*_CUDNN_CONV, precision)
    _C._set_cudnn_deterministic(deterministic)


def precision(dtype: torch.dtype, device: str) -> str:
    """ "tf32" where PyTorch's switch lets cuDNN's convolutions use it for this dtype, else "ieee"."""
    if device != "cuda" or dtype != torch.float32:
        return "ieee"
    # allow_tf32 refuses to be read once someone used the newer switch; this one answers for both.
    return "tf32" if _C._get_fp32_precision_getter(*_CUDNN_CONV) == "tf32" else "ieee"


def deterministic(device: str) -> bool:
    """Whether the user asked for convolutions that repeat bit for bit."""
    if torch.are_deterministic_algorithms_enabled():
        return True
    return device == "cuda" and _C._get_cudnn_deterministic()


def switch_state(on_cpu: bool) -> tuple[bool | str, ...]:
    """All of PyTorch's switches that a convolution's problem depends on; cheap, for keys of calls."""
    if on_cpu:
        return _C._get_deterministic_algorithms(), _C._get_mkldnn_enabled()
    return (
        _C._get_deterministic_algorithms(),
        _C._get_cudnn_enabled(),
        _C._get_cudnn_deterministic(),
        _C._get_fp32_precision_getter(*_CUDNN_CONV),
    )


def output_format(
    input: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> torch.memory_format:
    """The memory format in which PyTorch's convolution of two 5-D tensors gives its results.

    One format serves all results of a layer (output, grad-input, grad-weight). cuDNN and oneDNN take
    channels_last_3d as soon as one operand suggests it; PyTorch's own kernels (float64, CUDA
    depthwise) only know contiguous tensors. Works on fake tensors, and does not guard on a
    symbolic batch where groups > 1 (but for 1x1 kernels in a process of one thread).
    """
    if not _suggests_channels_last(input) and not _suggests_channels_last(weight):
        return torch.contiguous_format
    kind, dtype = input.device.type, input.dtype.to_real()  # a complex one is made of real ones
    if kind == "cuda":
        takes = torch.backends.cudnn.enabled and dtype != torch.float64
    elif kind == "cpu" and _C._get_mkldnn_enabled():
        takes = _onednn_takes(input, weight, stride, dilation, groups)
    else:
        takes = False
    return torch.channels_last_3d if takes else torch.contiguous_format


def _onednn_takes(
    input: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """ConvParams::use_mkldnn of ATen/native/Convolution.cpp: whether a CPU convolution goes to oneDNN."""
    dtype = input.dtype.to_real()
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if dtype != torch.float32:
        return False
    height, width = weight.shape[-2:]
    spread = max(stride) > 1 or max(dilation) > 1 or height != 1 or width != 1
    if not (spread or torch.get_num_threads() > 1 or input.shape[0] >= 16):
        return False
    if groups > 1 or (height > 3 and width > 3) or input.shape[0] > 1:
        return True
    return bool(input.shape[0] * input.shape[1] * input.shape[2] * input.shape[3] > 20480)


def _suggests_channels_last(x: Tensor) -> bool:
    """Tensor::suggest_memory_format() == ChannelsLast3d, which Python has no name for."""
    shape, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 4, 3, 2, 0):
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * shape[d]
    return True


def activate(activation: str, out: Tensor, inplace: bool = False) -> Tensor:
    """An activation of a problem ("": none) by PyTorch's function.

    ArgumentError: there is no such activation.
    """
    if not activation:
        return out
    if activation not in _ACTIVATIONS:
        raise ArgumentError(f"activation={activation!r} is unknown; use one of {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[activation][inplace](out)


def forward(problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's forward pass, without the detours of ``run``: it is on the path of every call.

    The activation is applied in place, which autograd would not allow.
    """
    return activate(problem.activation, _convolution(problem, input, weight, bias), inplace=True)


def _convolution(problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same without the activation."""
    g = problem.geometry
    if problem.transposed:
        options = g.stride, g.padding, g.dilation, True, g.output_padding, g.groups
        return torch.convolution(input, weight, bias, *options)
    if input.dtype.itemsize == 2 and input.is_cpu and g.blind:
        # oneDNN's half-precision forward kernels (3.12, AVX-512) may crash the process here. The
        # result is the bias or zero, so the detour over fp32 changes no bit of it.
        bias = None if bias is None else bias.float()
        wide = replace(problem, dtype=torch.float32)
        return _convolution(wide, input.float(), weight.float(), bias).to(input.dtype)
    return torch.convolution(input, weight, bias, g.stride, g.padding, g.dilation, False, (0, 0, 0), g.groups)


def gradient(problem: Problem, grad_output: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """One of the layer's gradients, as ``problem.layer_pass`` says."""
    g = problem.geometry
    extra = g.output_padding if problem.transposed else (0, 0, 0)
    options = g.stride, g.padding, g.dilation, problem.transposed, extra, g.groups
    mask = [problem.layer_pass == name for name in ("grad_input", "grad_weight", "bias")]
    grads = torch.ops.aten.convolution_backward(grad_output, input, weight, None, *options, mask)
    return grads[mask.index(True)]


def _compute(problem: Problem, tensors: Sequence[Tensor | None]) -> Tensor:
    if problem.layer_pass == "forward":
        input, weight, bias = (*tensors[0:1], *tensors[1 + problem.transposed :], None)[:3]
        if input is None or weight is None:
            raise ArgumentError("A forward pass needs an input and a weight; only the bias may be None.")
        return forward(problem, input, weight, bias)
    first, second, *rest = [x for x in tensors if x is not None]
    if not problem.transposed:
        return gradient(problem, first, second, *rest)
    if problem.layer_pass == "grad_weight":
        return gradient(problem, second, first, *rest)
    # PyTorch wants the layer's input too, although only its shape counts.
    input = torch.empty(
        problem.geometry.output_shape(first.shape[0]),
        dtype=first.dtype,
        device=first.device,
        memory_format=problem.memory_format,
    )
    return gradient(problem, first, input, second)


def _triple(values: Sequence[int]) -> Triple:
    t, h, w = values
    return int(t), int(h), int(w)
