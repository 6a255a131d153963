"""Changing a model: which modules take the place of its layers, whether they may, and how they get there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from g3dswap.decide import Decision
from g3dswap.discover import Meeting
from g3dswap.entries import Layer, Swapped
from g3dswap.fused import FUSED, NOTHING, Fused, Fusion
from g3dswap.layercheck import check_layer
from g3dswap.module import GROUPED, Conv, Grouped


class Swap:
    """Makes the replacement of a layer."""

    def __init__(self, tune: str, cache: str | Path | None) -> None:
        self.tune = tune
        self.cache = None if cache is None else str(cache)

    def __call__(self, conv: Conv, chosen: bool, fusion: Fusion = NOTHING) -> Grouped:
        # Shapes that come up later in a layer that has its kernels do not stop the run for tuning.
        tune = "cached" if chosen and self.tune != "none" else self.tune
        if fusion:
            return FUSED[type(conv)].of(conv, fusion, tune=tune, cache=self.cache)
        return GROUPED[type(conv)].from_conv(conv, tune=tune, cache=self.cache)


def replacements(decisions: Sequence[Decision], swap: Swap) -> dict[int, nn.Module]:
    """``id`` of each module that is to go -> what takes its place."""
    new: dict[int, nn.Module] = {}
    for item in decisions:
        conv = item.site.module
        if item.swap and (item.fusion or not isinstance(conv, Grouped)):
            layer = new[id(conv)] = swap(conv, bool(item.choices), item.fusion)
            if isinstance(layer, Fused):
                new.update((id(module), stand_in) for stand_in, module in layer.origin.stand_ins)
    return new


def verify_all(decisions: Sequence[Decision], swap: Swap) -> None:
    """Check each distinct swapped layer on what it met; keep those that fail as they were."""
    known: dict[tuple[Layer, Meeting, Fusion], str | None] = {}
    for decision in decisions:
        entry, conv, fusion = decision.entry, decision.site.module, decision.fusion
        if not isinstance(entry, Swapped) or not decision.meetings:
            continue
        bounds: dict[str, float] = {}
        for choice in decision.choices:
            name = choice.problem.layer_pass
            bounds[name] = max(bounds.get(name, 0.0), choice.bound or 0.0)
        meetings = decision.meetings
        if fusion:
            meetings = [replace(item, grad_input=False, grad_weight=False) for item in meetings]
        for meeting in meetings:
            key = (entry.geometry, meeting, fusion)
            if key not in known:
                swapped = partial(swap, chosen=True, fusion=fusion)
                known[key] = check_layer(conv, meeting, swapped, bounds, fusion)
        failed = [known[entry.geometry, meeting, fusion] for meeting in meetings]
        wrong = next((reason for reason in failed if reason), None)
        if wrong:
            decision.keep(f"not swapped, because it would compute something else: {wrong}")
        else:
            decision.entry = replace(entry, verified=True)


def replaced(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Put the new modules in the place of the old ones (``id(old) -> new``), wherever they are referred to.

    Beside the registered children that is every attribute, and every list, tuple or dict that an attribute
    holds: a model may keep a plain list of its layers too.
    """
    if not new:
        return model
    for module in list(model.modules()):
        attributes = vars(module)
        for name, value in list(attributes.items()):
            if id(value) in new:
                attributes[name] = new[id(value)]
            elif type(value) in (list, tuple) and any(id(item) in new for item in value):
                items = [new.get(id(item), item) for item in value]
                if type(value) is tuple:
                    attributes[name] = tuple(items)
                else:
                    value[:] = items  # the same list: others may hold it
            elif type(value) in (dict, OrderedDict):
                value.update({key: new[id(item)] for key, item in value.items() if id(item) in new})
    return new.get(id(model), model)
