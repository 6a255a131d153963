"""Converting a model: its grouped 3D convolutions become `GROUPED` layers, and nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from g3dswap import direct
from g3dswap.calls import merge_functional
from g3dswap.choice import Choice
from g3dswap.choose import MIN_SPEEDUP, Chooser
from g3dswap.decide import Decision, call_of, decide, keep, peek, problems, swap_later
from g3dswap.discover import Meeting, Shapes, Site, observe
from g3dswap.entries import Kept, Layer, NotFused, Swapped
from g3dswap.errors import ArgumentError, ConvertError, described
from g3dswap.functional import as_converted, decide_calls, intercept_calls
from g3dswap.fuse import find_fusions
from g3dswap.fused import NOTHING, Fused, Fusion
from g3dswap.guard import Inputs, a_type, example
from g3dswap.intercept import is_on, take_off, taken_off
from g3dswap.module import Grouped
from g3dswap.plan import Plan, forget_choices, install_plan, keep_choices, read_plan
from g3dswap.problem import Problem
from g3dswap.report import Report, forget, machine, store
from g3dswap.selection import Selection, check_model, select
from g3dswap.stored import EFFORTS, open_cache
from g3dswap.swap import Swap, replaced, replacements, verify_all
from g3dswap.trace import Trace, trace


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    inplace: bool = False,
    tune: str = "quick",
    fuse: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    min_speedup: float = 1.05,
    cache: str | Path | None = None,
    plan: str | Path | None = None,
    verify: bool = True,
    strict: bool = False,
    progress: bool = True,
    functional: bool = False,
) -> nn.Module:
    """Replace 3D convolution layers with groups > 1 by faster ones with the same weights.

    An ``nn.Conv3d`` becomes a ``Grouped3D``, an ``nn.ConvTranspose3d`` a ``Grouped3DTranspose``.

    The model keeps its class, module tree, state_dict keys, hooks and modes. Which layers its forward reaches
    is found with torch.fx; parts that cannot be traced are looked up in the module tree.

    Args:
        model: any module; a convolution layer itself may be the model.
        example_inputs: what the forward takes: a tensor, a tuple or list of positional arguments, or a dict
            of keyword arguments. The model is run on them once, and left untouched, to see the shapes that
            its layers meet; their kernels are then chosen. Without them each layer chooses at its first
            call. Under ``torch.no_grad()`` only forward passes are chosen.
        example_kwargs: keyword arguments to go with them.
        inplace: change this model and keep the very same Parameter objects (optimizers stay valid), instead
            of a deep copy. A model that is such a layer itself cannot change in place: use what is returned.
        tune: "none" (untimed default kernels), "cached" (only what was tuned before), "quick" or "full".
        fuse: make a model for inference, which has to be in eval mode: where torch.fx shows that nothing else
            sees what is in between, a ``BatchNorm3d`` after a layer goes into its weights and a ReLU, SiLU,
            GELU or Hardswish module after that into its kernel. An ``nn.Identity`` takes their places, and
            the layer is a ``Fused3D`` or ``Fused3DTranspose``, see ``g3dswap.fused``; only forward passes are
            chosen. Folded norms are no longer in the state_dict. ``revert`` brings everything back.
        include, exclude: globs on fully qualified layer names, such as ``"layer1.*.conv2"``.
        min_speedup: how much faster than PyTorch's a kernel must be; a layer where none is stays as it was.
        cache: directory of the options cache, by default that of the user.
        plan: a file written by ``save_plan``: its layers are swapped, with its choices.
        verify: check the outputs and gradients of every swapped layer against float64, and put back those
            that fail.
        strict: a grouped convolution that cannot be swapped (a subclass, say) is an error.
        progress: show a bar while tuning.
        functional: also convert calls of ``F.conv3d`` and ``F.conv_transpose3d`` with groups > 1. The modules
            whose forward makes them get a ``forward`` on the instance, which intercepts these functions; the
            other PyTorch functions called in it take about a microsecond more. Without inputs only calls that
            torch.fx can trace are found.

    Returns:
        The converted model; ``g3dswap.report`` says what was done.

    Raises:
        ArgumentError: a wrong argument, inputs that do not fit, a pattern that matches nothing.
        ConvertError: the model is wrapped (DDP, compiled, ...), its forward raised, or ``strict`` forbids.
        PlanError: the plan cannot be read, or was made for another model.
    """
    check_model(model, "convert")
    if fuse and model.training:
        raise ArgumentError("fuse=True is for inference, and the model is in train mode; call model.eval().")
    given = example(model, example_inputs, example_kwargs)
    chooser = _chooser(cache, tune, min_speedup, progress)
    planned = None if plan is None else read_plan(plan)
    selection = select(model, include, exclude)
    if strict:
        selection.check_strict()
    if planned is not None:
        planned.check({site.names[0]: Layer.of(site.module) for site in selection.sites})
        install_plan(planned)
    if not inplace:
        model = _copied(model)
        selection = select(model, include, exclude)
    with torch.no_grad() if fuse else contextlib.nullcontext():
        traced, shapes = _look(model, selection, given)
    fusions = find_fusions(model, selection.sites, traced) if fuse else {}
    began = time.monotonic()
    decisions = _decide_all(selection, traced, shapes, planned, given is not None, chooser, fusions)
    calls = []
    if functional or any(is_on(module) for module in model.modules()):
        calls = decide_calls(model, traced.functional, shapes.uses, selection, chooser, strict)
    elapsed = time.monotonic() - began
    swap = Swap(tune, cache)
    everything = [*decisions, *(item.decision for item in calls if item.decision)]
    if verify:
        verify_all(everything, swap)
    model = replaced(model, replacements(decisions, swap))
    report = _report("converted", selection, decisions, traced, shapes, elapsed)
    store(model, replace(report, functional=intercept_calls(calls, tune, cache)) if calls else report)
    keep_choices(model, {choice.problem: choice for item in everything for choice in item.choices}.values())
    return model


def inspect(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
) -> Report:
    """The report that ``convert`` would give, with the times that the cache knows; changes and tunes nothing.

    ``model``, ``example_inputs``, ``example_kwargs`` and ``cache`` are those of ``convert``.

    Raises:
        ArgumentError, ConvertError: as ``convert``.
    """
    check_model(model, "inspect")
    given = example(model, example_inputs, example_kwargs)
    chooser = _chooser(cache, "cached", MIN_SPEEDUP, False)
    selection = select(model)
    traced, shapes = _look(model, selection, given)
    decisions = []
    for site in selection.sites:
        meetings = shapes.meetings.get(id(site.module), [])
        decision = _without_inputs(site, selection, traced, meetings, given is not None, "quick")
        decisions.append(decision or _peeked(site, meetings, chooser))
    report = _report("inspected", selection, decisions, traced, shapes, 0.0)
    return replace(report, functional=as_converted(model, report.functional))


def revert(model: nn.Module) -> nn.Module:
    """Turn every swapped layer back into PyTorch's with the very same Parameter objects, in place.

    What was fused comes back as it was: the weights, the batch norm and the activation, in the mode, on the
    device and of the dtype that the model has now. Returns the model, which is another object only if it is
    such a layer itself.

    Raises:
        ArgumentError: not a module, or a part of the model that was fused.
        FusedError: weights were loaded into a fused layer.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"revert() takes a torch.nn.Module, not {a_type(model)}.")
    modules = [module for module in model.modules() if isinstance(module, Grouped)]
    new: dict[int, nn.Module] = {}
    for module in modules:
        new.update(module.restored() if isinstance(module, Fused) else {id(module): module})
    if not new.keys() <= {id(module) for module in model.modules()}:
        raise ArgumentError(
            f"A layer in this {type(model).__name__} was fused with others outside of it; "
            "revert the whole model."
        )
    forget(model)
    forget_choices(model)
    for part in model.modules():
        take_off(part)
    plain = {key: item.to_conv() if isinstance(item, Grouped) else item for key, item in new.items()}
    return replaced(model, plain)


