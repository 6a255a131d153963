from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from g3dswap import Grouped3D, layercheck, native
from g3dswap.errors import ArgumentError
from g3dswap.meetings import Meeting
from g3dswap.problem import DIRECTIONS, DTYPES, Geometry, Problem, layer_pass

GEOMETRY = Geometry(4, 8, 4, (5, 6, 7), (3, 3, 3), (1, 2, 1), (1, 1, 1))


def taps(g: Geometry) -> Any:
    """(tap, the slice of the padded input that meets it) for every tap of the kernel."""
    for tap in itertools.product(*map(range, g.kernel)):
        window = tuple(
            slice(i * d, i * d + s * (o - 1) + 1, s)
            for i, d, s, o in zip(tap, g.dilation, g.stride, g.output_size)
        )
        yield tap, (slice(None), slice(None), slice(None), *window)


def naive(problem: Problem, *tensors: Any) -> np.ndarray:
    """The three comprehensions in numpy, tap by tap: shares nothing with ATen's convolutions."""
    g, n = problem.geometry, len(tensors[0])
    c, f = g.in_channels // g.groups, g.out_channels // g.groups
    arrays: list[Any] = [None if x is None else x.double().numpy() for x in tensors]
    pads = [(0, 0)] * 3 + [(p, p) for p in g.padding]
    inner = (slice(None), slice(None), slice(None), *(slice(p, p + s) for p, s in zip(g.padding, g.size)))
    if problem.direction == "forward":
        image = np.pad(arrays[0].reshape(n, g.groups, c, *g.size), pads)
        weight = arrays[1].reshape(g.groups, f, c, *g.kernel)
        out = np.zeros((n, g.groups, f, *g.output_size))
        for tap, window in taps(g):
            out += np.einsum("ngcthw,gfc->ngfthw", image[window], weight[(..., *tap)])
        if arrays[2] is not None:
            out += arrays[2].reshape(g.groups, f, 1, 1, 1)
        return out.reshape(g.output_shape(n))
    grad = arrays[0].reshape(n, g.groups, f, *g.output_size)
    if problem.direction == "grad_input":
        weight = arrays[2].reshape(g.groups, f, c, *g.kernel)
        padded = np.pad(np.zeros((n, g.groups, c, *g.size)), pads)
        for tap, window in taps(g):
            padded[window] += np.einsum("ngfthw,gfc->ngcthw", grad, weight[(..., *tap)])
        if problem.bias:
            padded += arrays[3].reshape(g.groups, c, 1, 1, 1)
        return padded[inner].reshape(g.input_shape(n))
    image = np.pad(arrays[1].reshape(n, g.groups, c, *g.size), pads)
    result = np.zeros((g.groups, f, c, *g.kernel))
    for tap, window in taps(g):
        result[(..., *tap)] = np.einsum("ngfthw,ngcthw->gfc", grad, image[window])
    return result.reshape(g.weight_shape())


@st.composite
def problems(draw: Any) -> Problem:
    def triple(low: int, high: int) -> tuple[int, int, int]:
        return draw(st.tuples(*[st.integers(low, high)] * 3))

    groups = draw(st.integers(1, 4))
    try:
        geometry = Geometry(
            groups * draw(st.integers(1, 3)),
            groups * draw(st.integers(1, 3)),
            groups,
            triple(1, 7),
            triple(1, 3),
            triple(1, 3),
            triple(0, 2),
            triple(1, 2),
        )
    except ArgumentError:
        assume(False)
    direction = draw(st.sampled_from(["forward", "grad_input", "grad_weight"]))
    transposed = draw(st.booleans())
    bias = layer_pass(direction, transposed) == "forward" and draw(st.booleans())
    layout = draw(st.sampled_from(["contiguous", "channels_last_3d"]))
    dtype = draw(st.sampled_from(DTYPES))
    return Problem(direction, geometry, dtype, layout, bias=bias, transposed=transposed)


