"""Warnings that a process gives once about a topic, however often it meets it."""

from __future__ import annotations

import threading
import warnings

from .errors import G3DSwapWarning

_told: set[str] = set()
_lock = threading.Lock()


def warn_once(topic: str, message: str, stacklevel: int = 2) -> None:
    """A `G3DSwapWarning`, unless there was one about this topic; `stacklevel` as in `warnings.warn`."""
    with _lock:
        if topic in _told:
            return
        _told.add(topic)
    warnings.warn(message, G3DSwapWarning, stacklevel=stacklevel + 1)


def forget() -> None:
    """Let every topic be news again."""
    with _lock:
        _told.clear()
