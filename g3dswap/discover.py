"""Which layers of a model may be swapped, which may not and why, and the inputs that they meet."""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from g3dswap.calls import FunctionCalls, Use
from g3dswap.entries import ROOT, Functional, Skipped
from g3dswap.errors import ArgumentError, ConvertError, described
from g3dswap.fused import FUSED
from g3dswap.guard import Inputs, a_type, untouched
from g3dswap.meetings import Hook, Meeting
from g3dswap.module import GROUPED, Conv
from g3dswap.problem import DTYPES, dtype_name


@dataclass(frozen=True)
class Site:
    """One module that is, or may become, one of the `GROUPED` layers; it may have several names."""

    module: Conv
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first qualified name, as in reports."""
        return self.names[0] or ROOT

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other names of a shared module."""
        return tuple(name or ROOT for name in self.names[1:])


def find(model: nn.Module) -> tuple[list[Site], list[Skipped], dict[int, str]]:
    """All grouped 3D convolutions: those that can be swapped (or are already), and those that cannot.

    The third result maps ``id(module)`` of both kinds to a name: torch.fx shall not look into them.
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    sites, skipped, known = [], [], {}
    for key, module in modules.items():
        groups = _groups(module)
        if groups <= 1:
            continue
        mine = tuple(names[key])
        known[key] = mine[0]
        reason = why_not(module)
        if reason is None:
            assert isinstance(module, Conv)  # why_not has a reason for everything else
            sites.append(Site(module, mine))
        else:
            labels = [name or ROOT for name in mine]
            skipped.append(Skipped(labels[0], type(module).__name__, reason, groups, tuple(labels[1:])))
    return sites, skipped, known


def _groups(module: nn.Module) -> int:
    """The group count of anything that looks like a 3D convolution; 1 for other modules."""
    names = [base.__name__ for base in type(module).__mro__]
    looks = any(plain.__name__ in name for plain in GROUPED for name in names)
    groups = getattr(module, "groups", 1) if looks else 1
    return groups if isinstance(groups, int) else 1


def why_not(module: nn.Module) -> str | None:
    """The reason why a grouped 3D convolution cannot be swapped; None if it can."""
    if parametrize.is_parametrized(module):
        tensors = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return (
            f"its {tensors} is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it "
            "a plain parameter"
        )
    if _namespace(module).startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic", "torchao.")):
        return "it is quantized, or prepared for quantization"
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin) or _uninitialized(module):
        return "it is lazy, without sizes yet; run the model once on an input before converting"
    if type(module) not in {*GROUPED, *GROUPED.values(), *FUSED.values()}:
        plain = "ConvTranspose3d" if isinstance(module, nn.ConvTranspose3d) else "Conv3d"
        return f"{type(module).__qualname__} is a subclass, whose forward may do more than nn.{plain}'s"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward is replaced on the instance"
    missing = [name for name in ("weight", "bias") if name not in module._parameters]
    if missing:
        return (
            f"its {missing[0]} is no plain parameter (weight_norm, spectral_norm or pruning computes it); "
            "remove that first"
        )
    weight: Any = module.weight
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.dtype not in DTYPES:
        supported = ", ".join(dtype_name(dtype) for dtype in DTYPES)
        return f"its dtype {dtype_name(weight.dtype)} has no kernels (they exist for {supported})"
    extra, stride = cast(Conv, module).output_padding, cast(Conv, module).stride
    if any(more >= step for more, step in zip(extra, stride)):
        return f"its output_padding {extra} reaches its stride {stride}, for which there are no kernels"
    return None


def _namespace(module: nn.Module) -> str:
    return type(module).__module__


def _uninitialized(module: nn.Module) -> bool:
    return any(isinstance(item, UninitializedParameter) for item in module.parameters(recurse=False))


# include and exclude


def patterns(
    value: str | Iterable[str] | None, argument: str, names: Sequence[str]
) -> tuple[str, ...] | None:
    """``include`` or ``exclude`` as a tuple of globs, each of which matches some grouped layer.

    Raises:
        ArgumentError: a value that is no string, or a pattern that matches nothing, with suggestions.
    """
    if value is None:
        return None
    items = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    for item in items:
        if not isinstance(item, str):
            raise ArgumentError(
                f"{argument} holds {a_type(item)}; it takes a qualified layer name or glob such as "
                "'layer1.*.conv2', or several of them."
            )
        if not any(fnmatchcase(name, item) for name in names):
            raise ArgumentError(
                f"{argument}={item!r} matches no convolution with groups > 1; {_suggest(item, names)}."
            )
    return items


def _suggest(pattern: str, names: Sequence[str]) -> str:
    if not names:
        return "the model has none"
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    # A prefix without a star is the commonest mistake.
    inside = [name for name in names if name.startswith(f"{pattern}.")]
    if inside:
        return f"write {pattern + '.*'!r} for the {len(inside)} inside it"
    listed = close or list(names[:3])
    return f"{'did you mean' if close else 'there are'} {', '.join(repr(name) for name in listed)}"


def matches(names: Collection[str], globs: Collection[str]) -> bool:
    """Whether one of a module's names matches one of the patterns."""
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


