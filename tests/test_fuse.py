"""Fused inference: what is fused and what is not, what a fused model does and refuses, and the way back."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from g3dswap.convert import convert, inspect, revert
from g3dswap.errors import ArgumentError, FusedError
from g3dswap.fused import MARK, Fused, Fused3D, Fused3DTranspose, Fusion, fold
from g3dswap.module import Grouped3D
from g3dswap.plan import save_plan
from g3dswap.problem import ACTIVATIONS
from g3dswap.report import Report, report
from g3dswap.verify import verify
from tests.fakes import FakeChooser, Wrong, faked

X = torch.randn(2, 4, 4, 6, 6, generator=torch.Generator().manual_seed(0))
MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "hardswish": nn.Hardswish,
}
EXACT = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def chooser(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChooser]:
    with faked(monkeypatch) as fake:
        yield fake


def norm(channels: int = 8, **arguments: Any) -> nn.BatchNorm3d:
    """A batch norm as of a trained network."""
    module = nn.BatchNorm3d(channels, **arguments)
    values = {"running_mean": (-1, 1), "running_var": (0.3, 2), "weight": (0.5, 1.5), "bias": (-1, 1)}
    for name, (low, high) in values.items():
        item = getattr(module, name)
        if item is not None:
            nn.init.uniform_(item, low, high)
    return module


def conv(transposed: bool = False, **arguments: Any) -> Any:
    kind = nn.ConvTranspose3d if transposed else nn.Conv3d
    return kind(4, 8, **{"kernel_size": 3, "padding": 1, "groups": 2, **arguments})


class Block(nn.Module):
    """A grouped convolution, a batch norm and an activation, which subclasses put to other uses."""

    def __init__(self, activation: nn.Module | None = None, **arguments: Any) -> None:
        super().__init__()
        self.conv: Any = conv(**arguments)
        self.norm: Any = norm()
        self.act: Any = nn.ReLU() if activation is None else activation
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


def fused(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fused)]


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x.clone())
        return y


def same(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().double().norm() / b.detach().double().norm()) < EXACT[b.dtype]


# What a fused model computes


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_norm_and_an_activation_go_into_the_layer(
    activation: str, transposed: bool, chooser: FakeChooser
) -> None:
    model = Block(MODULES[activation](), transposed=transposed)
    fast: Any = convert(model, X, fuse=True)
    assert type(fast) is Block and [name for name, _ in fast.named_modules()] == ["", "conv", "norm", "act"]
    assert type(fast.conv) is (Fused3DTranspose if transposed else Fused3D)
    assert type(fast.norm) is type(fast.act) is nn.Identity and not fast.norm.training
    assert same(outputs(fast), outputs(model))
    (problem,) = {problem for problem, _, _ in chooser.asked}
    assert (problem.layer_pass, problem.activation, problem.bias) == ("forward", activation, True)
    (row,) = report(fast).fused
    assert (row.name, row.norm, row.activation, row.kind) == ("conv", "norm", "act", activation)
    assert not report(fast).unfused and report(fast).swapped[0].verified


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("transposed", "bias", "affine", "groups"), [*itertools.product(*[[False, True]] * 3, [2, 4])]
)  # fmt: skip
def test_folding(transposed: bool, bias: bool, affine: bool, groups: int, dtype: torch.dtype) -> None:
    layer = conv(transposed, bias=bias, groups=groups).to(dtype, memory_format=torch.channels_last_3d)
    follows = norm(affine=affine, eps=0.1).to(dtype).eval()
    weight, shift = fold(layer, follows)
    assert weight.dtype == shift.dtype == dtype and weight.shape == layer.weight.shape
    assert weight.stride() == layer.weight.stride() and shift.shape == (8,)
    x = X.double()
    want = copy.deepcopy(follows).double()(copy.deepcopy(layer).double()(x))
    function: Any = F.conv_transpose3d if transposed else F.conv3d
    got = function(x, weight.double(), shift.double(), padding=1, groups=groups)
    assert same(got.to(dtype), want.to(dtype))


def test_only_a_norm_and_only_an_activation() -> None:
    model = nn.Sequential(conv(), norm(), nn.Tanh(), nn.Conv3d(8, 8, 3, groups=4), nn.SiLU()).eval()
    fast: Any = convert(model, X, fuse=True)
    assert fused(fast) == ["0", "3"] and [fast[0].activation, fast[3].activation] == ["", "silu"]
    assert type(fast[2]) is nn.Tanh and same(outputs(fast), outputs(model))
    assert list(fast.state_dict()) == ["0.weight", "0.bias", f"0.{MARK}", "3.weight", "3.bias"]
    (row,) = report(fast).unfused
    assert (row.name, row.reason) == ("0", "2 (Tanh) after 1 is not an activation that a kernel applies")


def test_an_identity_in_between_is_passed_unless_somebody_listens_there() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(conv(), nn.Identity(), norm(), nn.Identity(), nn.Identity(), nn.ReLU()).eval()

    fast = convert(model(), X, fuse=True)
    assert (report(fast).fused[0].norm, report(fast).fused[0].activation) == ("2", "5")
    hooked = model()
    hooked[4].register_forward_hook(lambda *_: None)
    assert report(convert(hooked, X, fuse=True)).fused[0].activation == ""
    assert [type(m) for m in revert(fast).modules()] == [type(m) for m in hooked.modules()]


def test_without_inputs_and_on_layers_that_were_converted_before() -> None:
    model = Block()
    later: Any = convert(model, fuse=True)
    assert fused(later) == ["conv"] and same(outputs(later), outputs(model))
    once: Any = convert(model, X)
    assert type(once.conv) is Grouped3D
    twice: Any = convert(once, X, fuse=True)
    assert fused(twice) == ["conv"] and same(outputs(twice), outputs(model))
    again: Any = convert(twice, X, fuse=True)
    assert type(again.norm) is nn.Identity and report(again).fused == report(twice).fused
    assert same(outputs(again), outputs(model)) and not report(again).unfused
    assert type(revert(again).get_submodule("conv")) is nn.Conv3d


def test_inputs_of_all_layouts_padding_modes_and_without_a_batch() -> None:
    model = Block(padding_mode="circular", stride=2)
    fast = convert(model, X.contiguous(memory_format=torch.channels_last_3d), fuse=True)
    for x in (X, X.contiguous(memory_format=torch.channels_last_3d), X[:0], X.expand(3, 2, 4, 4, 6, 6)[0]):
        assert outputs(fast, x).shape == outputs(model, x).shape
        assert not x.numel() or same(outputs(fast, x), outputs(model, x))
    single = nn.Sequential(conv(), nn.GELU()).eval()  # which, without a batch norm, may be unbatched
    assert same(outputs(convert(single, X[0], fuse=True), X[0]), outputs(single, X[0]))


# What is not fused


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x)


class ActTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x) - 1)


class NormTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.norm(torch.cat([x, x], 1))


class SeesConv(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(self.norm(y)) + y


class SeesNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.act(y) + y


class Functional(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Method(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Added(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + 1


class Last(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Reads(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.norm.weight.view(-1, 1, 1, 1)


class Untraceable(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return self.norm(x)
        return super().forward(x)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class Borrows(nn.Module):
    """Traced as one call, and uses a layer of another module."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.others = [other]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 if x.sum() > 1e9 else self.others[0](x * 0).mean())


