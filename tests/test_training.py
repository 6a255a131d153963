"""Ways to train and to run a converted model: each does what it does with the original, by our kernels.

The kernels are real, untimed defaults, compiled here; ``training.py`` says when a run is right. Training on
several processes is in ``test_distributed.py``.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import g3dswap
from g3dswap import choose, decided, execute
from g3dswap.workload import Candidate
from tests.kernels import Recorder
from tests.training import (
    Net,
    Step,
    batches,
    check,
    checkpointed,
    converted,
    in_bfloat16,
    plain,
    start,
    train,
)

PASSES = {"forward", "grad_input", "grad_weight"}
Run = tuple[str, torch.dtype, str]  # pass, dtype, layout


class Watch:
    """Which of our kernels ran, and which gradients were computed, by whatever kernel."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.gradients: list[str] = []

    def take(self) -> tuple[set[Run], list[str]]:
        """What was seen since the last time."""
        seen = set(self.runs), self.gradients
        self.runs, self.gradients = [], []
        return seen

    def passes(self) -> set[str]:
        return {name for name, _, _ in self.take()[0]}


@pytest.fixture(scope="module", autouse=True)
def decided_once() -> Iterator[None]:
    """They are made once for all tests of this file."""
    choose.forget()
    yield
    choose.forget()


@pytest.fixture(autouse=True)
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    seen = Watch()
    run, gradient = Candidate.__call__, execute._gradient

    def noted_run(self: Candidate, *tensors: Tensor | None) -> Tensor:
        assert self.kernel is not None
        seen.runs.append((self.problem.layer_pass, self.problem.dtype, self.problem.layout))
        return run(self, *tensors)

    def noted_gradient(name: str, *arguments: Any) -> Tensor:
        seen.gradients.append(name)
        return gradient(name, *arguments)

    monkeypatch.setattr(Candidate, "__call__", noted_run)
    monkeypatch.setattr(execute, "_gradient", noted_gradient)
    return seen


def compiled(model: nn.Module, clips: Tensor, labels: Tensor) -> None:
    torch._dynamo.reset()
    plain(torch.compile(model, backend="aot_eager", fullgraph=True), clips, labels)  # type: ignore[arg-type]
    torch._dynamo.reset()


def compare(step: Step, prepare: Callable[[Any], nn.Module] = lambda model: model) -> nn.Module:
    """Train the converted model, the original and its float64 copy, and compare; the first one."""
    models = converted(start()), start(), start().double()
    fast, original, exact = (train(prepare(model), step) for model in models)
    check(fast, original, exact)
    return fast


# Mixed precision.


def test_amp_in_bfloat16(watch: Watch) -> None:
    fast = compare(in_bfloat16)
    assert watch.take()[0] == {(name, torch.bfloat16, "contiguous") for name in PASSES}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in fast.parameters() if p.grad is not None)


