"""The torch.fx pass: which layers a forward really reaches, and which convolutions it calls as functions.

The model is never replaced by a ``GraphModule``: its graph only tells what follows a layer. Where a module's
forward cannot be traced, that module becomes opaque and the rest of the graph goes on; its children are then
traced one by one, and layers that no trace reaches even so are taken from the module tree.
"""

from __future__ import annotations

import inspect
import sys
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from g3dswap.entries import ROOT, Functional, Untraced
from g3dswap.guard import Inputs, untouched

# Function -> (name, position of `groups` among its arguments).
_FUNCTIONS: dict[Any, tuple[str, int]] = {
    torch.conv3d: ("conv3d", 6),  # nn.functional.conv3d is the same object
    torch.conv_transpose3d: ("conv_transpose3d", 6),
    torch.ops.aten.conv3d.default: ("aten.conv3d", 6),
    torch.ops.aten.conv_transpose3d.input: ("aten.conv_transpose3d", 6),
    torch.ops.aten.convolution.default: ("aten.convolution", 8),
    torch.convolution: ("convolution", 8),
}

_TORCH = str(Path(torch.__file__).parent)


@dataclass
class Trace:
    """What the forwards of a model were seen to do."""

    reached: set[int] = field(default_factory=set)
    """``id`` of each layer that a traced forward calls, or that a part which cannot be traced holds."""
    functional: list[Functional] = field(default_factory=list)
    untraced: list[Untraced] = field(default_factory=list)
    graph: fx.Graph | None = None
    """What the model's own forward does in its present mode; None where that cannot be traced."""


def trace(model: nn.Module, layers: Mapping[int, str], inputs: Inputs | None = None) -> Trace:
    """Trace the model as it is, and in the other mode (train, eval) if some layers were not reached.

    Args:
        layers: ``id(module) -> name`` of the grouped convolutions, which are not looked into.
        inputs: example inputs; they only say which optional arguments of the root's forward are passed.

    The model is left untouched.
    """
    result = Trace()
    with untouched(model), warnings.catch_warnings():
        # What a forward warns of when it meets a proxy is no concern of the user's.
        warnings.simplefilter("ignore")
        tracer = _trace_mode(model, layers, inputs, result)
        if "" not in tracer.failures:
            result.graph = getattr(tracer, "graph", None)
        if not result.reached.issuperset(layers):
            for module in model.modules():
                # Not through train(), which user classes override.
                module.__dict__["training"] = not module.training
            _trace_mode(model, layers, inputs, result)
    return result


def _trace_mode(model: nn.Module, layers: Mapping[int, str], inputs: Inputs | None, result: Trace) -> _Tracer:
    """Add to the result what the model does in the mode that it is in; returns the tracer of the whole."""
    visited: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    opaque: dict[str, tuple[nn.Module, str]] = {}
    loose: set[int] = set()
    whole = _Tracer("", layers, visited)
    while pending:
        name, module = pending.pop(0)
        if id(module) in layers:
            loose.add(id(module))
        if id(module) in visited or id(module) in layers:
            continue
        visited.add(id(module))
        if not _has_forward(module):
            pending += _children(name, module)
            continue
        tracer = whole if module is model else _Tracer(name, layers, visited)
        failures = tracer.run(module, inputs if module is model else None)
        result.reached |= tracer.reached
        _add_functional(result.functional, tracer.functional)
        for failed_name, (failed, reason) in failures.items():
            opaque[failed_name] = (failed, reason)
            pending += _children(failed_name, failed)
    _take_from_tree(opaque, layers, result)
    result.reached |= loose  # in a container that nothing calls: who calls them, only the user knows
    return whole


def _take_from_tree(
    opaque: Mapping[str, tuple[nn.Module, str]], layers: Mapping[int, str], result: Trace
) -> None:
    """Layers that only an opaque part can call are taken as reached; innermost parts first."""
    known = {item.name for item in result.untraced}
    for name in sorted(opaque, key=lambda item: -item.count(".") - bool(item)):
        module, reason = opaque[name]
        inside = {id(item) for item in module.modules() if id(item) in layers} - result.reached
        result.reached |= inside
        if (name or ROOT) not in known:
            result.untraced.append(Untraced(name or ROOT, reason, len(inside)))
    result.untraced.sort(key=lambda item: item.name)


def _children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        yield (f"{name}.{key}" if name else key), child


def _has_forward(module: nn.Module) -> bool:
    """False for mere containers: ``ModuleList``, ``ModuleDict``, classes without a forward of their own."""
    return getattr(module.forward, "__name__", "") != "_forward_unimplemented"