class Lender(Block):
    def __init__(self) -> None:
        super().__init__()
        self.borrows = Borrows(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.borrows(super().forward(x))


def changed(change: Callable[[Any], Any]) -> Block:
    model = Block()
    change(model)
    return model


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def _instance_forward(model: Any) -> None:
    model.norm.forward = nn.BatchNorm3d.forward.__get__(model.norm)


NOT_FUSED: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    # A model, the reason that the report gives, and whether its norm is folded all the same.
    "conv called twice": (Twice, r"conv is called at 2 places", False),
    "norm called twice": (NormTwice, r"norm is called at 2 places", False),
    "act called twice": (ActTwice, r"act is called at 2 places", True),
    "conv seen": (SeesConv, r"the result of conv is used at 2 places", False),
    "norm seen": (SeesNorm, r"the result of norm is used at 2 places", True),
    "F.relu": (Functional, r"F\.relu after norm is a function, and only modules \(nn\.ReLU\(\)\)", True),
    "x.relu()": (Method, r"\.relu\(\) after norm is a function, and only modules", True),
    "added to": (Added, r"conv is followed by add", False),
    "returned": (Last, r"the result of conv is the model's", False),
    "parameters read": (Reads, r"the forward reads the parameters of norm itself", False),
    "root untraceable": (Untraceable, r"cannot trace the model's forward \(symbolically traced", False),
    "part untraceable": (
        lambda: Outer(Untraceable()), r"inner\.conv is in inner, which torch\.fx cannot look into", False
    ),
    "used by a part": (Lender, r"norm is in borrows, which torch\.fx cannot look into", False),
    "conv hooked": (
        lambda: changed(lambda m: m.conv.register_forward_hook(lambda *_: None)), "conv has hooks", False
    ),
    "norm hooked": (
        lambda: changed(lambda m: m.norm.register_forward_pre_hook(lambda *_: None)), "norm has hooks", False
    ),
    "act hooked": (
        lambda: changed(lambda m: m.act.register_full_backward_hook(lambda *_: None)), "act has hooks", True
    ),
    "norm in train mode": (lambda: changed(lambda m: m.norm.train()), "norm is in train mode", False),
    "conv in train mode": (lambda: changed(lambda m: m.conv.train()), "conv is in train mode", False),
    "no running statistics": (
        lambda: changed(lambda m: setattr(m, "norm", nn.BatchNorm3d(8, track_running_stats=False).eval())),
        r"norm has no running statistics \(track_running_stats=False\)", False,
    ),
    "parametrized": (
        lambda: changed(lambda m: parametrize.register_parametrization(m.norm, "weight", Doubled().eval())),
        r"norm \(ParametrizedBatchNorm3d\) after conv is not a BatchNorm3d or such", False,
    ),
    "forward replaced": (lambda: changed(_instance_forward), "the forward of norm is replaced", False),
    "another norm": (
        lambda: changed(lambda m: setattr(m, "norm", nn.GroupNorm(2, 8).eval())),
        r"norm \(GroupNorm\) after conv is not a BatchNorm3d or such an activation", False,
    ),
    "another activation": (
        lambda: changed(lambda m: setattr(m, "act", nn.ReLU6())), r"act \(ReLU6\) after norm is not an", True
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_may_not_be_fused_is_not_and_the_report_says_why(case: str) -> None:
    build, reason, folded = NOT_FUSED[case]
    model = build()
    want = outputs(copy.deepcopy(model))
    fast = convert(model, X, fuse=True)
    assert bool(fused(fast)) == folded == bool(report(fast).fused)
    (row,) = report(fast).unfused
    assert re.search(reason, row.reason), row.reason
    assert same(outputs(fast), want)
    kinds = [type(module) for module in model.modules()]
    assert sum(type(module) is nn.Identity for module in fast.modules()) == folded
    assert [type(module) for module in model.modules()] == kinds


def test_weights_that_would_overflow_are_not_folded() -> None:
    model = Block().half()
    model.norm.weight.data.fill_(6e4)
    fast = convert(model, X.half(), fuse=True, verify=False)
    assert not fused(fast)
    assert report(fast).unfused[0].reason == "the weights with norm folded in are not finite in float16"


def test_on_the_meta_device_only_activations_are_fused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(conv(), nn.BatchNorm3d(8), nn.ReLU(), conv(), nn.SiLU()).eval()
    model[3] = nn.Conv3d(8, 8, 3, groups=2, device="meta").eval()
    fast = convert(model, fuse=True)
    assert fused(fast) == ["3"]
    assert report(fast).unfused[0].reason == "1 is on the meta device, without values to fold"


def test_the_model_has_to_be_in_eval_mode() -> None:
    with pytest.raises(
        ArgumentError, match=r"fuse=True is for inference, and the model is in train mode; call"
    ):
        convert(Block().train(), X, fuse=True)


def test_layers_that_are_kept_are_not_fused(chooser: FakeChooser) -> None:
    chooser.native = lambda problem: True
    alone = nn.Sequential(conv(), nn.ReLU()).eval()
    kept = convert(alone, X, fuse=True)
    assert not fused(kept) and type(kept.get_submodule("1")) is nn.ReLU
    assert report(kept).unfused[0].reason == "the convolution is kept as it was" and not report(kept).fused
    # Without its batch norm a layer is faster by PyTorch's kernel too.
    model = Block()
    fast = convert(model, X, fuse=True)
    assert fused(fast) == ["conv"] and same(outputs(fast), outputs(model))
    assert report(fast).swapped[0].calls[0].passes[0].native
    excluded = convert(model, X, fuse=True, exclude="conv")
    assert not fused(excluded) and type(excluded.get_submodule("norm")) is nn.BatchNorm3d


def test_a_layer_that_fails_its_check_is_put_back(chooser: FakeChooser) -> None:
    chooser.candidate = Wrong
    model = Block()
    fast = convert(model, X, fuse=True)
    assert not fused(fast) and torch.equal(outputs(fast), outputs(model))
    assert "compute something else" in report(fast).kept[0].reason
    assert fused(convert(model, X, fuse=True, verify=False)) == ["conv"]


# Training, gradients, checkpoints


def test_a_call_in_train_mode_is_refused_and_revert_is_the_way_out() -> None:
    model = Block()
    fast = convert(model, X, fuse=True).train()
    with pytest.raises(
        FusedError, match=r"fused for inference is called in train mode; g3dswap\.revert\(model\)"
    ):
        fast(X)
    fast.eval()
    assert same(outputs(fast), outputs(model))
    back = revert(fast.train())
    assert all(module.training for module in back.modules())
    torch.testing.assert_close(back(X), model.train()(X))


def test_gradients_are_right_or_refused() -> None:
    model: Any = Block(nn.GELU()).double()
    fast: Any = convert(model, X.double(), fuse=True)
    module: Any
    for module in (model, fast):
        module.x = X.double().requires_grad_()
        module(module.x).square().sum().backward()
    assert same(fast.x.grad, model.x.grad)
    assert fast.conv.weight.grad is fast.conv.bias.grad is None and not fast.conv.weight.requires_grad
    fast.requires_grad_()
    with pytest.raises(FusedError, match=r"batch norm was folded into cannot be trained; g3dswap\.revert"):
        fast(X.double())
    assert same(outputs(fast, X.double()), outputs(model, X.double()))
    alone = nn.Sequential(conv(), nn.SiLU()).eval().double()
    whole: Any = convert(alone, X.double(), fuse=True)
    for module in (alone, whole):
        module(X.double()).square().sum().backward()
    assert isinstance(whole[0], Fused)
    for ours, theirs in zip(whole.parameters(), alone.parameters()):
        assert ours.grad is not None and theirs.grad is not None and same(ours.grad, theirs.grad)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_without_fusion_does_not_load(strict: bool) -> None:
    model = Block()
    fast = convert(model, X, fuse=True)
    before = outputs(fast)
    message = r"conv\.weight comes from a model without fusion, and no batch norm is folded into it; load it"
    with pytest.raises(RuntimeError, match=message):
        fast.load_state_dict(Block().state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=message):
        fast.load_state_dict({"conv.weight": model.conv.weight}, strict=False)
    assert torch.equal(outputs(fast), before)
    fast.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match=r'Missing key.*"norm\.weight"'):
        model.load_state_dict(fast.state_dict())
    alone = nn.Sequential(conv(), nn.SiLU()).eval()  # its weights are what they were
    convert(alone, X, fuse=True).load_state_dict(alone.state_dict())


def test_a_fused_checkpoint_loads_into_a_fused_model_which_cannot_go_back_then() -> None:
    model, other = Block(), Block()
    fast, target = convert(model, X, fuse=True), convert(other, X, fuse=True)
    fast.load_state_dict(fast.state_dict())
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file))
    assert torch.equal(outputs(target), outputs(fast))
    with pytest.raises(
        FusedError, match=r"Weights were loaded into a fused layer, and those that they were folded"
    ):
        revert(target)
    assert torch.equal(outputs(target), outputs(fast)) and report(target).fused
    assert same(outputs(revert(fast)), outputs(model))


