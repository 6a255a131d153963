"""The cache entries most like a problem: their options may serve it, and its tuning starts from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .tc.cache import Cache, Entry

FIELDS = (
    *("size", "in_channels", "out_channels", "groups", "bias", "activation"),
    *("threads", "compiler", "generator", "device_name"),
)
"""Of the key, in which a similar entry may differ: a schedule does not depend on what follows the sum.

The channels of a group are the same, and so is the capability of the device.
"""

TWINS = {"float16": "bfloat16", "bfloat16": "float16"}
"""Types that ask the same of a kernel."""

FACTOR = 8.0
"""The ratio of positions and groups up to which one layer tells something about another."""

MOST = 3


def similar(cache: Cache, key: Mapping[str, Any]) -> list[Entry]:
    """The entries of the nearest sizes, at most three; of the same size those with most in common."""
    twin = TWINS.get(key["dtype"])
    keys = [key, {**key, "dtype": twin}] if twin else [key]
    wanted = _Extent.of(key)
    found: list[tuple[tuple[float, int, str], Entry]] = []
    for entry in (entry for own in keys for entry in cache.near(own, FIELDS) if entry.key != key):
        extent = _Extent.of(entry.key)
        if wanted and extent and extent.a_group == wanted.a_group:
            far = wanted.distance(extent)
            if far <= math.log(FACTOR):
                differing = sum(entry.key.get(name) != key.get(name) for name in ("dtype", *FIELDS))
                found.append(((far, differing, json.dumps(entry.key)), entry))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])[:MOST]]


@dataclass(frozen=True)
class _Extent:
    """How much of the same work there is: what a group has, and how many groups and positions."""

    a_group: tuple[int, int]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, key: Mapping[str, Any]) -> _Extent | None:
        """None for a key that is not of a convolution: files may hold anything."""
        try:
            c_in, c_out, groups, (t, h, w) = (
                key[n] for n in ("in_channels", "out_channels", "groups", "size")
            )
        except (KeyError, TypeError, ValueError):
            return None
        if not all(type(count) is int and count > 0 for count in (c_in, c_out, groups, t, h, w)):
            return None
        return cls((c_in // groups, c_out // groups), (groups, t, h, w))

    def distance(self, other: _Extent) -> float:
        """The logarithm of how many times more or less there is, of all axes together."""
        return sum(abs(math.log(x / y)) for x, y in zip(self.counts, other.counts))
