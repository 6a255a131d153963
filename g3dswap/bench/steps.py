"""Steps of networks, launched from Python: training steps of several models in turn, and inference."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3dswap.rounds import Times, alternate, clock, synchronize
from g3dswap.tc.timing import Call

Batch = tuple[Tensor, Tensor]
"""Clips, and what the network is to say of them."""

WARM_UP = 3  # steps that no time counts of: they allocate memory and search algorithms
BATCHES = 2  # of clips that the steps take in turn
RATE = 5e-3


class Training:
    """A model with its optimizer, and what its steps gave."""

    def __init__(self, model: nn.Module, amp: bool) -> None:
        self.model, self.amp = model, amp
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.memory = 0

    @property
    def times(self) -> Times:
        """Of the steps after the warm-up."""
        return Times.of(self.seconds[WARM_UP:] if len(self.seconds) > WARM_UP + 1 else self.seconds)

    def forward(self, clips: Tensor) -> Tensor:
        """In the network's precision."""
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=self.amp):
            out: Tensor = self.model(clips)
        return out

    def update(self, clips: Tensor, targets: Tensor) -> Tensor:
        """Forward, loss, backward and optimizer; returns the loss."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.forward(clips).float(), targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self, clips: Tensor, targets: Tensor, seed: int) -> None:
        """One update, timed; dropout as `seed` says."""
        torch.manual_seed(seed)
        device = clips.device
        others = _allocated(device) - self.resident()
        synchronize(device)
        start = time.perf_counter()
        loss = self.update(clips, targets)
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


def make_batch(model: nn.Module, shape: tuple[int, ...], device: torch.device, seed: int) -> Batch:
    """Clips and a class for each, or for each voxel where the network gives an image."""
    generator = torch.Generator(device).manual_seed(seed)
    clips = torch.randn(shape, generator=generator, device=device)
    training = model.training
    with torch.no_grad():
        out = model.eval()(clips)
    model.train(training)
    size = (out.shape[0], *out.shape[2:])
    return clips, torch.randint(out.shape[1], size, generator=generator, device=device)


def train(sides: Mapping[str, Training], batches: list[Batch], steps: int) -> None:
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


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
