from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from g3dswap import choose, decided, execute, native, op
from g3dswap.errors import ArgumentError
from g3dswap.problem import ACTIVATIONS, DTYPES
from tests.kernels import Recorder
from tests.profiles import examples

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports where that is installed
    from torch.testing._internal.common_methods_invocations import op_db

CONV3D = torch.ops.g3dswap.conv3d
BACKWARD = torch.ops.g3dswap.conv3d_backward
WRAPPER: Any = op.conv3d
CALL: Any = op.call
PYTORCH: Any = F.conv3d
INFO = next(info for info in op_db if info.name == "nn.functional.conv3d")
CONF: Any = ([1, 2, 1], [1, 0, 2], [1, 1, 2], 2)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Our kernels are chosen for everything that they cover."""
    recorder = Recorder()
    monkeypatch.setattr(choose, "resolve", recorder)
    decided.lookup().clear()
    yield recorder
    decided.lookup().clear()


@pytest.fixture(params=["ours", "native"])
def either(request: pytest.FixtureRequest, kernels: Recorder) -> Recorder:
    """Our kernels, and PyTorch's."""
    kernels.use_native = request.param == "native"
    return kernels


def operands(dtype: torch.dtype = torch.float64, grad: bool = True, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 4, 4, 5, 6), (6, 2, 2, 3, 2), (6,)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_(grad) for s in shapes]


def native_grads(out: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, grad)


LAYOUTS = ["contiguous", "channels_last_3d", "sliced", "expanded"]


def arranged(x: Tensor, how: str) -> Tensor:
    if how == "channels_last_3d":
        return x.contiguous(memory_format=torch.channels_last_3d)
    if how == "sliced":
        return torch.cat([x, x], 4)[..., ::2]
    if how == "expanded":
        return x[:1].expand(x.shape)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_layouts_are_pytorchs(dtype: torch.dtype, either: Recorder) -> None:
    for a, b, batched in itertools.product(LAYOUTS, LAYOUTS[:2], (True, False)):
        x, w, bias = operands(dtype, grad=False)
        x, w = arranged(x, a), arranged(w, b)
        x = x if batched else x[0]
        inputs = [t.detach().requires_grad_() for t in (x, w, bias)]
        out, expected = CONV3D(*inputs, *CONF), PYTORCH(*inputs, *CONF)
        assert out.dtype == dtype and out.stride() == expected.stride(), (a, b, batched)
        grad = torch.randn_like(expected)
        pairs = zip(native_grads(out, inputs, grad), native_grads(expected, inputs, grad))
        exact = PYTORCH(*(t.double() for t in inputs), *CONF)
        assert native.error(out, exact) < 4 * torch.finfo(dtype).eps
        for mine, theirs in pairs:
            assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride(), (a, b, batched)
            assert native.error(mine, theirs) < 20 * torch.finfo(dtype).eps
    assert (set(either.directions()) == set()) == either.use_native


@settings(max_examples=examples(100))
@given(data=st.data())
def test_random_geometries(data: st.DataObject) -> None:
    triple = st.tuples(*[st.integers(1, 3)] * 3)
    groups, kernel, stride, dilation = data.draw(st.tuples(st.integers(2, 4), triple, triple, triple))
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * 3))
    size = [d * (k - 1) + 1 + data.draw(st.integers(0, 3)) for k, d in zip(kernel, dilation)]
    channels, filters = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    batch = data.draw(st.integers(0, 2))
    x = torch.randn(batch, channels * groups, *size, dtype=torch.float64, requires_grad=True)
    w = torch.randn(filters * groups, channels, *kernel, dtype=torch.float64, requires_grad=True)
    decided.lookup().clear()
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "resolve", recorder)
        out, expected = (f(x, w, None, stride, padding, dilation, groups) for f in (CONV3D, PYTORCH))
        torch.testing.assert_close(out, expected)
        if batch:
            grad = torch.randn_like(out)
            torch.testing.assert_close(native_grads(out, [x, w], grad), native_grads(expected, [x, w], grad))
            assert recorder.directions() == ["forward", "grad_input", "grad_weight"]
    decided.lookup().clear()


