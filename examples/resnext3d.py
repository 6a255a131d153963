"""A 3D ResNeXt, trained twice from the same seed: with PyTorch's convolutions and with g3dswap's.

The network is that of Hara, Kataoka and Satoh, "Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs
and ImageNet?" (CVPR 2018): bottlenecks whose 3x3x3 convolution has 32 groups. The clips are made on the fly:
a disc or a square moves over a noisy background, and the label is the one of eight directions it moves in.

    python examples/resnext3d.py                               # CPU: a small one; GPU: the published one
    python examples/resnext3d.py --depth 50 --clip 16x64x64    # anything between
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import g3dswap
from g3dswap.bench.resnext3d import BLOCKS, ResNeXt3D

DIRECTIONS = 8
WARM_UP_STEPS = 3
"""First steps that the medians leave out: they allocate memory and choose algorithms."""


def moving_shapes(
    count: int, clip: tuple[int, int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``count`` clips of shape (3, frames, height, width), and the direction of each as its label.

    The shape leaves on one side and comes back on the other; edges are soft, so that movements of less than a
    pixel show.
    """
    frames, height, width = clip
    size = min(height, width)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low

    labels = torch.randint(DIRECTIONS, (count,), generator=generator)
    angle = labels.view(-1, 1, 1, 1) * (2 * math.pi / DIRECTIONS)
    speed = uniform(0.03, 0.06) * size
    t = torch.arange(frames).view(1, -1, 1, 1)
    # Distance from the centre along each axis, the short way round.
    y = torch.arange(height).view(1, 1, -1, 1) - uniform(0, height) - speed * torch.sin(angle) * t
    x = torch.arange(width).view(1, 1, 1, -1) - uniform(0, width) - speed * torch.cos(angle) * t
    y = (y + height / 2).remainder(height) - height / 2
    x = (x + width / 2).remainder(width) - width / 2
    disc = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    distance = torch.where(disc, torch.hypot(x, y), torch.maximum(x.abs(), y.abs()))
    shape = (uniform(0.12, 0.25) * size - distance).clamp(0, 1)
    colour = torch.rand(count, 3, 1, 1, 1, generator=generator) * 0.5 + 0.5
    clips = shape.unsqueeze(1) * colour
    return clips + 0.1 * torch.randn(clips.shape, generator=generator), labels


def rounded_otherwise(model: nn.Module) -> nn.Module:
    """A copy whose weights differ by at most one unit in the last place: the same model, for training."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            away = torch.where(torch.rand_like(weight) < 0.5, -torch.inf, torch.inf)
            weight.copy_(torch.nextafter(weight, away.to(weight)))
    return other


@dataclass
class Run:
    """What one model's training gave, step by step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of a step, without the first ones."""
        return statistics.median(self.seconds[WARM_UP_STEPS:] or self.seconds)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, clips: Tensor, labels: Tensor, amp: bool
) -> float:
    """One step; returns the loss before it."""
    optimizer.zero_grad()
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=amp):
        loss = F.cross_entropy(model(clips).float(), labels)
    loss.backward()
    optimizer.step()
    return loss.item()  # waits for the forward pass; train() waits for the rest


