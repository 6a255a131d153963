"""The direct way of a call does what Python's way does, and leaves to Python what it does not know.

The kernels are real, untimed defaults. A call of a kind that is new goes through Python, the next ones do
not, which ``counts`` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import g3dswap
from g3dswap import choose, comprehensions, decided, direct, native
from g3dswap.choice import Choice
from g3dswap.module import Grouped3D, Grouped3DTranspose
from g3dswap.problem import Geometry, Problem
from g3dswap.stored import open_cache
from g3dswap.tc.schedule import Schedule, serial
from g3dswap.workload import build
from tests.profiles import examples
from tests.training import check, checkpointed, converted, in_bfloat16, plain, start, train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    """In the tests of this file alone: others watch what Python does."""
    # One that an earlier test has begun would replace what is loaded here, at any time.
    if direct._loading is not None:
        direct._loading.join()
    direct._loading = None
    direct.load()
    assert direct.extension is not None
    choose.forget()
    yield
    direct.extension = None
    choose.forget()


class Counts:
    """How many passes of each kind took the direct way since the last question."""

    def __init__(self) -> None:
        self.before = self.now()

    def now(self) -> tuple[int, ...]:
        assert direct.extension is not None
        return direct.extension.counts()

    def take(self) -> tuple[int, ...]:
        before, self.before = self.before, self.now()
        return tuple(now - then for now, then in zip(self.before, before))


@pytest.fixture
def counts() -> Counts:
    return Counts()


def layer(*sizes: Any, device: str = "cpu", cls: type = Grouped3D, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls.from_conv(cls.plain(*sizes, **options), tune="none").to(device)  # type: ignore[attr-defined]


def results(module: nn.Module, x: Tensor, seed: int = 0) -> list[Tensor]:
    """What a layer gives, and all gradients of it."""
    x = x.detach().requires_grad_()
    out = module(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], grad)]


def same(some: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(some, others, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


# It does the same.


@settings(max_examples=examples(8))
@given(data=st.data())
def test_random_layers(data: st.DataObject) -> None:
    counts = Counts()
    triple = st.tuples(*[st.integers(1, 3)] * 3)
    groups, kernel, stride, dilation = data.draw(st.tuples(st.integers(2, 4), triple, triple, triple))
    padding = data.draw(st.tuples(*[st.integers(0, 1)] * 3))
    channels, filters = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    cls = data.draw(st.sampled_from([Grouped3D, Grouped3DTranspose]))
    options: dict[str, Any] = {"groups": groups, "bias": data.draw(st.booleans())}
    sizes = channels * groups, filters * groups, kernel, stride, padding
    module = layer(*sizes, cls=cls, dilation=dilation, **options)
    size = [d * (k - 1) + 1 + data.draw(st.integers(0, 3)) for k, d in zip(kernel, dilation)]
    x = torch.randn(data.draw(st.integers(1, 3)), channels * groups, *size)
    arranged = data.draw(st.sampled_from(["contiguous", "channels_last_3d", "sliced"]))
    if arranged == "channels_last_3d":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    if arranged == "sliced":
        x = torch.cat([x, x], 4)[..., ::2]
    first = results(module, x)
    counts.take()
    same(results(module, x), first)
    taken = counts.take()
    # On a CPU PyTorch's kernels are left to Python.
    ours = [c for c in decided.made.values() if not c.choice.is_native]
    assert taken == (1, 1, 1) or len(ours) < len(decided.made)
    with torch.no_grad():
        assert torch.equal(module(x), first[0])
    choose.forget()


@pytest.mark.parametrize("device", DEVICES)
def test_every_batch_is_alike(device: str, counts: Counts) -> None:
    module = layer(4, 4, 3, padding=1, groups=4, device=device)
    x = torch.randn(5, 4, 3, 4, 5, device=device)
    whole = results(module, x)[0]
    counts.take()
    for count in (1, 2, 5):
        torch.testing.assert_close(results(module, x[:count])[0], whole[:count])
    assert counts.take() == (3, 3, 3)
    assert module(x[:0]).shape == (0, 4, 3, 4, 5) and counts.take() == (0, 0, 0)
    torch.testing.assert_close(module(x[0]), whole[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step, again", [(plain, 1), (in_bfloat16, 1), (checkpointed, 2)])
def test_training(device: str, step: Callable[..., None], again: int, counts: Counts) -> None:
    choose.forget()
    models = converted(start()), start(), start().double()
    fast, original, exact = (train(model.to(device), step) for model in models)
    check(fast, original, exact)
    # Two layers of one shape in four steps; the first call of each kind is Python's.
    assert counts.take() == (8 * again - 1, 7, 7)


def test_weights_are_cast_once_under_autocast(counts: Counts) -> None:
    """As PyTorch's own operators find what was cast before in the same region."""
    module = layer(4, 4, 3, padding=1, groups=4)
    x = torch.randn(1, 4, 3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
        outs = [module(x) for _ in range(2)]
    assert counts.take() == (2, 0, 0)
    casts = {out.grad_fn.next_functions[1][0] for out in outs}
    assert len(casts) == 1 and "ToCopyBackward" in str(casts)
    outs[0].float().sum().backward()
    assert module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_only_what_is_wanted_is_computed(frozen: str, counts: Counts) -> None:
    module = layer(4, 4, 3, padding=1, groups=4)
    x = torch.randn(1, 4, 3, 4, 5)
    results(module, x)
    counts.take()
    names = ["input", "weight", "bias"]
    leaves = [x.requires_grad_(), module.weight, module.bias]
    wanted = [leaf for name, leaf in zip(names, leaves) if name != frozen]
    torch.autograd.grad(module(x).sum(), wanted)
    assert counts.take() == (1, int(frozen != "input"), int(frozen != "weight"))
    leaves[names.index(frozen)].requires_grad_(False)
    module(x).sum().backward()
    assert counts.take() == (1, int(frozen != "input"), int(frozen != "weight"))
    assert leaves[names.index(frozen)].grad is None


@pytest.mark.parametrize("block", [1, 2])
def test_parts_of_a_sum_are_added_up(block: int, monkeypatch: pytest.MonkeyPatch, counts: Counts) -> None:
    """Of a kernel whose programs leave partial results; one for each image or each two of three."""

    def resolve(problem: Problem, *rest: Any) -> Choice:
        nest = comprehensions.nest(problem)
        schedule = serial(nest)
        if problem.direction == "grad_weight":
            grid = ("n", "g", "f", "c", "kh", "kw")  # 72 programs of each image, or block
            digits = [str(d).replace("serial", "grid") if d.axis in grid else str(d) for d in schedule.digits]
            digits.sort(key=lambda text: "grid" not in text)
            digits += [f"n {block} serial"] if block > 1 else []
            schedule = Schedule.from_json({**schedule.to_json(), "digits": digits})
        found = build(problem, schedule, 60.0)
        assert found.kernel is not None
        blocks, parts = found.kernel.nest.blocks, found.kernel.partial_counts
        assert (parts is not None) == (problem.direction == "grad_weight")
        assert parts is None or (blocks is not None and blocks.number(3) == 4 - block)
        return Choice(problem, "tuned", "the test's", schedule=schedule.to_json(), candidate=found)

    choose.forget()
    monkeypatch.setattr(choose, "resolve", resolve)
    module = layer(4, 4, (1, 3, 3), groups=2, bias=False)
    for dtype in (torch.float32, torch.bfloat16):
        module.to(dtype)
        x = torch.randn(3, 4, 2, 4, 5).to(dtype)
        first = results(module, x)
        counts.take()
        same(results(module, x), first)
        assert counts.take() == (1, 1, 1)
    choose.forget()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
def test_a_pass_alone(direction: Any, device: str, counts: Counts) -> None:
    geometry = Geometry(4, 8, 4, (3, 6, 5), (3, 3, 3), padding=(1, 1, 1))
    problem = Problem(direction, geometry, device=device, bias=direction == "forward")
    choice = choose.Chooser(open_cache(), tune="none", progress=False).choose(problem)
    operands = native.random_operands(problem, 2)
    run = direct.bound(choice, operands)
    assert torch.equal(run(*operands), choice.run(*operands))
    assert sum(counts.take()) == 1


# What it does not know.


class Notes:
    """Notes what comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def note(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Dispatched(Notes, TorchDispatchMode):
    """Of operators."""

    __torch_dispatch__ = Notes.note


class Functions(Notes, TorchFunctionMode):
    """Of functions."""

    __torch_function__ = Notes.note


class Profiled(torch.profiler.profile):
    """Notes what the profiler counts."""

    @property
    def seen(self) -> list[str]:
        return [event.key for event in self.key_averages()]


class Own(Tensor):
    """A subclass of PyTorch's tensor."""


@pytest.mark.parametrize("watch", [Dispatched, Functions, Profiled])
def test_whoever_watches_is_asked(watch: Any) -> None:
    module, x = layer(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 3, 4, 5)
    expected = results(module, x)
    with watch() as watching:
        same(results(module, x), expected)
    assert any("g3dswap" in name and "conv3d" in name for name in watching.seen), watching.seen
    if watch is not Functions:  # autograd's nodes call no functions
        assert any("conv3d_backward" in name for name in watching.seen), watching.seen


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_forward_mode_is_pytorchs(counts: Counts) -> None:
    module, x = layer(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 3, 4, 5)
    expected = results(module, x)[0]
    counts.take()
    with torch.autograd.forward_ad.dual_level():
        out = torch.autograd.forward_ad.unpack_dual(module(torch.autograd.forward_ad.make_dual(x, x)))
    torch.testing.assert_close(out.primal, expected)
    torch.testing.assert_close(out.tangent, expected - module.bias.view(-1, 1, 1, 1))
    assert counts.take() == (0, 0, 0)


def test_compiled_graphs_and_operators(counts: Counts) -> None:
    """They come from the dispatcher, with lists for tuples."""
    module, x = layer(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 3, 4, 5)
    expected = results(module, x)
    counts.take()
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    same(results(compiled, x), expected)
    assert counts.take() == (1, 1, 1)
    options = [1, 1, 1], [1, 1, 1], [1, 1, 1], 4, "none"
    with torch.no_grad():
        out = torch.ops.g3dswap.conv3d(x, module.weight, module.bias, *options)
    assert torch.equal(out, expected[0]) and counts.take() == (1, 0, 0)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_is_no_plain_tensor_is_left_alone(counts: Counts) -> None:
    choose.forget()
    module, x = layer(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 3, 4, 5)
    with torch.no_grad():
        module(x)
        expected = module(x)
        assert counts.take() == (1, 0, 0)
        assert isinstance(module(x.as_subclass(Own)), Own)
        negated = torch.conj(torch.complex(torch.zeros_like(x), -x)).imag
        assert negated.is_neg()
        torch.testing.assert_close(module(negated), expected)
        torch.testing.assert_close(torch.vmap(module)(x[None])[0], expected)
        with pytest.raises(g3dswap.errors.InputError, match="5 channels"):
            module(torch.randn(1, 5, 3, 4, 5))
        with pytest.raises(g3dswap.errors.InputTypeError, match="is a list"):
            module([1])
        torch.testing.assert_close(torch.jit.trace(module, x, check_trace=False)(x), expected)


def test_arguments_that_are_no_tuples(counts: Counts) -> None:
    module, x = layer(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 3, 4, 5)
    expected = module(x)
    module.stride = [1, 1, 1]
    torch.testing.assert_close(module(x), expected)
    module.stride = (2, 1, 1)
    assert module(x).shape[2] == 2


def test_derivatives_of_derivatives(counts: Counts) -> None:
    module = layer(4, 4, (1, 2, 2), groups=2).double()
    x = torch.randn(1, 4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    results(module, x)
    counts.take()
    weight, bias = module.weight, module.bias

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))
    assert counts.take()[0] > 0


