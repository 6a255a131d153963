"""Transposed layers: all in which they differ from nn.Conv3d, from the operator to a converted model."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.fx
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import g3dswap
from g3dswap import choose, decided, native
from g3dswap.decide import problems
from g3dswap.discover import Meeting
from g3dswap.errors import ArgumentError, InputError, InputTypeError
from g3dswap.layercheck import check_layer
from g3dswap.module import Grouped3D, Grouped3DTranspose
from g3dswap.op import conv_transpose3d
from g3dswap.workload import Candidate, PassWorkload, quick_check
from tests.fakes import FakeChooser, Wrong, faked
from tests.kernels import Recorder
from tests.profiles import examples

CONV3D = torch.ops.g3dswap.conv3d.default
BACKWARD = torch.ops.g3dswap.conv3d_backward.default
# stride, padding, dilation, groups, tune, cache, transposed, output padding
CONF: Any = ([2, 1, 2], [1, 0, 1], [1, 2, 1], 2, "none", "", True, [1, 0, 0])
PASSES = ["forward", "grad_input", "grad_weight"]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Our kernels are chosen for everything that they cover."""
    recorder = Recorder()
    monkeypatch.setattr(choose, "resolve", recorder)
    decided.lookup().clear()
    yield recorder
    decided.lookup().clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChooser]:
    with faked(monkeypatch) as chooser:
        yield chooser


def pair(
    *args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> tuple[nn.ConvTranspose3d, Grouped3DTranspose]:
    """PyTorch's layer and ours with parameters of the same values."""
    layer, ours = nn.ConvTranspose3d(*args, **kwargs).to(dtype), Grouped3DTranspose(*args, **kwargs).to(dtype)
    ours.load_state_dict(layer.state_dict())
    return layer, ours


def compare(layer: nn.Module, ours: nn.Module, x: Tensor, *more: Any) -> None:
    results = []
    for module in (layer, ours):
        input = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = module(input, *more)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [input, *module.parameters()])])
    for expected, mine in zip(*results):
        torch.testing.assert_close(mine, expected)
        assert mine.stride() == expected.stride()


def operands(dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor]:
    shapes = (2, 4, 3, 3, 3), (4, 3, 2, 3, 2), (6,)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": (1, 2, 3), "padding": (0, 1, 2), "output_padding": (0, 1, 2), "dilation": (2, 1, 1)},
        {"stride": (3, 1, 2), "dilation": 2, "bias": False},
    ],
    ids=str,
)
def test_options(kwargs: dict[str, Any], batched: bool, kernels: Recorder) -> None:
    layer, ours = pair(4, 8, 3, groups=2, **kwargs)
    x = torch.randn(2, 4, 4, 5, 6, dtype=torch.float64)
    compare(layer, ours, x if batched else x[0])
    assert kernels.directions() == PASSES


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("size", [(7, 9, 16), (8, 9, 17), (8, 9, 18)])
def test_output_size_of_a_call(size: tuple[int, int, int], batched: bool, kernels: Recorder) -> None:
    layer, ours = pair(4, 4, 3, groups=4, stride=(2, 2, 3), padding=(1, 1, 1))
    x = torch.randn(2, 4, 4, 5, 6, dtype=torch.float64)
    if not batched:
        x = x[0]
    compare(layer, ours, x, size)
    compare(layer, ours, x, torch.Size([*x.shape[: x.dim() - 3], *size]))
    assert {problem.geometry.size for problem, *_ in kernels.resolved} == {size}


def test_output_size_that_no_padding_gives() -> None:
    layer, ours = pair(4, 4, 3, groups=4, stride=2)
    for module in (layer, ours):
        with pytest.raises(ValueError, match=r"requested an output size of .* valid sizes range from"):
            module(torch.randn(2, 4, 4, 5, 6, dtype=torch.float64), [99, 9, 9])


def test_output_padding_beyond_the_stride_is_left_to_pytorch(kernels: Recorder) -> None:
    layer, ours = pair(4, 4, 3, groups=4, stride=1, dilation=3, output_padding=2)
    compare(layer, ours, torch.randn(2, 4, 4, 5, 6, dtype=torch.float64))
    assert not kernels.resolved
    # torch.nn checks it at the call, as its operator does.
    with pytest.raises(RuntimeError, match="output padding must be smaller than either stride or dilation"):
        Grouped3DTranspose(4, 4, 3, groups=4, output_padding=1)(torch.randn(2, 4, 4, 5, 6))


