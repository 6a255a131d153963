"""Running a model without leaving a mark, and the forms of example inputs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g3dswap.discover import find, observe
from g3dswap.errors import ArgumentError, ConvertError
from g3dswap.guard import Inputs, example, map_tensors, named_tensors, untouched
from g3dswap.trace import trace

X = torch.zeros(2, 4, 5, 5, 5)


def conv(**arguments: Any) -> nn.Conv3d:
    return nn.Conv3d(4, 4, **{"kernel_size": 3, "groups": 2, **arguments})


class Messy(nn.Module):
    """Changes everything that a forward can change."""

    steps: Tensor

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.fail = fail
        self.layer = conv()
        self.norm = nn.BatchNorm3d(4, momentum=0.5)
        self.register_buffer("steps", torch.zeros(()))
        self.cache: dict[str, Tensor] = {}
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        self.norm.num_batches_tracked.add_(5)  # type: ignore[union-attr]
        self.cache["x"] = x
        self.seen.append(len(self.seen))
        self.last = x
        self.norm.eval()
        self.layer.weight.requires_grad_(False)
        x.add_(random.random() + float(numpy.random.rand()) + torch.rand(()).item())
        x = self.layer(F.dropout(self.norm(x)))
        torch.set_grad_enabled(False)
        if self.fail:
            raise RuntimeError("no such luck\nsecond line")
        return x


def state(model: nn.Module) -> list[Any]:
    """Everything about a model and the process that a run could change."""
    attributes = [
        (name, key, id(value), repr(value) if isinstance(value, (dict, list, bool)) else None)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    ]
    tensors = [
        (name, value.tolist(), value.requires_grad)
        for name, value in model.state_dict(keep_vars=True).items()
    ]
    seeds = [random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()]
    return [attributes, tensors, seeds, torch.is_grad_enabled()]


@pytest.mark.parametrize("fail", [False, True])
def test_run_leaves_the_model_untouched(fail: bool) -> None:
    model = Messy(fail)
    before, value = state(model), torch.ones(1, 4, 5, 5, 5)
    sites, _, _ = find(model)
    if fail:
        message = r"Messy\.forward raised on the example inputs \(RuntimeError: no such luck\); pass inputs"
        with pytest.raises(ConvertError, match=message):
            observe(model, sites, Inputs((value,), {}))
    else:
        (meetings,) = observe(model, sites, Inputs((value,), {})).meetings.values()
        assert [(item.batch, item.size) for item in meetings] == [(1, (5, 5, 5))]
    assert state(model) == before
    assert torch.equal(value, torch.ones_like(value))


def test_trace_leaves_the_model_untouched() -> None:
    model = Messy()
    before = state(model)
    trace(model, find(model)[2])
    assert state(model) == before


def test_untouched_keeps_versions_and_identity_of_buffers() -> None:
    model = nn.BatchNorm3d(4)
    mean = model.running_mean
    assert mean is not None
    version = mean._version
    with untouched(model):
        model(torch.randn(2, 4, 3, 3, 3))
        assert mean.abs().max() > 0
    assert model.running_mean is mean and mean.abs().max() == 0
    assert mean._version - version <= 1  # what the forward itself did, and nothing by the restoring


def test_untouched_restores_after_an_interrupt() -> None:
    model = nn.BatchNorm3d(4)
    with pytest.raises(KeyboardInterrupt), untouched(model):
        model.eval()
        model(torch.randn(2, 4, 3, 3, 3))
        raise KeyboardInterrupt
    assert model.training


class Pair(NamedTuple):
    a: Tensor
    b: int


@dataclass
class Batch:
    image: Tensor
    names: list[str] = field(default_factory=list)


class Takes(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None, *, flag: bool = False) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("inputs", "kwargs", "args", "keywords"),
    [
        (X, None, 1, set()),
        ((X, X), None, 2, set()),
        ([X, X], {"flag": True}, 2, {"flag"}),
        ({"x": X, "y": X}, None, 0, {"x", "y"}),
        (None, {"x": X}, 0, {"x"}),
        ({"x": X}, {"flag": True}, 0, {"x", "flag"}),
    ],
)
def test_forms_of_example_inputs(inputs: Any, kwargs: Any, args: int, keywords: set[str]) -> None:
    result = example(Takes(), inputs, kwargs)
    assert result is not None
    assert len(result.args) == args and set(result.kwargs) == keywords


def test_no_example_inputs() -> None:
    assert example(Takes(), None, None) is None


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ("x", None, "example_inputs is a str; it takes a tensor, a tuple or list of positional"),
        (X, 3, "example_kwargs is an int; it takes a dict from argument names to values."),
        ({"x": X}, {"x": X}, "The argument 'x' is in example_inputs and in example_kwargs; give it once."),
        ((), None, "example_inputs holds no tensor; pass what the model's forward takes."),
        ((1, 2), None, "example_inputs holds no tensor"),
        ((X, X, X), None, "example_inputs do not fit Takes.forward(x: 'Tensor', y: "),
        ({"z": X}, None, "argument: 'x'; to pass a dict as one argument wrap it in a tuple"),
        ({0: X}, None, "a dict with the key 0, and a dict is passed as keyword arguments; to pass"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        example(Takes(), inputs, kwargs)
    assert message in str(caught.value), caught.value


def test_structures_of_tensors() -> None:
    value = (Pair(X, 3), {"k": [X, "text"]}, Batch(X, ["n"]), None)
    names = [name for name, _ in named_tensors(value, "v")]
    assert names == ["v[0][0]", "v[1]['k'][0]", "v[2].image"]
    other = map_tensors(value, lambda tensor: tensor + 1)
    assert isinstance(other[0], Pair) and other[0].b == 3 and other[1]["k"][1] == "text"
    assert all(tensor.min() == 1 for _, tensor in named_tensors(other, "v"))
    assert X.max() == 0