def test_saved_tensors_are_autograds(counts: Counts) -> None:
    module = layer(4, 4, 3, padding=1, groups=4)
    x = torch.randn(1, 4, 3, 4, 5, requires_grad=True)
    results(module, x)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x).sum().backward()
    assert len(packed) == 2
    counts.take()
    out = module(x)
    assert counts.take() == (1, 0, 0)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    out = module(x)
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inference_mode(counts: Counts) -> None:
    module, x = layer(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 3, 4, 5)
    expected = results(module, x)[0]
    with torch.inference_mode():
        module(x)
        counts.take()
        out = module(x)
    assert out.is_inference() and torch.equal(out, expected) and counts.take() == (1, 0, 0)


def test_a_choice_that_changes_is_forgotten(counts: Counts) -> None:
    choose.forget()
    module, x = layer(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 3, 4, 5)
    with torch.no_grad():
        module(x), module(x)
        assert counts.take() == (1, 0, 0)
        decided.changed()
        module(x)
        assert counts.take() == (0, 0, 0)
        module(x)
        assert counts.take() == (1, 0, 0)
        # Another problem, as soon as a switch of PyTorch's says so.
        torch.use_deterministic_algorithms(True)
        try:
            module(x)
            assert counts.take() == (0, 0, 0)
        finally:
            torch.use_deterministic_algorithms(False)
        module(x)
        assert counts.take() == (1, 0, 0)


