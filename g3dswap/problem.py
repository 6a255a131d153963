"""One convolution pass on one shape, dtype and layout: what a kernel is chosen, tuned and cached for.

The batch size is no part of a problem: it is a run-time argument of every kernel.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from .errors import ArgumentError

Triple = tuple[int, int, int]

DIRECTIONS = ("forward", "grad_input", "grad_weight")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
PRECISIONS = ("ieee", "tf32")
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh", "hardswish")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Geometry:
    """The sizes of a grouped convolution: everything that its weights and one image (no batch) fix.

    ``size`` is the input's (T, H, W) before padding; ``padding`` is what is added on *each* side.
    Raises ArgumentError when the sizes contradict each other or leave no output.
    """

    in_channels: int
    out_channels: int
    groups: int
    size: Triple
    kernel: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)

    def __post_init__(self) -> None:
        for name, least in (("in_channels", 1), ("out_channels", 1), ("groups", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}={getattr(self, name)} must be at least {least}.")
        for name, least in (("size", 1), ("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            if len(value) != 3 or min(value) < least:
                raise ArgumentError(
                    f"{name}={tuple(value)} must be three integers (time, height, width) of at least {least}."
                )
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ArgumentError(
                    f"{name}={getattr(self, name)} is not divisible by groups={self.groups}; "
                    "choose a group count that divides both channel counts."
                )
        if min(self.output_size) < 1:
            raise ArgumentError(
                f"The dilated kernel {self.extent} is larger than the padded input {self.padded}; "
                "use a smaller kernel or dilation, or a larger input or padding."
            )

    @property
    def extent(self) -> Triple:
        """(T, H, W) of the input that one output reads: the dilated kernel."""
        t, h, w = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel))
        return t, h, w

    @property
    def padded(self) -> Triple:
        """(T, H, W) of the input with its padding."""
        t, h, w = (s + 2 * p for s, p in zip(self.size, self.padding))
        return t, h, w

    @property
    def output_size(self) -> Triple:
        """(T, H, W) of the output."""
        t, h, w = ((s - e) // step + 1 for s, e, step in zip(self.padded, self.extent, self.stride))
        return t, h, w

    @functools.cached_property
    def output_padding(self) -> Triple:
        """(T, H, W) of what the transposed layer of this convolution is to add at the end of its output.

        These are the elements at the input's end that the last step of the window does not reach.
        """
        t, h, w = ((s - e) % step for s, e, step in zip(self.padded, self.extent, self.stride))
        return t, h, w

    @property
    def depthwise(self) -> bool:
        """One input channel a group, at least one filter for it, and more than one group."""
        return self.in_channels == self.groups > 1

    @functools.cached_property
    def blind(self) -> bool:
        """Along some axis no tap of any output meets the input, only padding: the layer gives its bias."""
        return any(
            all(not 0 <= o * s - p + k * d < size for o in range(outputs) for k in range(taps))
            for size, outputs, taps, s, p, d in zip(
                self.size, self.output_size, self.kernel, self.stride, self.padding, self.dilation
            )
        )

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """(N, C, T, H, W)."""
        return (batch, self.in_channels, *self.size)

    def weight_shape(self) -> tuple[int, ...]:
        """(F, C / groups, KT, KH, KW)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    def output_shape(self, batch: int) -> tuple[int, ...]:
        """(N, F, TO, HO, WO)."""
        return (batch, self.out_channels, *self.output_size)

    def __str__(self) -> str:
        return (
            f"{self.in_channels}x{_join(self.size)} to {self.out_channels}x{_join(self.output_size)}, "
            f"groups {self.groups}, kernel {_join(self.kernel)}, stride {_join(self.stride)}, "
            f"padding {_join(self.padding)}, dilation {_join(self.dilation)}"
        )