@settings(max_examples=150)
@given(problem=problems(), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_reference_is_the_definition(problem: Problem, batch: int, seed: int) -> None:
    operands = native.random_operands(problem, batch, seed)
    ref = native.reference(problem, *operands)
    assert ref.dtype == torch.float64
    np.testing.assert_allclose(ref.numpy(), naive(problem, *operands), rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(problem=problems(), seed=st.integers(0, 99))
def test_run_is_near_the_reference_and_in_its_bound(problem: Problem, seed: int) -> None:
    operands = native.random_operands(problem, 2, seed)
    out, ref = native.run(problem, *operands), native.reference(problem, *operands)
    assert out.dtype == problem.dtype and out.shape == ref.shape
    # Far above what rounding does to sums this short, far below what a wrong tap does.
    assert native.error(out, ref) < 100 * torch.finfo(problem.dtype).eps
    assert native.error(out, ref) <= native.bound(problem, *operands, ref=ref)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_input_that_no_tap_meets(dtype: torch.dtype) -> None:
    # PyTorch's own call crashes the process on some of these, so it is not the one to compare with.
    geometry = Geometry(4, 4, 4, (4, 4, 1), (1, 2, 1), (3, 3, 3), (0, 0, 2), (1, 2, 2))
    assert geometry.blind and not GEOMETRY.blind
    operands = native.random_operands(Problem("forward", geometry, dtype, bias=True), 2)
    out = native.run(Problem("forward", geometry, dtype, bias=True), *operands)
    assert operands[2] is not None and out.dtype == dtype
    assert torch.equal(out, operands[2].view(1, 4, 1, 1, 1).expand(geometry.output_shape(2)))


def test_run_gives_what_autograd_gives() -> None:
    x, w = torch.randn(2, 4, 5, 6, 7, requires_grad=True), torch.randn(8, 1, 3, 3, 3, requires_grad=True)
    b = torch.randn(8)
    g = GEOMETRY
    out = F.conv3d(x, w, b, g.stride, g.padding, g.dilation, g.groups)
    assert torch.equal(native.run(Problem("forward", g, bias=True), x.detach(), w.detach(), b), out)
    grad = torch.randn_like(out)
    gi, gw = torch.autograd.grad(out, (x, w), grad)
    for direction, expected in (("grad_input", gi), ("grad_weight", gw)):
        result = native.run(Problem(direction, g), grad, x.detach(), w.detach())
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("output_padding", [(0, 0, 0), (0, 1, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_transposed_layer_is_posed_as_the_passes_of_its_convolution(
    output_padding: tuple[int, int, int], bias: bool
) -> None:
    g = GEOMETRY
    x, w = torch.randn(2, 8, 5, 3, 7, requires_grad=True), torch.randn(8, 1, 3, 3, 3, requires_grad=True)
    b = torch.randn(4) if bias else None
    out = F.conv_transpose3d(x, w, b, g.stride, g.padding, output_padding, g.groups, g.dilation)
    grad = torch.randn_like(out)
    gi, gw = torch.autograd.grad(out, (x, w), grad)
    layer = {"forward": (x, w, b), "grad_input": (grad, x, w), "grad_weight": (grad, x, w)}
    for name, expected in (("forward", out), ("grad_input", gi), ("grad_weight", gw)):
        options = g.stride, g.padding, g.dilation, g.groups, True, output_padding
        problem = native.problem(name, x, w, b, *options)
        assert problem.layer_pass == name and problem.bias == (bias and name == "forward")
        assert problem.geometry.size == out.shape[2:] and problem.geometry.output_size == x.shape[2:]
        assert problem.geometry.output_padding == output_padding
        operands = [None if t is None else t.detach() for t in native.operands(problem, *layer[name])]
        assert torch.equal(native.run(problem, *operands), expected)
        torch.testing.assert_close(native.reference(problem, *operands).float(), expected)


def test_the_pass_of_a_layer_and_that_of_its_convolution_are_named_by_one_function() -> None:
    for transposed in (False, True):
        names = [layer_pass(direction, transposed) for direction in DIRECTIONS]
        assert [layer_pass(name, transposed) for name in names] == list(DIRECTIONS)
    assert names == ["grad_input", "forward", "grad_weight"]


def test_forward_without_weight_is_refused() -> None:
    with pytest.raises(ArgumentError, match="needs an input and a weight"):
        native.run(Problem("forward", GEOMETRY), torch.zeros(1, 4, 5, 6, 7), None, None)


def test_error() -> None:
    ref = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert native.error(torch.tensor([3.0, 4.5]), ref) == pytest.approx(0.1)
    assert native.error(ref.float(), ref) == 0
    assert native.error(torch.zeros(3), ref) == float("inf")
    assert native.error(torch.tensor([float("nan"), 4.0]), ref) == float("inf")
    assert native.error(torch.tensor([float("inf"), 4.0]), ref) == float("inf")
    assert native.error(torch.zeros(2), torch.zeros(2)) == 0
    assert native.error(torch.ones(2), torch.zeros(2)) == float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_is_twice_pytorchs_error_or_the_floor(dtype: torch.dtype) -> None:
    problem = Problem("grad_weight", Geometry(4, 4, 4, (9, 10, 11), (3, 3, 3)), dtype)
    operands = native.random_operands(problem, 3)
    ref = native.reference(problem, *operands)
    own = native.error(native.run(problem, *operands), ref)
    bound = native.bound(problem, *operands)
    assert bound == max(2 * own, native.FLOORS[dtype]) and bound < 40 * torch.finfo(dtype).eps
    one_tap_wrong = ref.clone()
    one_tap_wrong[0, 0, 0, 0, 0] *= 1.5
    assert native.error(one_tap_wrong, ref) > bound


def test_random_operands_have_the_problems_form() -> None:
    problem = Problem("forward", GEOMETRY, torch.float16, "channels_last_3d", bias=True)
    x, w, b = native.random_operands(problem, 3, seed=5)
    assert x is not None and w is not None and b is not None
    assert x.shape == (3, 4, 5, 6, 7) and w.shape == (8, 1, 3, 3, 3) and b.shape == (8,)
    assert x.is_contiguous(memory_format=torch.channels_last_3d) and x.dtype == b.dtype == torch.float16
    again = native.random_operands(problem, 3, seed=5)[0]
    assert again is not None and torch.equal(x, again)
    grads = native.random_operands(replace(problem, direction="grad_weight", bias=False), 3)
    shapes = [tuple(t.shape) for t in grads if t is not None]
    assert shapes == [(3, 8, 5, 3, 7), (3, 4, 5, 6, 7), (8, 1, 3, 3, 3)]


SHAPES = [
    ((2, 4, 5, 6, 7), (8, 1, 3, 3, 3), 4),
    ((2, 4, 5, 6, 7), (4, 2, 3, 1, 3), 2),
    ((1, 4, 5, 6, 7), (4, 4, 1, 1, 1), 1),
    ((2, 4, 5, 6, 7), (4, 4, 1, 1, 1), 1),
    ((1, 4, 5, 6, 7), (4, 4, 1, 4, 4), 1),
    ((1, 4, 5, 6, 7), (4, 4, 3, 3, 3), 1),
    ((1, 64, 5, 9, 9), (4, 64, 3, 3, 3), 1),
    ((1, 4, 5, 6, 7), (4, 1, 1, 1, 1), 4),
    ((1, 3, 1, 1, 1), (3, 1, 1, 1, 1), 3),
    ((2, 1, 4, 4, 4), (2, 1, 3, 3, 3), 1),
    ((0, 4, 5, 6, 7), (4, 1, 3, 3, 3), 4),
    ((1, 4, 1, 6, 7), (4, 1, 1, 3, 3), 4),
]


def arranged(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "channels_last_3d":
        return x.contiguous(memory_format=torch.channels_last_3d)
    if how == "sliced":
        return torch.cat([x, x], 4)[..., ::2]
    if how == "permuted":
        return x.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    if how == "expanded":
        return x[:1].expand(x.shape)
    return x


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
@pytest.mark.parametrize("threads", [1, 2])
def test_output_format_is_pytorchs_on_a_cpu(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for (shape, kernel, groups), a, b in itertools.product(
            SHAPES,
            ["contiguous", "channels_last_3d", "sliced", "permuted", "expanded"],
            ["contiguous", "channels_last_3d", "permuted"],
        ):
            x = arranged(torch.randn(shape, dtype=dtype), a)
            w = arranged(torch.randn(kernel, dtype=dtype), b)
            out = torch.conv3d(x, w, groups=groups)
            expected = native.output_format(x, w, [1, 1, 1], [1, 1, 1], groups)
            empty = torch.empty(out.shape, memory_format=expected)
            assert out.stride() == empty.stride(), (shape, kernel, a, b, expected)
    finally:
        torch.set_num_threads(before)


def test_output_format_without_onednn() -> None:
    x = torch.randn(2, 4, 5, 6, 7).contiguous(memory_format=torch.channels_last_3d)
    w = torch.randn(4, 1, 3, 3, 3)
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of TF32 switches on a CPU build
    try:
        assert torch.conv3d(x, w, groups=4).is_contiguous()
        assert native.output_format(x, w, [1] * 3, [1] * 3, 4) == torch.contiguous_format
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert native.output_format(x, w, [1] * 3, [1] * 3, 4) == torch.channels_last_3d


def test_switches_are_read_and_restored() -> None:
    backends: Any = torch.backends
    other = Problem("forward", GEOMETRY, device="cuda", precision="ieee", deterministic=True)
    # Bracketed, because another test may have imported what forbids to set these flags plainly.
    with torch.backends.__allow_nonbracketed_mutation():
        before = backends.cudnn.conv.fp32_precision
        try:
            for wanted in ("ieee", "tf32"):
                backends.cudnn.conv.fp32_precision = wanted
                assert native.precision(torch.float32, "cuda") == wanted
                assert native.precision(torch.bfloat16, "cuda") == "ieee"
                assert native.precision(torch.float32, "cpu") == "ieee"
                with native.switches(other):
                    assert backends.cudnn.conv.fp32_precision == "ieee" and backends.cudnn.deterministic
                    assert native.precision(torch.float32, "cuda") == "ieee" and native.deterministic("cuda")
                assert native.precision(torch.float32, "cuda") == wanted and not native.deterministic("cuda")
        finally:
            backends.cudnn.conv.fp32_precision = before
    torch.use_deterministic_algorithms(True)
    try:
        assert native.deterministic("cpu") and native.deterministic("cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not native.deterministic("cpu")


@pytest.fixture
def cudnn() -> Iterator[Callable[..., tuple[bool, bool]]]:
    """Sets whether cuDNN searches and is deterministic, if given, and says so; as before afterwards."""
    read = torch._C._get_cudnn_benchmark, torch._C._get_cudnn_deterministic
    write = torch._C._set_cudnn_benchmark, torch._C._set_cudnn_deterministic
    before = [get() for get in read]

    def switches(*wanted: bool) -> tuple[bool, bool]:
        for put, value in zip(write, wanted):
            put(value)
        return read[0](), read[1]()

    yield switches
    switches(*before)


def test_the_reference_searches_for_no_kernel(
    monkeypatch: pytest.MonkeyPatch, cudnn: Callable[..., tuple[bool, bool]]
) -> None:
    seen = []
    compute = native._compute

    def recorded(*args: Any) -> Any:
        seen.append(cudnn())
        return compute(*args)

    monkeypatch.setattr(native, "_compute", recorded)
    problem = Problem("forward", GEOMETRY)
    operands = native.random_operands(problem, 1)
    for wanted in (True, False):
        cudnn(wanted, False)
        native.run(problem, *operands)
        native.reference(problem, *operands)
        assert cudnn() == (wanted, False)
    # PyTorch remembers what it took without a search, so that must not be what the user's own calls are.
    assert seen == [(True, False), (False, True), (False, False), (False, True)]
    cudnn(True, True)
    native.reference(problem, *operands)
    assert seen[-1] == (True, True)


def test_where_no_deterministic_kernel_is_another_runs(cudnn: Callable[..., tuple[bool, bool]]) -> None:
    seen = []

    def call() -> str:
        seen.append(cudnn())
        if seen[-1][1]:
            raise RuntimeError("unable to find an engine")
        return "found"

    cudnn(True, False)
    assert native.unsearched(call) == "found" and seen == [(False, True), (True, False)]
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        native.unsearched(lambda: native.unsearched(call) if cudnn(True, True) else None)


def test_only_pytorchs_kernels_are_checked_with_other_switches(
    monkeypatch: pytest.MonkeyPatch, cudnn: Callable[..., tuple[bool, bool]]
) -> None:
    """Ours are chosen for the switches that hold."""
    seen: dict[str, tuple[bool, bool]] = {}
    passes = layercheck._passes

    def recorded(layer: nn.Module, *args: Any) -> Any:
        seen["theirs" if type(layer) is nn.Conv3d else "ours"] = cudnn()
        return passes(layer, *args)

    monkeypatch.setattr(layercheck, "_passes", recorded)
    meeting = Meeting(1, (3, 4, 5), torch.float32, "contiguous", torch.device("cpu"), True, True)
    cudnn(True, False)
    conv = nn.Conv3d(4, 4, 3, padding=1, groups=4)
    assert layercheck.check_layer(conv, meeting, lambda x: Grouped3D.from_conv(x, tune="none"), {}) is None
    assert seen == {"theirs": (False, True), "ours": (True, False)}


def test_switches_work_after_global_flags_were_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    # The flag is a global of the module that `torch.backends` has wrapped.
    module = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(module, "__allow_nonbracketed_mutation_flag", False)
    with pytest.raises(RuntimeError):
        torch.backends.cudnn.deterministic = True
    with native.switches(Problem("forward", GEOMETRY, device="cuda", deterministic=True)):
        assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.deterministic


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_format_is_pytorchs_on_cuda(dtype: torch.dtype) -> None:
    for (shape, kernel, groups), a, b, dilation in itertools.product(
        SHAPES, ["contiguous", "channels_last_3d", "permuted"], ["contiguous", "channels_last_3d"], [1, 2]
    ):
        if any(dilation * (side - 1) + 1 > size for side, size in zip(kernel[2:], shape[2:])):
            continue
        x = arranged(torch.randn(shape, dtype=dtype, device="cuda"), a)
        w = arranged(torch.randn(kernel, dtype=dtype, device="cuda"), b)
        out = torch.conv3d(x, w, groups=groups, dilation=dilation)
        expected = native.output_format(x, w, [1] * 3, [dilation] * 3, groups)
        assert out.stride() == torch.empty(out.shape, memory_format=expected).stride(), (shape, kernel, a, b)
