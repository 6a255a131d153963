"""Steps of networks in CUDA graphs: what is captured, freed and said; with fakes, and on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from g3dswap.bench import captured, graphs
from g3dswap.bench.captured import time_graphs
from g3dswap.bench.compared import INFERENCE, TRAINING
from g3dswap.bench.steps import Batch, Training
from g3dswap.tc.timing import Call
from tests.apart import alone
from tests.fakes import Net

SHAPE = (2, 3, 4, 6, 6)


class Replay:
    """Stands for a captured graph: runs again what was captured."""

    def __init__(self, run: Call) -> None:
        self.run = run

    def __call__(self) -> None:
        self.run()


class Device:
    """Stands for a GPU, which captures in turn what it does not refuse."""

    def __init__(self, refused: Callable[[int], str] = lambda number: "") -> None:
        self.refused = refused
        self.models: list[tuple[nn.Module, bool]] = []
        self.results: list[list[Tensor]] = []
        self.alive: weakref.ref[Replay] | None = None

    def record(self, run: Callable[[], Sequence[Tensor]], warm_up: Call) -> Call:
        assert self.alive is None or self.alive() is None  # one graph at a time
        model = run.args[0].model  # type: ignore[attr-defined]
        assert all(x.grad is None for x in model.parameters())
        self.models.append((model, model.training))
        warm_up()
        if reason := self.refused(len(self.models)):
            raise RuntimeError(reason)
        self.results.append(list(run()))
        replay = Replay(run)
        self.alive = weakref.ref(replay)
        return replay

    def time(
        self, sides: dict[str, Training], batch: Batch
    ) -> tuple[dict[tuple[str, str], float], list[str]]:
        found, notes = time_graphs(sides, batch, 0.01, sample=self.sample, record=self.record)
        return {key: times.seconds for key, times in found.items()}, notes

    def sample(self, call: Call) -> float:
        call()
        return float(len(self.models))


def two(device: str = "cpu") -> tuple[dict[str, Training], Batch]:
    sides = {name: Training(Net().to(device), False) for name in ("before", "after")}
    return sides, (torch.randn(SHAPE, device=device), torch.tensor([1, 2], device=device))


def test_one_graph_at_a_time_is_captured_timed_and_freed() -> None:
    gpu, (sides, batch) = Device(), two()
    before, after = (it.model for it in sides.values())
    times, notes = gpu.time(sides, batch)
    assert notes == []
    assert gpu.models == [(before, False), (after, False), (before, True), (after, True)]
    assert times == {
        (INFERENCE, "before"): 1,
        (INFERENCE, "after"): 2,
        (TRAINING, "before"): 3,
        (TRAINING, "after"): 4,
    }
    assert gpu.alive is not None and gpu.alive() is None
    assert all(x.grad is None for it in sides.values() for x in it.model.parameters())


def test_a_graph_holds_a_whole_step_whose_results_are_checked() -> None:
    gpu, (sides, batch) = Device(), two()
    weights = [x.clone() for x in sides["after"].model.parameters()]
    gpu.time(sides, batch)
    outputs, losses = gpu.results[:2], gpu.results[2:]
    assert [[x.shape for x in it] for it in outputs] == [[(2, 5)], [(2, 5)]]
    assert not any(x.requires_grad for it in (*outputs, *losses) for x in it)
    first = next(sides["after"].model.parameters())
    assert [[x.shape for x in it] for it in losses] == [[(), first.shape]] * 2
    assert not any(torch.equal(a, b) for a, b in zip(weights, sides["after"].model.parameters()))
    assert sides["after"].losses == []  # they would be read, for which a graph cannot wait


def test_what_cannot_be_captured_is_said_once_and_the_rest_is_timed() -> None:
    gpu, (sides, batch) = Device(lambda number: "stream is capturing\nadvice" if number > 2 else ""), two()
    times, notes = gpu.time(sides, batch)
    assert set(times) == {(INFERENCE, "before"), (INFERENCE, "after")}
    assert notes == ["no CUDA graph of training before, training after: RuntimeError: stream is capturing"]


def test_two_reasons_are_two_notes() -> None:
    gpu, (sides, batch) = Device(lambda number: {1: "first", 4: "last"}.get(number, "")), two()
    times, notes = gpu.time(sides, batch)
    assert set(times) == {(INFERENCE, "after"), (TRAINING, "before")}
    assert [note.partition(": ")[0] for note in notes] == [
        "no CUDA graph of inference before",
        "no CUDA graph of training after",
    ]


# On a GPU.


@pytest.mark.gpu
def test_replays_train_on_a_gpu() -> None:
    sides, batch = two("cuda")
    for it in sides.values():
        it.step(*batch, seed=0)
    # Detached: a node for gradients would keep the stream of this step.
    weights = [x.detach().clone() for x in sides["after"].model.parameters()]
    run = lambda: captured._update(sides["after"], batch)  # noqa: E731
    replay = graphs.record(run, run)
    seen = []
    for _ in range(20):
        replay()
        seen.append([x.detach().clone() for x in sides["after"].model.parameters()])
    for before, *after in zip(weights, *seen):
        assert not torch.equal(before, after[0])
        assert not torch.equal(after[0], after[-1])  # each replay is a step
    del replay
    times, notes = time_graphs(sides, batch, 0.01, sample=captured.sampler())
    assert notes == []
    assert set(times) == {(kind, name) for kind in (TRAINING, INFERENCE) for name in sides}
    assert all(0 < it.seconds < 0.1 for it in times.values())


@pytest.mark.gpu
def test_a_failed_capture_loses_nothing_on_a_gpu() -> None:
    alone(what_fails)  # what a failed capture leaves behind is no other test's business


def without_workspaces() -> int:
    """Bytes that PyTorch keeps, but for those of cuBLAS, which has some for each stream."""
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def what_fails() -> None:
    """What the test above checks."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.drop = Net(), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            held = self.drop(x.new_ones(1 << 28))  # 1 GiB, and random numbers
            out: Tensor = self.net(x) * float(held.mean())  # a graph cannot wait for a number
            return out

    sides, batch = two("cuda")
    sides["after"] = Training(Reads().cuda(), False)
    for it in sides.values():
        it.step(*batch, seed=0)
        it.optimizer.zero_grad()
    reserved = without_workspaces()
    times, notes = time_graphs(sides, batch, 0.01, sample=captured.sampler())
    assert set(times) == {(TRAINING, "before"), (INFERENCE, "before")}
    assert notes and all("after" in note for note in notes)
    assert without_workspaces() < reserved + (1 << 28)
    torch.manual_seed(0)
    first = torch.rand(4, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(4, device="cuda"))
    sides["after"].step(*batch, seed=1)
    again, notes = time_graphs({"before": sides["before"]}, batch, 0.01, sample=captured.sampler())
    assert len(again) == 2 and notes == []
