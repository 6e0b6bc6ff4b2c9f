"""What adversarial networks are made of: generators, discriminators, least-squares losses, a pool of earlier fakes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """Draws the weights of all convolutions from N(0, std) and sets their biases to 0, as DCGAN starts."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with instance norm, added to the input; dropout lies between them.

    Args:
        channels: in and out.
        dropout: share of the features that are dropped.
    """

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to the same; H and W are at least 2."""
        return x + self.layers(x)


class ResnetGenerator(nn.Module):
    """From maps to maps of the same size, through residual blocks at a quarter of it (Johnson et al., CycleGAN).

    Of an input whose sides are no multiples of 4, or below 8, the last row and column are repeated, and the output is
    cut.

    Args:
        channels: of the input.
        out: of the output, which has no activation.
        width: channels of the first layer; doubled twice.
        blocks: residual blocks.
        dropout: in every residual block.
    """

    def __init__(self, channels: int, out: int, width: int = 64, blocks: int = 9, dropout: float = 0.5) -> None:
        super().__init__()

        def norm_relu(channels: int) -> list[nn.Module]:
            return [nn.InstanceNorm2d(channels), nn.ReLU()]

        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(channels, width, 7), *norm_relu(width)]
        for wide in (2 * width, 4 * width):
            layers += [nn.Conv2d(wide // 2, wide, 3, stride=2, padding=1), *norm_relu(wide)]
        layers += [ResidualBlock(4 * width, dropout) for _ in range(blocks)]
        for narrow in (2 * width, width):
            up = nn.ConvTranspose2d(2 * narrow, narrow, 3, stride=2, padding=1, output_padding=1)
            layers += [up, *norm_relu(narrow)]
        self.layers = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, out, 7))
        init_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` -> ``(B, out, H, W)``."""
        height, width = x.shape[-2:]
        down, right = (max(8, side + -side % 4) - side for side in (height, width))
        if down or right:
            x = F.pad(x, (0, right, 0, down), mode="replicate")
        return self.layers(x)[..., :height, :width]


def pixel_discriminator(channels: int, width: int = 64) -> nn.Sequential:
    """Scores every pixel by itself: ``(B, channels, H, W)`` -> ``(B, 1, H, W)``.

    Pixels know of each other through the statistics of the instance norm alone.
    """
    network = nn.Sequential(
        nn.Conv2d(channels, width, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 1),
        nn.InstanceNorm2d(2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 1),
    )
    init_normal(network)
    return network


def patch_discriminator(channels: int, width: int = 64) -> nn.Sequential:
    """Scores overlapping patches of 70 x 70 pixels (pix2pix): ``(B, channels, H, W)`` -> ``(B, 1, H/8 - 2, W/8 - 2)``.

    H and W are at least 32.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for wide, stride in ((2 * width, 2), (4 * width, 2), (8 * width, 1)):
        layers += [
            nn.Conv2d(wide // 2, wide, 4, stride=stride, padding=1),
            nn.InstanceNorm2d(wide),
            nn.LeakyReLU(0.2),
        ]
    network = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))
    init_normal(network)
    return network


def strided_discriminator(channels: int, width: int = 64) -> nn.Sequential:
    """Five strided convolutions without norm (Hung et al.): ``(B, channels, H, W)`` -> ``(B, 1, H/32, W/32)``."""
    widths = [channels, width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    network = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, stride=2, padding=1))
    init_normal(network)
    return network


def lsgan_generator_loss(fake: Tensor) -> Tensor:
    """How far a discriminator is from taking fakes for real: mean of ``(D - 1)^2``.

    Least-squares GAN (Mao et al., ICCV 2017).

    Args:
        fake: its scores of fakes, any shape.
    """
    return (fake - 1).square().mean()


def lsgan_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half of the mean of ``(D - 1)^2`` over real ones and the mean of ``D^2`` over fakes.

    Args:
        real: scores of real samples, any shape.
        fake: scores of fakes, any shape.
    """
    return ((real - 1).square().mean() + fake.square().mean()) / 2


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """What is computed inside has no gradient in the parameters of these modules, only through them."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class ReplayPool(nn.Module):
    """Shows a discriminator earlier fakes beside those of now, so that it does not forget (Shrivastava et al., 2017).

    An entry is a whole batch. The first ones are kept and returned; from then on a batch is returned as it came with
    probability 1/2, or else takes the place of a random entry, which is returned.

    The entries take part in checkpoints, for exact resuming, through the module's extra state. All chance comes from
    torch's global CPU generator.

    Args:
        size: number of entries; with 0 every batch is returned as it came.
    """

    def __init__(self, size: int = 50) -> None:
        super().__init__()
        self.size = size
        self.entries: list[Tensor] = []

    @torch.no_grad()
    def forward(self, batch: Tensor) -> Tensor:
        """A batch or an earlier one, without a gradient."""
        batch = batch.detach()
        if len(self.entries) < self.size:
            self.entries.append(batch.clone())
            return batch
        if self.size == 0 or torch.rand(()) < 0.5:
            return batch
        index = int(torch.randint(self.size, ()))
        earlier, self.entries[index] = self.entries[index], batch.clone()
        return earlier.to(batch.device)

    def get_extra_state(self) -> dict[str, Any]:
        """The entries."""
        return {"entries": self.entries}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.entries = list(state["entries"])
