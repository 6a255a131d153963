"""Whole networks to measure, from their public packages, at the inputs that they are known for.

Each has a tiny variant for tests: the same layers in fewer or smaller blocks, at a small input.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from g3dswap.bench.resnext3d import ResNeXt3D
from g3dswap.errors import ArgumentError

Shape = tuple[int, ...]
CLASSES = 400
SCALES = ("full", "tiny")


@dataclass(frozen=True)
class Network:
    """A network, how to build it in each scale, and its input with the batch.

    packages: what pip has to install for it.
    """

    name: str
    packages: str
    build: Callable[[bool], nn.Module]
    full: Shape
    tiny: Shape

    def shape(self, scale: str) -> Shape:
        """Of the input."""
        return self.tiny if scale == "tiny" else self.full

    def make(self, scale: str) -> nn.Module:
        """The network with random weights; MissingPackage where a package cannot be imported."""
        return self.build(scale == "tiny")


class MissingPackage(Exception):
    """A network's package is not there, or does not fit PyTorch."""


def _from(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:  # the latter from extensions built for another PyTorch
        raise MissingPackage(str(error).partition("\n")[0]) from error


def _resnext(tiny: bool) -> nn.Module:
    return ResNeXt3D(14, 4, 4, 5) if tiny else ResNeXt3D(101, 32, 4, CLASSES)


def _x3d(tiny: bool) -> nn.Module:
    create = _from("pytorchvideo.models.x3d", "create_x3d")
    size = {"input_clip_length": 4, "input_crop_size": 64, "depth_factor": 1.0, "model_num_class": 5}
    if not tiny:  # pytorchvideo's own x3d_m
        size = {"input_clip_length": 16, "input_crop_size": 224, "model_num_class": CLASSES}
    network: nn.Module = create(**size, head_activation=None)  # the loss wants logits
    return network


def _csn(tiny: bool) -> nn.Module:
    create = _from("pytorchvideo.models.csn", "create_csn")
    depth, pool, classes = (50, (1, 2, 2), 5) if tiny else (101, (4, 7, 7), CLASSES)
    network: nn.Module = create(
        model_depth=depth, stem_pool=nn.MaxPool3d, head_pool_kernel_size=pool, model_num_class=classes
    )
    return network


def _mednext(variant: str, kernel: int) -> Callable[[bool], nn.Module]:
    def build(tiny: bool) -> nn.Module:
        create = _from("monai.networks.nets.mednext", "create_mednext")
        network: nn.Module = create("S" if tiny else variant, kernel_size=kernel)
        return network

    return build


def _mvit(tiny: bool) -> nn.Module:
    create = _from("torchvision.models.video.mvit", "MViT" if tiny else "mvit_v2_s")
    if not tiny:
        network: nn.Module = create()
        return network
    config, taps = _from("torchvision.models.video.mvit", "MSBlockConfig"), (3, 3, 3)
    blocks = [
        config(1, 16, 16, taps, taps, (1, 1, 1), (1, 4, 4)),
        config(2, 16, 32, taps, taps, (1, 2, 2), (1, 2, 2)),
    ]
    second = {"residual_pool": True, "residual_with_cls_embed": False}  # what makes it an MViTv2
    second |= {"rel_pos_embed": True, "proj_after_attn": True}
    network = create((64, 64), 4, blocks, **second, num_classes=5)
    return network


NETWORKS = (
    Network("3D ResNeXt-101", "", _resnext, (32, 3, 16, 112, 112), (2, 3, 8, 64, 64)),
    Network("ir-CSN-101", "pytorchvideo torchvision", _csn, (8, 3, 32, 224, 224), (2, 3, 4, 64, 64)),
    Network("X3D-M", "pytorchvideo torchvision", _x3d, (16, 3, 16, 224, 224), (2, 3, 4, 64, 64)),
    Network("MViTv2-S", "torchvision", _mvit, (8, 3, 16, 224, 224), (2, 3, 4, 64, 64)),
    Network("MedNeXt-S k3", "monai", _mednext("S", 3), (2, 1, 128, 128, 128), (2, 1, 16, 16, 16)),
    Network("MedNeXt-B k5", "monai", _mednext("B", 5), (2, 1, 128, 128, 128), (2, 1, 16, 16, 16)),
)


def choose_networks(match: Sequence[str]) -> list[Network]:
    """Those whose names fit a glob; all of them where there is none."""
    chosen = [it for it in NETWORKS if not match or any(fnmatchcase(it.name, glob) for glob in match)]
    if not chosen:
        names = ", ".join(it.name for it in NETWORKS)
        raise ArgumentError(f"No network fits {' or '.join(map(repr, match))}; there are {names}.")
    return chosen
