"""The cache entries most like a problem: their options may serve it, and its tuning starts from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
    entries = [entry for own in keys for entry in cache.near(own, FIELDS) if entry.key != key]
    ranked = sorted(((_distance(e.key, key), json.dumps(e.key), e) for e in entries), key=lambda t: t[:2])
    return [entry for (far, _), _, entry in ranked if far <= math.log(FACTOR)][:MOST]


def _distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, int]:
    """How far the numbers of groups and positions of two keys are apart, and in how many fields they differ.

    Infinitely far where a group has other channels, or a key is of no convolution: files may hold anything.
    """
    one, other = _counts(a), _counts(b)
    far = math.inf
    if one and other and one[:2] == other[:2]:
        far = sum(abs(math.log(x / y)) for x, y in zip(one, other))
    return far, sum(a.get(name) != b.get(name) for name in ("dtype", *FIELDS))


def _counts(key: Mapping[str, Any]) -> tuple[int, ...]:
    """Channels into and out of a group, groups, and positions along each axis; () where that is not said."""
    try:
        c_in, c_out, groups, (t, h, w) = (key[n] for n in ("in_channels", "out_channels", "groups", "size"))
    except (KeyError, TypeError, ValueError):
        return ()
    if not all(type(count) is int and count > 0 for count in (c_in, c_out, groups, t, h, w)):
        return ()
    return c_in // groups, c_out // groups, groups, t, h, w
