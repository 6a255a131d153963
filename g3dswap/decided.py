"""What this process has decided, and the plans that decide for it: tables that all choosers share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .choice import Choice
from .problem import Problem
from .stored import EFFORTS


@dataclass(frozen=True)
class Decided:
    """A choice, and what was asked for when it was made."""

    choice: Choice
    effort: int  # of EFFORTS: what the choice rests on
    tune: str
    min_speedup: float

    def serves(self, tune: str, min_speedup: float | None) -> bool:
        """Whether it need not be made again for this request."""
        if min_speedup is not None and min_speedup != self.min_speedup:
            return False
        return self.tune == tune or self.effort >= max(1, EFFORTS[tune])


LOCK = threading.RLock()
"""Held while something is decided: measurements must not overlap."""

made: dict[tuple[Path, Problem], Decided] = {}
"""By the directory of the cache and the problem."""

planned: dict[Problem, Choice] = {}
"""The choices of installed plans, without their kernels."""

_lookup: dict[Hashable, Choice] = {}
_listeners: list[Callable[[], None]] = []


def lookup() -> dict[Hashable, Choice]:
    """A dictionary for callers that must be fast: from whatever they use as key to the choice.

    It is emptied when a choice changes.
    """
    return _lookup


def on_change(listener: Callable[[], None]) -> None:
    """Have a function called whenever a choice may have changed."""
    _listeners.append(listener)


def changed() -> None:
    """Have everybody who remembers choices forget them."""
    _lookup.clear()
    for listener in _listeners:
        listener()


def install(choices: Iterable[Choice]) -> None:
    """Let these choices (a plan's) decide from now on, in the whole process; built when first needed."""
    with LOCK:
        for choice in choices:
            planned[choice.problem] = choice
            for place in [place for place in made if place[1] == choice.problem]:
                del made[place]
        changed()


def remember(place: tuple[Path, Problem], decision: Decided) -> None:
    """Let a decision hold in this process."""
    if place in made:
        changed()
    made[place] = decision


def forget() -> None:
    """Forget all decisions and installed plans."""
    made.clear()
    planned.clear()
    changed()
