"""Classification networks that timm lacks, with what of its interface the backbones use.

SqueezeNet 1.1: F. N. Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and < 0.5 MB model
size", 2016 (arXiv 1602.07360). ResNet-50 V2: K. He, X. Zhang, S. Ren, J. Sun, "Identity Mappings in Deep Residual
Networks", ECCV 2016, as MXNet's Gluon lays it out: batch norm in front of the first convolution and behind it, where
timm's ``resnetv2_50`` has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Staged(nn.Module):
    """A network whose stages follow each other, and whose last output is its final feature map.

    Attributes:
        feature_info: one entry a stage.
        default_cfg: mean and standard deviation of the input.
    """

    feature_info: Sequence[str]
    default_cfg: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}  # noqa: RUF012 (as timm's)

    def stages(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """The stages, in order."""
        raise NotImplementedError

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int], intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages ``indices``; in front of them the last one, if not ``intermediates_only``."""
        outputs = []
        for stage in self.stages():
            x = stage(x)
            outputs.append(x)
        chosen = [outputs[i] for i in indices]
        return chosen if intermediates_only else (x, chosen)

    def prune_intermediate_layers(
        self, indices: Sequence[int], prune_norm: bool = False, prune_head: bool = True
    ) -> None:
        """Nothing to take out: all stages are needed, and there is no classifier."""


class SqueezeNet(Staged):
    """SqueezeNet 1.1 without its classifier; torchvision's names, strides 2, 4, 8, 16."""

    feature_info = ("features.1", "features.4", "features.7", "features.12")

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import squeezenet1_1

        self.features = squeezenet1_1().features

    def stages(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Up to the ReLU or the module in front of each pooling, and the rest."""
        return [self.features[:2], self.features[2:5], self.features[5:8], self.features[8:]]


class PreActivation(nn.Module):
    """A bottleneck whose norms and activations stand in front of the convolutions.

    Args:
        channels: of the input.
        out: of the output.
        stride: of the 3 x 3 convolution.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        width = out // 4
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to ``(B, out, H / stride, W / stride)``, not activated."""
        a = self.relu(self.bn1(x))
        if self.downsample is not None:
            x = self.downsample(a)
        y = self.conv1(a)
        y = self.conv2(self.relu(self.bn2(y)))
        return x + self.conv3(self.relu(self.bn3(y)))


class ResNet50V2C4(Staged):
    """ResNet-50 V2 to the end of its third stage and the norm behind it; strides 2, 4, 8, 16, 1024 channels.

    The outputs of the two stages before the last are sums, not activated.
    """

    feature_info = ("bn1", "layer1", "layer2", "layer3")

    def __init__(self) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _layer(64, 256, blocks=3, stride=1)
        self.layer2 = _layer(256, 512, blocks=4, stride=2)
        self.layer3 = _layer(512, 1024, blocks=6, stride=2)
        self.bn_c4 = nn.BatchNorm2d(1024)

    def stages(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """The stem in front of its pooling, and three stages."""
        return [
            lambda x: self.relu(self.bn1(self.conv1(self.bn0(x)))),
            lambda x: self.layer1(self.maxpool(x)),
            self.layer2,
            lambda x: self.relu(self.bn_c4(self.layer3(x))),
        ]


def _layer(channels: int, out: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActivation(channels, out, stride)
    return nn.Sequential(first, *(PreActivation(out, out, 1) for _ in range(blocks - 1)))


NETWORKS: dict[str, Callable[[], Staged]] = {"resnet50_v2_c4": ResNet50V2C4, "squeezenet1_1": SqueezeNet}
