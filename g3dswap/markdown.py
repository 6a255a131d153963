"""Tables of Markdown, and text that stays text in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

Columns = dict[str, list[str]]
"""A table by its columns; a column without any text is left out."""

WORDS = ("layer", "pass", "layout", "least", "network", "dtype")
"""Columns that are text."""


def table(columns: Columns, words: Collection[str] = WORDS) -> Iterator[str]:
    """The lines; the columns called ``words`` to the left, and those of numbers to the right."""
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    yield _line(shown)
    yield _line(["---" if name in words else "---:" for name in shown])
    for cells in zip(*shown.values(), strict=True):
        yield _line(cells)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def escape(text: str) -> str:
    """Text in which Markdown, or HTML in it, finds no markup; one line. The ``|`` is left to `table`."""
    text = text.replace("&", "&amp;")
    return re.sub(r"([\\`*_{}\[\]<>#~$!])", r"\\\1", text).replace("\n", "<br>")