def train(models: Mapping[str, nn.Module], options: argparse.Namespace) -> dict[str, Run]:
    """Trains the models in turns, each on the same batches, and each first as often as the others."""
    runs = {name: Run() for name in models}
    optimizers = {
        name: torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, nesterov=True)
        for name, model in models.items()
    }
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        clips, labels = moving_shapes(options.batch, options.clip, generator)
        clips, labels = clips.to(device, memory_format=options.memory_format), labels.to(device)
        # A clean start and a decaying rate: the loss goes down instead of around.
        rate = options.lr * min(1.0, (step + 1) / 5) * (1 + math.cos(math.pi * step / options.steps)) / 2
        order = list(models) if step % 2 == 0 else list(models)[::-1]
        for name in order:
            optimizers[name].param_groups[0]["lr"] = rate
            synchronize(device)
            start = time.perf_counter()
            loss = train_step(models[name], optimizers[name], clips, labels, options.amp)
            synchronize(device)
            runs[name].seconds.append(time.perf_counter() - start)
            runs[name].losses.append(loss)
    return runs


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed_up(slow: Run, fast: Run) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of how much faster a step is.

    Each step is compared with the other model's on the same batch, moments before or after it: on a machine
    with other work to do, both are hit alike.
    """
    pairs = list(zip(slow.seconds, fast.seconds, strict=True))
    ratios = [a / b for a, b in pairs[WARM_UP_STEPS:] or pairs]
    low, middle, high = statistics.quantiles(ratios * 2, n=4)  # twice: quantiles() wants at least two
    return low, middle, high


def losses_table(runs: Mapping[str, Run], rows: int = 12) -> str:
    """The losses side by side: some of the steps, the first and the last among them."""
    steps = len(next(iter(runs.values())).losses)
    shown = sorted({round(i * (steps - 1) / max(1, rows - 1)) for i in range(rows)})
    lines = ["step  " + "  ".join(f"{name:>12}" for name in runs)]
    for step in shown:
        lines.append(f"{step:4}  " + "  ".join(f"{run.losses[step]:12.5f}" for run in runs.values()))
    return "\n".join(lines)


def plot(runs: Mapping[str, Run], title: str, path: Path) -> None:
    """Losses and step times of the runs, in one picture."""
    figure = Figure(figsize=(11, 4), layout="constrained")  # outside pyplot: needs no screen
    left, right = figure.subplots(1, 2)
    for (name, run), style in zip(runs.items(), ("-", "--", ":")):
        left.plot(run.losses, style, label=name)
        right.plot([1e3 * s for s in run.seconds], style, label=f"{name}: median {1e3 * run.median:.1f} ms")
    left.set(title="loss", xlabel="step", ylabel="cross entropy")
    right.set(title="time of a training step", xlabel="step", ylabel="ms")
    right.set_ylim(0, 1.5e3 * max(run.median for run in runs.values()))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def clip_size(text: str) -> tuple[int, int, int]:
    """``16x112x112``: frames, height, width."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAMESxHEIGHTxWIDTH, such as 16x112x112")
    frames, height, width = map(int, parts)
    return frames, height, width


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what it leaves open depends on the device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depth", type=int, choices=sorted(BLOCKS), help="layers (GPU: 101, CPU: 14)")
    parser.add_argument("--cardinality", type=int, default=32, help="groups (default: 32)")
    parser.add_argument("--width", type=int, help="channels a group in the first stage (GPU: 4, CPU: 2)")
    parser.add_argument("--clip", type=clip_size, metavar="TxHxW", help="(GPU: 16x112x112, CPU: 16x64x64)")
    parser.add_argument("--batch", type=int, help="clips in a step (GPU: 32, CPU: 8)")
    parser.add_argument("--steps", type=int, help="training steps (GPU: 100, CPU: 60)")
    parser.add_argument("--lr", type=float, default=0.02, help="highest learning rate (default: 0.02)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true", help="channels_last_3d model and clips")
    parser.add_argument(
        "--control",
        action="store_true",
        help="train a third model, PyTorch's with other last bits in its weights: what rounding alone does",
    )
    parser.add_argument("--tune", default="quick", choices=("none", "cached", "quick", "full"))
    parser.add_argument("--plot", type=Path, default=Path("resnext3d.png"), help="(default: resnext3d.png)")
    options = parser.parse_args(arguments)
    small = torch.device(options.device).type == "cpu"
    defaults = {
        "depth": 14 if small else 101,
        "width": 2 if small else 4,
        "clip": (16, 64, 64) if small else (16, 112, 112),
        "batch": 8 if small else 32,
        "steps": 60 if small else 100,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.memory_format = torch.channels_last_3d if options.channels_last else torch.contiguous_format
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    """Builds, converts, verifies, trains and tells; returns the runs by the model's name."""
    options = parse_options(arguments)
    if torch.device(options.device).type == "cuda":
        torch.backends.cudnn.benchmark = True  # PyTorch at its best
    torch.manual_seed(options.seed)
    model = ResNeXt3D(options.depth, options.cardinality, options.width, DIRECTIONS)
    model = model.to(options.device, memory_format=options.memory_format)  # type: ignore[call-overload]
    name = f"3D ResNeXt-{options.depth} ({options.cardinality}x{options.width}d)"
    shape = "x".join(map(str, (options.batch, 3, *options.clip)))
    print(f"{name} on {options.device}, clips {shape}")

    clips, _ = moving_shapes(options.batch, options.clip, torch.Generator().manual_seed(options.seed))
    clips = clips.to(options.device, memory_format=options.memory_format)
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=options.amp):
        start = time.perf_counter()
        fast = g3dswap.convert(model, (clips,), tune=options.tune)
        seconds = time.perf_counter() - start
        verification = g3dswap.verify(model, fast, (clips,)).check()
    print(f"converted in {seconds:.1f} s\n\n{g3dswap.report(fast)}\n")
    print(str(verification).partition("\n")[0] + "\n")  # the rest has a line for each tensor

    models = {"PyTorch": model, "g3dswap": fast}
    if options.control:
        models["rounding"] = rounded_otherwise(model)
    runs = train(models, options)
    print(f"losses on the same {options.steps} batches\n{losses_table(runs)}")
    print("Training makes differences in rounding grow; --control shows how far those alone drive it.\n")
    for label, run in runs.items():
        print(f"{label}: {1e3 * run.median:.1f} ms a step (median)")
    low, middle, high = speed_up(runs["PyTorch"], runs["g3dswap"])
    print(f"whole training step, pair by pair: {middle:.2f}x faster (quartiles {low:.2f}x to {high:.2f}x)")
    plot(runs, f"{name}, {options.device}, clips {shape}", options.plot)
    print(f"plot: {options.plot.resolve()}")
    return runs


if __name__ == "__main__":
    main()
