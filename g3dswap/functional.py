"""From the calls of convolution functions in a model to what happens to each of them, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from g3dswap.calls import Use, merge_functional
from g3dswap.choose import Chooser
from g3dswap.decide import Decision, decide, problems
from g3dswap.discover import Site, why_not
from g3dswap.entries import ROOT, Functional, Kept
from g3dswap.errors import ConvertError
from g3dswap.intercept import FUNCTIONS, Intercept, is_on, put_on, take_off
from g3dswap.module import Conv, Grouped
from g3dswap.problem import Problem
from g3dswap.selection import Selection


@dataclass
class CallDecision:
    """What happens to the calls of one function at one place."""

    entry: Functional
    owner: nn.Module | None
    """The module whose forward makes them, if it may be intercepted."""
    reason: str = ""
    """Why they cannot be converted."""
    decision: Decision | None = None
    """That of a layer that computes the same; None where the calls were not met."""

    @property
    def wanted(self) -> bool:
        """It is a call that the chosen kernels are to run."""
        return self.owner is not None and not self.reason and (self.decision is None or self.decision.swap)


def decide_calls(
    model: nn.Module,
    traced: Sequence[Functional],
    uses: Sequence[Use],
    selection: Selection,
    chooser: Chooser,
    strict: bool,
) -> list[CallDecision]:
    """One decision for every call that tracing or a run found; each distinct problem is chosen once.

    Raises:
        ConvertError: ``strict``, and a call cannot be converted.
    """
    found = {id(use.entry): use for use in uses}
    made = [
        _possible(model, entry, found.get(id(entry)), selection)
        for entry in merge_functional(traced, [use.entry for use in uses])
    ]
    failing = next((item for item in made if item.reason and not selection.refused((item.entry.name,))), None)
    if strict and failing:
        raise ConvertError(
            f"With strict=True every grouped convolution has to be converted, and the call of "
            f"{failing.entry.function} in {failing.entry.name!r} cannot be: {failing.reason}; exclude it, or "
            "leave strict out."
        )
    met = [(item, found[id(item.entry)]) for item in made if not item.reason and id(item.entry) in found]
    wanted: dict[Problem, tuple[Problem, int, str]] = {}
    for item, use in met:
        for meeting in use.meetings:
            for problem in problems(_layer(use), meeting):
                wanted.setdefault(problem, (problem, meeting.batch, item.entry.name))
    chooser.expect(len(wanted))
    chooser.prepare(wanted.values())
    chooser.share(wanted.values())
    for item, use in met:
        if use.meetings:
            item.decision = decide(Site(_layer(use), (item.entry.name,)), use.meetings, chooser.choose)
    return made


def as_converted(model: nn.Module, entries: Sequence[Functional]) -> list[Functional]:
    """The lines of a report on a model as it is, of which some forwards may be intercepted already."""
    on = {name or ROOT for name, module in model.named_modules() if is_on(module)}
    return [replace(item, converted=item.name in on and item.function in FUNCTIONS) for item in entries]


def _layer(use: Use) -> Conv:
    assert use.module is not None  # or there is a reason why the call cannot be converted
    return use.module


def _possible(model: nn.Module, entry: Functional, use: Use | None, selection: Selection) -> CallDecision:
    """The decision so far as it needs no choice of a kernel."""
    if entry.function not in FUNCTIONS:
        return CallDecision(entry, None, f"only calls of {' and '.join(FUNCTIONS)} are converted")
    if entry.name == "?":
        return CallDecision(entry, None, "no module's forward makes it")
    owner = model if entry.name == ROOT else model.get_submodule(entry.name)
    if "forward" in vars(owner) and not is_on(owner):
        return CallDecision(entry, None, "the forward that makes it is replaced on the instance")
    reason = selection.refused((entry.name,)) or ""
    if use is not None and not reason:
        odd = "its weight is no five-dimensional tensor of floating-point numbers"
        reason = (why_not(use.module) if use.module else odd) or ""
    return CallDecision(entry, owner, reason)


def intercept_calls(made: Sequence[CallDecision], tune: str, cache: str | Path | None) -> list[Functional]:
    """Intercept the forwards that make calls to be converted; returns the lines of the report.

    What the calls of one forward run cannot be told apart: none of them is converted if one is wrong.
    """
    owners: dict[int, list[CallDecision]] = {}
    for item in made:
        if item.owner is not None:
            owners.setdefault(id(item.owner), []).append(item)
    lines: dict[int, Functional] = {}
    for items in owners.values():
        owner = items[0].owner
        assert owner is not None
        if any(_is_wrong(item) for item in items):
            take_off(owner)
        elif is_on(owner) or any(item.wanted for item in items):
            # Shapes that come up later do not stop the run for tuning where kernels are chosen.
            chosen = tune != "none" and all(item.decision for item in items if item.wanted)
            put_on(
                owner,
                Intercept(
                    "cached" if chosen else tune, None if cache is None else str(cache), _layers(owner)
                ),
            )
        lines.update((id(item), _line(item, is_on(owner), tune)) for item in items)
    return [lines.get(id(item)) or replace(item.entry, reason=item.reason) for item in made]


def _is_wrong(item: CallDecision) -> bool:
    """A kernel was chosen and failed the comparison with float64."""
    decision = item.decision
    return decision is not None and not decision.swap and not all(it.is_native for it in decision.choices)


def _line(item: CallDecision, on: bool, tune: str) -> Functional:
    """The line of the report; ``on``: the forward is intercepted."""
    entry, found = item.entry, item.decision.entry if item.decision else None
    if found is not None:
        entry = replace(entry, geometry=found.geometry, calls=found.calls)
    if item.reason:
        return replace(entry, reason=item.reason)
    if isinstance(found, Kept):
        return replace(entry, reason=found.reason)
    if not on:
        return replace(entry, reason="another call in the same forward would compute something else")
    if found is None:
        return replace(entry, converted=True, reason=f'chooses its kernels at its first call (tune="{tune}")')
    return replace(entry, converted=True, verified=found.verified)


def _layers(owner: nn.Module) -> list[nn.Module]:
    """The grouped layers of PyTorch's inside: what their forwards call is theirs."""
    return [
        module
        for module in owner.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        and module.groups > 1
        and not isinstance(module, Grouped)
    ]
