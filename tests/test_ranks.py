"""Agreement between processes: real ones, with the gloo backend."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from g3dswap import choose, ranks
from g3dswap.choose import Chooser
from g3dswap.decided import Decided
from g3dswap.errors import ArgumentError, G3DSwapWarning
from g3dswap.problem import Geometry, Problem
from g3dswap.tc.cache import Cache
from g3dswap.tc.trial import TunerConfig
from tests import apart


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
    found = sorted(apart.ranks(_rank, tmp_path))
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
        results.put(ranks.agree({"topic": 1}, lambda: {"by": 1}, 60))
    dist.barrier()
    if rank == 0:
        results.put(ranks.agree({"topic": 1}, fail, 60))
    dist.destroy_process_group()


def test_where_the_deciding_rank_fails_another_decides(tmp_path: Path) -> None:
    assert apart.ranks(_failing_rank, tmp_path, answers=3) == [
        "failed",
        ({"by": 1}, True),
        ({"by": 1}, False),
    ]


def _patient_rank(rank: int, directory: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    ranks.SILENCE, ranks.BEAT = 1.5, 0.1

    def long() -> dict[str, Any]:
        dist.barrier()
        time.sleep(2.5)  # longer than a silence may be, but not silent
        return {"by": rank}

    if rank == 1:
        dist.barrier()
    results.put((rank, ranks.agree({"topic": 1}, long, 60)))
    dist.barrier()
    dist.destroy_process_group()


def test_a_rank_waits_for_one_that_gives_signs_of_life(tmp_path: Path) -> None:
    assert sorted(apart.ranks(_patient_rank, tmp_path)) == [
        (0, ({"by": 0}, True)),
        (1, ({"by": 0}, False)),
    ]


def _slow_rank(rank: int, directory: str, results: Any, silent: bool) -> None:
    """Rank 0 decides, or is stopped while it does, and goes on when rank 1 has lost its patience."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    ranks.SILENCE = 0.5 if silent else 60.0
    if silent and rank == 0:
        ranks._Signs._beat = lambda self: self._sign("0")  # type: ignore[method-assign]  # once

    def slow() -> dict[str, Any]:
        dist.barrier()
        dist.barrier()
        return {"by": 0}

    if rank == 0:
        results.put((0, ranks.agree({"topic": 1}, slow, 60), []))
    else:
        dist.barrier()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.put((1, ranks.agree({"topic": 1}, lambda: {"by": 1}, 60 if silent else 0.3), []))
        results.put((2, str(caught[0].message), [str(warning.category) for warning in caught[1:]]))
        dist.barrier()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("silent", "how"), [(True, r"was silent for \d+ s"), (False, "took too long")])
def test_a_rank_does_not_wait_for_ever_and_there_is_one_decision(
    silent: bool, how: str, tmp_path: Path
) -> None:
    first, second, (_, warning, more) = sorted(apart.ranks(_slow_rank, tmp_path, silent, answers=3))
    assert first == (0, ({"by": 1}, False), []) and second == (1, ({"by": 1}, True), [])
    wanted = f"Rank 0, which was to choose a kernel for all ranks, {how}: rank 1 goes on without it."
    assert re.fullmatch(wanted, warning) and more == []


def _rank_without_store(rank: int, directory: str, results: Any) -> None:
    """Rank 0, which holds the store, dies while it decides."""
    port = Path(directory, "port")
    if rank == 0:
        store = dist.TCPStore("localhost", 0, 2, True, wait_for_workers=False)
        port.with_suffix(".new").write_text(str(store.port))
        port.with_suffix(".new").rename(port)
    else:
        while not port.exists():
            time.sleep(0.02)
        store = dist.TCPStore("localhost", int(port.read_text()), 2, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)

    def die() -> dict[str, Any]:
        dist.barrier()
        time.sleep(0.5)  # until the other waits
        os._exit(0)

    if rank == 0:
        ranks.agree({"topic": 1}, die, 60)
    dist.barrier()
    with pytest.warns(G3DSwapWarning) as caught:
        results.put(ranks.agree({"topic": 1}, die, 60))
    results.put(str(caught[0].message))
    results.close()
    results.join_thread()
    os._exit(0)  # what is left of the process group waits


def test_without_the_store_a_rank_is_on_its_own(tmp_path: Path) -> None:
    answer, warning = apart.ranks(_rank_without_store, tmp_path)
    assert answer == (None, False)
    assert re.fullmatch(
        r"The store of the process group is lost \(.+\), and this rank chooses its kernels alone; if the job "
        "ends, start it again: what was tuned is kept.",
        warning,
    )


