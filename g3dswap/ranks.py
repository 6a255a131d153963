"""One choice on all ranks of a distributed job.

The first rank that needs a choice makes it and publishes it, as JSON, in the store of the default
process group; the others wait for it there.  Nothing here is a collective: ranks may meet problems in
any order, or never, and a choice may be made in the middle of a backward pass without getting between
the collectives of that pass.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

PREFIX = "g3dswap/choice/"
PAUSE = 0.02  # seconds between two looks


def active() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(
    topic: Mapping[str, Any], decide: Callable[[], dict[str, Any]], patience: float
) -> tuple[dict[str, Any] | None, bool]:
    """The decision of the job about `topic`, and whether this rank has made it.

    `decide` is called on one rank only and returns JSON.  None: the rank that decides failed, or took
    longer than `patience` seconds; this rank is then on its own.
    """
    store = distributed_c10d._get_default_store()
    name = PREFIX + hashlib.sha256(json.dumps(topic, sort_keys=True).encode()).hexdigest()
    if store.add(f"{name}/asked", 1) == 1:
        text = "null"  # what the others read if `decide` raises
        try:
            decision = decide()
            text = json.dumps(decision)
        finally:
            store.set(f"{name}/decision", text)
        return decision, True
    # Asking again and again, because a wait that times out is reported on stderr by the store itself.
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if store.check([f"{name}/decision"]):
            return json.loads(store.get(f"{name}/decision")), False
        time.sleep(PAUSE)
    return None, False