# The way back


def test_revert_brings_back_the_very_modules_and_parameters() -> None:
    model = Block()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    fast = convert(model, X, fuse=True, inplace=True)
    assert fast is model and fused(model) == ["conv"]
    assert not {*map(id, parameters.values())} & {*map(id, model.parameters())}
    back = revert(model)
    assert {name: id(item) for name, item in back.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert back.get_submodule("norm") is modules["norm"] and back.get_submodule("act") is modules["act"]
    assert type(back.get_submodule("conv")) is nn.Conv3d
    assert list(back.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())
    assert all(item.requires_grad for item in back.parameters())
    with pytest.raises(ArgumentError, match="was not converted"):
        report(back)


def test_what_was_fused_moves_with_the_model() -> None:
    fast = convert(Block(), X, fuse=True).double().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    assert fast.conv.weight.dtype == torch.float64
    back = revert(copy.deepcopy(fast))
    assert {item.dtype for item in back.state_dict().values()} == {torch.float64, torch.int64}
    assert same(outputs(fast, X.double()).float(), outputs(back, X.double()).float())
    assert same(outputs(revert(fast), X.double()), outputs(back, X.double()))


def test_a_part_of_a_fused_model_cannot_go_back_alone() -> None:
    fast: Any = convert(Outer(Block()), X, fuse=True)
    with pytest.raises(ArgumentError, match=r"fused with others outside of it; revert the whole model"):
        revert(fast.inner.conv)
    with pytest.raises(ArgumentError, match=r"A fused layer is no Conv3d; g3dswap\.revert"):
        fast.inner.conv.to_conv()
    assert fused(fast) == ["inner.conv"]
    assert type(revert(fast.inner)) is Block and not fused(fast)


def test_shared_parameters_stay_with_those_who_share_them() -> None:
    class Tied(Block):
        def __init__(self) -> None:
            super().__init__()
            self.other: Any = conv().eval()
            self.other.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.other(x)

    model = Tied()
    fast: Any = convert(model, X, fuse=True)
    assert fused(fast) == ["conv"] and same(outputs(fast), outputs(model))
    back: Any = revert(copy.deepcopy(fast))
    assert back.conv.weight is back.other.weight


# What else is done with models


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_work_and_can_go_back(how: str) -> None:
    model = Outer(Block(nn.Hardswish()))
    fast = convert(model, X, fuse=True)
    if how == "deepcopy":
        other = copy.deepcopy(fast)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fast))
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(outputs(other), outputs(fast)) and report(other).fused == report(fast).fused
    back = revert(other)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(outputs(back), outputs(model)) and fused(fast) == ["inner.conv"]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_compiler_and_export_take_a_fused_model_whole(transposed: bool) -> None:
    model = Block(nn.SiLU(), transposed=transposed)
    fast = convert(model, X, fuse=True)
    torch._dynamo.reset()
    compiled: Any = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert same(outputs(compiled), outputs(model))
    x = X.clone().requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        program = torch.export.export(fast, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.g3dswap.conv3d.default]
    assert "silu" in calls[0].args
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert same(outputs(loaded, torch.cat([X, X])), outputs(model, torch.cat([X, X])))