def test_each_pass_is_resolved_when_first_needed(kernels: Recorder) -> None:
    x, w, b = operands()
    out = CONV3D(x, w, b, *CONF, "quick", "/some/cache")
    assert [p.direction for p, *_ in kernels.resolved] == ["forward"]
    problem, batch, tune, cache = kernels.resolved[0]
    assert (batch, tune, cache) == (2, "quick", "/some/cache")
    geometry = problem.geometry
    assert problem.bias and problem.dtype == torch.float64 and problem.layout == "contiguous"
    assert (geometry.in_channels, geometry.out_channels, geometry.groups) == (4, 6, 2)
    assert (geometry.stride, geometry.padding, geometry.dilation) == ((1, 2, 1), (1, 0, 2), (1, 1, 2))
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert [p.direction for p, *_ in kernels.resolved] == ["forward", "grad_input"]
    torch.autograd.grad(out.sum(), b, retain_graph=True)
    assert len(kernels.resolved) == 2
    torch.autograd.grad(out.sum(), w)
    assert [p.direction for p, *_ in kernels.resolved] == ["forward", "grad_input", "grad_weight"]
    assert not any(p.bias for p, *_ in kernels.resolved[1:])


def test_a_choice_serves_every_batch_and_only_its_own_kind_of_call(kernels: Recorder) -> None:
    for batch in (1, 2, 5):
        CONV3D(*operands(batch=batch, grad=False), *CONF)
    assert len(kernels.resolved) == 1 and [n for _, _, n in kernels.runs] == [1, 2, 5]
    x, w, b = operands(grad=False)
    calls = [
        (x.float(), w.float(), b.float(), *CONF),
        (x[..., 1:], w, b, *CONF),
        (arranged(x, "channels_last_3d"), w, b, *CONF),
        (x, w, None, *CONF),
        (x, w, b, [1, 1, 1], *CONF[1:]),
        (x, w, b, CONF[0], [1, 1, 1], *CONF[2:]),
        (x, w, b, *CONF[:2], [1, 1, 1], 2),
        (x, w, b, *CONF, "full"),
        (x, w, b, *CONF, "cached", "/elsewhere"),
    ]
    for count, call in enumerate(calls, 2):
        CONV3D(*call)
        assert len(kernels.resolved) == count
    torch.use_deterministic_algorithms(True)
    try:
        CONV3D(x, w, b, *CONF)
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernels.resolved[-1][0].deterministic and len(kernels.resolved) == len(calls) + 2


def test_the_dictionary_of_choices_is_bounded(kernels: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "_MOST_CHOICES", 3)
    x, w, _ = operands(grad=False)
    for width in (3, 4, 5, 6):
        CONV3D(x[..., :width].contiguous(), w, None, 1, 0, 1, 2)
    assert len(decided.lookup()) == 1


