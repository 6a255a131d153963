"""Training on two processes, over gloo: wrapped by DDP or sharded by FSDP2, with one choice of kernels."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import g3dswap
from g3dswap import choose, comprehensions, decided, ranks, stored
from g3dswap.choice import Record
from g3dswap.choose import Chooser
from g3dswap.errors import ConvertError
from g3dswap.problem import DIRECTIONS, Problem
from g3dswap.tc.cache import Cache
from g3dswap.tc.space import Space
from tests import apart
from tests.training import batches, check, plain, start, train

Schedules = dict[str, str]  # by direction


def network() -> Any:
    """Without batch statistics, which would be those of a rank's own share of the batch."""
    model = start()
    model.norm = nn.Identity()  # type: ignore[assignment]
    return model


def converted() -> Any:
    clips, _ = next(batches(network()))
    return g3dswap.convert(network(), clips[:2], tune="cached", min_speedup=1e-6, progress=False)


def share(model: nn.Module, clips: Tensor, labels: Tensor) -> None:
    """A step on this rank's share of the batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plain(model, clips[rank::world], labels[rank::world])


def chosen() -> Schedules:
    """The schedules of our kernels, as this process has decided."""
    choices = [decision.choice for decision in decided.made.values()]
    return {c.problem.direction: str(c.schedule) for c in choices if not c.is_native}


def fill(cache: Cache, problem: Problem, rank: int) -> None:
    """Let a cache say that a schedule was far faster than PyTorch's kernel: another one on each rank."""
    space = Space(comprehensions.nest(problem), "cpp", torch.get_num_threads())
    schedule = space.ranked(2, random.Random(0))[rank].to_json()
    record = Record(2, "quick", False, schedule, 1e-6, 1.0, 1e-7, 1e-6)
    cache.put(Chooser(cache).key(problem), record.to_json())


def disagree(rank: int) -> Schedules:
    """Give this rank a cache that says something else than the other's; what it would choose alone."""
    converted()  # to know the problems
    for problem in {problem for _, problem in decided.made}:
        fill(stored.open_cache(), problem, rank)
    choose.forget()
    converted()
    alone = chosen()
    choose.forget()
    return alone


@contextlib.contextmanager
def joined(rank: int, directory: str) -> Iterator[None]:
    """One of two ranks, with a cache folder of its own."""
    os.environ["G3DSWAP_CACHE_DIR"] = f"{directory}/cache{rank}"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    yield
    dist.barrier()
    dist.destroy_process_group()


def begin(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)


def _train(rank: int, directory: str, results: Any) -> None:
    with joined(rank, directory):
        alone = disagree(rank)
        begin(rank, directory)
        wrapped = nn.parallel.DistributedDataParallel(converted())
        together = chosen()
        train(wrapped, share)
        sharded = converted()
        for layer in (*sharded.body, sharded):
            fully_shard(layer)
        assert isinstance(sharded.body[0], g3dswap.Grouped3D)
        assert isinstance(sharded.body[0].weight, DTensor)
        train(sharded, share)
        assert chosen() == together
        full = [p.full_tensor().detach().numpy() for p in sharded.parameters()]
        results.put((rank, alone, together, [p.detach().numpy() for p in wrapped.parameters()], full))


def with_parameters(values: list[Any]) -> nn.Module:
    model = network()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.from_numpy(value))
    return model


def test_ranks_with_different_caches_train_with_one_choice(tmp_path: Path) -> None:
    (_, *first), (_, *second) = sorted(apart.ranks(_train, tmp_path), key=lambda answer: answer[0])
    alone, together = [first[0], second[0]], [first[1], second[1]]
    assert all(alone[0][direction] != alone[1][direction] for direction in DIRECTIONS)
    assert together[0] == together[1] and set(together[0]) == set(DIRECTIONS)
    assert all(
        together[0][direction] in (alone[0][direction], alone[1][direction]) for direction in DIRECTIONS
    )
    # One process with all the data takes the same steps.
    original, exact = train(network(), plain), train(network().double(), plain)
    for way in (2, 3):
        for mine, other in zip(first[way], second[way], strict=True):
            assert (mine == other).all()
        check(with_parameters(first[way]), original, exact, network)


def _train_and_die(rank: int, directory: str, results: Any) -> None:
    """One rank is killed while it makes the first choice of a training run, without inputs before."""
    ranks.SILENCE = 1.0
    os.environ["G3DSWAP_CACHE_DIR"] = f"{directory}/cache{rank}"
    torch.set_num_threads(1)
    decide = Chooser._decide

    def kill(self: Chooser, *arguments: Any) -> Any:
        if rank == 1:
            results.put((1, os.getpid(), []))
            results.close()
            results.join_thread()
            os.kill(os.getpid(), signal.SIGKILL)
        return decide(self, *arguments)

    setattr(Chooser, "_decide", kill)  # noqa: B010
    begin(rank, directory)
    model = g3dswap.convert(network(), tune="cached", progress=False)
    clips, _ = next(batches(model))
    if rank == 0:
        while not Path(directory, "dying").exists():
            time.sleep(0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(clips)
    results.put((0, os.getpid(), [str(warning.message) for warning in caught]))
    results.close()
    results.join_thread()
    os._exit(0)


def test_a_rank_killed_in_its_first_choice_leaves_it_to_the_others(tmp_path: Path) -> None:
    began: list[float] = []

    def meanwhile() -> None:
        began.append(time.monotonic())
        (tmp_path / "dying").touch()

    codes = (0, -signal.SIGKILL)
    (first, _, _), (rank, _, told) = apart.ranks(_train_and_die, tmp_path, codes=codes, meanwhile=meanwhile)
    assert (first, rank) == (1, 0) and time.monotonic() - began[0] < 15
    (warning,) = [text for text in told if text.startswith("Rank 1, which was to choose a kernel")]
    assert warning.endswith("s: rank 0 goes on without it.")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard_on_cpu(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def shard(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def shard_a_part(model: Any) -> nn.Module:
    fully_shard(model.body)
    return model


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # FSDP of the first kind is deprecated, and it is no friend of CPUs
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            nn.parallel.DistributedDataParallel,
            "The model is wrapped in DistributedDataParallel; convert its .module and wrap the result.",
        ),
        (shard_on_cpu, "The model is sharded by FSDP; convert the model before sharding it."),
        (shard, "The model is sharded by FSDP; convert the model before sharding it."),
        (shard_a_part, "Its part 'body' is sharded by FSDP; convert the model before sharding it."),
    ],
)
def test_models_that_are_wrapped_are_refused(wrap: Callable[[nn.Module], nn.Module], message: str) -> None:
    model = wrap(network())
    before = copy.copy(model.__dict__)
    with pytest.raises(ConvertError) as caught:
        g3dswap.convert(model, inplace=True)
    assert str(caught.value) == message and model.__dict__ == before
