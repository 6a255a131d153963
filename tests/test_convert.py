"""Converting models: what is replaced, what is kept, and what stays the same."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from g3dswap.convert import convert, inspect, revert
from g3dswap.errors import ArgumentError, ConvertError
from g3dswap.guard import untouched
from g3dswap.module import Grouped3D
from g3dswap.report import ATTRIBUTE, report
from g3dswap.verify import verify
from g3dswap.workload import Candidate
from tests.fakes import Block, FakeChooser, Net, Wrong, faked

X = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
GROUPED = ["layers.0.conv2", "layers.1.conv2", "down"]


@pytest.fixture(autouse=True)
def chooser(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChooser]:
    with faked(monkeypatch) as fake:
        yield fake


def conv(**arguments: Any) -> nn.Conv3d:
    return nn.Conv3d(4, 4, **{"kernel_size": 3, "groups": 2, **arguments})


def swapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Grouped3D)]


# The same model


def test_only_matched_layers_are_replaced_in_a_copy() -> None:
    model = Net()
    before = {name: id(module) for name, module in model.named_modules()}
    fast = convert(model, X)
    assert type(fast) is Net and fast is not model and fast.extra() == "still here"
    assert swapped(fast) == GROUPED and not swapped(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert [name for name, _ in fast.named_modules()] == list(before)
    kinds = {name: type(module) for name, module in fast.named_modules() if name not in GROUPED}
    assert kinds == {name: type(module) for name, module in model.named_modules() if name not in GROUPED}
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(torch.equal(fast.state_dict()[name], value) for name, value in model.state_dict().items())
    assert not {id(item) for item in fast.parameters()} & {id(item) for item in model.parameters()}


def test_outputs_gradients_and_checkpoints_agree() -> None:
    model = Net()
    fast = convert(model, X)
    assert verify(model, fast, X).ok
    fast.load_state_dict(model.state_dict())
    Net().load_state_dict(fast.state_dict())


def test_inplace_keeps_the_parameter_objects() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = dict(model.named_parameters())
    fast = convert(model, X, inplace=True)
    assert fast is model and swapped(model) == GROUPED
    assert all(item is parameters[name] for name, item in model.named_parameters())
    before = model.down.weight.detach().clone()
    model(X).sum().backward()
    optimizer.step()
    assert not torch.equal(model.down.weight, before)


def test_everything_attached_to_a_layer_carries_over() -> None:
    first: Any = conv(bias=False)
    model = nn.Sequential(first, conv())
    calls: list[str] = []
    first.register_forward_hook(lambda *_: calls.append("forward"))
    first.register_forward_pre_hook(lambda *_: calls.append("pre"))
    first.register_full_backward_hook(lambda *_: calls.append("backward"))
    first.weight.requires_grad_(False)
    first.tag = "mine"
    first.eval()
    model.double().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    fast: Any = convert(model, torch.randn(1, 4, 6, 6, 6).double())
    layer = fast[0]
    assert isinstance(layer, Grouped3D) and layer.tag == "mine" and not layer.training
    assert not layer.weight.requires_grad and layer.weight.dtype == torch.float64
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)
    calls.clear()
    fast(torch.randn(1, 4, 6, 6, 6).double().requires_grad_()).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_shared_modules_get_one_replacement_and_shared_parameters_stay_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(padding=1)
            self.b = self.a
            self.c = conv(padding=1)
            self.c.weight = self.a.weight
            self.listed = [self.a, self.c]
            self.pair = (self.a, 3)
            self.table = {"c": self.c}

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.listed[0](x)))

    fast: Any = convert(Shared(), torch.randn(1, 4, 4, 4, 4))
    assert fast.a is fast.b and isinstance(fast.a, Grouped3D)
    assert fast.c is not fast.a and fast.c.weight is fast.a.weight
    assert fast.listed[0] is fast.a and fast.listed[1] is fast.c
    assert fast.pair == (fast.a, 3) and fast.table["c"] is fast.c
    (first, second) = report(fast).swapped
    assert (first.name, first.aliases, second.name) == ("a", ("b",), "c")


def test_converting_twice_changes_nothing() -> None:
    once = convert(Net(), X)
    modules = {name: id(module) for name, module in once.named_modules()}
    again = convert(once, X, inplace=True)
    assert again is once
    assert {name: id(module) for name, module in again.named_modules()} == modules
    assert report(again).swapped == report(once).swapped
    copied = convert(once, X)
    assert swapped(copied) == GROUPED and type(copied.get_submodule("down")) is Grouped3D


def test_second_conversion_gives_times_to_layers_without(chooser: FakeChooser) -> None:
    lazy = convert(Net())
    assert not report(lazy).swapped[0].calls
    tuned = convert(lazy, X, inplace=True)
    assert len(report(tuned).swapped[0].calls) == 1
    chooser.native = lambda problem: True  # and a layer that is swapped already is not put back
    assert swapped(convert(lazy, X, inplace=True)) == GROUPED


def test_root_that_is_a_layer() -> None:
    layer = conv()
    fast = convert(layer, torch.randn(1, 4, 5, 5, 5))
    assert type(fast) is Grouped3D and report(fast).swapped[0].name == "(model)"
    same = convert(layer, torch.randn(1, 4, 5, 5, 5), inplace=True)
    assert isinstance(same, Grouped3D) and same.weight is layer.weight
    assert type(revert(same)) is nn.Conv3d


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.Linear(4, 4)), nn.Conv3d(4, 4, 3)])
def test_nothing_to_do(model: nn.Module) -> None:
    fast = convert(model)
    assert not swapped(fast) and type(fast) is type(model)
    assert "nothing to swap" in str(report(fast))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    fast = convert(model, X)
    assert swapped(fast) == GROUPED and all(item.is_meta for item in fast.parameters())
    assert report(fast).swapped[0].note.startswith("on the meta device; chooses its kernels at its first")


def test_graph_module_stays_one() -> None:
    graph = fx.symbolic_trace(Net())
    fast = convert(graph, X)
    assert isinstance(fast, fx.GraphModule) and swapped(fast) == GROUPED
    assert torch.equal(fast.eval()(X), graph.eval()(X))


def test_random_state_and_buffers_stay() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    convert(model, X, inplace=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Which layers


def test_example_inputs_in_all_forms() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = conv(), conv()

        def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.left(x) * scale + self.right(y)

    a, b = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 4, 4, 4, 4)
    forms: list[tuple[Any, Any]] = [
        ((a, b), None),
        ([a, b], {"scale": 2.0}),
        ({"x": a, "y": b}, None),
        (a, {"y": b}),
        (None, {"x": a, "y": b}),
    ]
    for inputs, kwargs in forms:
        items = report(convert(Two(), inputs, example_kwargs=kwargs)).swapped
        assert [item.calls[0].shape for item in items] == [(2, 4, 4, 4, 4)] * 2


def test_each_distinct_problem_is_chosen_once(chooser: FakeChooser) -> None:
    convert(Net(), X)
    assert [(problem.direction, batch, label) for problem, batch, label in chooser.asked] == [
        ("forward", 2, "layers.0.conv2"),
        ("grad_input", 2, "layers.0.conv2"),
        ("grad_weight", 2, "layers.0.conv2"),
        ("forward", 2, "down"),
        ("grad_input", 2, "down"),
        ("grad_weight", 2, "down"),
    ]
    assert chooser.expected == 6


def test_settings_reach_the_chooser_and_the_layers(chooser: FakeChooser, tmp_path: Path) -> None:
    fast = convert(Net(), X, tune="full", min_speedup=1.2, cache=tmp_path, progress=False)
    assert chooser.made["tune"] == "full" and chooser.made["min_speedup"] == 1.2
    assert chooser.made["progress"] is False and chooser.made["cache"].directory == tmp_path
    layer: Any = fast.get_submodule("down")
    assert (layer.tune, layer.cache) == ("cached", str(tmp_path))


def test_without_inputs_layers_choose_later(chooser: FakeChooser) -> None:
    fast = convert(Net(), tune="full")
    assert swapped(fast) == GROUPED and not chooser.asked
    assert {fast.get_submodule(name).tune for name in GROUPED} == {"full"}
    assert report(fast).swapped[0].note == 'chooses its kernels at its first call (tune="full")'


def test_no_grad_chooses_forward_passes_only(chooser: FakeChooser) -> None:
    with torch.no_grad():
        convert(Net(), X)
    assert {problem.direction for problem, _, _ in chooser.asked} == {"forward"}


def test_copy_made_in_inference_mode_can_be_trained() -> None:
    model = Net()
    with torch.inference_mode():
        fast = convert(model, X)
    fast(X).sum().backward()
    assert all(item.grad is not None for item in fast.parameters())


def test_layer_where_nothing_wins_is_kept(chooser: FakeChooser) -> None:
    chooser.native = lambda problem: problem.geometry.stride == (2, 2, 2)
    fast = convert(Net(), X)
    assert swapped(fast) == GROUPED[:2] and type(fast.get_submodule("down")) is nn.Conv3d
    (kept,) = report(fast).kept
    assert kept.name == "down"
    assert kept.reason == "PyTorch's own kernels stay in every pass: nothing was faster"
    assert [item.native for item in kept.calls[0].passes] == [True] * 3


def test_layer_where_one_pass_wins_is_swapped(chooser: FakeChooser) -> None:
    chooser.native = lambda problem: problem.direction != "grad_weight"
    items = report(convert(Net(), X)).swapped
    assert [item.name for item in items] == GROUPED
    assert [item.speedup for item in items[0].calls[0].passes] == pytest.approx([1, 1, 3])


def test_include_and_exclude() -> None:
    assert swapped(convert(Net(), X, include="layers.*")) == GROUPED[:2]
    assert swapped(convert(Net(), X, include=["down", "layers.1.conv2"])) == GROUPED[1:]
    fast = convert(Net(), X, include="layers.*", exclude="*.1.*")
    assert swapped(fast) == GROUPED[:1]
    assert [(item.name, item.reason) for item in report(fast).kept] == [
        ("layers.1.conv2", "excluded by exclude='*.1.*'"),
        ("down", "not asked for: include='layers.*'"),
    ]


class Unreached(nn.Module):
    """A layer that forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layer_that_no_forward_reaches_is_kept_unless_named() -> None:
    fast = convert(Unreached())
    assert swapped(fast) == ["used"]
    assert report(fast).kept[0].reason.startswith("no forward reaches it, in train or eval mode; name it in")
    fast = convert(Unreached(), torch.randn(1, 4, 4, 4, 4), include="*")
    assert swapped(fast) == ["used", "dead"]
    assert report(fast).swapped[1].note.startswith("not called on the example inputs; chooses its kernels at")


