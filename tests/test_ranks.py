"""Agreement between processes: real ones, with the gloo backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from g3dswap import ranks


def _run(target: Callable[..., None], directory: Path) -> list[Any]:
    """What two processes put into the queue, in that order; both must end well."""
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(r, str(directory), results)) for r in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return found


def _rank(rank: int, directory: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    made: list[int] = []

    def decide() -> dict[str, Any]:
        made.append(rank)
        time.sleep(0.2)
        return {"rank": rank}

    agreed = [ranks.agree({"topic": i}, decide, 60) for i in (range(6) if rank else reversed(range(6)))]
    told = [decision["rank"] for decision, _ in agreed if decision]
    alone = ranks.agree({"only": rank}, decide, 60)  # no other rank asks
    results.put((rank, told if rank else told[::-1], made, alone[0], [mine for _, mine in agreed]))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_agree_in_any_order_without_collectives(tmp_path: Path) -> None:
    found = sorted(_run(_rank, tmp_path))
    (_, told, made, alone, _), (_, other_told, other_made, other_alone, _) = found
    assert told == other_told and len(told) == 6
    assert len(made) + len(other_made) == 6 + 2  # each topic once, and one that only one rank asked about
    assert set(told) == {0, 1}  # they began at opposite ends
    assert alone == {"rank": 0} and other_alone == {"rank": 1}


def _failing_rank(rank: int, directory: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)

    def fail() -> dict[str, Any]:
        raise KeyboardInterrupt

    if rank == 0:
        with pytest.raises(KeyboardInterrupt):
            ranks.agree({"topic": 1}, fail, 60)
        results.put("failed")
    dist.barrier()
    if rank == 1:
        results.put(ranks.agree({"topic": 1}, fail, 60))
    dist.barrier()
    dist.destroy_process_group()


def test_a_failure_of_the_deciding_rank_is_told(tmp_path: Path) -> None:
    assert _run(_failing_rank, tmp_path) == ["failed", (None, False)]


def _slow_rank(rank: int, directory: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)

    def hang() -> dict[str, Any]:
        dist.barrier()
        results.put("begun")
        dist.barrier()
        return {}

    if rank == 0:
        ranks.agree({"topic": 1}, hang, 60)
    else:
        dist.barrier()
        results.put(ranks.agree({"topic": 1}, hang, 0.3))
        dist.barrier()
    dist.destroy_process_group()


def test_a_rank_does_not_wait_for_ever(tmp_path: Path) -> None:
    assert (None, False) in _run(_slow_rank, tmp_path)


def test_one_process_is_not_distributed() -> None:
    assert not ranks.active()
