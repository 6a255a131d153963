"""Networks that nobody here wrote, from their public packages: converted, same keys, everything verified."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import g3dswap


def mednext() -> tuple[nn.Module, Tensor]:
    from monai.networks.nets import MedNeXtS

    return MedNeXtS(spatial_dims=3, in_channels=1, out_channels=2, deep_supervision=False), torch.randn(
        2, 1, 16, 16, 16
    )


def seresnext() -> tuple[nn.Module, Tensor]:
    from monai.networks.nets import SEResNext50

    return SEResNext50(spatial_dims=3, in_channels=1, num_classes=3), torch.randn(2, 1, 48, 48, 48)


def uniformer() -> tuple[nn.Module, Tensor]:
    from uniformer_pytorch import Uniformer

    network = Uniformer(
        num_classes=5,
        dims=(16, 32, 32, 32),
        depths=(1, 2, 1, 1),
        mhsa_types=("l", "l", "g", "g"),
        dim_head=16,
    )
    return network, torch.randn(1, 3, 4, 64, 64)


def x3d() -> tuple[nn.Module, Tensor]:
    from pytorchvideo.models.x3d import create_x3d

    network = create_x3d(input_clip_length=4, input_crop_size=64, model_num_class=5, depth_factor=1.0)
    return network, torch.randn(1, 3, 4, 64, 64)


def csn() -> tuple[nn.Module, Tensor]:
    from pytorchvideo.models.csn import create_csn

    network = create_csn(
        model_num_class=5,
        model_depth=50,
        head_pool_kernel_size=(1, 2, 2),
        stem_pool=nn.MaxPool3d,
        stem_pool_kernel_size=(1, 3, 3),
        stem_pool_stride=(1, 2, 2),
    )
    return network, torch.randn(1, 3, 4, 64, 64)


@pytest.fixture
def roi_align(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorchvideo imports a class of torchvision that its detection heads use and these networks do not."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        package, operators = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
        operators.RoIAlign = type("RoIAlign", (), {})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchvision", package)
        monkeypatch.setitem(sys.modules, "torchvision.ops", operators)


@pytest.mark.filterwarnings("ignore")  # what other packages warn about is theirs
@pytest.mark.usefixtures("roi_align")
@pytest.mark.parametrize("build", [mednext, seresnext, uniformer, x3d, csn])
def test_a_public_network(build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    network, clip = build()
    kinds = (nn.Conv3d, nn.ConvTranspose3d)
    grouped = [n for n, m in network.named_modules() if type(m) in kinds and getattr(m, "groups", 1) > 1]
    fast = g3dswap.convert(network, (clip,), tune="none", progress=False)
    report = g3dswap.report(fast)
    assert type(fast) is type(network)
    assert list(fast.state_dict()) == list(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), network.state_dict().values()))
    assert {row.name for row in report.swapped} <= set(grouped) and len(report.swapped) > 0
    assert {*(row.name for row in report.swapped), *(row.name for row in report.kept)} == set(grouped)
    assert len(report.swapped) >= 0.8 * len(grouped), str(report)
    g3dswap.verify(network, fast, (clip,)).check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("roi_align")
@pytest.mark.parametrize(("build", "activations"), [(x3d, 1), (csn, 16)])  # X3D has a swish of its own
def test_a_public_network_fused(build: Callable[[], tuple[nn.Module, Tensor]], activations: int) -> None:
    network, clip = build()
    for module in network.eval().modules():
        if isinstance(module, nn.BatchNorm3d):  # as a trained one has it, not zeros and ones
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    fast = g3dswap.convert(network, (clip,), fuse=True, tune="none", progress=False)
    report = g3dswap.report(fast)
    assert type(fast) is type(network)
    assert [row.name for row in report.fused] == [row.name for row in report.swapped]
    assert all(row.norm for row in report.fused), str(report)
    assert sum(bool(row.activation) for row in report.fused) == activations, str(report)
    g3dswap.verify(network, fast, (clip,)).check()
    state = g3dswap.revert(fast).state_dict()
    assert list(state) == list(network.state_dict())
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
