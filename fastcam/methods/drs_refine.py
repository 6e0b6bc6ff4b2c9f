"""The second stage of DRS: a network that learns the classifier's maps from the image.

B. Kim, S. Han, J. Kim, "Discriminative Region Suppression for Weakly-Supervised Semantic Segmentation", AAAI 2021
("localization map refinement learning"; arXiv 2103.07246). Authors' code: github.com/qjadud1994/DRS (MIT). The first
stage is :mod:`fastcam.methods.drs`; any method's CAMs may stand in its place.

What many images' maps have in common is learned, their noise is not. The target is the winner at every pixel
(:func:`fastcam.methods.drs.winner_take_all`); the classes that an image has not are learned as 0, and left out at
inference by its tags.

Deviations from the authors' code: maps are stored in half precision, not truncated to 8 bits; pixels that a crop adds
around its image do not count; the last step's weights are kept, not those with the best score on true masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.methods.drs import winner_take_all
from fastcam.nn import CamFusion, FusedCams, create_trunk, multi_scale_max, score_head
from fastcam.nn.optim import step_decay


@dataclass(frozen=True)
class Config:
    """The values of the authors' VOC 2012 run.

    Attributes:
        backbone: timm name; ``vgg16`` gets the authors' layout.
        output_stride: of the last features; layers behind a removed stride are dilated.
        frozen_stages: first stages that do not learn.
        frozen_norm: the backbone's batch norm keeps its pre-trained statistics.
        head_layers: 3 x 3 convolutions between the backbone and the last layer.
        head_channels: their width.
        fusion: of views: ``max``, the largest value, or ``mean``, which takes mirror images too.
        mirror: take the maximum over mirror images too, which the authors do not.
        lr: of Adam.
        head_lr_factor: the head learns this much faster; 1 in the authors' run.
        drops: shares of the training after which the learning rate falls to a tenth.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    backbone: str = "vgg16"
    output_stride: int = 8
    frozen_stages: int = 0
    frozen_norm: bool = True
    head_layers: int = 3
    head_channels: int = 512
    fusion: str = "max"
    mirror: bool = False
    lr: float = 1e-4
    head_lr_factor: float = 1.0
    drops: tuple[float, ...] = (9 / 30, 19 / 30)
    grad_clip: float | None = None


def refinement_loss(prediction: Tensor, maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error to the winning maps, over all classes and valid pixels.

    Args:
        prediction: ``(B, C, H, W)``, no activation.
        maps: ``(B, C, H, W)`` in [0, 1], absent classes 0.
        valid: bool ``(B, H, W)``; ``None``: every pixel counts.

    Returns:
        A scalar; 0 where no pixel counts.
    """
    squared = (prediction - winner_take_all(maps)).square()
    if valid is None:
        return squared.mean()
    return (squared * valid[:, None]).sum() / (valid.sum() * maps.shape[1]).clamp(min=1)


FUSIONS = ("max", "mean")


class DRSRefine(nn.Module):
    """The refinement network.

    Args:
        num_classes: number of foreground classes C.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "drs_refine"
    kind = "cam"
    learns_from_maps = True

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if config.head_layers < 0 or config.head_channels < 1:
            raise FastcamError(
                f"drs_refine: head_layers is {config.head_layers} and head_channels {config.head_channels}, expected "
                "0 or more layers of at least 1 channel"
            )
        if config.fusion not in FUSIONS:
            raise FastcamError(f"drs_refine: fusion is '{config.fusion}', expected one of {', '.join(FUSIONS)}")
        self.num_classes = num_classes
        self.config = config
        self.backbone = create_trunk(
            config.backbone,
            output_stride=config.output_stride,
            weights=weights,
            frozen_stages=config.frozen_stages,
            frozen_norm=config.frozen_norm,
        )
        self.normalize = self.backbone.normalize
        self.head = score_head(
            self.backbone.channels[-1], num_classes, width=config.head_channels, layers=config.head_layers
        )
        for layer in self.head:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def prediction(self, images: Tensor) -> Tensor:
        """Learned maps at the last features' size, ``(B, C, h, w)``; no activation, so that they may leave [0, 1]."""
        return self.head(self.backbone(images)[-1]).float()

    def tag_logits(self, images: Tensor) -> Tensor:
        """A class counts as present by the largest value of its map, taken as a probability: ``(B, C)`` logits."""
        return torch.logit(self.prediction(images).amax(dim=(2, 3)), eps=1e-6)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Squared error of the maps.

        Args:
            batch: ``"image"`` ``(B, 3, S, S)``, ``"maps"`` ``(B, C, S, S)`` in [0, 1] and, where crops have a border,
                ``"valid"`` ``(B, S, S)``.
        """
        maps = F.interpolate(
            self.prediction(batch["image"]), batch["image"].shape[-2:], mode="bilinear", align_corners=True
        )
        return {"loss": refinement_loss(maps, batch["maps"], batch.get("valid"))}

    def cams(self, images: Tensor, tags: Tensor | None = None) -> Tensor:
        """Learned maps ``(B, C, h, w)`` of one view, negative values as 0; classes without a tag are 0."""
        maps = F.relu(self.prediction(images))
        return maps if tags is None else maps * (tags > 0)[:, :, None, None]

    def fused_cams(
        self, views: Sequence[Tensor], size: tuple[int, int], tags: Tensor | None = None, keys: Tensor | None = None
    ) -> FusedCams:
        """Refined maps: the largest value of all views at every pixel, not normalised, kept to [0, 1].

        With ``fusion="mean"`` the mean of all views and their mirror images. ``keys`` ``(n,)``: only the maps of these
        classes. No background.
        """
        if self.config.fusion == "mean":
            mean = CamFusion("irn", multiple=1, reduce="mean", normalize=None)
            return FusedCams(mean(self.cams, views, size, tags, keys).maps.clamp(max=1))
        maps = multi_scale_max(self.cams, views, size, tags, keys, mirror=self.config.mirror, normalize=None)
        return FusedCams(maps.clamp(max=1))

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """Adam, whose learning rate falls in steps."""
        config = self.config
        groups = [
            {"params": [p for p in self.backbone.parameters() if p.requires_grad], "lr": config.lr},
            {"params": list(self.head.parameters()), "lr": config.lr * config.head_lr_factor},
        ]
        optimizer = torch.optim.Adam(groups)
        return [(optimizer, step_decay(optimizer, config.drops, total_steps))]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()
