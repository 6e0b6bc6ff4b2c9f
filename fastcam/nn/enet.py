"""ENet: a small segmentation network for one pass in real time, here for medical slices."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-3  # of every batch norm
DEEP: tuple[tuple[str, int], ...] = (
    ("regular", 1),
    ("dilated", 2),
    ("asymmetric", 5),
    ("dilated", 4),
    ("regular", 1),
    ("dilated", 8),
    ("asymmetric", 5),
    ("dilated", 16),
)


def _norm(channels: int, prelu: bool) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, eps=EPS), nn.PReLU(channels) if prelu else nn.ReLU()]


def _middle(kind: str, channels: int, number: int) -> list[nn.Module]:
    """The convolution between the two that narrow and widen; `number` is a dilation or a length."""
    if kind == "asymmetric":
        return [
            nn.Conv2d(channels, channels, (number, 1), padding=(number // 2, 0), bias=False),
            nn.Conv2d(channels, channels, (1, number), padding=(0, number // 2)),
        ]
    if kind == "up":
        return [nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1)]
    return [nn.Conv2d(channels, channels, 3, padding=number, dilation=number)]


class Bottleneck(nn.Module):
    """Three convolutions beside a short cut: narrow to a quarter of the output's channels, work, widen.

    Args:
        channels: of the input.
        out: of the output.
        kind: `"regular"`, `"dilated"` or `"asymmetric"`, which keep channels and size; `"down"` halves the sides and
            gives the places of its maxima too; `"up"` doubles them and takes such places.
        number: dilation of `"dilated"`, length of `"asymmetric"`.
        prelu: a learnt slope for negative values (encoder) instead of none (decoder).
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kind: Literal["regular", "dilated", "asymmetric", "down", "up"] | str = "regular",
        number: int = 1,
        prelu: bool = True,
    ) -> None:
        super().__init__()
        inner = out // 4
        stride = 2 if kind == "down" else 1
        self.kind = kind
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, stride, stride=stride, bias=False),
            *_norm(inner, prelu),
            *_middle(kind, inner, number),
            *_norm(inner, prelu),
            nn.Conv2d(inner, out, 1, bias=False),
            *_norm(out, prelu),
        )
        if kind == "up":
            self.short = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out, eps=EPS))

    def forward(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`(B, channels, h, w)` -> `(B, out, ., .)`, and the places of the maxima if the sides were halved."""
        body = self.body(x)
        if self.kind == "up":
            assert places is not None
            return F.relu(F.max_unpool2d(self.short(x), places, (2, 2)) + body), None
        if self.kind == "down":
            x, places = F.max_pool2d(x, 2, return_indices=True)
            x = F.pad(x, (0, 0, 0, 0, 0, body.shape[1] - x.shape[1]))
            return F.relu(x + body), places
        return F.relu(x + body), None


class ENet(nn.Module):
    """A. Paszke, A. Chaurasia, S. Kim, E. Culurciello, "ENet: A Deep Neural Network Architecture for Real-Time Semantic
    Segmentation", arXiv 1606.02147, without its dropout, as deep co-training uses it.

    Weights begin as Xavier's normal numbers, the factors of batch norm as N(1, 0.02).

    Args:
        channels: of the images.
        labels: channels of the scores.
    """

    stride = 8  # sides of the images are multiples of it

    def __init__(self, channels: int, labels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 13, 3, stride=2, padding=1)
        self.first_norm = nn.Sequential(*_norm(13, True))
        start = 13 + channels
        self.down1 = Bottleneck(start, 64, "down")
        self.stage1 = nn.ModuleList([Bottleneck(64, 64) for _ in range(4)])
        self.down2 = Bottleneck(64, 128, "down")
        self.stage2 = nn.ModuleList([Bottleneck(128, 128, kind, number) for kind, number in 2 * DEEP])
        self.up4 = Bottleneck(128, 64, "up", prelu=False)
        self.stage4 = nn.ModuleList([Bottleneck(64, 64, prelu=False) for _ in range(2)])
        self.up5 = Bottleneck(64, start, "up", prelu=False)
        self.stage5 = nn.ModuleList([Bottleneck(start, start, prelu=False)])
        self.last = nn.ConvTranspose2d(start, labels, 2, stride=2)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` -> scores `(B, labels, H, W)`; H and W are multiples of 8."""
        x = torch.cat([self.first_norm(self.first(x)), F.max_pool2d(x, 2)], dim=1)
        x, places1 = self.down1(x)
        x = _through(self.stage1, x)
        x, places2 = self.down2(x)
        x = _through(self.stage2, x)
        x, _ = self.up4(x, places2)
        x = _through(self.stage4, x)
        x, _ = self.up5(x, places1)
        return self.last(_through(self.stage5, x))


def _through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x, _ = block(x)
    return x
