"""How many random examples a property test runs."""

from __future__ import annotations

import os

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")

DEEP_FACTOR = 20
"""``HYPOTHESIS_PROFILE=deep`` runs this many times as many examples, and other ones at every run."""


def examples(count: int) -> int:
    """The ``max_examples`` of a test that should see ``count`` examples in an everyday run."""
    return count * DEEP_FACTOR if PROFILE == "deep" else count
