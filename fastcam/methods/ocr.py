"""OCR: segmentation in which every pixel attends to one vector a class.

Y. Yuan, X. Chen, J. Wang, "Object-Contextual Representations for Semantic Segmentation", ECCV 2020 (arXiv 1909.11065).
Authors' code: github.com/openseg-group/openseg.pytorch and github.com/HRNet/HRNet-Semantic-Segmentation, branch
HRNet-OCR (both MIT).

A first segmentation says softly where the regions of every class are; the features of a region are pooled to one
vector; every pixel reads from these vectors what resembles it, and is classified with what it has read.

Deviations from the authors' code: trunks are timm's, whose ResNets pool without rounding sizes up and whose HRNets
enlarge between branches to the nearest pixel; images are RGB in the trunk's own normalisation; the first
segmentation's loss is a mean over known pixels also beside OHEM, where HRNet-OCR returns it unreduced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn import create_backbone
from fastcam.nn.losses import IGNORE, LossConfig, check_loss, cross_entropy, resize, segmentation_loss
from fastcam.nn.optim import sgd_poly
from fastcam.ops.region_pool import region_pool


@dataclass(frozen=True)
class Config(LossConfig):
    """The authors' ResNet-101 on Cityscapes but for its class weights; configs/ocr_voc.yaml has their HRNet.

    The fields of :class:`fastcam.nn.LossConfig` choose the loss of the last output.

    Attributes:
        backbone: timm name. ``resnet101s`` has the authors' stem of three convolutions.
        output_stride: of the last features; 32 for HRNet, whose first branch has stride 4 all the same.
        features: ``"last"``: the first segmentation is made of the last stage but one, the regions of the last
            (ResNet); ``"all"``: both of all four stages, enlarged to the first and concatenated (HRNet).
        frozen_stages: first stages of the backbone that do not learn.
        frozen_norm: the backbone's batch norm keeps its pre-trained statistics.
        coarse_kernel: side of the first segmentation's first convolution.
        coarse_channels: its channels; 0 for as many as its input has.
        coarse_dropout: behind it, of whole channels.
        mid_channels: of the pixels' features and the regions'.
        key_channels: of what is compared and read.
        rates: dilation of 3 x 3 convolutions beside the attention, with a 1 x 1 (ASP-OCR: 12, 24, 36); empty for none.
        bias: convolutions of the attention and the fusion have one (HRNet-OCR: not).
        dropout: before the last layer, of whole channels.
        temperature: multiplies the first segmentation's logits before the softmax over pixels.
        attention_scale: pixels that attend are first pooled by this factor, and what they read is enlarged again.
        aux_weight: of the first segmentation's cross-entropy.
        lr: of the backbone; falls as ``(1 - step / steps) ** poly_power``.
        head_lr_factor: the head learns this much faster.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    backbone: str = "resnet101s"
    output_stride: int = 8
    features: Literal["last", "all"] = "last"
    frozen_stages: int = 0
    frozen_norm: bool = False
    coarse_kernel: int = 3
    coarse_channels: int = 512
    coarse_dropout: float = 0.05
    mid_channels: int = 512
    key_channels: int = 256
    rates: tuple[int, ...] = ()
    bias: bool = True
    dropout: float = 0.05
    temperature: float = 1.0
    attention_scale: int = 1
    aux_weight: float = 0.4
    lr: float = 0.01
    head_lr_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    poly_power: float = 0.9
    grad_clip: float | None = None


def region_vectors(features: Tensor, coarse: Tensor, temperature: float = 1.0) -> Tensor:
    """Object region representations (eq. 2): features averaged with a softmax of each class over the pixels.

    Args:
        features: ``(B, D, h, w)``.
        coarse: logits of the first segmentation ``(B, K, h, w)``.
        temperature: multiplies them; 0 gives the mean of the image, infinity would give the best pixel.

    Returns:
        ``(B, K, D)``.
    """
    return region_pool(features, temperature * coarse, normalize="softmax")