class Untraceable(nn.Module):
    """Control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Block(4), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() > 0 else self.other(x)


@pytest.mark.parametrize("inputs", [None, torch.ones(1, 4, 4, 4, 4)])
def test_untraceable_part_is_converted_and_reported(inputs: Tensor | None) -> None:
    model = nn.Sequential(conv(padding=1), Untraceable())
    fast = convert(model, inputs)
    assert swapped(fast) == ["0", "1.block.conv2", "1.other"]
    (part,) = report(fast).untraced
    assert part.name == "1" and "control flow" in part.reason
    assert "Not traceable by torch.fx" in str(report(fast))


class MyConv(nn.Conv3d):
    pass


def skipping() -> nn.Module:
    return nn.Sequential(MyConv(4, 4, 1, groups=2), parametrizations.weight_norm(conv(kernel_size=1)), conv())


def test_skipped_layers_are_reported() -> None:
    fast = convert(skipping(), torch.randn(1, 4, 4, 4, 4))
    assert swapped(fast) == ["2"]
    assert [(item.name, item.kind) for item in report(fast).skipped] == [
        ("0", "MyConv"),
        ("1", "ParametrizedConv3d"),
    ]


def test_strict_makes_a_skip_an_error() -> None:
    message = r"every grouped convolution has to be swapped, and '0' \(and '1'\) cannot be: MyConv is a subcl"
    with pytest.raises(ConvertError, match=message):
        convert(skipping(), strict=True)
    assert swapped(convert(skipping(), strict=True, exclude=["0", "1"])) == ["2"]
    assert swapped(convert(skipping(), strict=True, include="2")) == ["2"]


@pytest.mark.filterwarnings("ignore:.*[Ll]azy.*:UserWarning")
def test_lazy_layers_are_skipped_until_they_have_sizes() -> None:
    model = nn.Sequential(nn.LazyConv3d(4, 3, groups=2), conv())
    fast = convert(model, inplace=True)
    assert swapped(fast) == ["1"] and "it is lazy" in report(fast).skipped[0].reason
    fast(torch.randn(1, 4, 6, 6, 6))
    assert swapped(convert(fast)) == ["0", "1"]


@pytest.mark.filterwarnings("ignore:.*[Ll]azy.*:UserWarning")
def test_run_on_example_inputs_gives_lazy_layers_no_sizes() -> None:
    model = nn.Sequential(nn.LazyConv3d(4, 3, groups=2), conv())
    fast = convert(model, torch.randn(1, 4, 6, 6, 6), inplace=True)
    assert swapped(fast) == ["1"]
    assert report(fast).swapped[0].calls[0].shape == (1, 4, 4, 4, 4)
    assert isinstance(model[0], nn.LazyConv3d)


# Checks


@pytest.mark.parametrize("verified", [True, False])
def test_layer_that_computes_something_else_is_put_back(chooser: FakeChooser, verified: bool) -> None:
    chooser.candidate = Wrong
    fast = convert(Net(), X, verify=verified)
    if verified:
        assert not swapped(fast)
        reasons = {item.reason.split(":")[0] for item in report(fast).kept}
        assert reasons == {"not swapped, because it would compute something else"}
        assert "forward has a relative error of 0.001" in report(fast).kept[0].reason
    else:
        assert swapped(fast) == GROUPED
        assert {item.verified for item in report(fast).swapped} == {None}
        assert not verify(Net(), fast, X).ok


def test_checked_layers_are_reported_so() -> None:
    assert {item.verified for item in report(convert(Net(), X)).swapped} == {True}


def test_only_wrong_gradients_are_found_too(chooser: FakeChooser) -> None:
    class WrongBackward(Wrong):
        def __call__(self, *tensors: Tensor | None) -> Tensor:
            right = self.problem.direction == "forward"
            return Candidate.__call__(self, *tensors) if right else super().__call__(*tensors)

    chooser.candidate = WrongBackward
    fast = convert(Net(), X)
    assert not swapped(fast) and "grad-input has a relative error" in report(fast).kept[0].reason


def test_interrupt_changes_nothing(chooser: FakeChooser, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chooser, "choose", interrupt)
    model = Net()
    with pytest.raises(KeyboardInterrupt):
        convert(model, X, inplace=True)
    assert not swapped(model) and not vars(model)["_forward_pre_hooks"] and ATTRIBUTE not in vars(model)


# Report, inspection, the way back


def test_report_survives_copies_and_files() -> None:
    fast = convert(Net(), X)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert report(other) == report(fast) and len(report(other).swapped) == 3
        assert torch.equal(other.eval()(X), fast.eval()(X))
    assert json.loads(json.dumps(report(fast).to_dict())) == report(fast).to_dict()


def test_inspect_changes_nothing(chooser: FakeChooser) -> None:
    model = Net()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    chooser.key = lambda problem: {"device_name": "none", "n": str(problem)}  # type: ignore[method-assign]
    found = inspect(model, X)
    assert found.kind == "inspected" and [item.name for item in found.swapped] == GROUPED
    assert [item.source for item in found.swapped[0].calls[0].passes] == ["untuned"] * 3
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert not chooser.asked
    assert [item.name for item in inspect(model).swapped] == GROUPED
    assert "3 of 3 grouped layers would be swapped" in str(found)


def test_revert_gives_the_layers_back() -> None:
    model = Net()
    fast = convert(model, X)
    parameters = dict(fast.named_parameters())
    back = revert(fast)
    assert back is fast and not swapped(back) and type(back.get_submodule("down")) is nn.Conv3d
    assert all(item is parameters[name] for name, item in back.named_parameters())
    assert torch.equal(back.eval()(X), model.eval()(X))
    with pytest.raises(ArgumentError, match="was not converted"):
        report(back)
    assert revert(Net()).extra() == "still here"  # type: ignore[operator]


def test_revert_of_shared_modules() -> None:
    model = nn.ModuleDict({"a": conv()})
    model["b"] = model["a"]
    back: Any = revert(convert(model, include="*"))
    assert back["a"] is back["b"] and type(back["a"]) is nn.Conv3d


# Mistakes


class Wrapped(nn.Module):
    """As other tools leave a model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def compiled() -> nn.Module:
    return torch.compile(Net())  # type: ignore[return-value]


