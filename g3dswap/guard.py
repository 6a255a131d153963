"""Running a model to look at it, and leaving it as it was.

A forward may change buffers (batch-norm statistics), draw random numbers, and set attributes; tracing it with
torch.fx leaves proxies wherever the forward stores what it computes. :func:`untouched` undoes all of that,
also when the forward raises.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from g3dswap.errors import ArgumentError

_CONTAINERS = (dict, OrderedDict, list, set, deque)
"""Types whose content is restored; a subclass may do more than hold values, and is left alone."""


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within it, the model may be run and traced; afterwards it is what it was before.

    Restores for every module its attributes (``training`` and hooks among them) and the content of those that
    are plain containers, the values of buffers, the ``requires_grad`` and ``grad`` of parameters, and for the
    process the random states (Python, NumPy, PyTorch on CPU and every CUDA device) and the grad mode.
    """
    modules = [(module, _attributes(module)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    parameters = [(item, item.requires_grad, item.grad) for item in model.parameters()]
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    torch_state = torch.random.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if _cuda_in_use() else []
    grad_enabled = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad_enabled)
        for module, attributes in modules:
            _restore(module, attributes)
        for buffer, value in buffers:
            # Through .data: graphs that were recorded before must not see a newer version of the buffer.
            if buffer.data.shape == value.shape:
                buffer.data.copy_(value)
            else:
                buffer.data = value
        for parameter, requires_grad, grad in parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.random.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def _cuda_in_use() -> bool:
    """Asking for the random state of CUDA would initialise it, which forbids forking later."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _attributes(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """Name, value, and a shallow copy of the value where it is a container."""
    return [
        (name, value, value.copy() if type(value) in _CONTAINERS else None)
        for name, value in vars(module).items()
    ]


def _restore(module: nn.Module, attributes: list[tuple[str, Any, Any]]) -> None:
    for _, value, content in attributes:
        if content is None or _same_items(value, content):
            continue
        value.clear()
        if isinstance(value, (list, deque)):
            value.extend(content)
        else:
            value.update(content)
    now = vars(module)
    before = [(name, id(value)) for name, value, _ in attributes]
    if [(name, id(value)) for name, value in now.items()] != before:
        now.clear()
        now.update((name, value) for name, value, _ in attributes)


def _same_items(value: Any, content: Any) -> bool:
    """The same objects in the same order; equality would compare tensors element by element."""
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()] == [
            (key, id(item)) for key, item in content.items()
        ]
    return [id(item) for item in value] == [id(item) for item in content]


# Example inputs


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, function: Callable[[Tensor], Any]) -> Inputs:
        """The same structure with every tensor replaced."""
        return replace(self, args=map_tensors(self.args, function), kwargs=map_tensors(self.kwargs, function))

    def fresh(self) -> Inputs:
        """Copies of the tensors: a forward may change its input in place."""
        return self.map(lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with a name that says where it stands."""
        for index, value in enumerate(self.args):
            yield from named_tensors(value, f"input[{index}]")
        for key, value in self.kwargs.items():
            yield from named_tensors(value, f"input[{key!r}]")


def example(model: nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None) -> Inputs | None:
    """Arguments of the model's forward from what the user passed; None if nothing was passed.

    A tensor is the only argument, a tuple or list are the positional arguments, a dict the keyword arguments.

    Raises:
        ArgumentError: another type, no tensor in it, or arguments that do not fit the forward's signature.
    """
    if inputs is None and kwargs is None:
        return None
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ArgumentError(
            f"example_kwargs is {a_type(kwargs)}; it takes a dict from argument names to values."
        )
    keywords = dict(kwargs or {})
    args: tuple[Any, ...] = ()
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, Mapping):
        twice = sorted(set(inputs) & set(keywords))
        if twice:
            raise ArgumentError(
                f"The argument {twice[0]!r} is in example_inputs and in example_kwargs; give it once."
            )
        keywords = {**inputs, **keywords}
    elif isinstance(inputs, (tuple, list)):
        args = tuple(inputs)
    elif inputs is not None:
        raise ArgumentError(
            f"example_inputs is {a_type(inputs)}; it takes a tensor, a tuple or list of positional "
            "arguments, or a dict of keyword arguments."
        )
    result = Inputs(args, keywords)
    if not any(True for _ in result.tensors()):
        raise ArgumentError("example_inputs holds no tensor; pass what the model's forward takes.")
    wrong = next((key for key in keywords if not isinstance(key, str)), None)
    if wrong is not None:
        raise ArgumentError(
            f"example_inputs is a dict with the key {wrong!r}, and a dict is passed as keyword arguments; "
            "to pass it as one argument wrap it in a tuple: (inputs,)."
        )
    _check_signature(model, result, isinstance(inputs, Mapping))
    return result


def _check_signature(model: nn.Module, inputs: Inputs, from_dict: bool) -> None:
    """Raise if the forward cannot take these arguments."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return  # No signature to compare with: the call itself will tell.
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        hint = "; to pass a dict as one argument wrap it in a tuple: (inputs,)" if from_dict else ""
        raise ArgumentError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}{hint}."
        ) from None


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same nested structure with ``function`` applied to each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return _like(value, {key: map_tensors(item, function) for key, item in value.items()})
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{item.name: map_tensors(getattr(value, item.name), function) for item in _init(value)}
        )
    return value


def _like(value: dict[Any, Any], content: dict[Any, Any]) -> dict[Any, Any]:
    """A dictionary of the same class where that is possible without guessing its constructor."""
    return type(value)(content) if type(value) in (dict, OrderedDict) else content


def _init(value: Any) -> Iterable[Any]:
    return (item for item in fields(value) if item.init)


def named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested structure of tuples, lists, mappings and dataclasses, with its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for index, item in enumerate(value):
            yield from named_tensors(item, f"{name}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from named_tensors(getattr(value, item.name), f"{name}.{item.name}")


def a_type(value: Any) -> str:
    """``a list``, ``an int``: what a message calls a value of the wrong type."""
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