def pixel_region_relation(query: Tensor, keys: Tensor) -> Tensor:
    """How much every pixel belongs to every region (eq. 3), with the authors' divisor, the root of D.

    Args:
        query: of pixels ``(B, D, N)``.
        keys: of regions ``(B, D, K)``.

    Returns:
        ``(B, K, N)``; sums over K are 1.
    """
    return torch.matmul(keys.mT / math.sqrt(query.shape[1]), query).softmax(dim=1)


def region_read(relation: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of what every pixel reads from the regions: ``weight (values relation) + bias``.

    With fewer regions than channels it is cheaper to apply the layer to the regions, ``(weight values + bias)
    relation``: the same, as sums of ``relation`` over regions are 1.

    Args:
        relation: ``(B, K, N)``.
        values: of regions ``(B, D, K)``.
        weight: ``(C, D)``.
        bias: ``(C,)``.

    Returns:
        ``(B, C, N)``.
    """
    (K, N), (C, D) = relation.shape[1:], weight.shape
    if C * K * (D + N) <= D * N * (C + K):
        table = torch.matmul(weight, values)
        return torch.matmul(table if bias is None else table + bias[:, None], relation)
    out = torch.matmul(weight, torch.matmul(values, relation))
    return out if bias is None else out + bias[:, None]


def label_regions(features: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Region vectors of true labels, the authors' upper bound: plain means; 0 for a label that is absent.

    Args:
        features: ``(B, D, h, w)``.
        labels: ``(B, h, w)``: 0 to K - 1, 255 where nothing is known.
        num_labels: K.

    Returns:
        ``(B, K + 1, D)``; the last region is that of 255.
    """
    return region_pool(features, _one_hot(labels, num_labels).to(features.dtype), normalize="sum", eps=1e-12)


def label_relation(labels: Tensor, num_labels: int, background: bool = False) -> Tensor:
    """The relation of true labels: each pixel to its own region, or (``background``) to all others alike.

    Args:
        labels: ``(B, h, w)``: 0 to K - 1, 255 where nothing is known.
        num_labels: K.
        background: the authors' upper bound with the context of the other regions.

    Returns:
        float32 ``(B, K + 1, h w)``.
    """
    own = _one_hot(labels, num_labels).flatten(2).float()
    return (1 - own) / num_labels if background else own


def _one_hot(labels: Tensor, num_labels: int) -> Tensor:
    return F.one_hot(labels.masked_fill(labels == IGNORE, num_labels), num_labels + 1).movedim(-1, 1)


def norm_relu(channels: int) -> nn.Sequential:
    """Batch norm, ReLU."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def conv_norm(channels: int, out: int, kernel: int = 1, bias: bool = True, dilation: int = 1) -> list[nn.Module]:
    """Convolution that keeps the size, batch norm, ReLU."""
    padding = dilation * (kernel // 2)
    return [nn.Conv2d(channels, out, kernel, padding=padding, dilation=dilation, bias=bias), norm_relu(out)]


class ObjectAttention(nn.Module):
    """What every pixel reads from the regions, back in the channels of its features.

    Names of layers are those of the authors' checkpoints.

    Args:
        channels: of features and regions.
        keys: of what is compared and read.
        bias: of the convolutions.
        scale: factor by which pixels are pooled first.
    """

    def __init__(self, channels: int, keys: int, bias: bool = True, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale
        self.f_pixel = nn.Sequential(*conv_norm(channels, keys, bias=bias), *conv_norm(keys, keys, bias=bias))
        self.f_object = nn.Sequential(*conv_norm(channels, keys, bias=bias), *conv_norm(keys, keys, bias=bias))
        self.f_down = nn.Sequential(*conv_norm(channels, keys, bias=bias))
        self.f_up = nn.Sequential(*conv_norm(keys, channels, bias=bias))

    def relation(self, features: Tensor, regions: Tensor) -> Tensor:
        """Relation ``(B, K, h w)`` of pixels ``(B, C, h, w)`` to regions ``(B, K, C)``."""
        keys = self.f_object(regions.mT[..., None])[..., 0]
        return pixel_region_relation(self.f_pixel(features).flatten(2), keys)

    def forward(self, features: Tensor, regions: Tensor, relation: Tensor | None = None) -> Tensor:
        """Context ``(B, C, h, w)``; ``relation`` takes the place of the computed one (upper bounds)."""
        pooled = F.max_pool2d(features, self.scale) if self.scale > 1 else features
        if relation is None:
            relation = self.relation(pooled, regions)
        values = self.f_down(regions.mT[..., None])[..., 0]
        conv, norm = self.f_up
        assert isinstance(conv, nn.Conv2d)
        context = region_read(relation.to(values.dtype), values, conv.weight[:, :, 0, 0].to(values.dtype), conv.bias)
        context = norm(context.unflatten(2, pooled.shape[-2:]))
        return resize(context, features.shape[-2:], align_corners=True)


class SpatialOCR(nn.Module):
    """Context and further features, joined by a 1 x 1 convolution.

    Args:
        channels: of features, regions and all that is joined.
        keys: see :class:`ObjectAttention`.
        out: of the result.
        joined: number of features beside the context.
        bias: of the convolutions.
        scale: see :class:`ObjectAttention`.
        dropout: of whole channels, at the end.
    """

    def __init__(
        self,
        channels: int,
        keys: int,
        out: int,
        *,
        joined: int = 1,
        bias: bool = True,
        scale: int = 1,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        self.object_context_block = ObjectAttention(channels, keys, bias, scale)
        self.conv_bn_dropout = nn.Sequential(*conv_norm((1 + joined) * channels, out, bias=bias), nn.Dropout2d(dropout))

    def forward(
        self, features: Tensor, regions: Tensor, beside: list[Tensor] | None = None, relation: Tensor | None = None
    ) -> Tensor:
        """``(B, out, h, w)`` of the context of ``features``, joined with them, or with ``beside``."""
        context = self.object_context_block(features, regions, relation)
        return self.conv_bn_dropout(torch.cat([context, *(beside or [features])], dim=1))


class Head(nn.Module):
    """Both segmentations. Names of layers are those of HRNet-OCR's checkpoints.

    Args:
        coarse_channels: channels of the features that the first segmentation is made of.
        channels: of those that regions are pooled from.
        num_labels: K.
        config: its values.
    """

    def __init__(self, coarse_channels: int, channels: int, num_labels: int, config: Config) -> None:
        super().__init__()
        mid, width = config.mid_channels, config.coarse_channels or coarse_channels
        drop = [nn.Dropout2d(config.coarse_dropout)] if config.coarse_dropout else []
        coarse = conv_norm(coarse_channels, width, config.coarse_kernel)
        self.aux_head = nn.Sequential(*coarse, *drop, nn.Conv2d(width, num_labels, 1))
        self.conv3x3_ocr = nn.Sequential(*conv_norm(channels, mid, 3))
        rates = config.rates
        first = [nn.Sequential(*conv_norm(channels, mid))] if rates else []
        self.branches = nn.ModuleList([*first, *(nn.Sequential(*conv_norm(channels, mid, 3, True, r)) for r in rates)])
        self.ocr_distri_head = SpatialOCR(
            mid,
            config.key_channels,
            mid,
            joined=len(self.branches) or 1,
            bias=config.bias,
            scale=config.attention_scale,
            dropout=config.dropout,
        )
        self.cls_head = nn.Conv2d(mid, num_labels, 1)
        self.temperature = config.temperature

    def forward(self, coarse_features: Tensor, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K, h, w)`` of the first and of the last segmentation.

        Args:
            coarse_features: ``(B, coarse_channels, h, w)``.
            features: ``(B, channels, h, w)``.
            labels: true labels ``(B, h, w)``, which then take the place of the soft regions and of the relation (the
                authors' upper bound).
        """
        coarse = self.aux_head(coarse_features)
        x = self.conv3x3_ocr(features)
        relation = None
        if labels is None:
            regions = region_vectors(x, coarse.to(x.dtype), self.temperature)
        else:
            regions = label_regions(x, labels, coarse.shape[1])
            relation = label_relation(labels, coarse.shape[1])
        beside = [branch(features) for branch in self.branches]
        return coarse, self.cls_head(self.ocr_distri_head(x, regions, beside, relation))


class OCR(nn.Module):
    """The network, its losses and its recipe.

    Args:
        num_classes: number of foreground classes C; label 0 is the background.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "ocr"
    kind = "segmenter"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        check_loss("ocr", config, num_classes + 1)
        if config.features not in ("last", "all"):
            raise FastcamError(f"ocr: features is {config.features!r}, expected last or all")
        if config.attention_scale < 1:
            raise FastcamError(f"ocr: attention_scale is {config.attention_scale}, expected at least 1")
        if config.coarse_kernel % 2 == 0:
            raise FastcamError(f"ocr: coarse_kernel is {config.coarse_kernel}, expected an odd number")
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
        channels, strides = self.backbone.channels, self.backbone.strides
        # Where branches join inside the network, sides of images must be multiples of the largest stride.
        self.multiple = strides[-1] if config.features == "all" else 1
        if config.features == "all":
            self.head = Head(sum(channels), sum(channels), num_classes + 1, config)
        elif strides[-2] == strides[-1]:
            self.head = Head(channels[-2], channels[-1], num_classes + 1, config)
        else:
            raise FastcamError(
                f"ocr: the last two features of '{config.backbone}' have strides {strides[-2]} and {strides[-1]}, "
                "expected the same; choose output_stride 8 or 16, or features all"
            )
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.tensor(config.class_weights or [1.0] * (num_classes + 1)))

    def scores(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``(B, C + 1, h, w)`` of the first and the last segmentation of ``(B, 3, H, W)``.

        Args:
            images: sides must be multiples of ``self.multiple``.
            labels: true labels ``(B, h, w)`` for the upper bound; see :class:`Head`.
        """
        stages = self.backbone(images)
        if self.config.features == "last":
            return self.head(stages[-2], stages[-1], labels)
        x = torch.cat([resize(stage, stages[0].shape[-2:], align_corners=True) for stage in stages], dim=1)
        return self.head(x, x, labels)

    def logits(self, images: Tensor) -> Tensor:
        """Logits of the labels at every pixel: ``(B, 3, H, W)`` -> float32 ``(B, C + 1, H, W)``, background first."""
        (H, W), padded = images.shape[-2:], self._pad(images, 0)
        return resize(self.scores(padded)[1].float(), padded.shape[-2:], align_corners=True)[..., :H, :W]

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of the last segmentation, and ``aux_weight`` times the first one's cross-entropy.

        Args:
            batch: ``"image"`` ``(B, 3, S, S)``, and ``"mask"`` int64 ``(B, S, S)``: 0 to C, 255 where nothing is known.

        Returns:
            As :func:`fastcam.nn.losses.segmentation_loss`, and ``"aux_loss"``, the first one's. All are 0 where no
            pixel of the batch has a label.
        """
        mask = self._pad(batch["mask"], IGNORE)
        coarse, scores = self.scores(self._pad(batch["image"], 0))
        scalars = segmentation_loss(scores, mask, self.config, self.class_weights, align_corners=True)
        aux = cross_entropy(resize(coarse.float(), mask.shape[-2:], align_corners=True), mask, self.class_weights)
        return {**scalars, "loss": scalars["loss"] + self.config.aux_weight * aux, "aux_loss": aux.detach()}

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with a poly schedule; the head learns ``head_lr_factor`` times faster."""
        return [sgd_poly(self.backbone, [self.head], self.config, total_steps)]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()

    def _pad(self, x: Tensor, value: float) -> Tensor:
        """Right and below, so that the sides are multiples of ``self.multiple``; 0 is the mean colour."""
        H, W = x.shape[-2:]
        return F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), value=value)