def scaled(model: nn.Module, scale: float) -> list[float]:
    """Train in float16 with a GradScaler that begins at ``scale``; the scale after each step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scales = []
    for clips, labels in batches(model, 8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(model(clips), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_amp_in_float16_with_a_grad_scaler(watch: Watch) -> None:
    models = fast, original, exact = converted(start()), start(), start().double()
    scales = [scaled(model, 2.0**10) for model in models]
    assert scales[0] == scales[1] == scales[2] and scales[0][-1] > 2**10  # nothing overflowed
    check(fast, original, exact)
    assert watch.take()[0] == {(name, torch.float16, "contiguous") for name in PASSES}


def test_a_grad_scaler_skips_the_same_steps() -> None:
    fast, original = converted(start()), start()
    scales = [scaled(model, 2.0**20) for model in (fast, original)]
    assert scales[0] == scales[1]
    assert scales[0][0] < 2**20 and scales[0] != sorted(scales[0], reverse=True)  # skipped, and went on
    assert all(p.isfinite().all() for p in fast.parameters())


# Memory: what is recomputed, accumulated, averaged, laid out otherwise.


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, watch: Watch) -> None:
    compare(functools.partial(checkpointed, use_reentrant=use_reentrant))
    steps, layers = 4, 2
    assert len([name for name, _, _ in watch.runs if name == "forward"]) == 2 * steps * layers  # twice each
    assert watch.passes() == PASSES


def test_gradient_accumulation(watch: Watch) -> None:
    def step(model: nn.Module, clips: Tensor, labels: Tensor) -> None:
        for part, wanted in zip(clips.split((3, 1)), labels.split((3, 1)), strict=True):
            (cross_entropy(model(part), wanted) * len(part) / len(clips)).backward()

    compare(step)
    assert watch.passes() == PASSES


def test_averaged_models(watch: Watch) -> None:
    def averaged(model: nn.Module) -> AveragedModel:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

        def step(model: nn.Module, clips: Tensor, labels: Tensor) -> None:
            plain(model, clips, labels)
            average.update_parameters(model)

        train(model, step)
        return average

    fast, original, exact = map(averaged, (converted(start()), start(), start().double()))
    assert type(fast.module.get_submodule("body.0")) is g3dswap.Grouped3D
    assert list(fast.state_dict()) == list(original.state_dict())
    check(fast.module, original.module, exact.module)
    watch.take()
    with torch.no_grad():
        fast(next(batches(fast))[0])
    assert watch.passes() == {"forward"}


def test_channels_last_3d(watch: Watch) -> None:
    def step(model: nn.Module, clips: Tensor, labels: Tensor) -> None:
        plain(model, clips.contiguous(memory_format=torch.channels_last_3d), labels)

    fast: Any = compare(step, lambda model: model.to(memory_format=torch.channels_last_3d))
    assert watch.take()[0] == {(name, torch.float32, "channels_last_3d") for name in PASSES}
    assert fast.body[0].weight.grad.is_contiguous(memory_format=torch.channels_last_3d)


# Copies and files.


def copied(model: nn.Module, folder: Path) -> nn.Module:
    return copy.deepcopy(model)


def saved(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=False)


@pytest.mark.parametrize("way", [copied, saved])
def test_whole_modules_go_on_training(
    way: Callable[[nn.Module, Path], nn.Module], tmp_path: Path, watch: Watch
) -> None:
    """Trained, copied or saved and loaded, and trained on."""
    fast, original, exact = (train(m, plain) for m in (converted(start()), start(), start().double()))
    before = [p.detach().clone() for p in fast.parameters()]
    again = way(fast, tmp_path)
    assert type(again) is Net and str(g3dswap.report(again)) == str(g3dswap.report(fast))
    watch.take()
    check(*(train(model, plain) for model in (again, original, exact)))
    assert watch.passes() == PASSES
    assert all(map(torch.equal, fast.parameters(), before))  # the copy has parameters of its own


# torch.func: what it does not watch runs by our kernels, and the rest by PyTorch's.


def test_functional_call(watch: Watch) -> None:
    fast, original, exact = converted(start()), start(), start().double()
    grads = []
    for model in (fast, original, exact):
        parameters = {name: (p * 1.5).detach().requires_grad_() for name, p in model.named_parameters()}
        clips, labels = next(batches(model))
        loss = cross_entropy(torch.func.functional_call(model, parameters, (clips,)), labels)
        grads.append(torch.autograd.grad(loss, list(parameters.values())))
    assert watch.passes() == PASSES
    for mine, theirs, wanted in zip(*grads, strict=True):
        error = (theirs - wanted).norm() / wanted.norm()
        assert (mine - wanted).norm() / wanted.norm() <= 2 * error + 1e-5


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")
def test_vmap_and_grad_are_pytorchs(watch: Watch) -> None:
    """Gradients of each sample, and an ensemble in one call."""
    fast, original = converted(start()).eval(), start().eval()
    clips, labels = next(batches(fast))
    found = []
    for model in (fast, original):
        parameters: dict[str, Tensor] = dict(model.named_parameters())

        def loss(values: dict[str, Tensor], clip: Tensor, label: Tensor, model: nn.Module = model) -> Tensor:
            out = torch.func.functional_call(model, values, (clip[None],))
            return cross_entropy(out, label[None])

        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, clips, labels)
        several = {name: torch.stack([p, p * 0.5]) for name, p in parameters.items()}
        losses = torch.func.vmap(loss, (0, None, None))(several, clips[0], labels[0])
        found.append([*each.values(), losses])
    torch.testing.assert_close(*found)
    assert watch.take() == (set(), [])


# Threads.


def test_threads_share_a_model(watch: Watch) -> None:
    """Eight at once, from the first call on, which chooses; every result is what one thread computes."""
    fast = converted(start()).eval()
    inputs = [clips for clips, _ in batches(fast, 16)]
    choose.forget()
    together = threading.Barrier(8)

    def infer(number: int) -> Tensor:
        if number < 8:
            together.wait(30)
        with torch.inference_mode():
            return fast(inputs[number])

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(infer, range(16)))
    with torch.inference_mode():
        assert all(torch.equal(result, fast(clips)) for result, clips in zip(results, inputs, strict=True))
    assert watch.passes() == {"forward"}


# What is not needed is not computed.


@pytest.fixture(params=["ours", "PyTorch's"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our kernels, and PyTorch's in layers of ours."""
    if request.param != "ours":
        monkeypatch.setattr(choose, "resolve", Recorder(use_native=True))
    decided.lookup().clear()
    yield
    decided.lookup().clear()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("step", [plain, checkpointed, compiled, in_bfloat16])