def _add_functional(known: list[Functional], new: list[Functional]) -> None:
    for item in new:
        if item not in known:
            known.append(item)


class _Tracer(fx.Tracer):
    """Collects what it meets; a module whose forward fails becomes a leaf, with the failure recorded."""

    def __init__(self, prefix: str, layers: Mapping[int, str], visited: set[int]) -> None:
        super().__init__()
        self.prefix = prefix
        self.layers = layers
        self.visited = visited
        self.reached: set[int] = set()
        self.functional: list[Functional] = []
        self.failures: dict[str, tuple[nn.Module, str]] = {}

    def run(self, module: nn.Module, inputs: Inputs | None) -> dict[str, tuple[nn.Module, str]]:
        """Trace one module; returns the modules that could not be traced, itself perhaps among them."""
        if not self.is_leaf_module(module, ""):
            try:
                self.trace(module, concrete_args=_defaults(module, inputs))
            except Exception as error:
                self.failures[self.prefix] = (module, _reason(error))
        return self.failures

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.layers or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        name = self.path_of_module(m)
        if id(m) in self.layers:
            self.reached.add(id(m))
        self.visited.add(id(m))
        depth = len(self.module_stack)
        scope = self.scope
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.failures.setdefault(self.qualified(name), (m, _reason(error)))
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            self.scope = scope
            return self.create_proxy("call_module", name, args, kwargs)

    def create_node(
        self,
        kind: str,
        target: fx.node.Target,
        args: tuple[fx.node.Argument, ...],
        kwargs: dict[str, fx.node.Argument],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        if kind == "call_function":
            groups = groups_of(target, args, kwargs)
            if groups is None or isinstance(groups, fx.Node) or groups > 1:
                self.add(target, groups)
        return super().create_node(kind, target, args, kwargs, name, type_expr)

    def add(self, function: Any, groups: int | fx.Node | None) -> None:
        """Record a call of a convolution function."""
        owner = next(reversed(self.module_stack.values()))[0] if self.module_stack else ""
        self.functional.append(
            Functional(
                name=self.qualified(owner) or ROOT,
                function=_FUNCTIONS[function][0],
                groups=groups if isinstance(groups, int) else 0,
                where=place(sys._getframe()),
            )
        )

    def qualified(self, name: str) -> str:
        return ".".join(part for part in (self.prefix, name) if part)


def groups_of(function: Any, args: Collection[Any], kwargs: Mapping[str, Any]) -> Any:
    """The ``groups`` argument of a 3D convolution call (None: unknown); 1 for any other function."""
    try:
        _, position = _FUNCTIONS.get(function, (None, -1))
    except TypeError:  # an unhashable callable
        return 1
    if position < 0:
        return 1
    values = list(args)
    if position == 8:
        # The general convolution: one stride, or three, of which only three say that it is a 3D one.
        stride = kwargs.get("stride", values[3] if len(values) > 3 else None)
        if not isinstance(stride, (list, tuple)) or len(stride) != 3:
            return 1
    return kwargs.get("groups", values[position] if len(values) > position else 1)


def function_name(function: Any) -> str:
    """The name under which a convolution function is reported."""
    return _FUNCTIONS[function][0]


def user_frame(frame: types.FrameType | None) -> types.FrameType | None:
    """The innermost frame outside of PyTorch and of this package's own tracing."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_TORCH) and Path(name).parent != Path(__file__).parent:
            return frame
        frame = frame.f_back
    return None


def place(frame: types.FrameType | None) -> str:
    """``file:line`` of the user's code that led here, or an empty string."""
    found = user_frame(frame)
    if found is None or found.f_code.co_filename.startswith("<"):
        return ""
    return f"{found.f_code.co_filename}:{found.f_lineno}"


def _reason(error: Exception) -> str:
    """The first line of a failure, with the place in the user's code."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    if type(error) is not fx.proxy.TraceError:
        text = f"{type(error).__name__}: {text}"
    traceback = error.__traceback__
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    for frame, line in reversed(frames):
        if user_frame(frame) is frame and not frame.f_code.co_filename.startswith("<"):
            return f"{text} ({frame.f_code.co_filename}:{line})"
    return text


def _defaults(module: nn.Module, inputs: Inputs | None) -> dict[str, Any]:
    """Optional arguments that are not passed: they keep their default instead of becoming proxies."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return {}
    passed = set() if inputs is None else {*list(parameters)[: len(inputs.args)], *inputs.kwargs}
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
        and name not in passed
        # fx takes a concrete value apart with pytree; only plain ones stay what they are.
        and (parameter.default is None or isinstance(parameter.default, (bool, int, float, str)))
    }