def test_one_process_is_not_distributed() -> None:
    assert not ranks.active()
    assert ranks.shares([1, 2, 3]) == []
    with ranks.joined() as rank:
        assert rank == 0 and not ranks.active()


# Work that ranks share, as `g3dswap tune` does under torchrun.

PROBLEMS = [Problem("forward", Geometry(c, c, c, (3, 4, 5), (1, 1, 1))) for c in range(1, 9)]


class SlowChooser(Chooser):
    """Decides for PyTorch's kernel, after a while."""

    made: list[int]
    dies: bool = False

    def _decide(self, problem: Problem, batch: int, label: str) -> Decided:
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        self.made.append(problem.geometry.groups)
        return self._decision(choose.native(problem, f"by {dist.get_rank()}"), 1)


def _share(rank: int, directory: str, results: Any, dies: bool) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "1"}
    real = dist.init_process_group

    def init(backend: str) -> None:
        real(backend, init_method=f"file://{directory}/store", rank=rank, world_size=2)

    setattr(dist, "init_process_group", init)  # noqa: B010  torchrun names a port, a test a file
    ranks.SILENCE = 1.0
    with ranks.joined() as mine:
        assert mine == rank and ranks.active()
        chooser = SlowChooser(
            Cache(directory), progress=False, config=replace(TunerConfig.quick(), seconds=0.1)
        )
        chooser.made, chooser.dies = [], dies and rank == 1
        chooser.share([(problem, 1, "") for problem in PROBLEMS])
        shared = list(chooser.made)
        reasons = [chooser.choose(problem).reason for problem in PROBLEMS]
        results.put((rank, shared, chooser.made, reasons))
        if not dies:
            dist.barrier()
    assert not ranks.active()


def test_ranks_share_work_and_know_all_of_it(tmp_path: Path) -> None:
    found = sorted(apart.ranks(_share, tmp_path, False))
    (_, shared, made, reasons), (_, other_shared, other_made, other_reasons) = found
    assert sorted(made + other_made) == list(range(1, 9))  # each once
    assert len(shared) >= 2 and len(other_shared) >= 2
    assert reasons == other_reasons
    assert {int(reason.split()[-1]) for reason in reasons} == {0, 1}


def test_a_rank_that_is_killed_leaves_its_work_to_the_others(tmp_path: Path) -> None:
    ((rank, _, made, reasons),) = apart.ranks(_share, tmp_path, True, answers=1, codes=(0, -signal.SIGKILL))
    assert rank == 0 and sorted(made) == list(range(1, 9))
    assert set(reasons) == {"by 0"}


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    wanted = r"process 2 .* has no GPU of its own; pass --nproc-per-node=2\."
    with pytest.raises(ArgumentError, match=wanted), ranks.joined():
        pass


@pytest.mark.slow
def test_tuning_under_torchrun_after_one_that_was_killed(tmp_path: Path) -> None:
    """A rank is killed, which ends the others soon; the next run ends well: two processes, one cache."""
    (tmp_path / "user_pair.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv3d(8, 8, 3, groups=8), nn.Conv3d(8, 8, 3, groups=4))\n"
    )
    arguments = ["tune", "--arch", "user_pair:net", "--input", "2x8x5x9x9", "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["G3DSWAP_CACHE_DIR"] = str(tmp_path / "cache")
    options: Any = {"cwd": tmp_path, "env": environment, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [*command, "-m", "g3dswap", *arguments]
    with subprocess.Popen(words, **options) as first:
        apart.wait_for(lambda: Cache(tmp_path / "cache").entries(), 120)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        victim = next(pid for pid in children if b"g3dswap" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(int(victim), signal.SIGKILL)
        _, told = first.communicate(timeout=60)
    assert first.returncode != 0 and "Signal 9 (SIGKILL)" in told
    kept = len(Cache(tmp_path / "cache").entries())
    done = subprocess.run(words, **options, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    layers = report["swapped"] + report["kept"]
    passes = [choice for layer in layers for call in layer["calls"] for choice in call["passes"]]
    assert len(layers) == 2 and len(passes) == 5  # of the first layer no grad-input
    assert len({json.dumps(entry.key) for entry in Cache(tmp_path / "cache").entries()}) == 5
    assert 1 <= kept < 5
