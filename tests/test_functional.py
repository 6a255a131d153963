"""Calls of convolution functions in a forward: which are converted, how, and what stays as it was."""

from __future__ import annotations

import copy
import inspect as signatures
import json
import pickle
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from g3dswap.convert import convert, inspect, revert
from g3dswap.decide import pass_of
from g3dswap.endtoend import measure_steps
from g3dswap.entries import Functional, Layer
from g3dswap.errors import ConvertError
from g3dswap.intercept import Intercept
from g3dswap.plan import save_plan
from g3dswap.problem import Problem
from g3dswap.report import Report, report
from g3dswap.verify import verify
from g3dswap.workload import Candidate
from tests.fakes import FakeChooser, Wrong, faked

X = torch.randn(2, 4, 4, 6, 6, generator=torch.Generator().manual_seed(0))
SOURCE = Path(__file__).read_text().splitlines()


@pytest.fixture(autouse=True)
def chooser(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChooser]:
    with faked(monkeypatch) as fake:
        yield fake


def where(mark: str) -> str:
    """``file:line`` of the line that ends so."""
    return f"{__file__}:{next(n for n, text in enumerate(SOURCE, 1) if text.endswith(f'# {mark}'))}"


class Mixer(nn.Module):
    """A depthwise convolution whose weight is computed and whose groups are those of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        weight = torch.tanh(self.weight) * scale
        return F.conv3d(x, weight, self.bias, padding="same", groups=x.shape[-4])  # MIXER


class Net(nn.Module):
    """A layer, and a module with a function call, between which nothing else is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(4, 4, 3, padding=1, groups=2)
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(self.layer(x))


class Seen(TorchDispatchMode):
    """The names of the convolution operators that run, forward ones."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if "conv" in str(func) and "backward" not in str(func):
            self.names.append(str(func).split(".")[0])
        return func(*args, **(kwargs or {}))


def seen(model: Any, *inputs: Any) -> list[str]:
    """Whose operators a run of the model takes: ``aten`` or ``g3dswap``."""
    with Seen() as mode:
        model(*(inputs or (X,)))
    return mode.names


def the_call(model: nn.Module) -> Functional:
    (found,) = report(model).functional
    return found


def mode_of(module: Any) -> Intercept:
    mode: Intercept = module.forward.mode
    return mode


# What is converted


def test_calls_are_only_reported_unless_asked_for() -> None:
    fast = convert(Net(), X)
    assert seen(fast) == ["g3dswap", "aten"]
    assert the_call(fast) == Functional("mixer", "conv3d", 4, where("MIXER"), tuple(X.shape))


def test_a_call_is_converted_and_the_model_stays_the_same() -> None:
    model = Net()
    fast = convert(model, X, functional=True)
    assert seen(fast) == ["g3dswap", "g3dswap"] and seen(model) == ["aten", "aten"]
    assert type(fast) is Net and type(fast.mixer) is Mixer
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]
    assert list(fast.state_dict()) == list(model.state_dict())
    assert signatures.signature(fast.mixer.forward) == signatures.signature(model.mixer.forward)
    assert verify(model, fast, X).check().ok
    call = the_call(fast)
    assert (call.name, call.where, call.converted, call.verified) == ("mixer", where("MIXER"), True, True)
    assert call.geometry == Layer(4, 4, 4, (3, 3, 3), (1, 1, 1), "same", (1, 1, 1), bias=True)
    (met,) = call.calls
    assert met.shape == tuple(X.shape)
    assert [(item.direction, item.source) for item in met.passes] == [
        ("forward", "tuned"),
        ("grad_input", "tuned"),
        ("grad_weight", "tuned"),
    ]
    assert Report.from_dict(json.loads(json.dumps(report(fast).to_dict()))) == report(fast)


def test_passes_are_those_that_are_needed(chooser: FakeChooser) -> None:
    model = Mixer().requires_grad_(False)
    convert(model, X, functional=True)
    assert [problem.direction for problem, _, _ in chooser.asked] == ["forward"]
    assert chooser.expected == 1


def test_calls_in_helpers_belong_to_the_forward_that_runs() -> None:
    class Tool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 1, 1, 1, 1))

        def apply_to(m, x: Tensor) -> Tensor:
            return F.conv3d(x, m.weight, groups=4)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tool = Tool()

        def forward(m, x: Tensor) -> Tensor:
            return m.tool.apply_to(x)

    for inputs in (X, None):
        fast = convert(Outer(), inputs, functional=True)
        assert the_call(fast).name == "(model)" and the_call(fast).converted
        assert seen(fast) == ["g3dswap"]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: torch.conv3d(x, w, None, 1, [1], 1, 2),
        lambda x, w: F.conv3d(input=x, weight=w, groups=2, stride=(1, 2, 2), dilation=[1, 2, 1]),
        lambda x, w: F.conv3d(x[0], w, groups=2, padding="valid"),
        lambda x, w: F.conv_transpose3d(x, w, None, (1, 2, 2), 1, (0, 1, 1), 2),
        lambda x, w: F.conv_transpose3d(x, w, groups=2, dilation=2, bias=w.sum((1, 2, 3, 4)).repeat(1)),
        lambda x, w: F.conv3d(x.to(memory_format=torch.channels_last_3d), w, groups=2),
    ],
)
def test_every_way_of_calling(call: Any) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 2, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = call(x, self.weight)
            return result

    model = Calls()
    fast = convert(model, X, functional=True)
    assert seen(fast) == ["g3dswap"] and the_call(fast).verified
    assert verify(model, fast, X).check().ok
    assert fast(X).stride() == model(X).stride()


def test_groups_that_change_from_call_to_call() -> None:
    class Choosy(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
            return F.conv3d(x, weight, groups=groups)

    model = Choosy()
    fast = convert(model, (X, torch.randn(4, 1, 3, 3, 3), 4), functional=True)
    for groups, whose in ((4, "g3dswap"), (2, "g3dswap"), (1, "aten")):
        inputs = X, torch.randn(4, 4 // groups, 3, 3, 3), groups
        assert seen(fast, *inputs) == [whose]
        assert torch.equal(fast(*inputs), model(*inputs))


def test_without_inputs_kernels_are_chosen_at_the_first_call() -> None:
    fast = convert(Net(), functional=True)
    call = the_call(fast)
    assert call.converted and call.reason == 'chooses its kernels at its first call (tune="quick")'
    assert mode_of(fast.mixer).tune == "quick"
    assert seen(fast) == ["g3dswap", "g3dswap"]
    assert mode_of(convert(Net(), X, functional=True).mixer).tune == "cached"


# What is not


class Odd(nn.Module):
    """One function call; subclasses have others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight, groups=2)