@pytest.mark.parametrize("groups", [1, 2])
def test_empty_batch(groups: int, kernels: Recorder) -> None:
    layer, ours = pair(4, 4, 3, groups=groups)
    x = torch.randn(0, 4, 5, 5, 5, dtype=torch.float64)
    assert ours(x).shape == layer(x).shape and not kernels.resolved


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["module", "input", "both"])
@pytest.mark.parametrize("groups", [2, 4])
def test_layouts_are_pytorchs(dtype: torch.dtype, how: str, groups: int, kernels: Recorder) -> None:
    layer, ours = pair(4, 8, 3, groups=groups, stride=2, dtype=dtype)
    x = torch.randn(2, 4, 4, 5, 6, dtype=dtype)
    if how != "module":
        x = x.to(memory_format=torch.channels_last_3d)
    if how != "input":
        layer, ours = (m.to(memory_format=torch.channels_last_3d) for m in (layer, ours))  # type: ignore[call-overload]
    outs, grads = [], []
    for module in (layer, ours):
        input = x.clone(memory_format=torch.preserve_format).requires_grad_()
        outs.append(module(input))
        seed = torch.ones_like(outs[-1])
        grads.append(torch.autograd.grad(outs[-1], [input, *module.parameters()], seed))
    assert outs[0].stride() == outs[1].stride()
    assert [g.stride() for g in grads[0]] == [g.stride() for g in grads[1]]
    last = outs[0].is_contiguous(memory_format=torch.channels_last_3d)
    if dtype != torch.bfloat16:  # where a processor's own instructions decide
        assert last == (dtype == torch.float32)
    assert {layout for _, layout, _ in kernels.runs} == {"channels_last_3d" if last else "contiguous"}


