"""The grouped layers of a network: what the passes of one step take, and what the device would allow.

A conversion changes nothing but the kernels of these passes. So the most that it could save of a step is what
PyTorch's kernels take beyond the roofline, over all calls.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from g3dswap import choose
from g3dswap.bench.measure import Ceilings, time_choice
from g3dswap.choice import Choice, problem_from_json, problem_to_json
from g3dswap.decide import problems
from g3dswap.discover import find
from g3dswap.meetings import Hook, Meeting
from g3dswap.module import Conv, Grouped
from g3dswap.problem import Problem
from g3dswap.rounds import Times
from g3dswap.tc.timing import Call


@dataclass(frozen=True)
class GroupedPass:
    """One pass that the grouped layers of a network run `count` times in a training step.

    torch, ours: one call of PyTorch's kernel, and of the one that runs after the conversion, which `source`
    says; both on cold data in the layout that the layer has. roofline: seconds below which it cannot go.
    """

    problem: Problem
    batch: int
    count: int
    source: str
    torch: Times
    ours: Times
    roofline: float

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        times = {"torch": asdict(self.torch), "ours": asdict(self.ours)}
        return {**vars(self), **times, "problem": problem_to_json(self.problem)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GroupedPass:
        """The inverse; KeyError, TypeError or ValueError for anything else."""
        times = {name: Times(**data[name]) for name in ("torch", "ours")}
        found = cls(**{**data, **times, "problem": problem_from_json(data["problem"])})
        if not min(found.torch.seconds, found.ours.seconds, found.roofline, found.count) > 0:
            raise ValueError(f"{found.problem} has times that are no times")
        return found


@dataclass(frozen=True)
class Part:
    """What grouped layers take of a step, in seconds: before and after a conversion, and at the roofline."""

    before: float
    after: float
    roofline: float

    @classmethod
    def of(cls, passes: Iterable[GroupedPass]) -> Part:
        """The sum over all calls."""
        found = list(passes)
        before = sum(it.count * it.torch.seconds for it in found)
        after = sum(it.count * it.ours.seconds for it in found)
        roofline = sum(it.count * it.roofline for it in found)
        return cls(before, after, roofline)

    @property
    def allowed(self) -> float:
        """What a conversion could save at most."""
        return self.before - self.roofline


def measure_passes(
    before: nn.Module,
    after: nn.Module,
    forward: Call,
    ceilings: Callable[[torch.dtype], Ceilings],
    seconds: float,
) -> list[GroupedPass]:
    """Time each distinct pass of the grouped layers, swapped and kept alike.

    before, after: the network as it was, and its conversion. forward: runs `before` as in a training step.
    ceilings: the device's for a dtype. seconds: what each kernel may take.
    """
    return [
        GroupedPass(
            choice.problem,
            batch,
            count,
            choice.source,
            *time_choice(choice, batch, seconds),
            ceilings(choice.problem.dtype).roofline(choice.problem, batch),
        )
        for (choice, batch), count in count_passes(before, after, forward).items()
    ]


def count_passes(before: nn.Module, after: nn.Module, forward: Call) -> Counter[tuple[Choice, int]]:
    """What runs the passes of a training step after the conversion, and at which batch: the calls of each."""
    counts: Counter[tuple[Choice, int]] = Counter()

    def count(name: str, module: Conv, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        met: list[Meeting] = []
        Hook(met, grads=True)(module, args, kwargs)
        for meeting in met:
            for problem in problems(module, meeting):
                counts[_choice(problem, meeting.batch, after.get_submodule(name)), meeting.batch] += 1

    with contextlib.ExitStack() as stack:
        for site in find(before)[0]:
            hook = partial(count, site.names[0])
            stack.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        forward()
    return counts


def _choice(problem: Problem, batch: int, layer: nn.Module) -> Choice:
    """What runs a pass in a layer; PyTorch's kernel is one and the same, whatever the reason for it."""
    if isinstance(layer, Grouped):
        choice = choose.resolve(problem, batch, layer.tune, layer.cache or "")
        if not choice.is_native:
            return choice
    return choose.native(problem, "")
