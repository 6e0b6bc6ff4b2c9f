"""A classification network whose last layer gives a score a class at every pixel (OAA, DRS, Group-WSSS)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from fastcam.nn.backbone import Backbone, create_backbone


def create_trunk(
    name: str,
    *,
    output_stride: int,
    weights: str | Path | None = None,
    frozen_stages: int = 0,
    frozen_norm: bool = True,
) -> Backbone:
    """:func:`fastcam.nn.create_backbone`, dilated, its last output that in front of the classifier.

    VGG-16 at an output stride of 8 is the layout "D1" of these systems: the fourth pooling keeps its window, 3 x 3, and
    loses its stride; the fifth is gone; the last three convolutions are dilated.
    """
    backbone = create_backbone(
        name,
        output_stride=output_stride,
        weights=weights,
        frozen_stages=frozen_stages,
        frozen_norm=frozen_norm,
        head=True,
    )
    layers = [m for m in backbone.net.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    for i, layer in enumerate(layers[:-1]):
        following = layers[i + 1]
        if isinstance(layer, nn.MaxPool2d) and layer.kernel_size == 1 and isinstance(following, nn.Conv2d):
            layer.kernel_size, layer.padding = 3, 1
    return backbone


def score_head(
    channels: int,
    num_classes: int,
    *,
    width: int = 512,
    layers: int = 3,
    activation: Callable[[int], nn.Module] = lambda width: nn.ReLU(inplace=True),
) -> nn.Sequential:
    """3 x 3 convolutions, each with an activation, then a 1 x 1 convolution to one channel a class; all with biases.

    Args:
        channels: of the features.
        num_classes: C.
        width: channels of the 3 x 3 convolutions.
        layers: number of them; 0 leaves the 1 x 1 convolution alone.
        activation: makes the activation behind a convolution of ``width`` channels.

    Returns:
        ``(B, channels, h, w)`` to ``(B, C, h, w)``. Initial weights are the systems' own.
    """
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Conv2d(channels, width, 3, padding=1), activation(width)]
        channels = width
    return nn.Sequential(*modules, nn.Conv2d(channels, num_classes, 1))
