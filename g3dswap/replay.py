"""Runs of one model in several precisions that take the same decisions.

Two runs of a network differ by rounding, and rounding alone can flip a ReLU or the winner of a max pooling;
one flip moves a gradient by a thousand times the rounding error, in either run, by chance. To compare errors
one has to compare them along the same branch: the float64 run notes where each function with a kink was
evaluated, and the other runs take the derivative there. Values are not touched, so a wrong value still shows.

Random numbers are drawn in the model's own dtype, so that dropout drops the same elements in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_KINKED: frozenset[Any] = frozenset(
    [
        *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
        *(F.relu6, F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid, F.prelu, F.threshold, F.softshrink),
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
        *(F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices),
        *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
        *(torch.abs, Tensor.abs, torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_),
        *(torch.clamp_min, Tensor.clamp_min, torch.amax, Tensor.amax),
    ]
)

_DROPOUTS: frozenset[Any] = frozenset(
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout]
)
_FILLS: frozenset[Any] = frozenset(
    [Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.random_]
)
_DRAWS: frozenset[Any] = frozenset([torch.rand, torch.randn])
_DRAWS_LIKE: frozenset[Any] = frozenset([torch.rand_like, torch.randn_like])


class Record(TorchFunctionMode):
    """The float64 run: notes the inputs of functions with a kink, draws random numbers as ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.places: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else kwargs.get("input")
        if func in _DRAWS and kwargs.get("dtype") == torch.float64:
            return func(*args, **{**kwargs, "dtype": self.dtype}).double()
        if func in _KINKED and isinstance(first, Tensor) and first.is_floating_point():
            self.places.append(first.detach().to(self.dtype, copy=True))
        if not isinstance(first, Tensor) or first.dtype != torch.float64:
            return func(*args, **kwargs)
        if func in _DRAWS_LIKE and "dtype" not in kwargs:
            return func(first.to(self.dtype), *args[1:], **kwargs).double()
        elif func in _FILLS:
            return first.copy_(func(torch.empty_like(first, dtype=self.dtype), *args[1:], **kwargs))
        elif func in _DROPOUTS:
            return self._dropout(func, first, args[1:], {**kwargs})
        return func(*args, **kwargs)

    def _dropout(self, func: Any, value: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        kwargs.pop("input", None)
        ones = torch.ones_like(value, dtype=self.dtype)
        kept = func(ones, *rest, **kwargs)
        inplace = kept is ones
        return value.mul_(kept) if inplace else value * kept


class Replay(TorchFunctionMode):
    """Another run: functions with a kink are differentiated where the recorded run evaluated them."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.places = record.places
        self.position = 0
        self.paused = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.paused or func not in _KINKED:
            return func(*args, **kwargs)
        value = args[0] if args else kwargs.pop("input", None)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return func(value, *args[1:], **kwargs)
        place = self._next(value)
        if place is None or not (torch.is_grad_enabled() and value.requires_grad):
            return func(value, *args[1:], **kwargs)
        return _evaluate(self, func, value, place, args[1:], kwargs)

    def _next(self, value: Tensor) -> Tensor | None:
        """Where the recorded run was at this point; None once the runs have parted."""
        if self.position >= len(self.places) or self.places[self.position].shape != value.shape:
            self.position = len(self.places)
            return None
        self.position += 1
        return self.places[self.position - 1]


def _evaluate(
    mode: Replay, func: Any, value: Tensor, place: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``func(value, *rest)`` with the derivative that it has at ``place``."""
    # Tensors among the other arguments (the slope of a PReLU) get their gradients too.
    tensors = [item for item in rest if isinstance(item, Tensor)]
    extra: list[Any] = []
    inplace = False

    def call(first: Tensor, *others: Tensor) -> Tensor:
        nonlocal inplace
        left = list(others)
        copy = first.clone()
        result = func(copy, *[left.pop(0) if isinstance(item, Tensor) else item for item in rest], **kwargs)
        inplace = result is copy
        if isinstance(result, tuple):
            extra[:] = result[1:]
            result = result[0]
        return result

    result = _Elsewhere.apply(mode, call, place, value, *tensors)
    if inplace:
        return value.copy_(result)
    return (result, *extra) if extra else result


class _Elsewhere(torch.autograd.Function):
    """A function evaluated at one place and differentiated at another."""

    @staticmethod
    def forward(
        ctx: Any, mode: Replay, call: Callable[..., Tensor], place: Tensor, value: Tensor, *others: Tensor
    ) -> Tensor:
        ctx.mode, ctx.call = mode, call
        # Not the value itself: an in-place function is about to overwrite it.
        ctx.save_for_backward(place.to(value), *others)
        return call(value, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.mode.paused = True
        try:
            with torch.enable_grad():
                at = [item.detach().requires_grad_() for item in ctx.saved_tensors]
                found = torch.autograd.grad(ctx.call(*at), at, grads[0])
        finally:
            ctx.mode.paused = False
        return (None, None, None, *found)