def test_views_that_are_not_contiguous(kernels: Recorder) -> None:
    layer, ours = pair(4, 4, 3, groups=4, stride=2)
    x = torch.randn(5, 2, 4, 6, 8, dtype=torch.float64)
    compare(layer, ours, x.permute(1, 2, 0, 4, 3)[:, :, ::2])
    with torch.no_grad():
        torch.testing.assert_close(
            *(m(x.new_ones(1, 1, 1, 1, 1).expand(2, 4, 3, 3, 3)) for m in (layer, ours))
        )


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(kernels: Recorder, unbatched: bool, bias: bool) -> None:
    x, w, b = (t.detach() for t in operands())
    x = (x[0] if unbatched else x)[..., :2].contiguous().requires_grad_()
    inputs = [x, w.requires_grad_(), *([b.requires_grad_()] if bias else [])]

    def f(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return CONV3D(x, w, b, *CONF)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("keep", list(itertools.product([False, True], repeat=3))[1:])
def test_double_backward_of_each_gradient_alone(keep: tuple[bool, ...], kernels: Recorder) -> None:
    inputs = operands()
    results = []
    for f in (conv_transpose3d, F.conv_transpose3d):
        x, w, b = inputs
        out = f(x, w, b, (2, 1, 2), (1, 0, 1), (1, 0, 1), 2)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).requires_grad_()
        wanted = [x for x, k in zip(inputs, keep) if k]
        grads = torch.autograd.grad(out, wanted, grad, create_graph=True)
        value = sum((g.sin().sum() for g in grads), start=torch.zeros(()))
        results.append(torch.autograd.grad(value, [*inputs, grad], allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool, kernels: Recorder) -> None:
    x, w, b = operands(torch.float32, grad)
    torch.library.opcheck(CONV3D, (x, w, None, *CONF))
    last = x.detach().to(memory_format=torch.channels_last_3d)
    for input in (x, x[0].detach().requires_grad_(grad), last):
        torch.library.opcheck(CONV3D, (input, w, b, *CONF))
    assert kernels.runs


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False], [True, False, True]])
def test_opcheck_of_the_backward(mask: list[bool], kernels: Recorder) -> None:
    x, w, b = operands(torch.bfloat16)
    out = torch.randn_like(CONV3D(x, w, b, *CONF)).requires_grad_()
    torch.library.opcheck(BACKWARD, (out, x, w, *CONF[:4], mask, *CONF[4:]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in forward mode
def test_functorch_and_forward_mode_are_pytorchs(kernels: Recorder) -> None:
    x, w, _ = operands(grad=False)

    def mine(x: Tensor) -> Tensor:
        return conv_transpose3d(x, w, None, 2, 1, 1, 2)

    def theirs(x: Tensor) -> Tensor:
        return F.conv_transpose3d(x, w, None, 2, 1, 1, 2)

    torch.testing.assert_close(
        torch.func.grad(lambda x: mine(x).pow(2).sum())(x),
        torch.func.grad(lambda x: theirs(x).pow(2).sum())(x),
    )
    torch.testing.assert_close(torch.func.vmap(mine)(x), torch.func.vmap(theirs)(x))
    pair: Any = torch.func.jvp(mine, (x,), (x + 1,))
    torch.testing.assert_close(pair[1], theirs(x + 1))


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast(to: torch.dtype, kernels: Recorder) -> None:
    layer, ours = pair(4, 4, 3, groups=2, dtype=torch.float32)
    x = torch.randn(2, 4, 5, 5, 5)
    with torch.autocast("cpu", to):
        out, expected = ours(x), layer(x)
    assert out.dtype == expected.dtype == kernels.resolved[0][0].dtype == to
    out.float().sum().backward()
    assert ours.weight.grad is not None and ours.weight.grad.dtype == torch.float32


def test_compile_does_not_compile_again_for_new_batches(kernels: Recorder) -> None:
    layer, ours = pair(4, 8, 3, groups=2, stride=2, output_padding=1, dtype=torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for count, batch in enumerate((2, 3, 4, 7)):
        x = torch.randn(batch, 4, 4, 3, 5, requires_grad=True)
        out = compiled(x)
        torch.testing.assert_close(out, layer(x))
        grads = torch.autograd.grad(out.sum(), [x, ours.weight])
        expected = torch.autograd.grad(layer(x).sum(), [x, layer.weight])
        torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-4)
        assert counter.frame_count == min(count + 1, 2)
    torch.testing.assert_close(compiled(x, [9, 8, 12]), layer(x, [9, 8, 12]))
    torch._dynamo.reset()


def test_export_round_trip(kernels: Recorder, tmp_path: Path) -> None:
    ours = Grouped3DTranspose(4, 8, 3, 2, groups=2).eval()
    x = torch.randn(2, 4, 3, 4, 5)
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "torch.ops.g3dswap.conv3d.default" in program.graph_module.code
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    x = torch.randn(5, 4, 3, 4, 5)
    torch.testing.assert_close(loaded.module()(x), ours(x))


def test_fx_traces_through_it(kernels: Recorder) -> None:
    net = nn.Sequential(Grouped3DTranspose(4, 8, 3, groups=2), nn.ReLU())
    x = torch.randn(2, 4, 3, 4, 5)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_state_dict_copies_and_the_way_back() -> None:
    layer, ours = pair(4, 8, 3, groups=2, dtype=torch.float32)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    layer.load_state_dict(torch.load(buffer), strict=True)
    assert repr(ours).startswith(
        "Grouped3DTranspose(4, 8, kernel_size=(3, 3, 3)"
    ) and "tune='quick')" in repr(ours)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is Grouped3DTranspose and torch.equal(again.weight, ours.weight)
    log: list[str] = []
    layer.register_forward_hook(lambda module, *_: log.append(type(module).__name__))
    swapped = Grouped3DTranspose.from_conv(layer, tune="cached", cache="/c")
    assert swapped.weight is layer.weight and (swapped.tune, swapped.cache) == ("cached", "/c")
    back = swapped.to_conv()
    assert type(back) is nn.ConvTranspose3d and back.weight is layer.weight and repr(back) == repr(layer)
    back(torch.randn(1, 4, 3, 3, 3))
    assert log == ["ConvTranspose3d"] and back.__dict__.keys() == layer.__dict__.keys()
    torch.manual_seed(3)
    drawn = nn.ConvTranspose3d(4, 8, 3, groups=2)
    torch.manual_seed(3)
    assert torch.equal(drawn.weight, Grouped3DTranspose(4, 8, 3, groups=2).weight)


def test_each_layer_takes_the_place_of_its_own_kind_only() -> None:
    with pytest.raises(ArgumentError, match=r"Conv3d is not exactly nn\.ConvTranspose3d and may compute"):
        Grouped3DTranspose.from_conv(nn.Conv3d(4, 4, 3, groups=4))
    with pytest.raises(ArgumentError, match=r"ConvTranspose3d is not exactly nn\.Conv3d and may compute"):
        Grouped3D.from_conv(nn.ConvTranspose3d(4, 4, 3, groups=4))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((4, 4, 3), {"tune": "fast"}, "tune='fast' is unknown; use one of none, cached, quick, full."),
        ((4, 6, 3), {"groups": 4}, "out_channels=6 is not divisible by groups=4; choose a group count"),
        ((4, 4, 3), {"padding_mode": "circular"}, 'Only "zeros" padding mode is supported'),
    ],
)
def test_bad_arguments(args: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grouped3DTranspose(*args, **kwargs)


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.randn(2, 4, 5), InputError, r"\(2, 4, 5\) has 3 dimensions; pass one of shape \(4, T"),
        (torch.randn(2, 6, 5, 5, 5), InputError, r"\(2, 6, 5, 5, 5\) has 6 channels; pass one of shape"),
        (torch.ones(2, 4, 5, 5, 5).double(), InputError, "is float64 but the weight is float32; convert one"),
        ([1.0], InputTypeError, "The input is a list; pass a torch.Tensor."),
    ],
)
def test_bad_inputs(x: Any, kind: type[Exception], message: str, kernels: Recorder) -> None:
    layer, ours = pair(4, 4, 3, groups=2, dtype=torch.float32)
    with pytest.raises(kind, match=message) as mine:
        ours(x)
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        layer(x)
    assert isinstance(mine.value, type(theirs.value)) and not kernels.resolved