class General(Odd):
    def forward(self, x: Tensor) -> Tensor:
        triple = [1, 1, 1]
        return torch.convolution(x, self.weight, None, triple, [0, 0, 0], triple, False, [0, 0, 0], 2)


class Whole(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x.long(), self.weight.long(), groups=2)


def replaced() -> nn.Module:
    model = Odd()
    model.forward = lambda x: Odd.forward(model, x)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (General(), "only calls of conv3d and conv_transpose3d are converted"),
        (Whole(), "its weight is no five-dimensional tensor of floating-point numbers"),
        (replaced(), "the forward that makes it is replaced on the instance"),
    ],
)
def test_calls_that_cannot_be_converted_say_why(model: nn.Module, reason: str) -> None:
    # A copy of a model whose forward was replaced would run the original's.
    fast = convert(model, X, functional=True, inplace=True)
    assert (the_call(fast).converted, the_call(fast).reason) == (False, reason)
    assert seen(fast) == ["aten"]
    with pytest.raises(
        ConvertError, match=f"With strict=True .* the call of .* in '\\(model\\)' cannot be: {reason}"
    ):
        convert(model, X, functional=True, inplace=True, strict=True)


def test_calls_that_are_not_asked_for() -> None:
    fast = convert(Net(), X, functional=True, include="layer")
    assert the_call(fast).reason == "not asked for: include='layer'"
    assert seen(fast) == ["g3dswap", "aten"]