def test_autocast_and_threads() -> None:
    model = Block()
    fast = convert(model, X, fuse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert outputs(fast).dtype == torch.bfloat16 and same(outputs(fast), outputs(model).bfloat16())


# Reports, plans, verification


def test_verify_compares_the_outputs_of_fused_models() -> None:
    model = Block()
    fast = convert(model, X, fuse=True)
    found = verify(model, fast, X)
    assert found.ok and [item.name for item in found.tensors] == ["output"]
    assert "1 outputs against float64" in str(found)
    fast.get_submodule("conv").bias.data[0] += 1e-4  # type: ignore[index,operator]
    assert not verify(model, fast, X).ok
    assert verify(fast, copy.deepcopy(fast), X).ok
    with pytest.raises(ArgumentError, match=r"before is in train mode and after in eval mode"):
        verify(copy.deepcopy(model).train(), fast, X)


def test_the_report_survives_json_and_older_ones_are_read() -> None:
    fast = convert(nn.Sequential(Block()).eval(), X, fuse=True)
    data = json.loads(json.dumps(report(fast).to_dict()))
    assert Report.from_dict(data) == report(fast)
    text = str(report(fast))
    assert "Fused for inference" in text and "0.norm (batch norm, in its weights), 0.act (relu, in" in text
    del data["fused"], data["unfused"]
    assert Report.from_dict(data).fused == []
    assert not report(convert(Block(), X)).unfused and not inspect(Block()).fused
    model = Outer(Block(nn.Tanh()))
    assert "Not, or not further, fused" in str(report(convert(model, X, fuse=True)))


def test_a_plan_repeats_a_fused_conversion(tmp_path: Path, chooser: FakeChooser) -> None:
    model = Block()
    save_plan(convert(model, X, fuse=True), tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [choice["problem"]["activation"] for choice in plan["choices"]] == ["relu"]
    again = convert(model, plan=tmp_path / "plan.json", fuse=True)
    assert fused(again) == ["conv"] and same(outputs(again), outputs(model))
    assert report(again).swapped[0].calls[0].passes[0].direction == "forward"


def test_a_fusion_of_nothing_is_false() -> None:
    assert not Fusion() and not Fusion(reason="x") and Fusion(norm=norm()) and Fusion(activation=nn.ReLU())
