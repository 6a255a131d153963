"""What follows each grouped convolution in the graph of a model, as far as it can become a part of it.

A batch norm or an activation is fused only where the graph of the model's forward shows that nothing else
sees what the layers in between compute: each is called once, and its result is used once, by the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from g3dswap.discover import Site
from g3dswap.entries import ROOT
from g3dswap.fused import NOTHING, Fused, Fusion, activation_kind, fold
from g3dswap.module import Conv
from g3dswap.problem import dtype_name
from g3dswap.trace import Trace

_FUNCTIONS: dict[Any, str] = {
    F.relu: "F.relu", torch.relu: "torch.relu", torch.relu_: "torch.relu_", "relu": ".relu()",
    "relu_": ".relu_()", F.silu: "F.silu", F.gelu: "F.gelu", F.hardswish: "F.hardswish",
}  # fmt: skip
"""Activations that are called as functions or methods."""

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def find_fusions(model: nn.Module, sites: Sequence[Site], traced: Trace) -> dict[int, Fusion]:
    """``id`` of every grouped layer -> what can be fused into it, and why there is not more of it.

    The model is to be in the mode in which it was traced.
    """
    if traced.graph is None:
        why = next((item.reason for item in traced.untraced if item.name == ROOT), "")
        reason = f"torch.fx cannot trace the model's forward{f' ({why})' if why else ''}"
        return {id(site.module): Fusion(reason=reason) for site in sites}
    graph = _Graph(model, traced.graph)
    return {id(site.module): _fusion(graph, site.module, site.name) for site in sites}


class _Graph:
    """Who calls whom in a graph, and what it does not show."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.calls: dict[int, list[fx.Node]] = {}
        self.modules: dict[fx.Node, tuple[str, nn.Module]] = {}
        self.read: set[int] = set()
        """``id`` of each module whose parameters or buffers the forward takes itself."""
        self.hidden: dict[int, str] = {}
        """``id`` of each module inside one that is a single call in the graph -> the name of that one."""
        for node in graph.nodes:
            if node.op == "call_module":
                module = model.get_submodule(str(node.target))
                self.modules[node] = str(node.target), module
                self.calls.setdefault(id(module), []).append(node)
            elif node.op == "get_attr":
                self.read.add(id(model.get_submodule(str(node.target).rpartition(".")[0])))
        for name, module in self.modules.values():
            for used in (item for part in module.modules() for item in _held(part)):
                self.hidden.setdefault(id(used), name)

    def unfit(self, module: nn.Module, name: str) -> str:
        """Why a module has to stay where it is, whatever it is; "" if nothing keeps it."""
        if id(module) in self.hidden:
            return f"{name} is in {self.hidden[id(module)]}, which torch.fx cannot look into"
        count = len(self.calls.get(id(module), ()))
        if count != 1:
            return f"{name} is called at {count} places" if count else f"no forward calls {name}"
        if _has_hooks(module):
            return f"{name} has hooks"
        if id(module) in self.read:
            return f"the forward reads the parameters of {name} itself"
        if parametrize.is_parametrized(module):
            return f"{name} is parametrized"
        if "forward" in vars(module):
            return f"the forward of {name} is replaced on the instance"
        return f"{name} is in train mode" if module.training else ""

    def next(self, node: fx.Node, name: str) -> tuple[fx.Node | None, str]:
        """The call that takes a result and nothing else does, or None and why there is none.

        An ``nn.Identity`` in between counts for nothing.
        """
        users = list(node.users)
        if len(users) != 1:
            return None, f"the result of {name} is used at {len(users)} places"
        (user,) = users
        if user.op == "output":
            return None, f"the result of {name} is the model's"
        if user not in self.modules:
            called = _FUNCTIONS.get(user.target)
            if called is not None:
                return None, f"{called} after {name} is a function, and only modules (nn.ReLU()) are replaced"
            return None, f"{name} is followed by {getattr(user.target, '__name__', user.target)}"
        if user.args != (node,) or user.kwargs:
            return None, f"{self.modules[user][0]} after {name} takes more than its result"
        module = self.modules[user][1]
        passes = type(module) is nn.Identity and not _has_hooks(module) and "forward" not in vars(module)
        return self.next(user, name) if passes else (user, "")


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, kind, None) for kind in _HOOKS)


def _held(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that the attributes of one refer to: its children, and those in its lists and dicts."""
    for value in vars(module).values():
        items = list(value.values()) if isinstance(value, dict) else value
        for item in items if isinstance(items, (list, tuple, set)) else (items,):
            if isinstance(item, nn.Module):
                yield from item.modules()


def _fusion(graph: _Graph, conv: Conv, name: str) -> Fusion:
    if isinstance(conv, Fused):
        return NOTHING
    if unfit := graph.unfit(conv, name):
        return Fusion(reason=unfit)
    norm: nn.BatchNorm3d | None = None
    norm_name = ""
    node, reason = graph.next(graph.calls[id(conv)][0], name)
    if node is not None and type(graph.modules[node][1]) is nn.BatchNorm3d:
        norm_name, found = graph.modules[node]
        assert isinstance(found, nn.BatchNorm3d)
        if fault := graph.unfit(found, norm_name) or _fault(conv, found, norm_name):
            return Fusion(reason=fault)
        norm, name = found, norm_name
        node, reason = graph.next(node, name)
    if node is None:
        return Fusion(norm, norm_name, reason=reason)
    after, module = graph.modules[node]
    if not activation_kind(module):
        kinds = "an activation that a kernel applies" if norm else "a BatchNorm3d or such an activation"
        return Fusion(
            norm, norm_name, reason=f"{after} ({type(module).__name__}) after {name} is not {kinds}"
        )
    if fault := graph.unfit(module, after):
        return Fusion(norm, norm_name, reason=fault)
    return Fusion(norm, norm_name, module, after)


def _fault(conv: Conv, norm: nn.BatchNorm3d, name: str) -> str:
    """Why a batch norm cannot be folded into a convolution; "" if it can."""
    if norm.running_mean is None or norm.running_var is None:
        return f"{name} has no running statistics (track_running_stats=False)"
    if conv.weight.is_meta or norm.running_var.is_meta:
        return f"{name} is on the meta device, without values to fold"
    if conv.weight.device != norm.running_var.device:
        return f"{name} is on {norm.running_var.device}, its convolution on {conv.weight.device}"
    if not all(bool(torch.isfinite(item).all()) for item in fold(conv, norm)):
        return f"the weights with {name} folded in are not finite in {dtype_name(conv.weight.dtype)}"
    return ""
