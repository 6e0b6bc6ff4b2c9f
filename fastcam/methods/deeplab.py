"""DeepLabv3+: the segmentation network that is trained on pseudo-labels.

L.-C. Chen, Y. Zhu, G. Papandreou, F. Schroff, H. Adam, "Encoder-Decoder with Atrous Separable Convolution for Semantic
Image Segmentation", ECCV 2018 (arXiv 1802.02611), on any timm backbone; with ``low_level_channels=0`` it is DeepLabv3
(arXiv 1706.05587). Authors' code: github.com/tensorflow/models/tree/master/research/deeplab (Apache-2.0).

The last features pass through atrous spatial pyramid pooling: convolutions of several dilation rates and the image's
mean, side by side. The decoder joins the result with earlier, finer features, of which it first keeps a few channels.

Deviations from the authors' code: the branch of the image's mean has no batch norm, so that a batch of one image can be
trained; a bias stands in its place. The heads may learn faster than the backbone (``head_lr_factor``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.methods.drs import online_labels
from fastcam.nn import create_backbone
from fastcam.nn.losses import LossConfig, check_loss, resize, segmentation_loss
from fastcam.nn.optim import sgd_poly


@dataclass(frozen=True)
class Config(LossConfig):
    """The authors' values on VOC 2012, but for ``frozen_norm``, which they set only in a last stage of training.

    The fields of :class:`fastcam.nn.LossConfig` choose the loss.

    Attributes:
        backbone: timm name.
        output_stride: of the last features; the layers behind a removed stride are dilated.
        frozen_stages: first stages of the backbone that do not learn.
        frozen_norm: the backbone's batch norm keeps its pre-trained statistics.
        rates: dilation of each 3 x 3 branch. For an output stride of 8 the authors double them.
        image_pooling: a branch for the image's mean.
        head_channels: channels of the branches and of the decoder.
        separable: every 3 x 3 convolution is a depthwise one and a 1 x 1.
        low_level_stage: which of the backbone's four outputs the decoder reads.
        low_level_channels: channels kept of it; 0 for no decoder (DeepLabv3).
        dropout: before the last layer.
        online_loss: factor of a second cross-entropy, with the network's own prediction among the image's tags
            (DRS: 1).
        lr: of the backbone; falls as ``(1 - step / steps) ** poly_power``.
        head_lr_factor: the heads learn this much faster.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    backbone: str = "resnet50"
    output_stride: int = 16
    frozen_stages: int = 0
    frozen_norm: bool = True
    rates: tuple[int, ...] = (6, 12, 18)
    image_pooling: bool = True
    head_channels: int = 256
    separable: bool = True
    low_level_stage: int = 0
    low_level_channels: int = 48
    dropout: float = 0.1
    online_loss: float = 0.0
    lr: float = 0.007
    head_lr_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 4e-5
    poly_power: float = 0.9
    grad_clip: float | None = None


def conv_norm(channels: int, out: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    conv = nn.Conv2d(channels, out, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def conv3x3(channels: int, out: int, dilation: int = 1, separable: bool = True) -> nn.Sequential:
    """3 x 3 convolution, batch norm, ReLU; if ``separable``, a depthwise one and a 1 x 1, each with norm and ReLU."""
    if not separable:
        return conv_norm(channels, out, 3, dilation)
    depthwise = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False)
    return nn.Sequential(
        depthwise, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *conv_norm(channels, out, 1).children()
    )


class PyramidPooling(nn.Module):
    """Atrous spatial pyramid pooling: a 1 x 1 and dilated 3 x 3 convolutions and the image's mean, then a projection.

    A 3 x 3 convolution whose rate passes the map's size sees its centre only.
    """

    def __init__(self, channels: int, out: int, rates: tuple[int, ...], image_pooling: bool, separable: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_norm(channels, out, 1), *(conv3x3(channels, out, rate, separable) for rate in rates)]
        )
        self.pool = (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, out, 1), nn.ReLU(inplace=True))
            if image_pooling
            else None
        )
        self.project = conv_norm((len(self.branches) + image_pooling) * out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, h, w)`` -> ``(B, out, h, w)``."""
        outputs = [branch(x) for branch in self.branches]
        if self.pool is not None:
            outputs.append(self.pool(x).expand_as(outputs[0]))
        return self.project(torch.cat(outputs, dim=1))


class DeepLab(nn.Module):
    """The network, its loss and its recipe.

    Args:
        num_classes: number of foreground classes C; label 0 is the background.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "deeplab"
    kind = "segmenter"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        check_loss("deeplab", config, num_classes + 1)
        if config.low_level_stage not in range(3):
            raise FastcamError(f"deeplab: low_level_stage is {config.low_level_stage}, expected 0, 1 or 2")
        self.num_classes = num_classes
        self.config = config
        self.backbone = create_backbone(
            config.backbone,
            output_stride=config.output_stride,
            weights=weights,
            frozen_stages=config.frozen_stages,
            frozen_norm=config.frozen_norm,
        )
        self.normalize = self.backbone.normalize
        out, low = config.head_channels, config.low_level_channels
        self.pyramid = PyramidPooling(
            self.backbone.channels[-1], out, config.rates, config.image_pooling, config.separable
        )
        if low:
            self.low_level = conv_norm(self.backbone.channels[config.low_level_stage], low, 1)
            self.decoder = nn.Sequential(
                conv3x3(out + low, out, separable=config.separable), conv3x3(out, out, separable=config.separable)
            )
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Conv2d(out, num_classes + 1, 1))
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.tensor(config.class_weights or [1.0] * (num_classes + 1)))

    def coarse_logits(self, images: Tensor) -> Tensor:
        """Logits ``(B, C + 1, h, w)`` of ``(B, 3, H, W)`` at the decoder's resolution."""
        stages = self.backbone(images)
        x = self.pyramid(stages[-1])
        if self.config.low_level_channels:
            low = self.low_level(stages[self.config.low_level_stage])
            x = F.interpolate(x, low.shape[-2:], mode="bilinear", align_corners=False)
            x = self.decoder(torch.cat([x, low], dim=1))
        return self.classifier(x)

    def logits(self, images: Tensor) -> Tensor:
        """Logits of the labels at every pixel: ``(B, 3, H, W)`` -> float32 ``(B, C + 1, H, W)``, background first."""
        return F.interpolate(
            self.coarse_logits(images).float(), images.shape[-2:], mode="bilinear", align_corners=False
        )

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss over the pixels that have a label.

        Args:
            batch: ``"image"`` ``(B, 3, S, S)``, and ``"mask"`` int64 ``(B, S, S)``: 0 to C, 255 where nothing is known;
                ``"tags"`` ``(B, C)`` for ``online_loss``, which counts every pixel.

        Returns:
            As :func:`fastcam.nn.losses.segmentation_loss`: ``"loss"`` and ``"accuracy"``.
        """
        scores, mask = self.coarse_logits(batch["image"]), batch["mask"]
        scalars = segmentation_loss(scores, mask, self.config, self.class_weights, align_corners=False)
        if self.config.online_loss:
            if "tags" not in batch:
                raise FastcamError("deeplab: online_loss needs the images' tags; give data.tags")
            logits = resize(scores.float(), mask.shape[-2:], align_corners=False)
            online = F.cross_entropy(logits, online_labels(logits, batch["tags"]))
            scalars["loss"] = scalars["loss"] + self.config.online_loss * online
        return scalars

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with a poly schedule; the heads learn ``head_lr_factor`` times faster."""
        heads = [module for name, module in self.named_children() if name != "backbone"]
        return [sgd_poly(self.backbone, heads, self.config, total_steps)]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()