# The kernels themselves


@st.composite
def layers(draw: Any) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Arguments of a small transposed layer, and the size of its input."""

    def triple(low: int, high: int) -> tuple[int, int, int]:
        return draw(st.tuples(*[st.integers(low, high)] * 3))

    groups, stride = draw(st.sampled_from([2, 3, 5])), triple(1, 3)
    layer = {
        "in_channels": groups * draw(st.sampled_from([1, 1, 2])),
        "out_channels": groups * draw(st.sampled_from([1, 1, 2])),
        "kernel_size": triple(1, 3),
        "stride": stride,
        "padding": triple(0, 1),
        "output_padding": tuple(draw(st.integers(0, step - 1)) for step in stride),
        "dilation": triple(1, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return layer, triple(1, 6)


@settings(max_examples=examples(8), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=layers(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["contiguous", "channels_last_3d"]),
    batch=st.integers(1, 3),
)
def test_any_geometry_within_the_error_bound(
    drawn: tuple[dict[str, Any], tuple[int, int, int]], dtype: torch.dtype, layout: str, batch: int
) -> None:
    """Default kernels, compiled, against float64: the layer check is that of a conversion."""
    arguments, size = drawn
    layer = nn.ConvTranspose3d(**arguments, dtype=dtype)
    with torch.no_grad():
        try:
            assume(layer(torch.zeros(1, arguments["in_channels"], *size, dtype=dtype)).numel())
        except RuntimeError:
            assume(False)  # as much padding as output, or more
    meeting = Meeting(batch, size, dtype, layout, torch.device("cpu"), True, True)
    for problem in problems(layer, meeting):
        choice = choose.resolve(problem, batch, "none")
        assert choice.source == "default", choice.reason
    wrong = check_layer(layer, meeting, lambda x: Grouped3DTranspose.from_conv(x, tune="none"), {})
    assert wrong is None


def test_a_workload_times_pytorchs_transposed_kernel_with_the_bias() -> None:
    layer = nn.ConvTranspose3d(8, 8, 3, stride=2, padding=1, groups=8)
    meeting = Meeting(2, (3, 4, 5), torch.float32, "contiguous", torch.device("cpu"), True, True)
    found = problems(layer, meeting)
    assert [problem.layer_pass for problem in found] == PASSES
    assert [problem.bias for problem in found] == [True, False, False]
    for problem in found:
        workload = PassWorkload(problem, 2)
        schedule = workload.space.default()
        candidate = workload.build(schedule, 60)
        assert workload.check(candidate).passed and quick_check(candidate).passed
        assert workload.time(workload.baseline, 0.01).seconds > 0
        assert (
            native.error(candidate(*workload.operands), workload.baseline(*workload.operands).double()) < 1e-6
        )
        again = Candidate(problem, candidate.kernel)
        assert torch.equal(again(*workload.operands), candidate(*workload.operands))


# Models


class Up(nn.Module):
    """A block as MedNeXt has to go up: the residual is a transposed layer too, and pads are added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose3d(8, 8, 3, stride=2, padding=1, groups=8)
        self.norm = nn.GroupNorm(8, 8)
        self.conv2 = nn.Conv3d(8, 16, 1)
        self.conv3 = nn.Conv3d(16, 4, 1)
        self.res = nn.ConvTranspose3d(8, 4, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(F.gelu(self.conv2(self.norm(self.conv1(x)))))
        return F.pad(y, (1, 0) * 3) + F.pad(self.res(x), (1, 0) * 3)


class Sized(nn.Module):
    """Asks for the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(4, 4, 3, 2, 1, groups=4)
        self.up = nn.ConvTranspose3d(4, 4, 3, 2, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x), output_size=x.shape[2:])


def test_convert_report_plan_and_revert(fake: FakeChooser, tmp_path: Path) -> None:
    model, x = Up(), torch.randn(2, 8, 3, 4, 5, requires_grad=True)
    fast = g3dswap.convert(model, x)
    (entry,) = g3dswap.report(fast).swapped
    assert (
        entry.name == "conv1" and entry.verified and type(fast.get_submodule("conv1")) is Grouped3DTranspose
    )
    assert str(entry.geometry) == "transposed 8->8 g8 3x3x3 s2 p1"
    assert [item.direction for item in entry.calls[0].passes] == PASSES
    assert "transposed 8->8" in str(g3dswap.report(fast))
    assert [problem.direction for problem, *_ in fake.asked] == ["grad_input", "forward", "grad_weight"]
    assert g3dswap.verify(model, fast, x).ok
    g3dswap.save_plan(fast, tmp_path / "plan.json")
    fake.asked.clear()
    again = g3dswap.convert(model, plan=tmp_path / "plan.json")
    assert type(again.get_submodule("conv1")) is Grouped3DTranspose
    assert len(fake.asked) == 3 and all(problem.transposed for problem, *_ in fake.asked)
    assert g3dswap.report(again).swapped[0].calls == entry.calls
    weight = fast.get_parameter("conv1.weight")
    back = g3dswap.revert(fast)
    assert type(back.get_submodule("conv1")) is nn.ConvTranspose3d
    assert back.get_parameter("conv1.weight") is weight and torch.equal(back(x), model(x))


def test_a_call_whose_output_is_empty_is_pytorchs(fake: FakeChooser) -> None:
    model = nn.Sequential(nn.ConvTranspose3d(4, 4, 1, padding=1, groups=4))
    x = torch.randn(2, 4, 2, 4, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # on one thread PyTorch has another kernel, which refuses
    try:
        fast = g3dswap.convert(model, x)
        assert fast(x).shape == model(x).shape == (2, 4, 0, 2, 2) and not fake.asked
    finally:
        torch.set_num_threads(before)


def test_inspect_and_keep(fake: FakeChooser) -> None:
    assert [item.name for item in g3dswap.inspect(Up()).swapped] == ["conv1"]
    fake.native = lambda problem: True
    fast = g3dswap.convert(Up(), torch.randn(2, 8, 3, 4, 5))
    assert type(fast.get_submodule("conv1")) is nn.ConvTranspose3d
    (kept,) = g3dswap.report(fast).kept
    assert kept.reason == "PyTorch's own kernels stay in every pass: nothing was faster"


def test_a_kernel_that_is_wrong_is_not_swapped_in(fake: FakeChooser) -> None:
    fake.candidate = Wrong
    fast = g3dswap.convert(Up(), torch.randn(2, 8, 3, 4, 5))
    (kept,) = g3dswap.report(fast).kept
    assert "would compute something else: forward has a relative error" in kept.reason


def test_the_size_that_a_call_asks_for_is_what_is_tuned_and_planned(
    fake: FakeChooser, tmp_path: Path
) -> None:
    model, x = Sized(), torch.randn(2, 4, 4, 5, 6)
    fast = g3dswap.convert(model, x)
    up = next(item for item in g3dswap.report(fast).swapped if item.name == "up")
    assert up.calls[0].output_padding == (1, 0, 1) and str(up.calls[0]).endswith("float32 op1x0x1")
    assert up.verified and {p.geometry.size for p, _, name in fake.asked if name == "up"} == {(4, 5, 6)}
    g3dswap.save_plan(fast, tmp_path / "plan.json")
    fake.asked.clear()
    again = g3dswap.convert(model, plan=tmp_path / "plan.json")
    assert {p.geometry.size for p, _, name in fake.asked if name == "up"} == {(4, 5, 6)}
    assert torch.equal(again(x), fast(x))


def test_optimizer_stays_valid_in_place(fake: FakeChooser) -> None:
    model = Up()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.conv1.weight.detach().clone()
    fast = g3dswap.convert(model, torch.randn(2, 8, 3, 4, 5), inplace=True)
    fast(torch.randn(1, 8, 3, 4, 5)).sum().backward()
    optimizer.step()
    assert fast is model and not torch.equal(model.conv1.weight, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what other packages warn about is theirs
def test_mednext_with_its_up_blocks() -> None:
    from monai.networks.nets import MedNeXtS

    network = MedNeXtS(spatial_dims=3, in_channels=1, out_channels=2, deep_supervision=False)
    x = torch.randn(2, 1, 16, 16, 16)
    fast = g3dswap.convert(network, (x,), tune="none", progress=False)
    ups = [n for n, m in network.named_modules() if isinstance(m, nn.ConvTranspose3d) and m.groups > 1]
    swapped = [n for n, m in fast.named_modules() if isinstance(m, Grouped3DTranspose)]
    assert ups and swapped == ups, str(g3dswap.report(fast))
    g3dswap.verify(network, fast, (x,)).check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("how", ["neither", "input", "module"])
def test_layouts_on_a_gpu_are_pytorchs(dtype: torch.dtype, groups: int, how: str) -> None:
    layer = nn.ConvTranspose3d(4, 8, 3, 2, 1, groups=groups, dtype=dtype, device="cuda")
    x = torch.randn(2, 4, 4, 5, 6, dtype=dtype, device="cuda")
    if how == "input":
        x = x.to(memory_format=torch.channels_last_3d)
    if how == "module":
        layer = layer.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    ours = Grouped3DTranspose.from_conv(layer, tune="none", share=False)
    strides = []
    for module in (layer, ours):
        input = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = module(input)
        grads = torch.autograd.grad(out, [input, *module.parameters()], torch.ones_like(out))
        strides.append([out.stride(), *(g.stride() for g in grads)])
    assert strides[0] == strides[1]
    layout = native.output_format(x, layer.weight, layer.stride, layer.dilation, layer.groups)
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("groups", [4, 8])
def test_default_kernels_on_a_gpu(dtype: torch.dtype, layout: str, groups: int) -> None:
    layer = nn.ConvTranspose3d(8, 16, 3, (1, 2, 2), 1, (0, 1, 0), groups=groups, dtype=dtype, device="cuda")
    meeting = Meeting(2, (4, 5, 6), dtype, layout, torch.device("cuda:0"), True, True)
    sources = [choose.resolve(problem, 2, "none").source for problem in problems(layer, meeting)]
    assert sources == ["default"] * 3
    assert check_layer(layer, meeting, lambda x: Grouped3DTranspose.from_conv(x, tune="none"), {}) is None
