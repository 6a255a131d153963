"""What tests of training share: a small network, its data, and when two runs count as the same.

A run is right if its parameters are at most twice as far from those of a float64 run as the original
model's are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import g3dswap

SHAPE = (4, 3, 4, 6, 5)

Step = Callable[[nn.Module, Tensor, Tensor], Any]
"""One step on a model, clips and labels; it leaves gradients."""


class Net(nn.Module):
    """Two grouped layers of the same shape, so that few kernels are compiled, between others that train."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 1)
        self.body = nn.Sequential(*[nn.Conv3d(8, 8, 3, padding=1, groups=4) for _ in range(2)])
        self.norm = nn.BatchNorm3d(8)
        self.head = nn.Linear(8, 4)

    def features(self, x: Tensor) -> Tensor:
        """What is recomputed under activation checkpointing."""
        return torch.relu(self.norm(self.body(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.stem(x)).mean((2, 3, 4)))


def start() -> Net:
    torch.manual_seed(0)
    return Net()


def converted(model: nn.Module) -> nn.Module:
    """A copy with our kernels in both layers, which choose at their first call."""
    fast = g3dswap.convert(model, tune="none", progress=False)
    assert [row.name for row in g3dswap.report(fast).swapped] == ["body.0", "body.1"]
    return fast


def batches(model: nn.Module, count: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Clips and labels, the same for every model, in the dtype and place of its parameters."""
    weight = next(model.parameters())
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        clips = torch.randn(SHAPE, generator=generator).to(weight)
        yield clips, torch.randint(4, SHAPE[:1], generator=generator).to(weight.device)


def train(model: nn.Module, step: Step) -> nn.Module:
    """Some steps of SGD; ``step`` leaves gradients."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for clips, labels in batches(model):
        optimizer.zero_grad()
        step(model, clips, labels)
        optimizer.step()
    return model


def plain(model: nn.Module, clips: Tensor, labels: Tensor) -> None:
    cross_entropy(model(clips), labels).backward()


def in_bfloat16(model: nn.Module, clips: Tensor, labels: Tensor) -> None:
    with torch.autocast(clips.device.type, torch.bfloat16):
        plain(model, clips, labels)


def checkpointed(model: Any, clips: Tensor, labels: Tensor, use_reentrant: bool = False) -> None:
    inner = checkpoint(model.features, model.stem(clips), use_reentrant=use_reentrant)
    assert isinstance(inner, Tensor)
    cross_entropy(model.head(inner.mean((2, 3, 4))), labels).backward()


@torch.no_grad()
def check(
    fast: nn.Module, original: nn.Module, exact: nn.Module, begin: Callable[[], nn.Module] = start
) -> None:
    """The bound for each parameter: twice the error of the original's, and a floor of rounding.

    Errors are distances from float64. Where the original happens to be nearer than its parameters are on the
    whole, for how far they have moved, the latter counts.
    """

    def apart(model: nn.Module, other: nn.Module) -> Tensor:
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        return torch.stack([torch.linalg.vector_norm(p.double().cpu() - o.double().cpu()) for p, o in pairs])

    moved, usual = apart(begin(), exact), apart(original, exact)
    assert moved.max() > 1e-2  # there was something to learn
    bound = 2 * torch.maximum(usual, usual.norm() / moved.norm() * moved) + 1e-6 * moved.max()
    assert (apart(fast, exact) <= bound).all(), apart(fast, exact) / bound
