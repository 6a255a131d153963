"""One choice on all ranks of a distributed job.

The first rank that needs a choice makes it and publishes it, as JSON, in the store of the default
process group; the others wait for it there, as long as it gives signs of life.  Nothing here is a
collective: ranks may meet problems in any order, or never, and a choice may be made in the middle of a
backward pass without getting between the collectives of that pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .errors import ArgumentError, G3DSwapWarning, first_line

T = TypeVar("T")

PREFIX = "g3dswap/choice/"
PAUSE = 0.02  # seconds between two looks
BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one after which a rank is taken for dead
FAILED = "failed"


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
    """The items in the order in which this rank should see to them; none if the ranks do not share work."""
    return rotated(items) if _sharing and active() else []


def rotated(items: list[T]) -> list[T]:
    """The items, from another place on for each rank, so that they rarely want the same one at a time."""
    if not active():
        return items
    begin = len(items) * dist.get_rank() // dist.get_world_size()
    return items[begin:] + items[:begin]


def begun(topic: Mapping[str, Any]) -> bool:
    """Whether a rank has asked `agree` about a topic."""
    return distributed_c10d._get_default_store().check([f"{_name(topic)}/0/asked"])


def _name(topic: Mapping[str, Any]) -> str:
    return PREFIX + hashlib.sha256(json.dumps(topic, sort_keys=True).encode()).hexdigest()


def agree(
    topic: Mapping[str, Any], decide: Callable[[], dict[str, Any]], patience: float
) -> tuple[dict[str, Any] | None, bool]:
    """The decision of the job about `topic`, and whether this rank has made it.

    `decide` returns JSON.  It is called on one rank, and on another one if that rank fails, falls silent or
    takes longer than `patience` seconds; a decision that is made all the same holds only if it comes first,
    so that all ranks hear of the same.  None: the store is lost, and this rank is on its own.
    """
    name = _name(topic)
    decided: dict[str, Any] | None = None
    try:
        store = distributed_c10d._get_default_store()
        for turn in itertools.count():
            place = f"{name}/{turn}"
            if store.add(f"{place}/asked", 1) == 1:
                with _Signs(store, place) as signs:
                    decided = decide()
                    signs.has_decided = True
                text = json.dumps(decided)
                first = store.compare_set(f"{name}/decision", "", text).decode()
                return (decided, True) if first == text else (json.loads(first), False)
            told = _told(store, name, place, patience)
            if told is not None:
                return json.loads(told), False
    except dist.DistError as error:
        why = first_line(error, type(error).__name__)
        warnings.warn(
            f"The store of the process group is lost ({why}), and this rank chooses its kernels alone; "
            "if the job ends, start it again: what was tuned is kept.",
            G3DSwapWarning,
            stacklevel=2,
        )
    return decided, decided is not None


class _Signs(contextlib.AbstractContextManager["_Signs"]):
    """Signs of life while this rank decides: its rank and a count in the store, `FAILED` if it fails.

    They come from a thread of their own.
    """

    def __init__(self, store: dist.Store, place: str) -> None:
        self.store, self.place = store, place
        self.has_decided = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Signs:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(BEAT)  # where the store hangs, the others do not hear this rank either
        if not self.has_decided:
            self._sign(FAILED)

    def _beat(self) -> None:
        for count in itertools.count():
            self._sign(str(count))
            if self._over.wait(BEAT):
                return

    def _sign(self, text: str) -> None:
        with contextlib.suppress(dist.DistError):  # whoever waits notices that, too
            self.store.set(f"{self.place}/sign", f"{dist.get_rank()} {text}")


def _told(store: dist.Store, name: str, place: str, patience: float) -> bytes | None:
    """The decision about a topic, or None if this rank should ask for its turn.

    It looks again and again, because a wait that times out is reported on stderr by the store itself.
    """
    began = heard = time.monotonic()
    sign = ""
    while not store.check([f"{name}/decision"]):
        now = time.monotonic()
        before = sign
        sign = store.get(f"{place}/sign").decode() if store.check([f"{place}/sign"]) else ""
        rank, _, text = sign.partition(" ")
        if sign != before:
            heard = now
        if text == FAILED:
            return None
        if now - heard > SILENCE or now - began > patience:
            how = f"was silent for {now - heard:.0f} s" if now - heard > SILENCE else "took too long"
            warnings.warn(
                f"Rank {rank or 'unknown'}, which was to choose a kernel for all ranks, {how}: "
                f"rank {dist.get_rank()} goes on without it.",
                G3DSwapWarning,
                stacklevel=3,
            )
            return None
        time.sleep(PAUSE)
    return store.get(f"{name}/decision")
