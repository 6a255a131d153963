"""Whole steps of a model, timed before and after its conversion."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3dswap import endtoend
from g3dswap.convert import convert, revert
from g3dswap.endtoend import measure_steps
from g3dswap.entries import Step
from g3dswap.errors import ArgumentError, ConvertError
from g3dswap.module import Grouped
from g3dswap.report import report
from tests.fakes import FakeChooser, Net, faked

X = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def chooser(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChooser]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads of so small steps mostly wait for each other
    monkeypatch.setattr(endtoend, "WARM_UP", 1)
    monkeypatch.setattr(endtoend, "SHARES", 2)
    with faked(monkeypatch) as fake:
        yield fake
    torch.set_num_threads(threads)


def measured(model: nn.Module, *inputs: Tensor) -> dict[str, Step]:
    return {step.kind: step for step in measure_steps(model, inputs or (X,), seconds=0.02)}


def test_a_converted_model_is_compared_with_itself_reverted() -> None:
    fast = convert(Net(), X)
    steps = measured(fast)
    assert list(steps) == ["training", "inference"]
    for step in steps.values():
        assert step.after is not None and step.speedup is not None and step.share_after is not None
        assert step.before.runs >= 3 and step.after.runs >= 3
        assert 0 < step.share_before <= 1 and 0 < step.share_after <= 1
        assert step.speedup == step.before.seconds / step.after.seconds
    assert report(fast).steps == tuple(steps.values())
    assert any(isinstance(module, Grouped) for module in fast.modules())


def test_the_model_is_left_as_it_was() -> None:
    fast = convert(Net(), X)
    fast.layers[0].norm.eval()  # type: ignore[index, union-attr]
    grads = {name: torch.full_like(item, 7) for name, item in fast.named_parameters()}
    for name, item in fast.named_parameters():
        item.grad = grads[name]
    weights = {name: value.clone() for name, value in fast.state_dict().items()}
    modes = [module.training for module in fast.modules()]
    random, modules = torch.get_rng_state(), list(fast.modules())
    given = X.clone()
    measured(fast, given)
    assert all(torch.equal(value, weights[name]) for name, value in fast.state_dict().items())
    assert all(item.grad is grads[name] for name, item in fast.named_parameters())
    assert [module.training for module in fast.modules()] == modes
    assert all(a is b for a, b in zip(fast.modules(), modules, strict=True))
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(given, X)


def test_both_models_hold_the_same_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    twins: list[nn.Module] = []

    def kept(model: nn.Module) -> nn.Module:
        twins.append(revert(model))
        return twins[0]

    monkeypatch.setattr(endtoend, "revert", kept)
    fast = convert(Net(), X)
    measured(fast)
    (twin,) = twins
    assert type(twin.get_submodule("down")) is nn.Conv3d and type(twin) is Net
    ours = dict(fast.named_parameters())
    assert all(item is ours[name] for name, item in twin.named_parameters())


def test_of_a_model_as_it_is_there_is_no_after() -> None:
    model = Net()
    step = measured(model)["training"]
    assert step.after is None and step.speedup is None and step.share_after is None
    assert not hasattr(model, "_g3dswap_report")


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen"])
def test_without_gradients_there_is_no_training_step(how: str) -> None:
    model = Net().requires_grad_(how != "frozen").train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        assert list(measured(model)) == ["inference"]
        assert torch.is_grad_enabled() == (how != "no_grad")


class Sleepy(nn.Module):
    """A function call is its grouped convolution, and most of its time is spent elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.008)
        return F.conv3d(x, torch.ones(4, 1, 1, 1, 1), groups=4)


def test_share_is_of_all_grouped_convolutions_and_of_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampler(device: torch.device) -> Any:
        def sample(call: Any) -> float:
            call()
            return 0.002

        return sample

    monkeypatch.setattr(endtoend, "_sampler", sampler)
    step = measured(Sleepy(), torch.randn(1, 4, 3, 3, 3))["inference"]
    assert step.grouped_before == 0.002
    assert step.before.seconds >= 0.008
    plain = nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv2d(6, 6, 1, groups=6))
    assert measured(plain[0])["inference"].grouped_before == 0
    assert measured(plain[1], torch.randn(1, 6, 3, 3))["training"].grouped_before == 0
    # Forward, and backward as one operator, of three grouped layers.
    assert measured(Net())["training"].grouped_before == pytest.approx(6 * 0.002)
    fast = measured(convert(Net(), X))["training"]
    assert fast.grouped_after == pytest.approx(6 * 0.002)


def test_operators_are_timed_amid_the_step() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return F.conv3d(x, torch.ones(16, 1, 5, 5, 5), groups=16)

    step = measured(Slow(), torch.randn(1, 16, 8, 12, 12))["inference"]
    assert 0 < step.grouped_before < step.before.seconds - 0.019


def test_what_cannot_be_measured() -> None:
    with pytest.raises(
        ArgumentError, match="measure_steps\\(\\) needs example_inputs: what the model's forward"
    ):
        measure_steps(Net(), None)
    with pytest.raises(
        ConvertError, match=r"A step of training of Net raised RuntimeError: .*; measure_steps"
    ):
        measure_steps(Net(), torch.randn(2, 4, 4, 6, 6))

    class NoCopies(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("one of a kind")

    fast = convert(NoCopies(), X, inplace=True)
    with pytest.raises(
        ConvertError, match=r"NoCopies cannot be deep-copied \(TypeError: one of a kind\), which"
    ):
        measure_steps(fast, X)
    assert isinstance(copy.copy(fast).down, Grouped)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = torch.randn(8, 3, 8, 28, 28, device="cuda")
    for step in measured(convert(Net().cuda(), x), x).values():
        # Of so small a step they may be all: their times are without the gaps that the host leaves.
        assert step.share_after is not None and 0 < step.share_after <= 1 and 0 < step.share_before <= 1
