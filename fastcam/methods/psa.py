"""PSA: AffinityNet, which learns from CAMs how alike nearby pixels are, and spreads the CAMs along it.

J. Ahn, S. Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised Semantic
Segmentation", CVPR 2018 (arXiv 1803.10464). Authors' code: github.com/jiwoon-ahn/psa (MIT).

Features of three stages are projected and joined; the affinity of two pixels is ``exp(-mean |f_i - f_j|)``. CAMs and
their background walk at random along the affinities.

Deviations from the authors' code: any timm backbone instead of ResNet-38 and VGG-16, pairs at the border, and labels of
single pixels instead of averaged CRF scores; see ``docs/methods/psa.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn import create_backbone
from fastcam.nn.optim import sgd_poly
from fastcam.nn.pairs import affinity_loss, label_pairs, labels_at
from fastcam.ops.feature_affinity import feature_affinity
from fastcam.ops.random_walk import random_walk


@dataclass(frozen=True)
class Config:
    """The authors' values on VOC 2012.

    Attributes:
        backbone: timm name.
        output_stride: of the last three stages, which the heads read, and of the affinities.
        frozen_stages: first stages of the backbone that do not learn, 4 for none.
        frozen_norm: the backbone's batch norm keeps its statistics.
        head_channels: channels kept of the last three stages; the joined features have their sum.
        group_norm: normalise the projected stages, as the authors do for VGG-16, whose stages differ in scale.
        radius: pairs are closer than this.
        beta: power of the affinities in the random walk.
        steps: steps of the random walk; 256 are the authors' 8 squarings, SEAM and MCTformer take 64.
        lr: of the backbone; the heads learn ``head_lr_factor`` times faster. SEAM takes 0.01.
        momentum: 0, as in the authors' program, which passes the weight decay in its place.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    backbone: str = "resnet50"
    output_stride: int = 8
    frozen_stages: int = 2
    frozen_norm: bool = True
    head_channels: tuple[int, ...] = (64, 128, 256)
    group_norm: bool = False
    radius: int = 5
    beta: float = 8.0
    steps: int = 256
    lr: float = 0.1
    head_lr_factor: float = 10.0
    momentum: float = 0.0
    weight_decay: float = 5e-4
    poly_power: float = 0.9
    grad_clip: float | None = None


class AffinityHead(nn.Module):
    """Projections of stages of one size, joined: the features that affinities compare.

    Args:
        channels: of every stage.
        out: channels kept of each.
        group_norm: normalise them, 8 channels a group.
    """

    def __init__(self, channels: tuple[int, ...], out: tuple[int, ...], group_norm: bool) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(c, d, 1, bias=False) for c, d in zip(channels, out, strict=True))
        self.norms = nn.ModuleList(nn.GroupNorm(d // math.gcd(8, d), d) if group_norm else nn.Identity() for d in out)
        self.join = nn.Conv2d(sum(out), sum(out), 1, bias=False)
        for weight in self.levels.parameters():
            nn.init.kaiming_normal_(weight)
        nn.init.xavier_uniform_(self.join.weight, gain=4)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Stages of one size to ``(B, sum(out), H, W)``."""
        levels = zip(self.levels, self.norms, stages, strict=True)
        return F.elu(self.join(torch.cat([F.elu(norm(level(x))) for level, norm, x in levels], dim=1)))


class PSA(nn.Module):
    """AffinityNet, its loss, and the random walk of its affinities.

    Args:
        num_classes: number of foreground classes C; the network itself knows no classes.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "psa"
    kind = "refiner"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if len(config.head_channels) != 3:
            raise FastcamError(f"psa: head_channels has {len(config.head_channels)} numbers, expected 3, one a stage")
        for name, least in (("radius", 2), ("steps", 1)):
            if getattr(config, name) < least:
                raise FastcamError(f"psa: {name} is {getattr(config, name)}, expected at least {least}")
        self.num_classes = num_classes
        self.config = config
        self.backbone = create_backbone(
            config.backbone,
            output_stride=config.output_stride,
            weights=weights,
            frozen_stages=config.frozen_stages,
            frozen_norm=config.frozen_norm,
        )
        if len(set(self.backbone.strides[1:])) > 1:
            raise FastcamError(
                f"psa: the last three stages of {config.backbone} have strides {self.backbone.strides[1:]}, expected "
                f"one stride; set output_stride to {self.backbone.strides[1]}"
            )
        self.normalize = self.backbone.normalize
        self.head = AffinityHead(tuple(self.backbone.channels[1:]), config.head_channels, config.group_norm)

    def features(self, images: Tensor) -> Tensor:
        """What affinities compare: ``(B, 3, H, W)`` to float32 ``(B, D, h, w)`` at the output stride."""
        return self.head(self.backbone(images)[1:]).float()

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of the affinities of labelled pairs.

        Args:
            batch: ``"image"`` ``(B, 3, S, S)``, and ``"mask"`` int64 ``(B, S, S)``: labels made of CAMs, 0 to C, 255
                where they are not sure.

        Returns:
            ``"loss"``; 0 where no pair is labelled.
        """
        features = self.features(batch["image"])
        pairs = label_pairs(labels_at(batch["mask"], features.shape[-2:]), self.config.radius)
        return {"loss": affinity_loss(feature_affinity(features, radius=self.config.radius), pairs)}

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with a poly schedule; the head learns ``head_lr_factor`` times faster."""
        return [sgd_poly(self.backbone, [self.head], self.config, total_steps)]

    def refine(self, images: Tensor, maps: Tensor, background: float | None) -> Tensor:
        """Maps and their background, walked at random along the affinities.

        Args:
            images: normalised ``(B, 3, H, W)``.
            maps: ``(B, K, ., .)`` of any size; the first is the background's where ``background`` is ``None``.
            background: constant score of the background, which walks too (MCTformer has 0.39).

        Returns:
            Scores ``(B, 1 + classes, H, W)``, background first.
        """
        height, width = images.shape[-2:]
        cell = self.config.output_stride
        padding = (0, -width % cell, 0, -height % cell)
        if background is not None:
            maps = F.pad(maps, (0, 0, 0, 0, 1, 0), value=background)
        if maps.shape[-2:] != (height, width):
            maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
        affinity = feature_affinity(self.features(F.pad(images, padding)), radius=self.config.radius)
        walked = random_walk(
            F.avg_pool2d(F.pad(maps, padding), cell),
            affinity,
            radius=self.config.radius,
            beta=self.config.beta,
            steps=self.config.steps,
        )
        full = F.interpolate(walked, scale_factor=cell, mode="bilinear", align_corners=False)
        return full[..., :height, :width]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()
