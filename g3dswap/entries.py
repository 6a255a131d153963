"""The lines of a report: one frozen dataclass for each thing that can happen to a convolution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from g3dswap.rounds import Times

ROOT = "(model)"
"""How the root module, whose qualified name is empty, is called in reports and messages."""


def _numbers(values: Iterable[int]) -> str:
    """``3x3x3``."""
    return "x".join(str(value) for value in values)


def _short(values: Sequence[int]) -> str:
    """``1`` for ``(1, 1, 1)``, ``1x2x2`` otherwise."""
    return str(values[0]) if len(set(values)) == 1 else _numbers(values)


@dataclass(frozen=True)
class Layer:
    """The constructor arguments of a 3D convolution that decide what it computes."""

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    bias: bool = False
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0, 0)

    @classmethod
    def of(cls, conv: nn.Module) -> Layer:
        """Read them from a convolution, of ``nn`` or of a namespace with the same attributes."""
        module: Any = conv
        padding = module.padding
        return cls(
            in_channels=int(module.in_channels),
            out_channels=int(module.out_channels),
            groups=int(module.groups),
            kernel_size=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=padding if isinstance(padding, str) else tuple(padding),
            dilation=tuple(module.dilation),
            padding_mode=str(getattr(module, "padding_mode", "zeros")),
            bias=getattr(module, "bias", None) is not None,
            transposed=bool(getattr(module, "transposed", False)),
            output_padding=tuple(getattr(module, "output_padding", (0, 0, 0))),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layer:
        """The inverse of ``dataclasses.asdict``."""
        arguments: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**arguments)

    def __str__(self) -> str:
        channels = f"{self.in_channels}->{self.out_channels}"
        parts = ["transposed"] if self.transposed else []
        parts += [channels, f"g{self.groups}", _numbers(self.kernel_size)]
        if set(self.stride) != {1}:
            parts.append(f"s{_short(self.stride)}")
        if isinstance(self.padding, str):
            parts.append(self.padding)
        elif set(self.padding) != {0}:
            parts.append(f"p{_short(self.padding)}")
        if set(self.output_padding) != {0}:
            parts.append(f"op{_short(self.output_padding)}")
        if set(self.dilation) != {1}:
            parts.append(f"d{_short(self.dilation)}")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        return " ".join(parts)


@dataclass(frozen=True)
class PassChoice:
    """What runs one of the passes of a layer on one shape, and what is known about its speed."""

    direction: str
    """``forward``, ``grad_input`` or ``grad_weight``."""
    source: str
    """``tuned``, ``cached``, ``shipped``, ``default``, ``nearest``, or ``native``: PyTorch's own kernel."""
    reason: str = ""
    seconds: float | None = None
    native_seconds: float | None = None
    error: float | None = None
    """Relative error against float64, as measured when it was tuned."""
    native: bool = False
    """PyTorch's own kernel runs this pass."""

    @property
    def speedup(self) -> float | None:
        """PyTorch's time over this one's; None where one of them was not measured."""
        if self.native:
            return 1.0
        if not self.seconds or not self.native_seconds:
            return None
        return self.native_seconds / self.seconds


@dataclass(frozen=True)
class Call:
    """One kind of input that a layer met, and the choices made for it."""

    shape: tuple[int, ...]
    """N, C, T, H, W of the layer's input."""
    dtype: str
    layout: str
    device: str
    passes: tuple[PassChoice, ...] = ()
    output_padding: tuple[int, ...] = ()
    """What the ``output_size`` of a call of a transposed layer made of the layer's own; empty for that."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Call:
        """The inverse of ``dataclasses.asdict``."""
        passes = tuple(PassChoice(**item) for item in data["passes"])
        extra = tuple(data.get("output_padding", ()))
        return cls(tuple(data["shape"]), data["dtype"], data["layout"], data["device"], passes, extra)

    def __str__(self) -> str:
        last = " channels_last" if self.layout == "channels_last_3d" else ""
        extra = f" op{_short(self.output_padding)}" if self.output_padding else ""
        return f"{_numbers(self.shape)} {self.dtype}{last}{extra}"


@dataclass(frozen=True)
class Swapped:
    """A layer that was replaced by its faster twin (or, in an inspection, would be)."""

    name: str
    geometry: Layer
    calls: tuple[Call, ...] = ()
    aliases: tuple[str, ...] = ()
    """Other names of the same, shared module."""
    note: str = ""
    """Why there are no choices yet, if there are none."""
    verified: bool | None = None
    """Outputs and gradients were checked against float64 after the swap; None: not checked."""


@dataclass(frozen=True)
class Kept:
    """A layer that stays PyTorch's although g3dswap could replace it."""

    name: str
    geometry: Layer
    reason: str
    calls: tuple[Call, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A grouped 3D convolution that g3dswap cannot replace."""

    name: str
    kind: str
    """Name of its class."""
    reason: str
    groups: int = 0
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class FusedInto:
    """What was fused into a grouped layer; names of modules, "" for none."""

    name: str
    """The layer's."""
    norm: str = ""
    """The batch norm that was folded into its weights."""
    activation: str = ""
    """The activation that its kernel applies."""
    kind: str = ""
    """That activation, one of ``problem.ACTIVATIONS``."""
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.norm} (batch norm, in its weights)"] if self.norm else []
        parts += [f"{self.activation} ({self.kind}, in its kernel)"] if self.activation else []
        return ", ".join(parts)


@dataclass(frozen=True)
class NotFused:
    """A grouped layer into which nothing, or not all that follows, was fused."""

    name: str
    reason: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Functional:
    """A call of a convolution function with groups > 1 inside a forward."""

    name: str
    """The module whose forward makes the call."""
    function: str
    groups: int
    where: str = ""
    """``file:line`` of the call, where known."""
    shape: tuple[int, ...] = ()
    """Shape of its input, where example inputs showed it."""
    converted: bool = False
    """The chosen kernels run it (with ``functional=True``)."""
    reason: str = ""
    """Why it is not converted although that was asked for, or why there are no choices yet."""
    geometry: Layer | None = None
    """What it computes, where example inputs showed it."""
    calls: tuple[Call, ...] = ()
    verified: bool | None = None
    """As of a swapped layer."""


@dataclass(frozen=True)
class Untraced:
    """A part of the model that torch.fx cannot trace; its layers were found in the module tree instead."""

    name: str
    reason: str
    layers: int = 0
    """How many grouped layers inside it were taken from the module tree."""


@dataclass(frozen=True)
class Step:
    """One kind of step of the whole model, timed before and after the conversion."""

    kind: str
    """``training``: forward and backward, without an optimizer; ``inference``: forward without gradients."""
    before: Times
    after: Times | None
    """None where the model is not converted."""
    grouped_before: float
    """Seconds of a step that 3D convolutions with groups > 1 take, whoever calls them."""
    grouped_after: float | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Step:
        """The inverse of ``dataclasses.asdict``; what else there is follows from it."""
        before = Times(**data["before"])
        after = None if data["after"] is None else Times(**data["after"])
        return cls(data["kind"], before, after, data["grouped_before"], data["grouped_after"])

    @property
    def speedup(self) -> float | None:
        """The step's time before over the one after; None where the model is not converted."""
        return None if self.after is None else self.before.seconds / self.after.seconds

    @property
    def share_before(self) -> float:
        """The grouped convolutions' part of the step before the conversion."""
        return min(1.0, self.grouped_before / self.before.seconds)

    @property
    def share_after(self) -> float | None:
        """Their part of it afterwards."""
        if self.after is None or self.grouped_after is None:
            return None
        return min(1.0, self.grouped_after / self.after.seconds)
