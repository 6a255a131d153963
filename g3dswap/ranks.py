"""One choice on all ranks of a distributed job.

The first rank that needs a choice makes it and publishes it, as JSON, in the store of the default
process group; the others wait for it there.  Nothing here is a collective: ranks may meet problems in
any order, or never, and a choice may be made in the middle of a backward pass without getting between
the collectives of that pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .errors import ArgumentError

T = TypeVar("T")

PREFIX = "g3dswap/choice/"
PAUSE = 0.02  # seconds between two looks


def active() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Within it, processes that torchrun has started share the work that `agree` is about; gives the rank.

    Each takes a GPU of its own, where there are GPUs.  A process that nobody started so is rank 0 of one.
    ArgumentError: there are more processes than GPUs.
    """
    global _sharing
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield 0
        return
    if torch.cuda.is_available():
        local, count = dist.get_node_local_rank(), torch.cuda.device_count()
        if local >= count:
            raise ArgumentError(
                f"process {local} of this machine has no GPU of its own; pass --nproc-per-node={count}."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("gloo")
    _sharing = True
    try:
        yield dist.get_rank()
    finally:
        _sharing = False
        dist.destroy_process_group()


_sharing = False


def shares(items: list[T]) -> list[T]:
    """The items in the order in which this rank should see to them; none if the ranks do not share work.

    Each begins at another place, so that they rarely want the same one.
    """
    if not (_sharing and active()):
        return []
    begin = len(items) * dist.get_rank() // dist.get_world_size()
    return items[begin:] + items[:begin]


def begun(topic: Mapping[str, Any]) -> bool:
    """Whether a rank has asked `agree` about a topic."""
    return distributed_c10d._get_default_store().check([f"{_name(topic)}/asked"])


def _name(topic: Mapping[str, Any]) -> str:
    return PREFIX + hashlib.sha256(json.dumps(topic, sort_keys=True).encode()).hexdigest()


def agree(
    topic: Mapping[str, Any], decide: Callable[[], dict[str, Any]], patience: float
) -> tuple[dict[str, Any] | None, bool]:
    """The decision of the job about `topic`, and whether this rank has made it.

    `decide` is called on one rank only and returns JSON.  None: the rank that decides failed, or took
    longer than `patience` seconds; this rank is then on its own.
    """
    store, name = distributed_c10d._get_default_store(), _name(topic)
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