def test_threads(counts: Counts) -> None:
    module = layer(4, 4, 3, padding=1, groups=4)
    inputs = [torch.randn(2, 4, 3, 4, 5) for _ in range(16)]
    expected = [results(module, x) for x in inputs]
    counts.take()
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(lambda x: results(module, x), inputs), expected):
            same(found, wanted)
    assert counts.take() == (16, 16, 16)


# How it is made.


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> None:
    """Nothing is loaded, and nothing was compiled."""
    for name in ("extension", "_loading"):
        monkeypatch.setattr(direct, name, None)
    choose.forget()


@pytest.mark.usefixtures("unloaded")
def test_without_a_compiler_python_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.warns(UserWarning, match="go through Python.*/bin/false"):
        direct.load()
    assert direct.extension is None
    module, x = layer(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 3, 4, 5)
    with pytest.warns(UserWarning, match="PyTorch's own kernels run"):
        module(x)


@pytest.mark.usefixtures("unloaded")
def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> None:
    path = direct._built()
    stamp = path.stat().st_mtime_ns
    assert direct._built() == path and path.stat().st_mtime_ns == stamp
    monkeypatch.setattr(torch, "__version__", "another")
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(g3dswap.errors.CompileError):
        direct._built()


@pytest.mark.gpu
def test_on_a_gpu_it_loads_by_itself(unloaded: None) -> None:
    choose.forget()
    module = layer(4, 4, 3, padding=1, groups=4, device="cuda")
    x = torch.randn(1, 4, 3, 4, 5, device="cuda")
    expected = results(module, x)
    assert direct._loading is not None
    direct._loading.join()
    assert direct.extension is not None
    same(results(module, x), expected)
    counts = Counts()
    same(results(module, x), expected)
    assert counts.take() == (1, 1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(16, 16, 4), (32, 32, 32), (64, 64, 2)])
def test_kernels_of_two_stages(sizes: tuple[int, int, int], dtype: torch.dtype, counts: Counts) -> None:
    """The partial results of gradients in weights are added up by a kernel too."""
    module = layer(*sizes[:2], 3, padding=1, groups=sizes[2], device="cuda").to(dtype)
    for batch in (1, 3, 8):
        x = torch.randn(batch, sizes[0], 6, 17, 16, device="cuda").to(dtype)
        decided.changed()
        first = results(module, x)
        counts.take()
        same(results(module, x), first)
        assert counts.take() == (1, 1, 1)


@pytest.mark.gpu
def test_graphs_streams_and_alignment(counts: Counts) -> None:
    module = layer(4, 4, 3, padding=1, groups=4, device="cuda")
    x = torch.randn(2, 4, 3, 4, 5, device="cuda")
    expected = results(module, x)[0].detach()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        out = module(x)
    stream.synchronize()
    torch.testing.assert_close(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = module(x)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected)
    counts.take()
    shifted = torch.empty(x.numel() + 1, device="cuda")[1:].view_as(x).copy_(x)
    with torch.no_grad():
        torch.testing.assert_close(module(shifted), expected)
