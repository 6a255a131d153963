"""Training on two processes: a converted model under DistributedDataParallel, over gloo."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import g3dswap
from g3dswap import choose
from g3dswap.problem import DIRECTIONS


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv3d(1, 8, 1), nn.Conv3d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv3d(8, 1, 1)
    )


def train(model: nn.Module, rank: int, world: int) -> list[float]:
    """Five steps on this rank's share of the same batches; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        clips = torch.randn(4, 1, 4, 9, 9, generator=generator)[rank::world]
        loss = (model(clips) - clips).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _rank(rank: int, directory: str, results: Any) -> None:
    # Caches of their own, so that only agreement can make the choices equal.
    os.environ["G3DSWAP_CACHE_DIR"] = f"{directory}/cache{rank}"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    fast = g3dswap.convert(
        network(), (torch.randn(2, 1, 4, 9, 9),), tune="quick", min_speedup=1e-6, progress=False
    )
    layer = fast.get_submodule("1")
    assert isinstance(layer, g3dswap.Grouped3D)
    losses = train(nn.parallel.DistributedDataParallel(fast), rank, 2)
    chosen = {
        p.direction: (c.schedule and str(c.schedule))
        for (_, p), d in choose._decisions.items()
        for c in [d.choice]
    }
    results.put((rank, chosen, losses, [p.detach().numpy() for p in fast.parameters()]))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_train_with_one_choice(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(r, str(tmp_path), results)) for r in range(2)]
    for process in processes:
        process.start()
    (_, chosen, losses, weights), (_, other_chosen, other_losses, other_weights) = sorted(
        (results.get(timeout=120) for _ in processes), key=lambda found: found[0]
    )
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert set(chosen) == set(DIRECTIONS) and all(chosen.values())  # our kernels, in all three passes
    assert chosen == other_chosen
    assert losses != other_losses  # each had its own share of the data
    for mine, theirs in zip(weights, other_weights, strict=True):
        assert (mine == theirs).all()
    # One process with all the data takes the same steps.
    alone = network()
    train(alone, 0, 1)
    for mine, parameter in zip(weights, alone.parameters(), strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), parameter.detach(), rtol=1e-4, atol=1e-6)
