"""3D ResNeXt, as a network to measure and to train.

That of Hara, Kataoka and Satoh, "Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and ImageNet?"
(CVPR 2018): bottlenecks whose 3x3x3 convolution has 32 groups.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Bottlenecks in each of the four stages, by the number of layers. 50, 101 and 152 are the published ones."""


class Bottleneck(nn.Module):
    """1x1x1, grouped 3x3x3, 1x1x1, each with batch norm, around a shortcut."""

    def __init__(self, inputs: int, middle: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(middle)
        self.conv2 = nn.Conv3d(middle, middle, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm3d(middle)
        self.conv3 = nn.Conv3d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv3d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm3d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNeXt3D(nn.Module):
    """3D ResNeXt for clips of shape (batch, 3, frames, height, width); gives (batch, classes).

    The first stage has ``cardinality`` groups of ``width`` channels, and every later stage channels twice as
    wide. ``ResNeXt3D(101, 32, 4)`` is the published 3D ResNeXt-101 (32x4d).
    """

    def __init__(self, depth: int = 101, cardinality: int = 32, width: int = 4, classes: int = 400) -> None:
        super().__init__()
        middle = cardinality * width
        channels = max(16, middle // 2)
        self.conv1 = nn.Conv3d(3, channels, 7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        stages = []
        for stage, blocks in enumerate(BLOCKS[depth]):
            layers = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, middle, 2 * middle, cardinality, stride))
                channels = 2 * middle
            stages.append(nn.Sequential(*layers))
            middle *= 2
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, clips: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(clips))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3, 4)))
