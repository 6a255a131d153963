"""The lines of a report put together: one row for all layers that compute the same on the same input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from g3dswap.entries import (
    Call,
    Functional,
    FusedInto,
    Kept,
    Layer,
    NotFused,
    PassChoice,
    Skipped,
    Swapped,
    Untraced,
)
from g3dswap.quantities import duration

Named = Swapped | Kept | Skipped | Functional | FusedInto | NotFused


@dataclass(frozen=True)
class Row:
    """What became of some layers, or function calls, of one geometry on one kind of input."""

    outcome: str
    """``swapped``, ``kept``, or ``converted`` for function calls."""
    names: str
    """Of the first and the last."""
    members: tuple[str, ...]
    """All names."""
    geometry: Layer
    call: Call | None
    """None where the model did not run."""
    note: str
    verified: bool | None

    def choice(self, direction: str) -> PassChoice | None:
        """That of a pass; None where it is not needed, or nothing is chosen yet."""
        passes = self.call.passes if self.call else ()
        return next((item for item in passes if item.direction == direction), None)


def rows(swapped: Sequence[Swapped], kept: Sequence[Kept], functional: Sequence[Functional]) -> list[Row]:
    """Swapped layers first, then function calls, then what is kept, each in the order of the model."""
    found: dict[tuple[str, Layer, Call | None, str, bool | None], list[Swapped | Kept | Functional]] = {}

    def add(outcome: str, item: Swapped | Kept | Functional, note: str, verified: bool | None) -> None:
        if item.geometry is not None:
            for call in item.calls or (None,):
                found.setdefault((outcome, item.geometry, call, note, verified), []).append(item)

    for layer in swapped:
        add("swapped", layer, layer.note, layer.verified)
    for use in functional:
        add("converted" if use.converted else "kept", use, use.reason, use.verified)
    for layer_kept in kept:
        add("kept", layer_kept, layer_kept.reason, None)
    made = [
        Row(outcome, names(items), tuple(item.name for item in items), geometry, call, note, verified)
        for (outcome, geometry, call, note, verified), items in found.items()
    ]
    return sorted(made, key=lambda row: ("swapped", "converted", "kept").index(row.outcome))


def names(items: Sequence[Named]) -> str:
    """``3 x layer1.0.conv2 ... layer1.2.conv2``; the other names of a single one are added."""
    first = items[0]
    if len(items) > 1:
        return f"{len(items)} x {first.name} ... {items[-1].name}"
    aliases = () if isinstance(first, Functional) else first.aliases
    return f"{first.name} (shared with {', '.join(aliases)})" if aliases else first.name


def gathered(items: Iterable[tuple[Named, str]]) -> list[tuple[str, str]]:
    """The names of all the items with the same text, and the text."""
    found: dict[str, list[Named]] = {}
    for item, text in items:
        found.setdefault(text, []).append(item)
    return [(names(members), text) for text, members in found.items()]


def pass_name(direction: str) -> str:
    """``grad-input`` for ``grad_input``."""
    return direction.replace("_", "-")


def source(choice: PassChoice) -> str:
    """Where a choice comes from; ``kept`` where PyTorch's kernel stays."""
    return "kept" if choice.native else choice.source


def of_pytorch(call: Call) -> str:
    """``8x64x16x56x56 float32: PyTorch takes 3 ms forward, 8 ms grad-input``; the times where known."""
    known = [item for item in call.passes if item.native_seconds]
    if not known:
        return str(call)
    parts = [f"{duration(item.native_seconds)} {pass_name(item.direction)}" for item in known]
    return f"{call}: PyTorch takes {', '.join(parts)}"


def of_call(item: Functional) -> str:
    """What a function call is, where it is made, and what became of it."""
    groups = item.groups or "?"
    text = f"{item.function} with groups={groups}"
    if item.shape:
        text += f" on {'x'.join(str(size) for size in item.shape)}"
    text = f"{text}, {item.where}" if item.where else text
    if item.converted:
        text += "\nconverted"
        text += ", verified against float64" if item.verified else ""
        return f"{text}; {item.reason}" if item.reason else text
    return f"{text}\nnot converted: {item.reason}" if item.reason else text


def of_untraced(item: Untraced) -> str:
    """Why a part cannot be traced, and what is inside."""
    layers = f" ({item.layers} grouped layer{'s' if item.layers != 1 else ''} inside)" if item.layers else ""
    return f"{item.reason}{layers}"


def printable(text: str) -> str:
    """Text without control characters, with which a name from a file could steer a terminal."""
    return "".join(
        x if x.isprintable() or x == "\n" else x.encode("unicode_escape").decode("ascii") for x in text
    )