@pytest.mark.parametrize(
    ("batch", "groups", "dtype"),
    [(2, 1, torch.float32), (0, 2, torch.float32), (2, 2, torch.complex64), (2, 2, torch.int64)],
    ids=["one group", "empty", "complex", "integer"],
)
def test_what_our_kernels_do_not_cover_goes_to_pytorch(
    batch: int, groups: int, dtype: torch.dtype, kernels: Recorder
) -> None:
    x = (4 * torch.randn(batch, 4, 3, 3, 3)).to(dtype)
    w = (4 * torch.randn(4, 4 // groups, 2, 2, 2)).to(dtype)
    if not x.is_floating_point() and not x.is_complex():
        assert torch.equal(CONV3D(x, w, None, 1, 1, 1, groups), PYTORCH(x, w, None, 1, 1, 1, groups))
        return
    x, w = x.requires_grad_(), w.requires_grad_()
    out, expected = CONV3D(x, w, None, 1, 1, 1, groups), PYTORCH(x, w, None, 1, 1, 1, groups)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
    grad = torch.randn_like(out)
    for mine, theirs in zip(native_grads(out, [x, w], grad), native_grads(expected, [x, w], grad)):
        assert torch.equal(mine, theirs)
    assert not kernels.resolved


def test_meta_tensors_have_the_shape_and_no_choice(kernels: Recorder) -> None:
    x, w, b = (t.to("meta") for t in operands())
    assert CONV3D(x, w, b, *CONF).shape == PYTORCH(x, w, b, *CONF).shape and not kernels.resolved


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(either: Recorder, unbatched: bool, bias: bool) -> None:
    x, w, b = (t.detach() for t in operands())
    x, w = x[:, :, :3, :3, :3].contiguous(), w[:4, :, :, :2].contiguous()
    x = (x[0] if unbatched else x).requires_grad_()
    inputs = [x, w.requires_grad_(), *([b[:4].clone().requires_grad_()] if bias else [])]

    def f(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return CONV3D(x, w, b, [1, 2, 1], [1, 0, 0], [1, 1, 2], 2)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_third_derivatives_are_pytorchs(kernels: Recorder) -> None:
    inputs = operands()

    def third(f: Any) -> list[Tensor]:
        # Not linear in any operand, so that no derivative vanishes.
        value = f(*inputs, *CONF).pow(3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((g.pow(2).sum() for g in grads), start=torch.zeros(()))
        return list(torch.autograd.grad(value, inputs))

    for mine, theirs in zip(third(CONV3D), third(PYTORCH)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert set(kernels.directions()) == {"forward", "grad_input", "grad_weight"}


@pytest.mark.parametrize("keep", list(itertools.product([False, True], repeat=3))[1:])
def test_double_backward_of_each_gradient_alone(keep: tuple[bool, ...], kernels: Recorder) -> None:
    inputs = operands()
    results = []
    for f in (CONV3D, PYTORCH):
        out = f(*inputs, *CONF)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).requires_grad_()
        wanted = [x for x, k in zip(inputs, keep) if k]
        grads = torch.autograd.grad(out, wanted, grad, create_graph=True)
        # Plain sums leave some second derivatives undefined rather than zero: both are an absent path.
        value = sum((g.sin().sum() for g in grads), start=torch.zeros(()))
        results.append(torch.autograd.grad(value, [*inputs, grad], allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool, kernels: Recorder) -> None:
    x, w, b = operands(torch.float32, grad)
    torch.library.opcheck(CONV3D, (x, w, None, *CONF))
    for input in (x, x[0].detach().requires_grad_(grad), arranged(x.detach(), "channels_last_3d")):
        torch.library.opcheck(CONV3D, (input, w, b, *CONF, "none", ""))
    assert kernels.runs


ACTIVATED = (*CONF, "none", "", False, [0, 0, 0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_an_activation_is_part_of_the_forward_pass(grad: bool, activation: str, either: Recorder) -> None:
    x, w, b = operands(grad=grad)
    want = native.activate(activation, PYTORCH(x, w, b, *CONF))
    for input in (x, x[0], x[:0]):
        whole = native.activate(activation, PYTORCH(input, w, b, *CONF))
        torch.testing.assert_close(CONV3D(input, w, b, *ACTIVATED, activation), whole)
        torch.testing.assert_close(CALL(input, w, b, *ACTIVATED, activation), whole)
    # Where a gradient is needed, so is what goes into the activation: it is PyTorch's then.
    activations = {problem.activation for problem, *_ in either.resolved}
    assert activations == ({""} if grad else {activation})
    if grad:
        grads = [
            torch.autograd.grad(f(x, w, b, *ACTIVATED, activation).sum(), [x, w, b]) for f in (CONV3D, CALL)
        ]
        for ours in grads:
            torch.testing.assert_close(ours, torch.autograd.grad(want.sum(), [x, w, b], retain_graph=True))


def test_opcheck_with_an_activation(kernels: Recorder) -> None:
    x, w, b = operands(torch.float32, grad=False)
    torch.library.opcheck(CONV3D, (x, w, b, *ACTIVATED, "silu"))
    torch.library.opcheck(CONV3D, (x.requires_grad_(), w, b, *ACTIVATED, "gelu"))
    f = torch.vmap(lambda x: CONV3D(x, w, b, *ACTIVATED, "relu"))
    torch.testing.assert_close(f(x.detach()[None]), PYTORCH(x, w, b, *CONF).relu()[None])
    with pytest.raises(ArgumentError, match="activation='tanh' is unknown; use one of"):
        CONV3D(x.detach(), w, b, *ACTIVATED, "tanh")


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False], [True, False, True]])
def test_opcheck_of_the_backward(mask: list[bool], kernels: Recorder) -> None:
    x, w, b = operands(torch.bfloat16)
    out = torch.randn_like(CONV3D(x, w, b, *CONF)).requires_grad_()
    torch.library.opcheck(BACKWARD, (out, x, w, *CONF, mask, "none", ""))
    assert mask != [True] * 3 or {"grad_input", "grad_weight"} <= set(kernels.directions())


def test_opcheck_of_what_goes_to_pytorch(kernels: Recorder) -> None:
    x, w, _ = operands(torch.float32)
    torch.library.opcheck(CONV3D, (x, torch.randn(6, 4, 2, 3, 2, requires_grad=True)))
    torch.library.opcheck(CONV3D, (x[:0].detach().requires_grad_(), w, None, *CONF))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("grad", [False, True])
def test_pytorchs_samples(dtype: torch.dtype, grad: bool, either: Recorder) -> None:
    samples = list(INFO.sample_inputs("cpu", dtype, requires_grad=grad))
    calls = [(WRAPPER, sample) for sample in samples]
    calls += [(CONV3D, sample) for sample in samples if not isinstance(sample.kwargs.get("padding"), str)]
    assert len(calls) == 20 + 8
    # Without instructions for it, PyTorch also sums bfloat16 in bfloat16.
    rtol, atol = (0.02, 0.05) if dtype == torch.bfloat16 else (None, None)
    for f, sample in calls:
        inputs = [x for x in (sample.input, *sample.args) if x is not None]
        out, expected = (g(sample.input, *sample.args, **sample.kwargs) for g in (f, PYTORCH))
        torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
        assert out.stride() == expected.stride() and out.requires_grad == grad
        if grad:
            seed = torch.randn_like(out)
            found = native_grads(out, inputs, seed)
            expected = native_grads(expected, inputs, seed)
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("index", range(10))
def test_pytorchs_error_inputs(index: int, kernels: Recorder) -> None:
    errors = list(INFO.error_inputs("cpu"))
    assert len(errors) == 10
    error, sample = errors[index], errors[index].sample_input
    with pytest.raises(error.error_type, match=error.error_regex):
        WRAPPER(sample.input, *sample.args, **sample.kwargs)
    if not isinstance(sample.kwargs.get("padding"), str):
        with pytest.raises(error.error_type, match=error.error_regex):
            CONV3D(sample.input, *sample.args, **sample.kwargs)
    assert not kernels.resolved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 3, 4, 5, 6)}, "expected input"),
        ({"x": torch.randn(2, 4, 4)}, "Expected 4D.*or 5D"),
        ({"x": torch.randn(2, 4, 1, 1, 1)}, "Kernel size can't be greater than actual input size"),
        ({"b": torch.randn(5)}, "expected bias to be 1-dimensional with 6 elements"),
        ({"w": torch.randn(5, 2, 2, 3, 2), "b": None}, "to be divisible by 2"),
        ({"b": torch.randn(6).double()}, "should be the same|must be the same|expected.*to have"),
    ],
)
def test_faults_are_pytorchs_errors_even_after_a_good_call(
    change: dict[str, Any], message: str, kernels: Recorder
) -> None:
    x, w, b = operands(torch.float32)
    CONV3D(x, w, b, *CONF)
    call = {"x": x, "w": w, "b": b} | change
    with pytest.raises(RuntimeError) as theirs:
        PYTORCH(call["x"], call["w"], call["b"], *CONF)
    with pytest.raises(RuntimeError, match=message) as ours:
        CONV3D(call["x"], call["w"], call["b"], *CONF)
    assert str(ours.value) == str(theirs.value) and len(kernels.resolved) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast_dtypes_are_pytorchs(dtype: torch.dtype, to: torch.dtype, kernels: Recorder) -> None:
    inputs = operands(dtype)
    with torch.autocast("cpu", to):
        out, expected = CONV3D(*inputs, *CONF), PYTORCH(*inputs, *CONF)
        wrapped = WRAPPER(*inputs, *CONF)
    assert out.dtype == expected.dtype == wrapped.dtype == (dtype if dtype == torch.float64 else to)
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert [g.dtype for g in grads] == [dtype] * 3
    assert kernels.resolved[0][0].dtype == out.dtype
    with torch.autocast("cpu", enabled=False):
        assert CONV3D(*inputs, *CONF).dtype == dtype