@dataclass(frozen=True)
class Problem:
    """One pass (``direction``) of a grouped convolution, as one kernel computes it.

    All tensors of the pass lie in ``layout``. ``precision`` is "tf32" where PyTorch's switch lets fp32
    convolutions round their factors to TF32, else "ieee".

    With ``transposed`` the pass is one of the transposed layer of that convolution, which has the same
    weight: its forward pass is the direction "grad_input", its input's gradient is "forward", and in its
    weight's gradient input and output change places. What our kernel computes is the same; PyTorch has
    other kernels for it. ``bias`` is true only where the layer's forward pass adds one; the bias's
    gradient is a plain sum and no problem of its own. ``activation``, one of ACTIVATIONS, is what a forward
    pass applies to its result in the same kernel; "" for nothing.
    """

    direction: str
    geometry: Geometry
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    device: str = "cpu"
    bias: bool = False
    precision: str = "ieee"
    deterministic: bool = False
    transposed: bool = False
    activation: str = ""

    def __post_init__(self) -> None:
        for name, known in (
            ("direction", DIRECTIONS),
            ("layout", tuple(LAYOUTS)),
            ("precision", PRECISIONS),
            ("activation", ("", *ACTIVATIONS)),
        ):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ArgumentError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")
        if self.dtype not in DTYPES:
            names = ", ".join(dtype_name(dtype) for dtype in DTYPES)
            raise ArgumentError(f"dtype {dtype_name(self.dtype)} has no kernels; use one of {names}.")
        if self.bias and self.layer_pass != "forward":
            raise ArgumentError(f"bias=True in a {self.layer_pass} pass: only a forward pass adds a bias.")
        if self.activation and self.layer_pass != "forward":
            raise ArgumentError(
                f"activation={self.activation!r} in a {self.layer_pass} pass: only a forward pass has one."
            )

    @property
    def layer_pass(self) -> str:
        """Which of the layer's passes this is; ``direction`` says which of the convolution's."""
        return layer_pass(self.direction, self.transposed)

    @property
    def bias_size(self) -> int:
        """How many numbers the pass adds as a bias: one for each channel of its result, or none."""
        if not self.bias:
            return 0
        return self.geometry.in_channels if self.transposed else self.geometry.out_channels

    @property
    def memory_format(self) -> torch.memory_format:
        """PyTorch's name for ``layout``."""
        return LAYOUTS[self.layout]

    def flops(self, batch: int) -> int:
        """Floating-point operations of the direct algorithm, padding counted as if it were data.

        All three passes do the same multiply-adds: 2 * N * F * (C / groups) * KT*KH*KW * TO*HO*WO.
        Adding the bias and the activation are not counted.
        """
        g = self.geometry
        return 2 * prod(g.output_shape(batch)) * (g.in_channels // g.groups) * prod(g.kernel)

    def bytes(self, batch: int) -> int:
        """Least memory traffic: input, weight, output (or their gradients) and bias moved once each."""
        g = self.geometry
        elements = prod(g.input_shape(batch)) + prod(g.weight_shape()) + prod(g.output_shape(batch))
        return (elements + self.bias_size) * self.dtype.itemsize

    def roofline(self, batch: int, bandwidth: float, peak: float) -> float:
        """Seconds below which the pass cannot go: max(bytes / bandwidth [B/s], flops / peak [flop/s])."""
        return max(self.bytes(batch) / bandwidth, self.flops(batch) / peak)

    def key(
        self, versions: Mapping[str, str] | None = None, device: torch.device | None = None
    ) -> dict[str, Any]:
        """The problem as a flat dict of JSON values: the key under which its options are cached.

        ``versions`` are the compiler's, printer's and generator's (field names are the caller's);
        ``device`` says which device's name and capability to enter, by default the current one.
        """
        g = self.geometry
        return {
            "direction": self.direction,
            "in_channels": g.in_channels,
            "out_channels": g.out_channels,
            "groups": g.groups,
            "size": list(g.size),
            "kernel": list(g.kernel),
            "stride": list(g.stride),
            "padding": list(g.padding),
            "dilation": list(g.dilation),
            "dtype": dtype_name(self.dtype),
            "layout": self.layout,
            "device": self.device,
            "bias": self.bias,
            "precision": self.precision,
            "deterministic": self.deterministic,
            # Only where it is so: what was tuned for plain convolutions keeps its key.
            **({"transposed": True} if self.transposed else {}),
            **({"activation": self.activation} if self.activation else {}),
            **device_facts(self.device, _index(self.device, device)),
            **(versions or {}),
        }

    def __str__(self) -> str:
        extras = [self.precision] if self.precision != "ieee" else []
        extras += ["bias"] if self.bias else []
        extras += ["deterministic"] if self.deterministic else []
        extras += ["transposed"] if self.transposed else []
        extras += [self.activation] if self.activation else []
        return ", ".join(
            [f"{self.direction} {self.geometry}", dtype_name(self.dtype), self.layout, self.device, *extras]
        )


def transposed_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> list[int]:
    """(T, H, W) of a transposed layer's output: the ``size`` of its convolution's Geometry.

    Symbolic sizes stay symbolic.
    """
    axes = zip(size, kernel, stride, padding, dilation, output_padding)
    return [(s - 1) * step - 2 * p + d * (k - 1) + 1 + more for s, k, step, p, d, more in axes]


def layer_pass(direction: str, transposed: bool) -> str:
    """The pass of a layer that a convolution's pass is, or, the relation being its own inverse, the reverse.

    A transposed layer computes forward what its convolution computes as the input's gradient.
    """
    if not transposed or direction == "grad_weight":
        return direction
    return "grad_input" if direction == "forward" else "forward"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def device_facts(device: str, index: int | None = None) -> dict[str, Any]:
    """What of a device decides which kernel is fastest on it: its name, capability and, on a CPU, threads.

    The thread count is a property of the process, not of the machine, but a choice measured on two
    threads says little about thirty-two.
    """
    if device == "cuda":
        name, capability = _cuda_facts(torch.cuda.current_device() if index is None else index)
        return {"device_name": name, "capability": capability}
    return {
        "device_name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def _cuda_facts(index: int) -> tuple[str, str]:
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), f"{major}.{minor}"


@functools.cache
def _cpu_name() -> str:
    """The processor's model name; Python knows only its architecture on Linux, so read the kernel's list."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "cpu"


def _index(kind: str, device: torch.device | None) -> int | None:
    if device is not None and device.type != kind:
        raise ArgumentError(f"device={device} is not of the problem's kind {kind!r}; pass a {kind} device.")
    return None if device is None else device.index


def _join(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
