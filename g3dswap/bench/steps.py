"""One network before and after its conversion: the same training steps in turn, and inference."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3dswap import direct
from g3dswap.convert import convert
from g3dswap.report import Report, report
from g3dswap.rounds import Times, alternate, clock, synchronize
from g3dswap.tc.timing import Call

BEFORE, AFTER = "before", "after"
WARM_UP = 3  # steps that no time counts of: they allocate memory and search algorithms
BATCHES = 2  # of clips that the steps take in turn
RATE = 5e-3


@dataclass(frozen=True)
class Side:
    """One of the two models. `memory` is the most bytes of a step with its weights; None on a CPU."""

    train: Times
    inference: Times
    losses: list[float]
    memory: int | None


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: layers by what became of them, and where the passes' kernels come from."""

    seconds: float
    swapped: int
    kept: int
    skipped: int
    sources: dict[str, int]

    @classmethod
    def of(cls, found: Report, seconds: float) -> Conversion:
        """Of a report."""
        passes = [it for layer in found.swapped for call in layer.calls for it in call.passes]
        sources = dict(sorted(Counter(it.source for it in passes).items()))
        return cls(seconds, len(found.swapped), len(found.kept), len(found.skipped), sources)


@dataclass(frozen=True)
class Compared:
    """Both models of one network in one dtype."""

    before: Side
    after: Side
    conversion: Conversion
    parameters: int

    @property
    def train_speedup(self) -> float:
        """Of a training step."""
        return self.before.train.seconds / self.after.train.seconds

    @property
    def inference_speedup(self) -> float:
        """Of a forward pass without gradients."""
        return self.before.inference.seconds / self.after.inference.seconds

    @property
    def difference(self) -> float:
        """The largest relative difference of the losses; infinite where one is not finite."""
        pairs = zip(self.before.losses, self.after.losses, strict=True)
        return max(
            abs(a - b) / abs(a) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs
        )


class Training:
    """A model with its optimizer, and what its steps gave."""

    def __init__(self, model: nn.Module, amp: bool) -> None:
        self.model, self.amp = model, amp
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.memory = 0

    def forward(self, clips: Tensor) -> Tensor:
        """In the network's precision."""
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=self.amp):
            out: Tensor = self.model(clips)
        return out

    def step(self, clips: Tensor, targets: Tensor, seed: int) -> None:
        """Forward, loss, backward and optimizer, timed; dropout as `seed` says."""
        torch.manual_seed(seed)
        device = clips.device
        others = _allocated(device) - self.resident()
        synchronize(device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.forward(clips).float(), targets)
        loss.backward()
        self.optimizer.step()
        synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        if device.type == "cuda" and len(self.losses) > WARM_UP:  # searches for algorithms take more
            self.memory = max(self.memory, torch.cuda.max_memory_allocated(device) - others)

    def resident(self) -> int:
        """Bytes of what stays between steps: weights, their gradients, the optimizer's state."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        grads = [x.grad for x in self.model.parameters() if x.grad is not None]
        state = [x for it in self.optimizer.state.values() for x in it.values() if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in (*weights, *grads, *state))


def compare(
    model: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    amp: bool,
    steps: int,
    seconds: float,
    options: Mapping[str, Any],
) -> Compared:
    """Convert a model and run both: `steps` of training, inference for about `seconds` each.

    shape: of the input, the batch first. options: of `convert`. The model itself is moved and trained.
    """
    model = model.to(device).train()
    batches = [_batch(model, shape, device, number) for number in range(BATCHES)]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    synchronize(device)
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        fast = convert(model, (batches[0][0],), **options)
    synchronize(device)
    conversion = Conversion.of(report(fast), time.perf_counter() - start)
    direct.begin(device.type, wait=True)  # which later steps do not wait for
    sides = {}
    for name, it in ((BEFORE, model), (AFTER, fast)):
        it.load_state_dict(weights)  # also the running means of what conversion ran
        sides[name] = Training(it.train(), amp)
    del weights
    train(sides, batches, steps)
    inference = infer(sides, batches[0][0], seconds)
    before, after = (
        Side(_times(it.seconds), inference[name], it.losses, it.memory or None) for name, it in sides.items()
    )
    return Compared(before, after, conversion, sum(x.numel() for x in model.parameters()))


def _batch(
    model: nn.Module, shape: tuple[int, ...], device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Clips and a class for each, or for each voxel where the network gives an image."""
    generator = torch.Generator(device).manual_seed(seed)
    clips = torch.randn(shape, generator=generator, device=device)
    training = model.training
    with torch.no_grad():
        out = model.eval()(clips)
    model.train(training)
    size = (out.shape[0], *out.shape[2:])
    return clips, torch.randint(out.shape[1], size, generator=generator, device=device)


def train(sides: Mapping[str, Training], batches: list[tuple[Tensor, Tensor]], steps: int) -> None:
    """The same steps of both models from equal seeds; who goes first alternates."""
    for step in range(steps):
        for name in list(sides) if step % 2 == 0 else list(sides)[::-1]:
            if batches[0][0].is_cuda:
                torch.cuda.reset_peak_memory_stats()
            sides[name].step(*batches[step % len(batches)], seed=step)


def infer(sides: Mapping[str, Training], clips: Tensor, seconds: float) -> dict[str, Times]:
    """Times of forward passes without gradients, in rounds; warm ones."""
    for it in sides.values():
        it.optimizer.zero_grad()
        it.model.eval()
    with torch.no_grad():
        calls: dict[str, Call] = {name: partial(it.forward, clips) for name, it in sides.items()}
        sample = clock(clips.device)
        for call in calls.values():
            for _ in range(WARM_UP):
                sample(call)
        return alternate(calls, sample, seconds)


def _times(seconds: list[float]) -> Times:
    return Times.of(seconds[WARM_UP:] if len(seconds) > WARM_UP + 1 else seconds)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