def test_autocast_is_over_when_a_kernel_is_chosen(kernels: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning and checks are not to be cast, whether the dispatcher was on the way or not."""
    products = []

    def resolve(*args: Any) -> Any:
        a = torch.ones(2, 2)
        products.append((a @ a).dtype)
        return kernels(*args)

    monkeypatch.setattr(choose, "resolve", resolve)
    inputs = operands(torch.float32)
    for function in (CONV3D, WRAPPER):
        decided.lookup().clear()
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*inputs, *CONF)
            assert (inputs[0][0, 0, 0] @ inputs[0][0, 0, 0].T).dtype == torch.bfloat16  # and goes on after
        out.float().sum().backward()
    assert products == [torch.float32] * 6


@pytest.mark.parametrize("graph", [False, True])
def test_the_dispatcher_is_asked_for_gradients_of_gradients_alone(
    graph: bool, kernels: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def backward(*args: Any) -> Any:
        asked.append(args)
        return BACKWARD.default(*args)

    monkeypatch.setattr(op, "_BACKWARD", backward)
    inputs = operands()
    (first,) = torch.autograd.grad(WRAPPER(*inputs, *CONF).pow(2).sum(), inputs[:1], create_graph=graph)
    assert len(asked) == graph and first.requires_grad == graph
    (expected,) = torch.autograd.grad(PYTORCH(*inputs, *CONF).pow(2).sum(), inputs[:1])
    assert torch.allclose(first, expected)


def test_autocast_mixes_dtypes_as_pytorch_does(kernels: Recorder) -> None:
    x, w, b = operands(torch.float32, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert CONV3D(x.bfloat16(), w, b, *CONF).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            CONV3D(x.double(), w, b, *CONF)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in forward mode
def test_functorch_and_forward_mode_are_pytorchs(kernels: Recorder) -> None:
    x, w, _ = operands(grad=False)

    def loss(f: Any, w: Tensor, x: Tensor) -> Tensor:
        return f(x, w, None, *CONF).pow(2).sum()

    for f in (CONV3D, WRAPPER):
        gradient = torch.func.grad(lambda w, x: loss(f, w, x))  # noqa: B023
        per_sample = torch.func.vmap(gradient, (None, 0))(w, x.unsqueeze(1))
        each = [torch.func.grad(lambda w, x: loss(PYTORCH, w, x))(w, x[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(per_sample, torch.stack(each))
        pair: Any = torch.func.jvp(lambda x: f(x, w, None, *CONF), (x,), (x + 1,))  # noqa: B023
        torch.testing.assert_close(pair[1], PYTORCH(x + 1, w, None, *CONF))
        torch.testing.assert_close(pair[0], PYTORCH(x, w, None, *CONF))
        hessian = torch.func.hessian(lambda w: loss(f, w, x[:1]))(w)  # noqa: B023
        torch.testing.assert_close(hessian, torch.func.hessian(lambda w: loss(PYTORCH, w, x[:1]))(w))


def test_the_short_way_and_the_dispatchers_do_the_same(kernels: Recorder) -> None:
    inputs = operands(torch.float32)
    conf = (*CONF, "cached", "")
    a, b = CALL(*inputs, *conf), CONV3D(*inputs, *conf)
    assert torch.equal(a, b) and a.grad_fn is not None and type(a.grad_fn) is type(b.grad_fn)
    grad = torch.randn_like(a)
    assert all(map(torch.equal, native_grads(a, inputs, grad), native_grads(b, inputs, grad)))
    with torch.no_grad():
        assert not CALL(*inputs, *conf).requires_grad
    with torch.inference_mode():
        assert CALL(*inputs, *conf).is_inference()


def test_whoever_watches_sees_the_operator(kernels: Recorder) -> None:
    inputs = operands(torch.float32)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        WRAPPER(*inputs, *CONF).sum().backward()
    assert "g3dswap.conv3d.default" in seen and "g3dswap.conv3d_backward.default" in seen
    with torch.profiler.profile() as profile:
        WRAPPER(*inputs, *CONF)
    assert "g3dswap::conv3d" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_lazily_negated_tensor_is_negated(which: int, kernels: Recorder) -> None:
    inputs = operands(grad=False)
    inputs[which] = torch._neg_view(inputs[which])
    for f in (WRAPPER, CONV3D):
        torch.testing.assert_close(f(*inputs, *CONF), PYTORCH(*inputs, *CONF))


def test_saved_tensors_are_checked_for_changes(kernels: Recorder) -> None:
    x, w, b = operands()
    out = WRAPPER(x * 1, w, b, *CONF)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("kernel", [1, 2, 3, (1, 2, 5), 4])
@pytest.mark.parametrize("dilation", [1, 2, (1, 2, 3)])
def test_same_padding(kernel: Any, dilation: Any, kernels: Recorder) -> None:
    shape = (kernel,) * 3 if isinstance(kernel, int) else kernel
    x, w = torch.randn(2, 4, 13, 14, 15, dtype=torch.float64), torch.randn(4, 1, *shape, dtype=torch.float64)
    for padding in ("same", "valid"):
        out, expected = (f(x, w, None, 1, padding, dilation, 4) for f in (WRAPPER, PYTORCH))
        torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        WRAPPER(x[0], w, padding="same", dilation=dilation, groups=4),
        PYTORCH(x[0], w, padding="same", dilation=dilation, groups=4),
    )


def test_unknown_padding_is_pytorchs_error() -> None:
    x, w, b = operands()
    with pytest.raises(RuntimeError, match="Invalid padding string: 'full'"):
        WRAPPER(x, w, b, padding="full", groups=2)


def test_fake_batch_stays_symbolic(kernels: Recorder) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    for layout in ("contiguous", "channels_last_3d"):
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env)
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * 4)
        x, w, b = operands(torch.float32, grad=False)
        fake = mode.from_tensor(arranged(x, layout), symbolic_context=context)
        weight, bias = mode.from_tensor(w, static_shapes=True), mode.from_tensor(b, static_shapes=True)
        with mode:
            out = CONV3D(fake, weight, bias, *CONF)
            grads = BACKWARD(out, fake, weight, *CONF, [True, True, True])
        expected = PYTORCH(arranged(x, layout), w, b, *CONF)
        assert isinstance(out.shape[0], torch.SymInt) and out.shape[1:] == expected.shape[1:]
        assert out.stride() == expected.stride() and grads[0].stride() == fake.stride()
        assert not env.guards, [str(guard.expr) for guard in env.guards]


def test_one_number_serves_all_three_dimensions_as_in_pytorch() -> None:
    x, w = torch.randn(1, 4, 5, 5, 5), torch.randn(4, 1, 3, 3, 3)
    out = torch.ops.g3dswap.conv3d(x, w, None, [2], [1], [1], 4)
    torch.testing.assert_close(out, torch.conv3d(x, w, None, [2], [1], [1], 4))
    with pytest.raises(RuntimeError):
        torch.ops.g3dswap.conv3d(x, w, None, [2, 2], [1], [1], 4)
