"""The example: its network, its clips, and a whole run at a tiny size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from examples import resnext3d

TINY = ["--device", "cpu", "--depth", "14", "--cardinality", "4", "--width", "2", "--clip", "8x32x32"]


def grouped(model: nn.Module) -> list[nn.Conv3d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv3d) and m.groups > 1]


def test_published_network() -> None:
    """Kopuklu et al. (2019) count 48.75 million parameters in 3D ResNeXt-101 for Kinetics-600."""
    with torch.device("meta"):
        model = resnext3d.ResNeXt3D(101, 32, 4, 600)
        out = model(torch.empty(2, 3, 16, 112, 112))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 48.75
    assert out.shape == (2, 600)


def test_layers_of_the_published_network() -> None:
    with torch.device("meta"):
        model = resnext3d.ResNeXt3D(101, 32, 4)
    layers = grouped(model)
    assert len(layers) == 3 + 4 + 23 + 3
    assert {layer.groups for layer in layers} == {32}
    assert sorted({layer.in_channels for layer in layers}) == [128, 256, 512, 1024]
    assert [layer.stride[0] for layer in layers].count(2) == 3
    # A layer of a network has a convolution or a linear map; the shortcuts' convolutions are not counted.
    weighted = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv3d, nn.Linear))]
    assert len([n for n in weighted if "downsample" not in n]) == 101


def test_clips_move_in_the_direction_of_their_label() -> None:
    """The light's centre of mass, taken on the circle that each axis is, moves along the label's angle."""
    clips, labels = resnext3d.moving_shapes(64, (8, 48, 40), torch.Generator().manual_seed(1))
    assert clips.shape == (64, 3, 8, 48, 40)
    assert set(labels.tolist()) == set(range(8))
    light = (clips - 0.3).clamp(min=0).mean(dim=1)  # above the noise

    def moved(profile: torch.Tensor) -> torch.Tensor:
        size = profile.shape[-1]
        wave = torch.polar(torch.ones(size), torch.arange(size) * (2 * math.pi / size))
        phase = (profile * wave).sum(-1)
        step = torch.angle(phase[:, 1:] * phase[:, :-1].conj())
        return step.sum(-1) * size / (2 * math.pi)

    dy, dx = moved(light.sum(3)), moved(light.sum(2))
    angle = labels * (2 * math.pi / 8)
    wrong = torch.angle(torch.polar(torch.ones(64), torch.atan2(dy, dx) - angle))
    assert wrong.abs().max() < math.pi / 16
    # 3 % to 6 % of the image's smaller side a frame, over seven frames.
    distance = torch.hypot(dy, dx)
    assert distance.min() > 7 * 0.03 * 40 * 0.95
    assert distance.max() < 7 * 0.06 * 40 * 1.05


def test_clips_follow_their_seed() -> None:
    first, second, other = (
        resnext3d.moving_shapes(4, (4, 16, 16), torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def test_network_learns() -> None:
    """A few steps on the same few clips: what they show can be told apart, and the gradients point there."""
    options = resnext3d.parse_options(TINY)
    model = resnext3d.ResNeXt3D(options.depth, options.cardinality, options.width, resnext3d.DIRECTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    clips, labels = resnext3d.moving_shapes(8, options.clip, torch.Generator().manual_seed(0))
    losses = [resnext3d.train_step(model, optimizer, clips, labels, amp=False) for _ in range(25)]
    assert losses[0] > 1.5  # a guess costs log(8) = 2.1
    assert losses[-1] < 0.3


def test_equal_models_get_equal_losses() -> None:
    """Both models see the same batches, whichever goes first."""
    options = resnext3d.parse_options([*TINY, "--batch", "2", "--steps", "4"])
    models = {}
    for name in ("a", "b"):
        torch.manual_seed(3)
        models[name] = resnext3d.ResNeXt3D(options.depth, options.cardinality, options.width, 8)
    runs = resnext3d.train(models, options)
    assert runs["a"].losses == pytest.approx(runs["b"].losses, rel=1e-3)
    assert len(set(runs["a"].losses)) == 4


def test_control_differs_in_the_last_bit_only() -> None:
    model = nn.Linear(50, 50)
    other = resnext3d.rounded_otherwise(model)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a != b).all()
        assert torch.allclose(a, b, rtol=2e-7, atol=0)


def test_speed_up_is_taken_pair_by_pair() -> None:
    slow = resnext3d.Run(seconds=[9, 9, 9, 2.0, 20.0, 4.0])
    fast = resnext3d.Run(seconds=[1, 1, 1, 1.0, 10.0, 2.0])
    assert resnext3d.speed_up(slow, fast) == (2.0, 2.0, 2.0)
    assert slow.median == 4.0
    assert resnext3d.speed_up(resnext3d.Run(seconds=[3.0]), resnext3d.Run(seconds=[2.0])) == (1.5, 1.5, 1.5)


def test_losses_table_has_the_first_and_the_last_step() -> None:
    runs = {name: resnext3d.Run(losses=[i + 0.5 for i in range(40)]) for name in ("PyTorch", "g3dswap")}
    lines = resnext3d.losses_table(runs, rows=5).splitlines()
    assert lines[0].split() == ["step", "PyTorch", "g3dswap"]
    assert lines[1].split() == ["0", "0.50000", "0.50000"]
    assert lines[-1].split() == ["39", "39.50000", "39.50000"]
    assert len(lines) == 6


@pytest.mark.parametrize("text", ["16x112", "16x112x112x3", "16xax112", "0x112x112", ""])
def test_bad_clip_sizes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resnext3d.parse_options(["--clip", text])
    assert caught.value.code == 2
    assert f"{text!r} is not FRAMESxHEIGHTxWIDTH, such as 16x112x112" in capsys.readouterr().err


def test_defaults_on_a_gpu_are_the_published_network() -> None:
    options = resnext3d.parse_options(["--device", "cuda"])
    assert (options.depth, options.cardinality, options.width) == (101, 32, 4)
    assert options.clip == (16, 112, 112)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--channels-last"]])
def test_whole_run(layout: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plot.png"
    options = ["--batch", "4", "--steps", "3", "--lr", "1e-4", "--tune", "none", "--control"]
    runs = resnext3d.main([*TINY, *options, "--plot", str(picture), *layout])
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert str(picture) in out
    assert "layer1.0.conv2" in out
    assert set(runs) == {"PyTorch", "g3dswap", "rounding"}
    # Batch norm over few numbers makes differences in rounding grow, the faster the more the weights change.
    assert runs["g3dswap"].losses == pytest.approx(runs["PyTorch"].losses, rel=1e-3)
    assert runs["rounding"].losses == pytest.approx(runs["PyTorch"].losses, rel=1e-3)
