"""Times, shares and factors as people read them."""

from __future__ import annotations

import math


def duration(seconds: float | None) -> str:
    """Three digits with the unit that fits; ``?`` for None."""
    if seconds is None:
        return "?"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def ms(seconds: float) -> str:
    """Three significant digits, as milliseconds."""
    value = seconds * 1e3
    if value >= 100:
        return f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 2
    return f"{value:.{min(digits, 4)}f}"


def percent(share: float | None) -> str:
    """Two significant digits; nothing for None."""
    if share is None:
        return ""
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def times(factor: float | None) -> str:
    """A speed-up; nothing for None."""
    if factor is None:
        return ""
    return f"{factor:.2f}x" if factor < 100 else f"{factor:.0f}x"
