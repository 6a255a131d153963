"""The torch.fx pass: what a forward reaches, and which parts cannot be traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from g3dswap.calls import merge_functional
from g3dswap.discover import find, observe
from g3dswap.entries import Functional
from g3dswap.guard import Inputs, example
from g3dswap.trace import trace
from tests.fakes import Block, Net

X = torch.zeros(2, 4, 5, 5, 5)


def conv(**arguments: Any) -> nn.Conv3d:
    return nn.Conv3d(4, 4, **{"kernel_size": 3, "groups": 2, **arguments})


def reached(
    model: nn.Module, inputs: Inputs | None = None
) -> tuple[set[str], list[Functional], dict[str, str]]:
    """Names of the layers that a trace reaches, functional calls, untraced parts."""
    _, _, known = find(model)
    result = trace(model, known, inputs)
    names = {known[key] for key in result.reached}
    return names, result.functional, {item.name: item.reason for item in result.untraced}


def test_trace_reaches_all_layers_and_leaves_no_mark() -> None:
    model = Net()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    names, functional, untraced = reached(model)
    assert names == {"layers.0.conv2", "layers.1.conv2", "down"}
    assert not functional and not untraced
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


class Branches(nn.Module):
    """A layer for training, one for inference, one for neither."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.train_only, self.eval_only, self.never = (conv() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.train_only(x) if self.training else self.eval_only(x)


@pytest.mark.parametrize("training", [True, False])
def test_trace_sees_both_modes(training: bool) -> None:
    model = Branches().train(training)
    names, _, _ = reached(model)
    assert names == {"always", "train_only", "eval_only"}
    assert all(module.training is training for module in model.modules())


class Router(nn.Module):
    """Control flow on a value: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Block(4), conv()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.left(x)
        return self.right(x)


class Around(nn.Module):
    """A traceable model around a part that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.last, self.unused = conv(), Router(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.router(self.first(x)))


def test_part_that_cannot_be_traced_falls_back_alone() -> None:
    names, _, untraced = reached(Around())
    assert names == {"first", "last", "router.left.conv2", "router.right"}
    assert list(untraced) == ["router"]
    assert "symbolically traced variables cannot be used as inputs to control flow" in untraced["router"]
    assert f"({__file__}:" in untraced["router"]


def test_root_that_cannot_be_traced() -> None:
    _, _, known = find(model := Router())
    result = trace(model, known)
    assert result.reached == set(known)
    assert [(item.name, item.layers) for item in result.untraced] == [("(model)", 1)]


class Unpacks(nn.Module):
    """The caller of an opaque part needs its length: both become opaque, for their own reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Router()
        self.outer = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.stack(list(self.inner(x))))


def test_opaque_parts_nest() -> None:
    names, _, untraced = reached(nn.Sequential(Unpacks()))
    assert names == {"0.inner.left.conv2", "0.inner.right", "0.outer"}
    assert set(untraced) == {"0", "0.inner"}


class NoForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([Net(), conv()])


def test_module_without_forward_is_a_container() -> None:
    names, _, untraced = reached(NoForward())
    assert names == {"net.0.layers.0.conv2", "net.0.layers.1.conv2", "net.0.down", "net.1"}
    assert not untraced


class Optional_(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.masked = conv(), conv()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return self.masked(x * mask)
        return self.plain(x)


def test_optional_arguments_are_traced_as_they_are_passed() -> None:
    model = Optional_()
    assert reached(model)[0] == {"plain"}
    assert reached(model, example(model, X, {"mask": X}))[0] == {"masked"}
    assert reached(model, example(model, (X, X), None))[0] == {"masked"}


class Functions(nn.Module):
    """Convolutions that are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3, 3, 3))
        self.plain = nn.Parameter(torch.randn(4, 4, 1, 1, 1))
        self.layer = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv3d(x, self.plain)  # one group: of no interest
        x = F.conv3d(x, self.weight, None, 1, 1, 1, 2)  # MARK
        return self.layer(x)


SOURCE = Path(__file__).read_text().splitlines()
LINE = next(number for number, text in enumerate(SOURCE, 1) if text.endswith("# MARK"))


def test_functional_calls_are_reported_with_their_place() -> None:
    _, functional, _ = reached(nn.Sequential(Functions()))
    assert functional == [Functional("0", "conv3d", 2, f"{__file__}:{LINE}")]


def test_functional_calls_get_their_shape_from_a_run() -> None:
    model = nn.Sequential(Functions())
    sites, _, _ = find(model)
    shapes = observe(model, sites, Inputs((X,), {}))
    wanted = Functional("0", "conv3d", 2, f"{__file__}:{LINE}", tuple(X.shape))
    assert shapes.functional == [wanted]
    assert merge_functional(reached(model)[1], shapes.functional) == [wanted]


def test_functional_calls_of_untraceable_parts_are_seen_by_a_run() -> None:
    class Hidden(Functions):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            return super().forward(x)

    model = Hidden()
    shapes = observe(model, find(model)[0], Inputs((X,), {}))
    assert [item.shape for item in merge_functional(reached(model)[1], shapes.functional)] == [tuple(X.shape)]


def test_groups_that_depend_on_the_input() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.ones(4, 1, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv3d(x, self.kernel, groups=x.shape[1])  # type: ignore[arg-type]

    model = Depthwise()
    _, traced, _ = reached(model)
    assert [item.groups for item in traced] == [0]
    shapes = observe(model, [], Inputs((X,), {}))
    assert [item.groups for item in merge_functional(traced, shapes.functional)] == [4]


def test_graph_module_is_traced_like_any_other() -> None:
    graph = fx.symbolic_trace(Net())
    assert reached(graph)[0] == {"layers.0.conv2", "layers.1.conv2", "down"}
