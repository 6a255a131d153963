"""``Grouped3D`` and ``Grouped3DTranspose``: an ``nn.Conv3d`` and an ``nn.ConvTranspose3d`` whose passes each
run the kernel chosen for them.

What the two have in common is in ``Grouped``; `GROUPED` says which layer of PyTorch's each stands for.
"""

from __future__ import annotations

import copy
import os
import weakref
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import op
from .errors import ArgumentError, InputError, InputTypeError
from .problem import dtype_name

TUNE = ("none", "cached", "quick", "full")

Conv = nn.Conv3d | nn.ConvTranspose3d
"""The layers of PyTorch's that have a faster twin."""

_Moved = TypeVar("_Moved", bound=nn.Module)
_Self = TypeVar("_Self", bound="Grouped")


class Grouped(nn.Module):
    """What makes a layer of PyTorch's, which a subclass inherits beside this, run the chosen kernels.

    ``tune`` says how the kernel of a shape is chosen when it is first seen: "none" takes an untimed
    default, "cached" what the options cache has, "quick" and "full" measure what it does not have.
    ``cache`` is the options cache's directory, by default the user's. Both are plain attributes.

    A fault in the arguments or the input raises an ArgumentError; one that PyTorch's layer would meet with
    a RuntimeError (wrong shape, wrong dtype) raises an InputError, which is a RuntimeError too.
    """

    plain: ClassVar[type[nn.Module]]
    """The class of PyTorch's that it stands for."""

    activation: str = ""
    """What is applied to the result, one of ``problem.ACTIVATIONS``; see ``fused``."""

    tune: str
    cache: str | None

    # Of PyTorch's layer.
    in_channels: int
    out_channels: int
    groups: int

    @classmethod
    def from_conv(
        cls: type[_Self],
        conv: nn.Module,
        *,
        tune: str = "quick",
        cache: str | os.PathLike[str] | None = None,
        share: bool = True,
    ) -> _Self:
        """A layer to stand in the place of ``conv``, with everything that was attached to it.

        With ``share`` it holds the very same Parameter and hook objects (handles of hooks stay valid, an
        optimizer too), and ``conv`` is not to be used on; without, it has copies of its own. Raises
        ArgumentError where that is not possible: for subclasses, parametrized or weight-normed layers,
        and layers whose forward was replaced.
        """
        tune, cache = checked(tune, cache)
        if type(conv) is not cls.plain:
            name = cls.plain.__name__
            raise ArgumentError(
                f"{type(conv).__name__} is not exactly nn.{name} and may compute something else; "
                f"convert only plain nn.{name} layers."
            )
        module = moved(conv, cls, share)
        module.tune, module.cache = tune, cache
        return module

    def to_conv(self, *, share: bool = True) -> Any:
        """The way back: PyTorch's layer to stand in this module's place, as ``from_conv`` does."""
        conv = moved(self, self.plain, share)
        del conv.__dict__["tune"], conv.__dict__["cache"]
        return conv

    def extra_repr(self) -> str:
        """As of PyTorch's layer, with ``tune`` and, where it is not the default, ``cache``."""
        cache = "" if self.cache is None else f", cache={self.cache!r}"
        return f"{super().extra_repr()}, tune={self.tune!r}{cache}"

    def _run(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, output_padding: Any = None
    ) -> Tensor:
        """The operator; transposed where there is an ``output_padding``."""
        module: Any = self
        transposed = output_padding is not None
        return op.call(
            input, weight, bias, module.stride, padding, module.dilation, self.groups, self.tune,
            self.cache or "", transposed, output_padding if transposed else op.ZEROS, self.activation,
        )  # fmt: skip

    def _raise(self, error: Exception, input: Any, weight: Tensor) -> NoReturn:
        """Say what is wrong with an input that PyTorch refused, in one sentence; or pass its error on."""
        if not isinstance(input, Tensor):
            message = f"The input is a {type(input).__name__}; pass a torch.Tensor."
            raise InputTypeError(message) from error
        fault = self._fault(input, weight)
        if fault is None:
            raise error
        raise InputError(fault) from error

    def _fault(self, input: Tensor, weight: Tensor) -> str | None:
        shape = tuple(input.shape)
        wanted = f"({self.in_channels}, T, H, W) or (N, {self.in_channels}, T, H, W)"
        if len(shape) not in (4, 5):
            return f"The input of shape {shape} has {len(shape)} dimensions; pass one of shape {wanted}."
        if shape[-4] != self.in_channels:
            return f"The input of shape {shape} has {shape[-4]} channels; pass one of shape {wanted}."
        if input.dtype != weight.dtype:
            have, need = dtype_name(input.dtype), dtype_name(weight.dtype)
            return (
                f"The input is {have} but the weight is {need}; "
                "convert one of them with .to(dtype), or run under autocast."
            )
        if input.device != weight.device:
            return (
                f"The input is on {input.device} but the weight is on {weight.device}; "
                "move one of them with .to(device)."
            )
        return None