# Shapes


@dataclass
class Shapes:
    """What a run of the model on example inputs showed."""

    meetings: dict[int, list[Meeting]] = field(default_factory=dict)
    """``id`` of a layer -> the distinct inputs that it met, in order."""
    uses: list[Use] = field(default_factory=list)
    """Calls of convolution functions."""

    @property
    def functional(self) -> list[Functional]:
        """Their lines of the report."""
        return [use.entry for use in self.uses]


def observe(model: nn.Module, sites: Sequence[Site], inputs: Inputs) -> Shapes:
    """Run the model once, with hooks on the layers; the model is left untouched, also if it raises.

    Gradients: under ``torch.no_grad()`` or ``torch.inference_mode()`` no layer needs any; otherwise those are
    noted that a training step would need. Nothing is kept for a backward pass meanwhile.

    Raises:
        ConvertError: the model's forward raised.
    """
    modules = [site.module for site in sites]
    runs = model
    if any(isinstance(item, UninitializedParameter) for item in model.parameters()):
        # The first run gives lazy modules their sizes, for good.
        runs = copy.deepcopy(model)
        twins = dict(zip(map(id, model.modules()), runs.modules()))
        modules = [cast(Conv, twins[id(module)]) for module in modules]
    try:
        try:
            found, uses = _run(runs, modules, inputs, keep=False)
        except Exception as error:
            if not _needs_saved_tensors(error):
                raise
            found, uses = _run(runs, modules, inputs, keep=True)
    except Exception as error:
        raise ConvertError(_forward_failed(model, inputs, error)) from error
    return Shapes({id(site.module): item for site, item in zip(sites, found)}, uses)


def _run(
    model: nn.Module, modules: Sequence[Conv], inputs: Inputs, keep: bool
) -> tuple[list[list[Meeting]], list[Use]]:
    """What each module meets, and the calls of functions."""
    meetings: list[list[Meeting]] = [[] for _ in modules]
    grads = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    # The graph is only asked what requires a gradient: what a backward would need is dropped.
    saved = (
        contextlib.nullcontext()
        if keep
        else torch.autograd.graph.saved_tensors_hooks(lambda _: None, _no_backward)
    )
    handles: list[Any] = []
    with untouched(model):
        try:
            for module, met in zip(modules, meetings):
                hook = Hook(met, grads)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            with saved, FunctionCalls(model, grads) as calls:
                fresh = inputs.fresh()
                model(*fresh.args, **fresh.kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return meetings, calls.uses


class _BackwardInside(Exception):
    """A forward asked for a tensor that was saved for a backward pass."""


def _no_backward(_: None) -> Tensor:
    raise _BackwardInside("the forward runs a backward pass of its own")


def _needs_saved_tensors(error: Exception) -> bool:
    """True for forwards with a backward inside, and for torch.func transforms, which allow no hooks."""
    return isinstance(error, _BackwardInside) or "saved tensor hooks" in str(error)


def _forward_failed(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    ours = {tensor.device for _, tensor in inputs.tensors()}
    theirs = {item.device for item in [*model.parameters(), *model.buffers()]}
    hint = "pass inputs that it takes, or none (each layer then chooses at its first call)"
    if len(ours) == len(theirs) == 1 and ours != theirs:
        hint = f"the inputs are on {ours.pop()}, the model on {theirs.pop()}; move the inputs"
    return f"{type(model).__name__}.forward raised on the example inputs ({described(error)}); {hint}."
