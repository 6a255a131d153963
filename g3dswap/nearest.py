"""The cache entries most like a problem: their options may serve it, and its tuning starts from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .tc.cache import Cache, Entry

FIELDS = ("size", "threads", "compiler", "generator", "device_name", "bias", "activation")
"""Of the key, in which a similar entry may differ: a schedule does not depend on what follows the sum.

The capability of the device is the same.
"""

TWINS = {"float16": "bfloat16", "bfloat16": "float16"}
"""Types that ask the same of a kernel."""

FACTOR = 8.0
"""The ratio of the image volumes up to which one size tells something about another."""

MOST = 3


def similar(cache: Cache, key: Mapping[str, Any]) -> list[Entry]:
    """The entries of the nearest image sizes, at most three; of the same size those with most in common."""
    twin = TWINS.get(key["dtype"])
    keys = [key, {**key, "dtype": twin}] if twin else [key]
    entries = [entry for own in keys for entry in cache.near(own, FIELDS) if entry.key != key]
    ranked = sorted(((_distance(e.key, key), json.dumps(e.key), e) for e in entries), key=lambda t: t[:2])
    return [entry for (far, _), _, entry in ranked if far <= math.log(FACTOR)][:MOST]


def _distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, int]:
    """How far the sizes of two keys are apart, and in how many fields beside them they differ."""
    size = sum(abs(math.log(x / y)) for x, y in zip(a["size"], b["size"]))
    return size, sum(a.get(name) != b.get(name) for name in ("dtype", *FIELDS) if name != "size")
