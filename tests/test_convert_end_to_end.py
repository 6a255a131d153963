"""Converting with nothing replaced: untimed default kernels, compiled here, and a training run with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from g3dswap import choose, decided
from g3dswap.convert import convert, inspect, revert
from g3dswap.module import Grouped3D
from g3dswap.plan import save_plan
from g3dswap.report import report
from g3dswap.verify import verify
from tests.training import Net

pytestmark = pytest.mark.usefixtures("forgotten")

X = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module) -> list[float]:
    """Losses of some steps on fixed data."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(4):
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(model(torch.randn(X.shape)), torch.tensor([step % 4, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_default_kernels_compute_the_same_and_train_the_same() -> None:
    model = Net()
    fast = convert(model, X, tune="none")
    items = report(fast).swapped
    assert [item.name for item in items] == ["body.0", "body.1"] and all(item.verified for item in items)
    assert [item.source for item in items[0].calls[0].passes] == ["default"] * 3
    assert isinstance(fast.get_submodule("body.0"), Grouped3D)
    # What runs is what was chosen and checked: no other choice is made, at any batch size.
    before = dict(decided.made)
    assert verify(model, fast, X).check().ok
    assert verify(model, fast, torch.cat([X, X, X])).ok
    assert decided.made == before
    assert train(copy.deepcopy(fast)) == pytest.approx(train(model), rel=1e-3)


def test_plan_brings_the_kernels_back(tmp_path: Path) -> None:
    model = Net()
    save_plan(convert(model, X, tune="none"), tmp_path / "plan.json")
    choose.forget()
    fast = convert(model, plan=tmp_path / "plan.json", tune="cached")
    passes = report(fast).swapped[0].calls[0].passes
    assert [item.source for item in passes] == ["default"] * 3
    assert all(item.reason.startswith("from the plan: ") for item in passes)
    assert verify(model, fast, X).ok


def test_lazy_layers_choose_at_their_first_call() -> None:
    model = Net()
    fast = convert(model, tune="none")
    assert not decided.made
    assert verify(model, fast, X).ok
    assert {decision.choice.source for decision in decided.made.values()} == {"default"}


def test_inspect_knows_nothing_of_an_empty_cache(tmp_path: Path) -> None:
    found = inspect(Net(), X, cache=tmp_path)
    assert [item.source for item in found.swapped[0].calls[0].passes] == ["untuned"] * 3
    assert not decided.made and not list(tmp_path.iterdir())


def test_without_a_compiler_all_layers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="PyTorch's own kernels run"):
        fast = convert(Net(), X, tune="none")
    assert not [module for module in fast.modules() if isinstance(module, Grouped3D)]
    assert {item.reason for item in report(fast).kept} == {
        "PyTorch's own kernels stay in every pass: no compiler"
    }


def test_way_back() -> None:
    model = Net().eval()
    fast = convert(model, X, tune="none")
    assert torch.equal(revert(fast)(X), model(X))