def _chooser(cache: str | Path | None, tune: str, min_speedup: float, progress: bool) -> Chooser:
    if not isinstance(tune, str) or tune not in EFFORTS:
        raise ArgumentError(f"tune={tune!r} is unknown; use one of {', '.join(EFFORTS)}.")
    number = isinstance(min_speedup, (int, float)) and not isinstance(min_speedup, bool)
    if not number or not math.isfinite(min_speedup) or min_speedup <= 0:
        raise ArgumentError(f"min_speedup={min_speedup!r} must be a number above 0, say 1.05.")
    if cache is not None and not isinstance(cache, (str, Path)):
        raise ArgumentError(f"cache is {a_type(cache)}; it takes the path of a directory.")
    return Chooser(open_cache(cache), tune, min_speedup, progress)


def _copied(model: nn.Module) -> nn.Module:
    try:
        with torch.inference_mode(False):  # whose tensors could never be trained
            return copy.deepcopy(model)
    except Exception as error:
        raise ConvertError(
            f"{type(model).__name__} cannot be deep-copied ({described(error)}); pass "
            "inplace=True to change the model itself."
        ) from error


# What is in the model


def _look(model: nn.Module, selection: Selection, given: Inputs | None) -> tuple[Trace, Shapes]:
    """What the model's forward reaches, and the inputs that its layers meet."""
    with taken_off(model):  # calls that are converted already are calls
        if any(id(model) == id(site.module) for site in selection.sites):
            traced = Trace(reached={id(model)})
        else:
            traced = trace(model, selection.known, given)
        if given is None or any(site.module.weight.is_meta for site in selection.sites):
            return traced, Shapes()
        return traced, observe(model, selection.sites, given)


