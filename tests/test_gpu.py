"""On a CUDA device: the untimed Triton kernels on layers of real networks, and a whole network converted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import g3dswap
from examples import resnext3d
from g3dswap import choose, decided, native
from g3dswap.bench.layers import BenchLayer, read_layers
from g3dswap.problem import DIRECTIONS, LAYOUTS, Geometry, Problem
from g3dswap.tc import runtime_triton
from g3dswap.workload import PassWorkload

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16)
LAYERS = read_layers()

RecordProperty = Callable[[str, object], None]


def label(value: Any) -> str:
    """A word for a test's name."""
    if isinstance(value, BenchLayer):
        return re.sub(r"\W+", "-", value.name)
    return str(value).removeprefix("torch.")


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Tests that run at the same time share the device: each gives back what it has allocated."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def untimed(fresh_cache: Path) -> Iterator[None]:
    """Nothing is known of any layer, neither from this process nor from a cache."""
    choose.forget()
    yield
    choose.forget()


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("layer", LAYERS, ids=label)
def test_default_kernel_of_a_real_layer(
    layer: BenchLayer, dtype: torch.dtype, layout: str, direction: str, record_property: RecordProperty
) -> None:
    """At the layer's own batch, within twice the error of PyTorch's kernel, which may not use TF32 here."""
    bias = layer.bias and direction == "forward"
    problem = Problem(direction, layer.geometry, dtype, layout, DEVICE, bias=bias, precision="ieee")
    workload = PassWorkload(problem, layer.batch)
    schedule = workload.space.default()
    check = workload.check(workload.build(schedule, 120.0))
    # For whoever wants figures: they go into the file that --junitxml writes.
    record_property("error", check.error)
    record_property("native_error", workload.native_error)
    record_property("bound", check.bound)
    record_property("schedule", json.dumps(schedule.to_json()))
    assert check.passed, f"error {check.error:.3g}, bound {check.bound:.3g}: {problem}\n{schedule}"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "amp", "layout"),
    [
        ("ieee", False, "contiguous"),
        ("tf32", False, "contiguous"),  # PyTorch's own default
        ("tf32", True, "contiguous"),
        ("tf32", True, "channels_last_3d"),
    ],
)
def test_a_whole_network(
    precision: str,
    amp: bool,
    layout: str,
    untimed: None,
    monkeypatch: pytest.MonkeyPatch,
    record_property: RecordProperty,
) -> None:
    """The published 3D ResNeXt-101 (32x4d), untimed kernels: outputs and gradients at two batch sizes."""
    model = resnext3d.ResNeXt3D(101, 32, 4, resnext3d.DIRECTIONS)
    model = model.to(DEVICE, memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    clips, _ = resnext3d.moving_shapes(3, (16, 112, 112), torch.Generator().manual_seed(0))
    clips = clips.to(DEVICE, memory_format=LAYOUTS[layout])
    switches = Problem("forward", LAYERS[0].geometry, device="cuda", precision=precision)
    with native.switches(switches), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        fast = g3dswap.convert(model, (clips[:2],), tune="none", progress=False)
        items = g3dswap.report(fast).swapped
        assert len(items) == sum(isinstance(m, g3dswap.Grouped3D) for m in fast.modules()) == 33
        assert all(item.verified for item in items)
        calls = [call for item in items for call in item.calls]
        assert {tuple(choice.source for choice in call.passes) for call in calls} == {("default",) * 3}
        assert {(call.dtype, call.layout) for call in calls} == {("bfloat16" if amp else "float32", layout)}
        first = g3dswap.verify(model, fast, (clips[:2],))
        record_property("ratio", first.worst.ratio)
        record_property("tensors", len(first.tensors))
        first.check()

        before = dict(decided.made)
        monkeypatch.setattr(runtime_triton, "load", no_compilation)
        monkeypatch.setattr(runtime_triton._Launcher, "compile", no_compilation)
        second = g3dswap.verify(model, fast, (clips,))
        record_property("ratio of another batch", second.worst.ratio)
        second.check()
        assert decided.made == before


def no_compilation(*_: object) -> None:
    pytest.fail("a new batch size compiles a kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_a_converted_layer_in_a_cuda_graph(dtype: torch.dtype, untimed: None) -> None:
    """What a graph replays is our kernel, on the data that its input holds by then."""
    geometry = Geometry(256, 256, 32, (8, 28, 28), (3, 3, 3), (2, 2, 2), (1, 1, 1))
    conv = nn.Conv3d(256, 256, 3, stride=2, padding=1, groups=32, bias=False, device=DEVICE, dtype=dtype)
    x, other = (torch.randn(geometry.input_shape(4), device=DEVICE, dtype=dtype) for _ in range(2))
    fast = g3dswap.convert(conv, x, tune="none", progress=False)
    assert isinstance(fast, g3dswap.Grouped3D)
    with torch.no_grad():
        expected = fast(other)
        # In the last bits at least, PyTorch's kernel differs: it sums in another order.
        assert not torch.equal(expected, conv(other))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fast(x)
        x.copy_(other)
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        problem = Problem("forward", geometry, dtype, device="cuda")
        reference = native.reference(problem, other, conv.weight, None)
        assert native.error(out, reference) <= native.bound(problem, other, conv.weight, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardswish()], ids=str
)
def test_a_fused_layer(activation: nn.Module, transposed: bool, dtype: torch.dtype, untimed: None) -> None:
    """Folding and the activation in the kernel, against the three layers one after the other."""
    kind = nn.ConvTranspose3d if transposed else nn.Conv3d
    norm = nn.BatchNorm3d(16)
    nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    model = nn.Sequential(kind(8, 16, 3, padding=1, groups=4), norm, activation).to(DEVICE, dtype).eval()
    x = torch.randn(2, 8, 4, 9, 11, device=DEVICE, dtype=dtype)
    fast = g3dswap.convert(model, x, fuse=True, tune="none", progress=False)
    (item,) = g3dswap.report(fast).swapped
    assert item.verified and [choice.source for choice in item.calls[0].passes] == ["default"]
    assert g3dswap.report(fast).fused[0].kind
    g3dswap.verify(model, fast, x).check()
