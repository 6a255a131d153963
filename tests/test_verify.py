"""Whole models against float64, and one layer against float64."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g3dswap.discover import Meeting
from g3dswap.errors import ArgumentError, ConvertError, VerificationError
from g3dswap.layercheck import check_layer
from g3dswap.replay import Record, Replay
from g3dswap.verify import Verification, verify
from tests.fakes import Net

X = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class OtherRounding(nn.Conv3d):
    """The same convolution (of padding 1), summed in another order."""

    def forward(self, input: Tensor) -> Tensor:
        swapped = self.weight.flip(2, 3, 4)
        image = F.pad(input, [1] * 6)
        out = F.conv3d(image.flip(2, 3, 4), swapped, self.bias, 1, 0, 1, self.groups).flip(2, 3, 4)
        return out[:, :, :: self.stride[0], :: self.stride[1], :: self.stride[2]]


class Off(nn.Conv3d):
    """A convolution with a small error in its output."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return out + 1e-4 * out.roll(1, -1)  # no mere factor: a batch norm would hide it


class OffGradient(nn.Conv3d):
    """The right output, and a gradient of the weight that is a little off."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight + 1e-4 * (self.weight - self.weight.detach())
        return self._conv_forward(input, weight, self.bias)


def changed(model: nn.Module, kind: type[nn.Conv3d], name: str = "layers.1.conv2") -> nn.Module:
    other = copy.deepcopy(model)
    other.get_submodule(name).__class__ = kind
    return other


@pytest.mark.parametrize("training", [True, False])
def test_same_model_in_other_rounding_is_ok(training: bool) -> None:
    model = Net().train(training)
    other = changed(changed(model, OtherRounding), OtherRounding, "layers.0.conv2")
    result = verify(model, other, X)
    assert result.ok and result.check() is result
    names = [item.name for item in result.tensors]
    assert names[:2] == ["output", "grad input[0]"]
    assert set(names[2:]) == {f"grad {name}" for name, _ in model.named_parameters()}
    assert any(item.after != item.before for item in result.tensors)


@pytest.mark.parametrize(("kind", "worst"), [(Off, ""), (OffGradient, "grad layers.1.conv2.weight")])
def test_small_errors_are_found(kind: type[nn.Conv3d], worst: str) -> None:
    model = Net()
    result = verify(model, changed(model, kind), X)
    assert not result.ok
    assert result.worst.name == worst or not worst
    assert result.worst.ratio > 10
    if worst:
        assert [item.name for item in result.tensors if not item.ok] == [worst]
    with pytest.raises(VerificationError, match="tensors differ from float64 by more than the bound, the w"):
        result.check()


def test_models_are_left_untouched() -> None:
    model = Net()
    other = copy.deepcopy(model)
    before = [copy.deepcopy(item.state_dict()) for item in (model, other)]
    torch.manual_seed(5)
    random.seed(5)
    seeds = torch.get_rng_state(), random.getstate()
    value = X.clone()
    verify(model, other, value)
    for item, state in zip((model, other), before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in item.state_dict().items())
        assert all(parameter.grad is None for parameter in item.parameters())
    assert torch.equal(seeds[0], torch.get_rng_state()) and seeds[1] == random.getstate()
    assert torch.equal(value, X) and not value.requires_grad


class Kinks(nn.Module):
    """An activation whose inputs are zero but for rounding: each run is on another side of the kink."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv3d(8, 8, 3, padding=1, groups=4, bias=False)
        with torch.no_grad():
            self.conv.weight[:, 1] = -self.conv.weight[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat_interleave(2, 1)
        return self.activation(self.conv(x)) + x


@pytest.mark.parametrize(
    "activation",
    [F.relu, lambda x: F.relu(x, inplace=True), lambda x: torch.clamp(x, min=0), F.leaky_relu, Tensor.relu],
)
def test_a_flipped_relu_is_no_error(activation: Callable[[Tensor], Tensor]) -> None:
    model = Kinks(activation)
    other = changed(model, OtherRounding, "conv")
    result = verify(model, other, torch.randn(2, 4, 5, 5, 5))
    assert result.ok, str(result)
    # And not because the bound is loose: flips change the gradient by a large part of it.
    assert max(item.bound for item in result.tensors) < 1e-5


def test_replay_takes_derivatives_where_the_record_was() -> None:
    exact = torch.tensor([1e-12, -1e-12, 2.0, -2.0], dtype=torch.float64)
    with Record(torch.float32) as record:
        F.relu(exact)
        F.max_pool1d(exact.view(1, 1, 4), 2)
    other = torch.tensor([-1e-9, 1e-9, 2.0, -2.0], requires_grad=True)
    with Replay(record):
        F.relu(other).sum().backward()
        assert other.grad is not None and other.grad.tolist() == [1, 0, 1, 0]
        again = other.detach().requires_grad_()
        values = F.max_pool1d(again.view(1, 1, 4), 2)
        values.sum().backward()
    assert again.grad is not None and again.grad.tolist() == [1, 0, 1, 0]
    assert values.flatten().tolist() == pytest.approx([1e-9, 2.0])


def test_replay_of_a_parametric_slope() -> None:
    slope = torch.full((1,), 0.25, requires_grad=True)
    exact = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    with Record(torch.float32) as record:
        F.prelu(exact, slope.detach().double())
    value = exact.float().requires_grad_()
    with Replay(record):
        F.prelu(value, slope).sum().backward()
    assert value.grad is not None and value.grad.tolist() == [[1.0, 0.25]]
    assert slope.grad is not None and slope.grad.tolist() == [-4.0]


def test_replay_gives_up_where_the_runs_part() -> None:
    with Record(torch.float32) as record:
        F.relu(torch.zeros(3, dtype=torch.float64))
    value = torch.tensor([1.0, -1.0], requires_grad=True)
    with Replay(record):
        F.relu(value).sum().backward()
    assert value.grad is not None and value.grad.tolist() == [1, 0]


class Dropouts(nn.Module):
    """Every common way to draw a random mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 8, 3, groups=4)
        self.drop, self.drop3d = nn.Dropout(0.3), nn.Dropout3d(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop3d(self.drop(self.conv(x)))
        x = F.dropout(x, 0.1, inplace=True)
        path = x.new_empty(x.shape[0], 1, 1, 1, 1).bernoulli_(0.5)
        noise = torch.rand_like(x) + torch.randn(x.shape, dtype=x.dtype)
        return x * path + noise * random.random()


def test_random_numbers_are_the_same_in_float64() -> None:
    model = Dropouts()
    result = verify(model, copy.deepcopy(model), torch.randn(3, 4, 5, 5, 5))
    assert result.ok
    assert max(item.before for item in result.tensors) < 1e-5


@dataclass
class Output:
    main: Tensor
    aux: dict[str, Any]


class Structured(nn.Module):
    def __init__(self, fail_backward: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, groups=4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, *, scale: Tensor) -> Any:
        y = self.conv(x) * scale
        return (Output(y, {"sum": y.sum(), "index": y.argmax(), "text": "t"}), [x * 2])


def test_structured_outputs_and_inputs() -> None:
    model = Structured()
    inputs = {"x": torch.randn(1, 4, 4, 4, 4), "scale": torch.ones(())}
    result = verify(model, copy.deepcopy(model), inputs)
    assert [item.name for item in result.tensors] == [
        "output[0].main",
        "output[0].aux['sum']",
        "output[1][0]",
        "grad input['x']",
        "grad input['scale']",
        "grad conv.weight",
        "grad conv.bias",
    ]
    assert result.ok
    data = json.loads(json.dumps(result.to_dict()))
    assert data["ok"] is True and len(data["tensors"]) == 7


def test_example_kwargs() -> None:
    model = Structured()
    assert verify(model, model, torch.randn(1, 4, 4, 4, 4), example_kwargs={"scale": torch.ones(())}).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv3d(4, 4, 3, groups=2), nn.GELU()).to(dtype)
    result = verify(model, copy.deepcopy(model), torch.randn(1, 4, 5, 5, 5).to(dtype))
    assert result.ok
    assert result.worst.bound >= torch.finfo(dtype).eps / 2
    assert not verify(model, changed(model, HalfPercent, "0"), torch.randn(1, 4, 5, 5, 5).to(dtype)).ok


class HalfPercent(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.05


def test_vanishing_gradients_are_measured_against_the_others() -> None:
    # The bias before a batch norm has no effect: its gradient is rounding and nothing else.
    layers = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.SiLU(), nn.Conv3d(8, 8, 3, 1, 1, groups=4)
    model = nn.Sequential(*layers)
    result = verify(model, changed(model, OtherRounding, "3"), X)
    (bias,) = [item for item in result.tensors if item.name == "grad 0.bias"]
    assert result.ok and bias.before < 10
    # A bias whose gradient does not vanish has a bound like the others'.
    (real,) = [item for item in result.tensors if item.name == "grad 3.bias"]
    assert real.bound < 1e-5


def test_frozen_model_and_no_grad() -> None:
    model = Net().requires_grad_(False)
    with torch.no_grad():
        names = [item.name for item in verify(model, copy.deepcopy(model), X).tensors]
    assert names == ["output", "grad input[0]"]


def test_table() -> None:
    model = Net()
    text = str(verify(model, changed(model, Off), X))
    assert text.startswith("g3dswap verification FAILED: ")
    assert "| output" in text and "FAILED |" in text
    assert max(map(len, text.splitlines()[1:])) <= 80 and text.isascii()
    assert str(verify(model, model, X)).startswith("g3dswap verification ok: ")


class Wants32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 3, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.float())


class Fails(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of luck\nand more")


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "nothing"


@pytest.mark.parametrize(
    ("before", "after", "inputs", "error", "message"),
    [
        (3, nn.ReLU(), X, ArgumentError, "verify() takes two torch.nn.Modules; before is an int."),
        (nn.ReLU(), None, X, ArgumentError, "verify() takes two torch.nn.Modules; after is a NoneType."),
        (nn.ReLU(), nn.ReLU(), None, ArgumentError, "verify() needs example_inputs: what the model's"),
        (
            nn.Conv3d(3, 3, 1),
            nn.Conv3d(3, 3, 2),
            X,
            ArgumentError,
            "before and after are not the same model: their parameter 'weight' differs in name or shape;",
        ),
        (
            nn.ReLU(),
            nn.ReLU().eval(),
            X,
            ArgumentError,
            "before is in train mode and after in eval mode; put both in the same, with .train() or .eval().",
        ),
        (
            Wants32(),
            Wants32(),
            X,
            VerificationError,
            "which verify() needs as its reference; let its forward follow the dtype of its input",
        ),
        (Wants32(), Wants32(), X, VerificationError, "Wants32 cannot run in float64 (RuntimeError: "),
        (Nothing(), Nothing(), X, VerificationError, "Nothing.forward returned no floating-point tensor"),
    ],
)
def test_errors(before: Any, after: Any, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        verify(before, after, inputs)
    assert message in str(caught.value), caught.value


def test_after_that_fails() -> None:
    torch.manual_seed(0)
    model = Net()
    after = copy.deepcopy(model)
    after.__class__ = Fails
    with pytest.raises(ConvertError, match="Running the model 'after' on the example inputs raised Runtime"):
        verify(model, after, X)


def test_nan_is_a_failure() -> None:
    class NaN(nn.Conv3d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * float("nan")

    model = Net()
    result = verify(model, changed(model, NaN), X)
    assert not result.ok and isinstance(result, Verification)


# One layer


def meeting(dtype: torch.dtype = torch.float32, layout: str = "contiguous", **needs: bool) -> Meeting:
    grads: dict[str, Any] = {"grad_input": True, "grad_weight": True, **needs}
    return Meeting(3, (5, 6, 7), dtype, layout, torch.device("cpu"), **grads)


LAYERS: list[dict[str, Any]] = [
    {"groups": 2},
    {"groups": 4, "bias": False, "padding": 1, "stride": 2},
    {"groups": 4, "padding": "same", "dilation": (1, 2, 1), "kernel_size": (2, 3, 2)},
    {"groups": 2, "padding": 1, "padding_mode": "circular"},
]


@pytest.mark.parametrize("arguments", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_layer_that_is_right(arguments: dict[str, Any], dtype: torch.dtype, layout: str) -> None:
    conv = nn.Conv3d(4, 8, **{"kernel_size": 3, **arguments})
    seen: list[nn.Conv3d] = []

    def swap(layer: nn.Conv3d) -> nn.Conv3d:
        seen.append(layer)
        return layer

    assert check_layer(conv, meeting(dtype, layout), swap, {}) is None
    assert seen[0] is not conv and seen[0].weight.dtype == dtype
    assert conv.weight.grad is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Off, "forward has a relative error of 0.0001, "),
        (OffGradient, "grad-weight has a relative error of 0.0001, "),
    ],
)
def test_layer_that_is_wrong(kind: type[nn.Conv3d], message: str) -> None:
    def swap(layer: nn.Conv3d) -> nn.Conv3d:
        layer.__class__ = kind
        return layer

    found = check_layer(nn.Conv3d(4, 8, 3, groups=2), meeting(), swap, {})
    assert found is not None and found.startswith(message) and found.endswith("is allowed")
    # What tuning allowed is allowed.
    bounds = {"forward": 1.0, "grad_input": 1.0, "grad_weight": 1.0, "grad_bias": 1.0}
    assert check_layer(nn.Conv3d(4, 8, 3, groups=2), meeting(), swap, bounds) is None


def test_layer_that_is_wrong_in_a_group_without_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneGroup(nn.Conv3d):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            return torch.cat([out[:, :1] * 1.01, out[:, 1:]], 1)

    def swap(layer: nn.Conv3d) -> nn.Conv3d:
        layer.__class__ = OneGroup
        return layer

    monkeypatch.setattr("g3dswap.workload.REFERENCE_FLOPS", {"cpu": 1.0})  # one group in float64
    assert check_layer(nn.Conv3d(64, 64, 3, groups=64), meeting(), swap, {}) is not None


def test_layer_check_runs_only_needed_passes_and_draws_nothing() -> None:
    state = torch.get_rng_state()

    def swap(layer: nn.Conv3d) -> nn.Conv3d:
        layer.__class__ = OffGradient
        return layer

    with torch.no_grad():
        needs = meeting(grad_weight=False)
        assert check_layer(nn.Conv3d(4, 8, 3, groups=2, device="meta"), needs, swap, {}) is None
    assert torch.equal(state, torch.get_rng_state())