def _decide_all(
    selection: Selection,
    traced: Trace,
    shapes: Shapes,
    planned: Plan | None,
    ran: bool,
    chooser: Chooser,
    fusions: Mapping[int, Fusion],
) -> list[Decision]:
    """One decision for every layer; each distinct problem is chosen once."""
    made: dict[Problem, Choice] = {}

    def choose(problem: Problem, batch: int, label: str) -> Choice:
        if problem not in made:
            made[problem] = chooser.choose(problem, batch, label)
        return made[problem]

    met: dict[int, list[Meeting]] = {}
    simple: dict[int, Decision] = {}
    for site in selection.sites:
        key = id(site.module)
        met[key] = shapes.meetings.get(key, [])
        if planned is not None and not ran:
            met[key] = planned.meetings(site.names[0], site.module.weight.device)
        decision = _planned_kept(site, planned)
        decision = decision or _without_inputs(site, selection, traced, met[key], ran, chooser.tune)
        if decision:
            simple[key] = decision
            decision.fusion = fusions.get(key, NOTHING)
            if isinstance(decision.entry, Kept):
                decision.keep(decision.entry.reason)
    waiting = [site for site in selection.sites if id(site.module) not in simple]
    wanted: dict[Problem, tuple[Problem, int, str]] = {}
    for site in waiting:
        for meeting in met[id(site.module)]:
            for problem in problems(site.module, meeting, fusions.get(id(site.module), NOTHING)):
                wanted.setdefault(problem, (problem, meeting.batch, site.name))
    chooser.expect(len(wanted))
    for device in {problem.device for problem, *_ in wanted.values()}:
        direct.begin(device)
    chooser.prepare(wanted.values())
    chooser.share(wanted.values())
    return [
        simple.get(key) or decide(site, met[key], choose, fusions.get(key, NOTHING))
        for key, site in zip(met, selection.sites)
    ]


def _planned_kept(site: Site, planned: Plan | None) -> Decision | None:
    """The decision for a layer that the plan keeps."""
    if planned is None or planned.layers[site.names[0]].swapped or isinstance(site.module, Grouped):
        return None
    return keep(site, planned.layers[site.names[0]].reason)


def _without_inputs(
    site: Site,
    selection: Selection,
    traced: Trace,
    meetings: Sequence[Meeting],
    ran: bool,
    tune: str,
) -> Decision | None:
    """The decision for a layer that needs no choice, or can have none yet."""
    is_swapped = isinstance(site.module, Grouped)
    refused = selection.refused(site.names)
    if refused and not is_swapped:
        return keep(site, refused)
    kind = site.module.weight.device.type
    if kind not in ("cpu", "cuda", "meta"):
        return keep(site, f"there are no kernels for {kind} devices")
    if meetings:
        return None
    if is_swapped:
        return swap_later(site, "")
    if id(site.module) not in traced.reached and selection.include is None:
        return keep(
            site,
            "no forward reaches it, in train or eval mode; name it in include= to swap it all the same",
        )
    later = f'chooses its kernels at its first call (tune="{tune}")'
    if kind == "meta":
        return swap_later(site, f"on the meta device; {later}")
    return swap_later(site, f"not called on the example inputs; {later}" if ran else later)


def _peeked(site: Site, meetings: Sequence[Meeting], chooser: Chooser) -> Decision:
    """The decision that the cache alone allows."""
    layer = Layer.of(site.module)
    calls = tuple(
        call_of(layer, meeting, [peek(chooser, problem) for problem in problems(site.module, meeting)])
        for meeting in meetings
    )
    passes = [item for call in calls for item in call.passes]
    if all(item.native for item in passes):
        reasons = dict.fromkeys(item.reason for item in passes)
        reason = f"PyTorch's own kernels stay in every pass: {'; '.join(reasons)}"
        return Decision(site, Kept(site.name, layer, reason, calls, site.aliases))
    return Decision(site, Swapped(site.name, layer, calls, site.aliases))


def _report(
    kind: str,
    selection: Selection,
    decisions: Sequence[Decision],
    traced: Trace,
    shapes: Shapes,
    seconds: float,
) -> Report:
    entries = [decision.entry for decision in decisions]
    met = [*shapes.meetings.values(), *(use.meetings for use in shapes.uses)]
    kinds = {meeting.device.type for meetings in met for meeting in meetings}
    return Report(
        kind=kind,
        swapped=[entry for entry in entries if isinstance(entry, Swapped)],
        kept=[entry for entry in entries if isinstance(entry, Kept)],
        skipped=list(selection.skipped),
        functional=merge_functional(traced.functional, shapes.functional),
        untraced=list(traced.untraced),
        fused=[item for decision in decisions if (item := decision.fused())],
        unfused=[
            NotFused(decision.site.name, decision.fusion.reason, decision.site.aliases)
            for decision in decisions
            if decision.fusion.reason
        ],
        tuning_seconds=seconds,
        machine=machine(kinds),
    )
