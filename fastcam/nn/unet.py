"""U-Net with batch norm, in any width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def double_conv(channels: int, out: int) -> nn.Sequential:
    """Twice a 3 x 3 convolution, batch norm and ReLU."""
    layers: list[nn.Module] = []
    for before in (channels, out):
        layers += [nn.Conv2d(before, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI
    2015 (arXiv 1505.04597), with padded convolutions and batch norm.

    Args:
        channels: of the images.
        labels: channels of the scores.
        width: channels at full resolution; they double where the sides are halved (the paper: 64).
        depth: how often they are.
    """

    def __init__(self, channels: int, labels: int, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.stride = 2**depth  # sides of the images are multiples of it
        self.down = nn.ModuleList(
            [double_conv(before, after) for before, after in zip([channels, *widths], widths, strict=False)]
        )
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.enlarge = nn.ModuleList([nn.ConvTranspose2d(before, after, 2, stride=2) for before, after in steps])
        self.up = nn.ModuleList([double_conv(2 * after, after) for _, after in steps])
        self.last = nn.Conv2d(width, labels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` -> scores `(B, labels, H, W)`; H and W are multiples of `stride`."""
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for enlarge, block, beside in zip(self.enlarge, self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([beside, enlarge(x)], dim=1))
        return self.last(x)
