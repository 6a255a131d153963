from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.fx
import torch.nn.utils.prune
from torch import Tensor, nn

from g3dswap import choose, decided
from g3dswap.errors import ArgumentError, InputError, InputTypeError
from g3dswap.module import Grouped3D
from tests.kernels import Recorder


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Our kernels are chosen for everything that they cover."""
    recorder = Recorder()
    monkeypatch.setattr(choose, "resolve", recorder)
    decided.lookup().clear()
    yield recorder
    decided.lookup().clear()


def pair(*args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[nn.Conv3d, Grouped3D]:
    """An nn.Conv3d and a Grouped3D with parameters of the same values."""
    conv, ours = nn.Conv3d(*args, **kwargs).to(dtype), Grouped3D(*args, **kwargs).to(dtype)
    ours.load_state_dict(conv.state_dict())
    return conv, ours


def compare(conv: nn.Module, ours: nn.Module, x: Tensor) -> None:
    results = []
    for module in (conv, ours):
        input = x.detach().clone().requires_grad_()
        out = module(input)
        grads = torch.autograd.grad(out.sin().sum(), [input, *module.parameters()])
        results.append([out, *grads])
    for expected, mine in zip(*results):
        torch.testing.assert_close(mine, expected)
        assert mine.stride() == expected.stride()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2, 3), "padding": (0, 1, 2), "dilation": (2, 1, 1)},
        {"padding": "valid", "dilation": 2},
        {"padding": "same", "dilation": (1, 2, 3)},
        {"padding": (1, 2, 0), "padding_mode": "replicate"},
        {"padding": 1, "padding_mode": "reflect", "stride": 2},
        {"padding": (1, 0, 2), "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "reflect", "bias": False},
    ],
    ids=str,
)
def test_options(kwargs: dict[str, Any], batched: bool, kernels: Recorder) -> None:
    conv, ours = pair(4, 8, 3, groups=2, **kwargs)
    x = torch.randn(2, 4, 6, 7, 8, dtype=torch.float64)
    compare(conv, ours, x if batched else x[0])
    assert kernels.directions() == ["forward", "grad_input", "grad_weight"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("kernel", [2, (2, 3, 4), (1, 2, 1)])
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_same_padding_that_is_uneven(kernel: Any, mode: Any) -> None:
    conv, ours = pair(4, 4, kernel, groups=4, padding="same", padding_mode=mode)
    x = torch.randn(2, 4, 6, 7, 8, dtype=torch.float64)
    compare(conv, ours, x)
    compare(conv, ours, x[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_empty_batch(groups: int, kernels: Recorder) -> None:
    conv, ours = pair(4, 4, 3, groups=groups)
    compare(conv, ours, torch.randn(0, 4, 5, 5, 5, dtype=torch.float64))
    assert not kernels.resolved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["module", "input", "both"])
def test_channels_last(dtype: torch.dtype, how: str, kernels: Recorder) -> None:
    conv, ours = pair(4, 8, 3, groups=2, dtype=dtype)
    x = torch.randn(2, 4, 5, 6, 7, dtype=dtype)
    if how != "module":
        x = x.to(memory_format=torch.channels_last_3d)
    if how != "input":
        conv, ours = (m.to(memory_format=torch.channels_last_3d) for m in (conv, ours))  # type: ignore[call-overload]
    assert ours(x).stride() == conv(x).stride()
    last = conv(x).is_contiguous(memory_format=torch.channels_last_3d)
    assert last or dtype == torch.bfloat16  # where a processor's own instructions decide
    assert {layout for _, layout, _ in kernels.runs} == {"channels_last_3d" if last else "contiguous"}


def test_tune_and_cache_reach_the_choice(kernels: Recorder, tmp_path: Path) -> None:
    Grouped3D(4, 4, 3, groups=4)(torch.randn(3, 4, 5, 5, 5))
    Grouped3D(4, 4, 3, groups=4, tune="none", cache=tmp_path)(torch.randn(3, 4, 5, 5, 5))
    assert [(batch, tune, cache) for _, batch, tune, cache in kernels.resolved] == [
        (3, "quick", ""),
        (3, "none", str(tmp_path)),
    ]


def test_repr() -> None:
    assert repr(Grouped3D(4, 8, 3, groups=2, padding="same", bias=False)) == (
        "Grouped3D(4, 8, kernel_size=(3, 3, 3), stride=(1, 1, 1), padding=same, groups=2, bias=False, "
        "tune='quick')"
    )
    assert repr(Grouped3D(4, 8, 1, groups=2, tune="full", cache="/c")).endswith(
        "groups=2, tune='full', cache='/c')"
    )


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "copy", "save"])
def test_copies(way: str, tmp_path: Path) -> None:
    module = Grouped3D(4, 8, 3, groups=2, padding="same", tune="cached", cache="/c")
    module.eval()
    module.weight.requires_grad_(False)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(module))
    elif way == "save":
        torch.save(module, tmp_path / "module.pt")
        again = torch.load(tmp_path / "module.pt", weights_only=False)
    else:
        again = getattr(copy, way)(module)
    assert type(again) is Grouped3D and (again.tune, again.cache, again.training) == ("cached", "/c", False)
    assert again.bias is not None and again.bias.requires_grad and not again.weight.requires_grad
    assert (again.weight is module.weight) == (way == "copy")
    x = torch.randn(1, 4, 5, 5, 5)
    assert torch.equal(again(x), module(x))


def test_state_dict_goes_both_ways() -> None:
    conv, ours = nn.Conv3d(4, 8, 3, groups=2), Grouped3D(4, 8, 3, groups=2)
    buffer = io.BytesIO()
    torch.save(conv.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer), strict=True)
    assert torch.equal(ours.weight, conv.weight) and list(ours.state_dict()) == ["weight", "bias"]
    with torch.no_grad():
        ours.weight.add_(1)
    conv.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours.weight, conv.weight)
    shapes = [[(name, p.shape) for name, p in m.named_parameters()] for m in (conv, ours)]
    assert shapes[0] == shapes[1]


def test_reset_parameters_draws_what_nn_conv3d_draws() -> None:
    torch.manual_seed(3)
    conv = nn.Conv3d(4, 8, 3, groups=2)
    torch.manual_seed(3)
    ours = Grouped3D(4, 8, 3, groups=2)
    assert all(map(torch.equal, conv.parameters(), ours.parameters()))


def hooked(conv: nn.Conv3d, log: list[str]) -> list[Any]:
    """Every kind of hook on a layer; each writes what it is and the class it was given."""

    def note(kind: str) -> Any:
        def hook(module: Any, *args: Any, **kwargs: Any) -> None:
            log.append(f"{kind} {type(module).__name__}")

        return hook

    return [
        conv.register_forward_pre_hook(note("pre")),
        conv.register_forward_pre_hook(note("pre with kwargs"), with_kwargs=True),
        conv.register_forward_hook(note("forward")),
        conv.register_forward_hook(note("always"), always_call=True, with_kwargs=True),
        conv.register_full_backward_pre_hook(note("backward pre")),
        conv.register_full_backward_hook(note("backward")),
        conv.register_state_dict_pre_hook(note("state_dict pre")),
        conv.register_state_dict_post_hook(note("state_dict")),
        conv.register_load_state_dict_pre_hook(note("load pre")),
        conv.register_load_state_dict_post_hook(note("load post")),
    ]


def exercise(module: nn.Module) -> None:
    module(torch.randn(1, 4, 4, 4, 4, requires_grad=True)).sum().backward()
    module.load_state_dict(module.state_dict())


@pytest.mark.parametrize("share", [True, False])
def test_from_conv_carries_everything_over(share: bool) -> None:
    conv = nn.Conv3d(4, 8, 3, (1, 2, 1), "valid", 1, 2, dtype=torch.float64)
    conv = conv.to(memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload]
    conv.weight.requires_grad_(False)
    conv.note = "mine"
    conv.register_buffer("mask", torch.ones(2), persistent=False)
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    ours = Grouped3D.from_conv(conv, tune="cached", cache=Path("/c"), share=share)
    assert type(ours) is Grouped3D and (ours.tune, ours.cache) == ("cached", "/c")
    assert (ours.weight is conv.weight) == (ours.bias is conv.bias) == share
    assert not ours.weight.requires_grad and ours.bias is not None and ours.bias.requires_grad
    assert ours.weight.is_contiguous(memory_format=torch.channels_last_3d) and not ours.training
    assert ours.note == "mine" and "mask" not in ours.state_dict()
    assert torch.equal(ours.get_buffer("mask"), torch.ones(2))
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in before.items())
    x = torch.randn(2, 4, 6, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), conv(x))
    ours.register_buffer("late", torch.ones(1))
    assert not hasattr(conv, "late")
    back = ours.to_conv()
    assert type(back) is nn.Conv3d and back.weight is ours.weight and back.note == "mine"
    assert back.__dict__.keys() == conv.__dict__.keys() and repr(back) == repr(conv)
    assert ours.tune == "cached" and ours.to_conv(share=False).weight is not ours.weight


def test_from_conv_keeps_hooks_and_their_handles() -> None:
    log: list[str] = []
    conv = nn.Conv3d(4, 4, 3, groups=4)
    handles = hooked(conv, log)
    exercise(conv)
    expected, log[:] = [line.replace("Conv3d", "Grouped3D") for line in log], []
    assert len(expected) == 10
    ours = Grouped3D.from_conv(conv)
    del conv
    gc.collect()
    exercise(ours)
    assert log == expected
    del log[:]
    exercise(copy.deepcopy(ours))
    assert log == expected
    del log[:], handles[0]
    for handle in handles[:-1]:
        handle.remove()
    exercise(ours)
    assert log == ["pre Grouped3D", "load post Grouped3D"]
    back = ours.to_conv()
    del ours, log[:]
    gc.collect()
    exercise(back)
    assert log[0] == "pre Conv3d"


def test_optimizer_stays_valid() -> None:
    conv = nn.Conv3d(4, 4, 3, groups=4)
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    ours = Grouped3D.from_conv(conv)
    before = ours.weight.detach().clone()
    ours(torch.randn(1, 4, 4, 4, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(ours.weight, before)


class Subclass(nn.Conv3d):
    pass


def weight_normed() -> nn.Module:
    conv = nn.Conv3d(4, 4, 3, groups=4)
    nn.utils.parametrizations.weight_norm(conv)
    return conv


def pruned() -> nn.Module:
    conv = nn.Conv3d(4, 4, 3, groups=4)
    nn.utils.prune.l1_unstructured(conv, "weight", 0.5)
    return conv


def replaced() -> nn.Module:
    conv = nn.Conv3d(4, 4, 3, groups=4)
    conv.forward = lambda x: x  # type: ignore
    return conv


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Subclass(4, 4, 3), "Subclass is not exactly nn.Conv3d and may compute something else; conv"),
        (lambda: Grouped3D(4, 4, 3), "Grouped3D is not exactly nn.Conv3d"),
        (lambda: nn.LazyConv3d(4, 3), "LazyConv3d is not exactly nn.Conv3d"),
        (weight_normed, "ParametrizedConv3d is not exactly nn.Conv3d"),
        (pruned, "weight is not a parameter of its own .*; make it one .* before changing"),
        (replaced, "The layer's forward was replaced on the instance; delete that attribute before"),
    ],
)
def test_from_conv_refuses(make: Any, message: str) -> None:
    conv = make()
    keys = set(conv.__dict__)
    with pytest.raises(ArgumentError, match=message):
        Grouped3D.from_conv(conv)
    assert set(conv.__dict__) == keys


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((4, 4, 3), {"tune": "fast"}, "tune='fast' is unknown; use one of none, cached, quick, full."),
        ((4, 4, 3), {"groups": 3}, "in_channels=4 is not divisible by groups=3; choose a group count"),
        ((4, 6, 3), {"groups": 4}, "out_channels=6 is not divisible by groups=4; choose a group count"),
        ((4, 4, 3), {"groups": 0}, "groups=0 must be a positive integer; use 1 for an ungrouped layer."),
        ((4, 4, 3), {"padding": "full"}, "Invalid padding string"),
        ((4, 4, 3), {"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
        ((4, 4, 3), {"padding_mode": "mirror"}, "padding_mode must be one of"),
    ],
)
def test_bad_arguments(args: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grouped3D(*args, **kwargs)
    if "tune" not in kwargs:
        with pytest.raises(ValueError):
            nn.Conv3d(*args, **kwargs)
    else:
        with pytest.raises(ArgumentError, match=message):
            Grouped3D.from_conv(nn.Conv3d(*args), **kwargs)


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.randn(2, 4, 5), InputError, r"\(2, 4, 5\) has 3 dimensions; pass one of shape \(4, T"),
        (torch.randn(1, 2, 4, 5, 5, 5), InputError, r"has 6 dimensions; pass one of .* \(N, 4, T, H, W\)\."),
        (torch.randn(2, 6, 5, 5, 5), InputError, r"\(2, 6, 5, 5, 5\) has 6 channels; pass one of shape"),
        (torch.randn(2, 5, 5, 5), InputError, r"The input of shape \(2, 5, 5, 5\) has 2 channels"),
        (torch.ones(2, 4, 5, 5, 5).double(), InputError, "is float64 but the weight is float32; convert one"),
        (torch.ones(2, 4, 5, 5, 5, dtype=torch.int64), InputError, "is int64 but the weight is float32"),
        ([1.0], InputTypeError, "The input is a list; pass a torch.Tensor."),
        (None, InputTypeError, "The input is a NoneType; pass a torch.Tensor."),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_bad_inputs(x: Any, kind: type[Exception], message: str, warm: bool, kernels: Recorder) -> None:
    conv, ours = pair(4, 4, 3, groups=2, dtype=torch.float32)
    if warm:
        ours(torch.randn(2, 4, 5, 5, 5))
    with pytest.raises(kind, match=message) as mine:
        ours(x)
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        conv(x)
    assert isinstance(mine.value, type(theirs.value)) and isinstance(mine.value, ArgumentError)
    assert str(mine.value).count(". ") == 0 and len(kernels.resolved) == warm


def test_other_errors_are_pytorchs() -> None:
    conv, ours = pair(4, 4, 3, groups=2, dtype=torch.float32)
    x = torch.randn(2, 4, 1, 5, 5)
    with pytest.raises(RuntimeError) as theirs:
        conv(x)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size") as mine:
        ours(x)
    assert type(mine.value) is RuntimeError and str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast(to: torch.dtype, kernels: Recorder) -> None:
    conv, ours = pair(4, 4, 3, groups=2, dtype=torch.float32)
    x = torch.randn(2, 4, 5, 5, 5)
    with torch.autocast("cpu", to):
        out, expected = ours(x), conv(x)
    assert out.dtype == expected.dtype == to and kernels.resolved[0][0].dtype == to
    out.float().sum().backward()
    assert ours.weight.grad is not None and ours.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "kwargs", [{"padding": 1}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_compile_does_not_compile_again_for_new_batches(kwargs: Any, kernels: Recorder) -> None:
    conv, ours = pair(4, 8, 3, groups=2, dtype=torch.float32, **kwargs)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for count, batch in enumerate((2, 3, 4, 7, 5, 16)):
        x = torch.randn(batch, 4, 5, 6, 7, requires_grad=True)
        out = compiled(x)
        torch.testing.assert_close(out, conv(x))
        grads = torch.autograd.grad(out.sum(), [x, ours.weight])
        expected = torch.autograd.grad(conv(x).sum(), [x, conv.weight])
        torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-4)  # sums of thousands
        # One graph for the first size, one for any other.
        assert counter.frame_count == min(count + 1, 2)
    assert len(kernels.resolved) == 3
    torch._dynamo.reset()


def test_compile_with_a_dynamic_batch_compiles_once(kernels: Recorder) -> None:
    ours = Grouped3D(4, 8, 3, groups=2)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        before = counter.frame_count
        for batch in (2, 3, 8):
            x = torch.randn(batch, 4, 5, 6, 7).to(memory_format=layout)
            torch._dynamo.mark_dynamic(x, 0)
            out = compiled(x)
            assert out.is_contiguous(memory_format=layout)
            torch.testing.assert_close(out, ours(x))
        assert counter.frame_count == before + 1
    torch._dynamo.reset()


def test_compile_under_autocast(kernels: Recorder) -> None:
    ours = Grouped3D(4, 8, 3, groups=2)
    torch._dynamo.reset()

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(x)

    x = torch.randn(2, 4, 5, 6, 7)
    out = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, step(x))
    torch._dynamo.reset()


def test_export_round_trip(kernels: Recorder, tmp_path: Path) -> None:
    ours = Grouped3D(4, 8, 3, groups=2, padding="same").eval()
    x = torch.randn(2, 4, 5, 6, 7)
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "torch.ops.g3dswap.conv3d.default" in program.graph_module.code
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    for batch in (2, 5):
        x = torch.randn(batch, 4, 5, 6, 7)
        torch.testing.assert_close(loaded.module()(x), ours(x))
    assert loaded.state_dict.keys() == ours.state_dict().keys()


def test_fx_traces_through_it(kernels: Recorder) -> None:
    net = nn.Sequential(Grouped3D(4, 8, 3, groups=2, padding="same"), nn.ReLU())
    traced = torch.fx.symbolic_trace(net)
    x = torch.randn(2, 4, 5, 6, 7)
    assert torch.equal(traced(x), net(x))
    assert any("g3dswap" in str(node.target) for node in traced.graph.nodes)


def test_meta_device_and_to_empty() -> None:
    ours = Grouped3D(4, 4, 3, groups=2, device="meta")
    assert ours(torch.randn(2, 4, 5, 5, 5, device="meta")).shape == (2, 4, 3, 3, 3)
    assert ours.to_empty(device="cpu").weight.device.type == "cpu"


def test_a_cache_that_is_no_path_is_refused() -> None:
    with pytest.raises(ArgumentError, match="cache=5 is no directory; give a path, or None for the default"):
        Grouped3D(4, 4, 1, groups=4, cache=5)  # type: ignore[arg-type]