def test_a_layer_that_stays_pytorchs_stays_so_inside_an_intercepted_forward() -> None:
    class Both(Mixer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv3d(4, 4, 1, groups=2)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(self.inner(x), scale)

    model = nn.Sequential(nn.Conv3d(4, 4, 1, groups=2), Both())
    fast = convert(model, X, functional=True, exclude="1.inner")
    assert the_call(fast).reason == "" and the_call(fast).converted
    assert seen(fast) == ["g3dswap", "aten", "g3dswap"]
    assert seen(copy.deepcopy(fast)) == ["g3dswap", "aten", "g3dswap"]


def test_where_pytorch_is_faster_it_stays(chooser: FakeChooser) -> None:
    chooser.native = lambda problem: problem.geometry.groups == 4
    fast = convert(Net(), X, functional=True)
    call = the_call(fast)
    assert (call.converted, call.reason) == (
        False,
        "PyTorch's own kernels stay in every pass: nothing was faster",
    )
    assert call.calls[0].passes[0].native and seen(fast) == ["g3dswap", "aten"]
    assert "forward" not in vars(fast.mixer)


def test_a_wrong_kernel_leaves_all_calls_of_its_forward_alone(chooser: FakeChooser) -> None:
    class Two(Odd):
        def forward(self, x: Tensor) -> Tensor:
            y = F.conv3d(x, self.weight, groups=2)
            return y + F.conv3d(x, self.weight[:, :1], groups=4)

    def candidate(problem: Problem) -> Candidate:
        return Wrong(problem) if problem.geometry.groups == 4 else Candidate(problem)

    chooser.candidate = candidate  # type: ignore[assignment]
    fast = convert(Two(), X, functional=True)
    first, second = report(fast).functional
    assert first.reason == "another call in the same forward would compute something else"
    assert second.reason.startswith("not swapped, because it would compute something else: forward has a rel")
    assert not first.converted and not second.converted and seen(fast) == ["aten", "aten"]


# Around it


def test_nothing_outside_of_the_forward_is_touched() -> None:
    fast = convert(Mixer(), X, functional=True)
    inside, go_on = threading.Event(), threading.Event()
    names: list[str] = []

    class Waiting(nn.Module):
        """Stops in the middle of its forward."""

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv3d(x, torch.ones(4, 1, 1, 1, 1), groups=4)
            inside.set()
            assert go_on.wait(60)
            return y

    go_on.set()
    slow = convert(Waiting(), X, functional=True)
    inside.clear()
    go_on.clear()
    thread = threading.Thread(target=lambda: names.extend(seen(slow)))
    thread.start()
    assert inside.wait(60)
    assert seen(Mixer()) == ["aten"]  # another model, in another thread, meanwhile
    assert seen(fast) == ["g3dswap"]
    go_on.set()
    thread.join()
    assert names == ["g3dswap"]
    assert seen(Mixer()) == ["aten"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(kind: type[BaseException]) -> None:
    class Raises(Odd):
        def forward(self, x: Tensor, fail: bool = False) -> Tensor:
            y = super().forward(x)
            if fail:
                raise kind
            return y

    fast = convert(Raises(), X, functional=True)
    with pytest.raises(kind):
        fast(X, True)
    assert torch._C._len_torch_function_stack() == 0
    assert seen(Odd()) == ["aten"] and seen(fast) == ["g3dswap"]


def test_errors_are_pytorchs() -> None:
    fast = convert(Odd(), X, functional=True)
    with pytest.raises(RuntimeError) as theirs:
        Odd()(X[:, :3])
    with pytest.raises(RuntimeError) as ours:
        fast(X[:, :3])
    assert str(ours.value) == str(theirs.value)


def test_copies_and_pickles_have_calls_of_their_own() -> None:
    fast = convert(Net(), X, functional=True)
    others: list[Any] = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    for other in others:
        assert other.mixer.forward.module is other.mixer and seen(other) == ["g3dswap", "g3dswap"]
        with torch.no_grad():
            other.mixer.weight.zero_()
            other.mixer.bias.fill_(3)
        assert torch.equal(other(X), torch.full_like(X, 3))
    assert not torch.equal(fast(X), torch.full_like(X, 3))


def test_nested_forwards() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Mixer()

        def forward(self, x: Tensor) -> Tensor:
            return F.conv3d(self.inner(x), self.inner.weight, groups=4)

    model = nn.Sequential(Outer())
    fast = convert(model, X, functional=True)
    assert [(item.name, item.converted) for item in report(fast).functional] == [
        ("0.inner", True),
        ("0", True),
    ]
    assert seen(fast) == ["g3dswap", "g3dswap"]
    assert verify(model, fast, X).check().ok


def test_converting_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = convert(Net(), X, functional=True)
    for again in (convert(fast, X), convert(fast, X, functional=True), convert(fast, X, inplace=True)):
        assert report(again).functional == report(fast).functional
        assert seen(again) == ["g3dswap", "g3dswap"]
    monkeypatch.setattr(
        sys.modules["g3dswap.convert"], "peek", lambda it, problem: pass_of(it.resolve(problem))
    )
    assert [item.converted for item in inspect(fast, X).functional] == [True]
    assert [item.converted for item in inspect(Net(), X).functional] == [False]
    assert seen(fast) == ["g3dswap", "g3dswap"]  # inspection put back what it took off


def test_way_back() -> None:
    model = convert(Net(), X, functional=True, inplace=True)
    assert revert(model) is model and "forward" not in vars(model.mixer)
    assert seen(model) == ["aten", "aten"]


def test_steps_are_compared_with_the_reverted_model() -> None:
    fast = convert(Mixer(), X, functional=True)
    (step, _) = measure_steps(fast, X, seconds=0.01)
    assert step.grouped_before > 0 and step.grouped_after
    assert seen(fast) == ["g3dswap"]


# PyTorch's own machinery


def test_second_derivatives() -> None:
    model = Mixer().double()
    fast = convert(model, X.double(), functional=True)
    x = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast, (x,)) and torch.autograd.gradgradcheck(fast, (x,))


def test_autocast() -> None:
    model = Net()
    with torch.autocast("cpu", torch.bfloat16):
        fast = convert(model, X, functional=True)
        assert the_call(fast).calls[0].dtype == "bfloat16"
        assert seen(fast) == ["g3dswap", "g3dswap"]
        out = fast(X)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert verify(model, fast, X).check().ok
    mixer: Any = fast.mixer
    assert mixer.weight.grad.dtype == torch.float32


def test_compile_without_a_graph_break() -> None:
    fast = convert(Net(), X, functional=True)
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        names.extend(str(node.target) for node in graph.graph.nodes if "conv" in str(node.target))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    wanted = fast(X)
    for _ in range(3):
        assert torch.equal(compiled(X), wanted)
    assert names == ["g3dswap.conv3d.default"] * 2  # compiled once
    compiled(X).sum().backward()


def test_export() -> None:
    fast = convert(Net(), X, functional=True)
    program = torch.export.export(fast, (X,))
    targets = [str(node.target) for node in program.graph.nodes if "conv" in str(node.target)]
    assert targets == ["g3dswap.conv3d.default"] * 2
    assert torch.equal(program.module()(X), fast(X))


def test_a_converted_model_can_be_traced() -> None:
    fast = convert(Net(), X, functional=True)
    graph = torch.fx.symbolic_trace(fast)
    assert torch.allclose(graph(X), fast(X), atol=1e-5)
    assert "groups = getitem" in graph.code


def test_functional_call_and_vmap() -> None:
    fast = convert(Mixer(), X, functional=True)
    zeros = {name: torch.zeros_like(value) for name, value in fast.named_parameters()}
    assert not torch.func.functional_call(fast, zeros, (X,)).any()
    stacked = torch.stack([X, 2 * X])
    mapped = torch.func.vmap(fast)(stacked)
    assert torch.allclose(mapped, torch.stack([fast(X), fast(2 * X)]), atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing(inside: bool, reentrant: bool) -> None:
    class Inside(Mixer):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            run: Any = super().forward
            result: Tensor = checkpoint(run, x, use_reentrant=reentrant)
            return result

    x = X.clone().requires_grad_()
    model = Inside() if inside else Mixer()
    fast = convert(model, x, functional=True)
    assert the_call(fast).converted
    out = fast(x) if inside else checkpoint(fast, x, use_reentrant=reentrant)
    out.sum().backward()
    ours, x.grad = x.grad, None
    model(x).sum().backward()
    assert ours is not None and x.grad is not None
    assert torch.allclose(ours, x.grad, atol=1e-5)


def test_a_plan_has_the_choices_of_calls(tmp_path: Path, chooser: FakeChooser) -> None:
    fast = convert(Mixer(), X, functional=True)
    save_plan(fast, tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    directions = [item["problem"]["direction"] for item in data["choices"]]
    assert directions == ["forward", "grad_weight"]  # the input requires no gradient
    again = convert(Mixer(), plan=tmp_path / "plan.json", functional=True)
    assert the_call(again).converted and seen(again) == ["g3dswap"]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    fast, x = convert(Net().cuda(), X.cuda(), functional=True), X.cuda()
    assert seen(fast, x) == ["g3dswap", "g3dswap"]
    assert verify(revert(copy.deepcopy(fast)), fast, x).check().ok