def test_frozen_weights_get_no_gradient(step: Step, watch: Watch) -> None:
    fast: Any = converted(start())
    clips, labels = next(batches(fast))
    fast.body[1].weight.requires_grad_(False)
    step(fast, clips, labels)
    # From the last layer to the first: a gradient in the input of both, one in the weight of one.
    assert watch.take()[1] == ["grad_input", "grad_input", "grad_weight"]
    assert fast.body[0].weight.grad is not None and fast.body[1].weight.grad is None
    assert fast.body[1].bias.grad is not None
    fast.body.requires_grad_(False)
    step(fast, clips, labels)
    assert watch.take()[1] == ["grad_input", "grad_input"]
    assert fast.stem.weight.grad is not None


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("step", [plain, compiled, in_bfloat16])
def test_inputs_that_need_none_get_no_gradient(step: Step, watch: Watch) -> None:
    fast: Any = converted(start())
    clips, labels = next(batches(fast))
    fast.stem.requires_grad_(False)
    step(fast, clips, labels)
    assert watch.take()[1] == ["grad_input", "grad_weight", "grad_weight"]
    fast.body[0].requires_grad_(False)
    step(fast, clips, labels)
    assert watch.take()[1] == ["grad_weight"]


def test_only_what_was_asked_for_is_computed(watch: Watch) -> None:
    """With ``torch.autograd.grad``, although everything requires a gradient."""
    fast: Any = converted(start())
    clips, labels = next(batches(fast))
    hidden = fast.stem(clips)
    loss = cross_entropy(fast.head(fast.features(hidden).mean((2, 3, 4))), labels)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    assert watch.take()[1] == ["grad_input", "grad_input"]
    torch.autograd.grad(loss, fast.body[1].weight)
    assert watch.take()[1] == ["grad_weight"]


# The compiler.


def compiles_to(model: nn.Module, **options: Any) -> Any:
    """The compiled model, and nothing counted yet."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, **options)


def graphs_and_breaks() -> tuple[int, dict[str, int]]:
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what inductor says about itself, its host and its options
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compile_modes(mode: str, device: str, watch: Watch) -> None:
    """One graph in every mode, without a break; and training is the original's."""
    fast, original, exact = (model.to(device) for model in (converted(start()), start(), start().double()))
    compiled = compiles_to(fast, mode=mode)
    train(compiled, plain)
    assert graphs_and_breaks() == (1, {})
    check(fast, *(train(model, plain) for model in (original, exact)))
    if device == "cpu":  # CUDA graphs run kernels without asking
        assert watch.passes() == PASSES
    clips, _ = next(batches(fast))
    for count in (2, 3):  # other batches: one more graph, for any
        with torch.no_grad():
            torch.testing.assert_close(compiled(clips[:count]), fast(clips[:count]), rtol=1e-3, atol=1e-4)
    assert graphs_and_breaks()[1] == {}
    torch._dynamo.reset()


class Varied(nn.Module):
    """A layer of each kind, with all that its forward may have to do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(4, 4, 3, padding=1, groups=2),
            nn.Conv3d(4, 4, (1, 2, 3), padding="same", groups=4),
            nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
            nn.Conv3d(4, 8, 3, stride=2, padding=1, groups=4, bias=False),
        )
        self.up = nn.ConvTranspose3d(8, 4, 2, stride=2, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.layers(x), output_size=x.shape)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_layer_breaks_the_graph(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "resolve", Recorder())
    model = g3dswap.convert(Varied(), tune="cached", progress=False)
    assert len(g3dswap.report(model).swapped) == 5

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    torch._dynamo.reset()
    found = torch._dynamo.explain(forward)(torch.randn(2, 4, 4, 6, 8))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    torch._dynamo.reset()
