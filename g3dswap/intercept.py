"""Convolution functions called inside a forward, run by the chosen kernels.

The module whose forward makes such calls gets a ``forward`` of its own, an attribute of the instance: it runs
that of the class under a ``TorchFunctionMode``, which PyTorch keeps for each thread and which is left in any
case, also by an exception. Nothing outside of that forward, in this or another thread, meets other functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from g3dswap import op
from g3dswap.trace import groups_of

FUNCTIONS = ("conv3d", "conv_transpose3d")
"""The functions of ``torch.nn.functional``, and of ``torch``, that are intercepted."""


class Intercept(TorchFunctionMode):
    """While it is entered, `FUNCTIONS` with groups > 1 run the chosen kernels.

    ``tune`` and ``cache``: as of ``Grouped``. Calls on the weight of one of ``layers``, which are convolution
    layers that stay PyTorch's, are left alone.
    """

    def __init__(self, tune: str, cache: str | None, layers: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.tune, self.cache, self.layers = tune, cache or "", tuple(layers)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv3d:
            run: Any = op.conv3d
        elif func is torch.conv_transpose3d:
            run = op.conv_transpose3d
        else:
            return func(*args, **kwargs)
        value = args[0] if args else kwargs.get("input")
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        groups = groups_of(func, args, kwargs)
        ours = isinstance(value, Tensor) and isinstance(groups, int) and groups > 1  # no proxies of torch.fx
        if not ours or any(layer._parameters.get("weight") is weight for layer in self.layers):
            return func(*args, **kwargs)
        return run(*args, **kwargs, tune=self.tune, cache=self.cache)


class Forward:
    """The ``forward`` of one module: that of its class, under an `Intercept`.

    It is copied and pickled with its module.
    """

    def __init__(self, module: nn.Module, mode: Intercept) -> None:
        self.module, self.mode = module, mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode:
            return type(self.module).forward(self.module, *args, **kwargs)

    # What inspect and torch.export ask a method for.

    @property
    def __wrapped__(self) -> Any:
        return MethodType(type(self.module).forward, self.module)

    @property
    def __code__(self) -> CodeType:
        code: CodeType = type(self.module).forward.__code__
        return code


def put_on(module: nn.Module, mode: Intercept) -> None:
    """Let the module's forward run under the mode."""
    module.__dict__["forward"] = Forward(module, mode)


def take_off(module: nn.Module) -> None:
    """Leave the module's forward as its class has it."""
    if is_on(module):
        del module.__dict__["forward"]


def is_on(module: nn.Module) -> bool:
    """Whether the calls of this module's forward are intercepted."""
    return isinstance(module.__dict__.get("forward"), Forward)


@contextmanager
def taken_off(model: nn.Module) -> Iterator[None]:
    """Within it, no forward of the model is intercepted."""
    found = [module.__dict__ for module in model.modules() if is_on(module)]
    kept = [attributes.pop("forward") for attributes in found]
    try:
        yield
    finally:
        for attributes, forward in zip(found, kept):
            attributes["forward"] = forward