def compiled_inside() -> nn.Module:
    model = Wrapped()
    model.inner.compile()
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.ReLU())


def uncopyable() -> nn.Module:
    model = Net()
    model.weights = model.head.weight * 2
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (lambda: 3, {}, ArgumentError, "convert() takes a torch.nn.Module, not an int."),
        (lambda: Net, {}, ArgumentError, "convert() takes a model, and Net is a class; make an instance."),
        (
            lambda: Net().state_dict(),
            {},
            ArgumentError,
            "convert() takes a torch.nn.Module, not an OrderedDict; build the model and load the",
        ),
        (scripted, {}, ConvertError, "The model is TorchScript, whose modules cannot be replaced; convert"),
        (compiled, {}, ConvertError, "The model is wrapped by torch.compile; convert the original"),
        (compiled_inside, {}, ConvertError, "Its part 'inner' was compiled with .compile(); convert"),
        (uncopyable, {}, ConvertError, "Net cannot be deep-copied (RuntimeError: Only Tensors created"),
        (Net, {"tune": "best"}, ArgumentError, "tune='best' is unknown; use one of none, cached, quick"),
        (Net, {"tune": None}, ArgumentError, "tune=None is unknown; use one of none, cached, quick, full."),
        (Net, {"min_speedup": 0}, ArgumentError, "min_speedup=0 must be a number above 0, say 1.05."),
        (Net, {"min_speedup": "2"}, ArgumentError, "min_speedup='2' must be a number above 0, say 1.05."),
        (Net, {"min_speedup": float("nan")}, ArgumentError, "min_speedup=nan must be a number above 0"),
        (Net, {"cache": 3}, ArgumentError, "cache is an int; it takes the path of a directory."),
        (Net, {"include": "layer.*"}, ArgumentError, "include='layer.*' matches no convolution with groups"),
        (Net, {"exclude": "stem"}, ArgumentError, "exclude='stem' matches no convolution with groups >"),
        (Net, {"include": 4}, ArgumentError, "include holds an int; it takes a qualified layer name"),
        (Net, {"example_inputs": "x"}, ArgumentError, "example_inputs is a str; it takes a tensor, a tuple"),
        (Net, {"example_inputs": (X, X)}, ArgumentError, "example_inputs do not fit Net.forward(x: 'Ten"),
        (Net, {"example_inputs": X[:, :2]}, ConvertError, "Net.forward raised on the example inputs (Runti"),
        (Net, {"example_kwargs": {"y": X}}, ArgumentError, "example_inputs do not fit Net.forward"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by torch.compile's own imports
def test_errors(
    make: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        convert(make(), **arguments)
    assert message in str(caught.value), caught.value


@pytest.mark.parametrize("function", [inspect, revert])
def test_errors_of_the_others(function: Callable[[Any], Any]) -> None:
    with pytest.raises(ArgumentError, match=rf"{function.__name__}\(\) takes a torch.nn.Module, not a str\."):
        function("model")


def test_failed_conversion_leaves_the_model_alone() -> None:
    model = Net()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with untouched(model), pytest.raises(ConvertError):
        convert(model, X[:, :2], inplace=True)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
