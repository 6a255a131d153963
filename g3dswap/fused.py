"""Grouped layers with what followed them in them: a batch norm in the weights, an activation in the kernel.

Such a layer is for inference. It knows what it was made of, so that all of it can be put back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import ArgumentError, FusedError
from .module import GROUPED, Conv, Grouped, Grouped3D, Grouped3DTranspose, checked, moved

ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
"""The layers of PyTorch's that a kernel can apply, with their names in ``problem.ACTIVATIONS``."""

MARK = "norm_is_folded"
"""Name of the buffer by which a state_dict tells folded weights from others."""

REMEDY = "g3dswap.revert(model) brings back the layers that it was made of"

_Self = TypeVar("_Self", bound="Fused")


@dataclass(frozen=True)
class Fusion:
    """What follows a grouped convolution and is to become a part of it; the names are those in the model."""

    norm: nn.BatchNorm3d | None = None
    norm_name: str = ""
    activation: nn.Module | None = None
    activation_name: str = ""
    reason: str = ""
    """Why there is not more of it."""

    def __bool__(self) -> bool:
        return self.norm is not None or self.activation is not None

    @property
    def kind(self) -> str:
        """The activation as one of ``problem.ACTIVATIONS``, or ""."""
        return "" if self.activation is None else activation_kind(self.activation)


NOTHING = Fusion()
"""Of a layer that is not fused with anything, and of which nobody asked why."""


def activation_kind(module: nn.Module) -> str:
    """The name in ``problem.ACTIVATIONS`` of what a module computes, "" if it is none of them."""
    kind = ACTIVATION_MODULES.get(type(module), "")
    return f"{kind}_tanh" if isinstance(module, nn.GELU) and module.approximate == "tanh" else kind


@dataclass
class Origin:
    """What a fused layer was made of. No module, so that nothing of it is a part of the model."""

    conv: nn.Module
    fusion: Fusion
    stand_ins: tuple[tuple[nn.Identity, nn.Module], ...]
    """The modules in the places of the norm and of the activation, each with what it stands for."""
    lost: bool = False
    """Other weights were loaded since, and it is not known what they were folded from."""


def fold(conv: Conv, norm: nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that computes ``norm(conv(x))`` in eval mode.

    Worked out in float64 and then rounded to the convolution's dtype; the weight keeps its memory format.
    """
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None  # or it does not compute the same for every input
    with torch.inference_mode(False), torch.no_grad():
        weight = conv.weight.detach().double()
        scale = (var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        if conv.bias is not None:
            shift = shift + conv.bias.detach().double() * scale
        # Output channels come first in a weight; in a transposed layer's they come second, group by group.
        factors = scale.view(-1, 1, 1, 1, 1)
        if conv.transposed:
            groups, each = conv.groups, conv.out_channels // conv.groups
            factors = scale.view(groups, 1, each).expand(-1, conv.in_channels // groups, -1)
            factors = factors.reshape(conv.in_channels, each, 1, 1, 1)
        return (weight * factors).to(conv.weight.dtype), shift.to(conv.weight.dtype)


class Fused(Grouped):
    """A grouped layer that computes what it and the layers after it computed in eval mode.

    Its folded weights are not to be trained: they require no gradient, and a call in train mode, or one
    that asks for their gradient, is a FusedError. Gradients in the input are right. A state_dict with
    weights that no norm was folded into does not load.
    """

    origin: Origin

    @classmethod
    def of(
        cls: type[_Self],
        conv: Conv,
        fusion: Fusion,
        *,
        tune: str = "quick",
        cache: str | os.PathLike[str] | None = None,
    ) -> _Self:
        """A layer to stand in the place of ``conv``, which stays as it is.

        ``origin.stand_ins`` are for the places of the norm and of the activation.
        """
        tune, cache = checked(tune, cache)
        layer: Any = moved(conv, cls, share=True)
        layer.tune, layer.cache, layer.activation = tune, cache, fusion.kind
        stand_ins = []
        for module in (fusion.norm, fusion.activation):
            if module is not None:
                stand_in = nn.Identity()
                stand_in.training = module.training
                stand_ins.append((stand_in, module))
        layer.origin = Origin(conv, fusion, tuple(stand_ins))
        if fusion.norm is not None:
            weight, bias = fold(conv, fusion.norm)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.bias = nn.Parameter(bias, requires_grad=False)
            layer.register_buffer(MARK, torch.ones((), dtype=torch.uint8, device=weight.device))
        return layer

    def to_conv(self, *, share: bool = True) -> Any:
        """Not possible for this layer alone."""
        raise ArgumentError(f"A fused layer is no {self.plain.__name__}; {REMEDY}.")

    def restored(self) -> dict[int, nn.Module]:
        """``id`` of this layer and of each stand-in -> the module that was there, in the present mode.

        Raises:
            FusedError: weights were loaded into this layer.
        """
        if self.origin.lost:
            raise FusedError(
                "Weights were loaded into a fused layer, and those that they were folded from are not known; "
                "build the model again and load a checkpoint from before the fusion."
            )
        places = [(self, self.origin.conv), *self.origin.stand_ins]
        for place, module in places:
            module.training = place.training
        return {id(place): module for place, module in places}

    def extra_repr(self) -> str:
        """As of a grouped layer, with what was fused into it."""
        norm = "" if self.origin.fusion.norm is None else ", folded norm"
        return f"{super().extra_repr()}{norm}" + (f", {self.activation}" if self.activation else "")

    def _run(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, output_padding: Any = None
    ) -> Tensor:
        if self.training:
            raise FusedError(f"A layer that was fused for inference is called in train mode; {REMEDY}.")
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained and self.origin.fusion.norm is not None and torch.is_grad_enabled():
            raise FusedError(f"Weights that a batch norm was folded into cannot be trained; {REMEDY}.")
        return super()._run(input, weight, bias, padding, output_padding)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What moves or casts the layer does the same to what it was made of."""
        super()._apply(fn, recurse)
        for module in (self.origin.conv, *(module for _, module in self.origin.stand_ins)):
            module._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if self.origin.fusion.norm is None:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        if prefix + MARK not in state_dict and any(f"{prefix}{n}" in state_dict for n in ("weight", "bias")):
            errors = rest[-1]
            errors.append(
                f"{prefix}weight comes from a model without fusion, and no batch norm is folded into it; "
                "load it before g3dswap.convert(..., fuse=True), or into what g3dswap.revert(model) gives."
            )
            return
        before = [item.detach().clone() for item in self._weights()]
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not all(torch.equal(old, new) for old, new in zip(before, self._weights())):
            self.origin.lost = True

    def _weights(self) -> Iterator[Tensor]:
        return iter(self.parameters(recurse=False))


class Fused3D(Fused, Grouped3D):
    """``Grouped3D`` with a batch norm and an activation in it."""


class Fused3DTranspose(Fused, Grouped3DTranspose):
    """``Grouped3DTranspose`` with a batch norm and an activation in it."""


FUSED: dict[type[nn.Module], type[Fused]] = {cls.plain: cls for cls in (Fused3D, Fused3DTranspose)}
"""PyTorch's layer and the one that takes the place of it and of what follows it."""

for _plain, _grouped in GROUPED.items():
    FUSED[_grouped] = FUSED[_plain]  # a layer that was converted before