class Grouped3D(Grouped, nn.Conv3d):
    """``nn.Conv3d`` with the same parameters, state_dict, arguments and results, only faster.

    ``tune`` and ``cache``, and errors: as ``Grouped`` says.
    """

    plain = nn.Conv3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: str | int | tuple[int, int, int] = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        tune: str = "quick",
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        _check_groups(in_channels, out_channels, groups)
        tune, cache = checked(tune, cache)
        nn.Conv3d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,  # type: ignore[arg-type]  # the constructor checks the mode
        )  # fmt: skip
        self.tune, self.cache = tune, cache

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        try:
            padding: Any = self.padding
            if self.padding_mode != "zeros":
                input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
                padding = op.ZEROS
            elif padding == "same":
                input, padding = op.same_padding(input, self.kernel_size, self.dilation)
            elif padding == "valid":
                padding = op.ZEROS
            return self._run(input, weight, bias, padding)
        except (RuntimeError, TypeError, AttributeError) as error:
            self._raise(error, input, weight)


class Grouped3DTranspose(Grouped, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with the same parameters, state_dict, arguments and results, only faster.

    ``tune`` and ``cache``, and errors: as ``Grouped`` says.
    """

    plain = nn.ConvTranspose3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] = 0,
        output_padding: int | tuple[int, int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        tune: str = "quick",
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        _check_groups(in_channels, out_channels, groups)
        tune, cache = checked(tune, cache)
        nn.ConvTranspose3d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode, device, dtype,  # type: ignore[arg-type]  # the constructor checks the mode
        )  # fmt: skip
        self.tune, self.cache = tune, cache

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As nn.ConvTranspose3d; ``output_size`` is (T, H, W), or the whole shape, of what is wanted."""
        try:
            extra = self.output_padding if output_size is None else self._extra(input, output_size)
            return self._run(input, self.weight, self.bias, self.padding, extra)
        except (RuntimeError, TypeError, AttributeError) as error:
            self._raise(error, input, self.weight)

    def _extra(self, input: Tensor, output_size: list[int]) -> Any:
        """The output padding that gives this size; ValueError if none does."""
        layer: Any = self
        return layer._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 3, self.dilation
        )


GROUPED: dict[type[nn.Module], type[Grouped]] = {cls.plain: cls for cls in (Grouped3D, Grouped3DTranspose)}
"""PyTorch's layer and the one that takes its place."""


def _check_groups(in_channels: int, out_channels: int, groups: int) -> None:
    if groups < 1:
        raise ArgumentError(f"groups={groups} must be a positive integer; use 1 for an ungrouped layer.")
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ArgumentError(
                f"{name}={channels} is not divisible by groups={groups}; "
                "choose a group count that divides both channel counts."
            )


def checked(tune: str, cache: str | os.PathLike[str] | None) -> tuple[str, str | None]:
    if tune not in TUNE:
        raise ArgumentError(f"tune={tune!r} is unknown; use one of {', '.join(TUNE)}.")
    if cache is not None and not isinstance(cache, str | os.PathLike):
        raise ArgumentError(f"cache={cache!r} is no directory; give a path, or None for the default cache.")
    return tune, None if cache is None else os.fspath(cache)


def moved(module: nn.Module, cls: type[_Moved], share: bool) -> _Moved:
    """The module as one of class ``cls``, without running a constructor."""
    own = module.__dict__
    replaced = sorted({"forward", "_conv_forward"} & own.keys())
    if replaced:
        raise ArgumentError(
            f"The layer's {replaced[0]} was replaced on the instance; "
            f"delete that attribute before changing the layer's class."
        )
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise ArgumentError(
            "The layer's weight is not a parameter of its own (weight norm, pruning or parametrization); "
            "make it one (torch.nn.utils.remove_weight_norm, for example) before changing the layer's class."
        )
    if not share:
        module = copy.deepcopy(module)
        own = module.__dict__
    result = cls.__new__(cls)
    result.__dict__.update(own)
    for name in ("_parameters", "_buffers", "_modules"):
        result.__dict__[name] = own[name].copy()  # what is registered later belongs to one of the two only
    _rebind_hooks(module, result)
    return result


def _rebind_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give the new module to the hooks that PyTorch bound to the old one, which may be collected now.

    Other hooks get the module as an argument when they are called.
    """
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False) and hook.module() is old:  # type: ignore[attr-defined]
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]
