"""DRS: discriminative region suppression.

B. Kim, S. Han, J. Kim, "Discriminative Region Suppression for Weakly-Supervised Semantic Segmentation", AAAI 2021
(arXiv 2103.07246). Authors' code: github.com/qjadud1994/DRS (MIT).

A classifier wins by the few pixels that tell its classes apart, and its maps show no more than these. DRS replaces
every ReLU by one that clips each channel at a share of its maximum (:mod:`fastcam.nn.suppress`), so that the classifier
has to look at the rest of the object. A second network (``drs_refine``) then learns the maps from the image, which
removes noise and fills holes; saliency maps, where there are some, tell object from background (:func:`pseudo_label`).

Deviations from the authors' code: the last step's weights are kept, not those with the best score on true masks; images
keep their aspect ratio at inference; more in ``docs/methods/drs.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn import (
    CamFusion,
    FusedCams,
    SuppressedReLU,
    create_trunk,
    multi_scale_max,
    score_head,
    suppress_activations,
)
from fastcam.nn.optim import sgd_steps

CONTROLLERS = ("learnable", "fixed")
FUSIONS = ("max", "sum")
IGNORE = 255


@dataclass(frozen=True)
class Config:
    """The values of the authors' VOC 2012 run.

    Attributes:
        backbone: timm name of a network with ReLUs; ``vgg16`` gets the authors' layout.
        output_stride: of the last features; layers behind a removed stride are dilated.
        frozen_stages: first stages that do not learn; their activations are not suppressed.
        frozen_norm: the backbone's batch norm keeps its pre-trained statistics.
        controller: ``learnable``, one bias-free linear layer an activation, or ``fixed``.
        delta: the fixed controller's share of a channel's maximum; 1 is a plain ReLU.
        suppressed: how many of the backbone's activations, from the last; ``None`` for all, as the authors.
        head_layers: suppressed 3 x 3 convolutions between the backbone and the classifier.
        head_channels: their width.
        head_std: of the head's initial weights; ``None``: He's, by the number of outputs: in a short training
            much noise, which stays in the maps.
        fusion: of views: ``max``, the largest value of normalised maps, or ``sum``, that of IRN, which takes mirror
            images too.
        mirror: take the maximum over mirror images too, which the authors do not.
        lr: of the backbone's weights; biases learn twice as fast, head and controllers ``head_lr_factor`` times.
        drops: shares of the training after which the learning rate falls to a tenth.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    backbone: str = "vgg16"
    output_stride: int = 8
    frozen_stages: int = 0
    frozen_norm: bool = True
    controller: str = "learnable"
    delta: float = 0.55
    suppressed: int | None = None
    head_layers: int = 3
    head_channels: int = 512
    head_std: float | None = None
    fusion: str = "max"
    mirror: bool = False
    lr: float = 1e-3
    head_lr_factor: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    drops: tuple[float, ...] = (4 / 15, 9 / 15)
    grad_clip: float | None = None


def winner_take_all(maps: Tensor) -> Tensor:
    """At every pixel the largest map and 0 for all others, equal ones kept: what the refinement network learns.

    ``(B, C, H, W)`` of 0 or more to the same shape.
    """
    return maps * (maps == maps.amax(dim=1, keepdim=True))


def pseudo_label(
    maps: Tensor, saliency: Tensor, *, alpha: float = 0.2, conflict: float = 0.9, salient: float = 50 / 255
) -> Tensor:
    """Labels from maps and a saliency map.

    Background scores 1 outside the salient region and 0 inside; a class scores its map, where that reaches ``alpha``.
    The best score wins, the background where scores are equal. Ignored are pixels where more than two scores exceed
    ``conflict``, and salient pixels that no class claims. Foreground is thus what is salient and activated.

    Args:
        maps: ``(n, H, W)``, one map a class of the image.
        saliency: ``(H, W)`` in [0, 1].
        alpha: smallest value of a map that counts.
        conflict: score that at most two may exceed, the background's included.
        salient: a pixel is salient above this value; the authors' 50 of 255.

    Returns:
        uint8 ``(H, W)``: 0 background, ``i + 1`` for map ``i``, 255 ignored. An image without maps is 0 outside and
        255 inside the salient region.

    Example:
        >>> pseudo_label(torch.tensor([[[0.9, 0.1, 0.9]]]), torch.tensor([[1.0, 1.0, 0.0]]))
        tensor([[  1, 255,   0]], dtype=torch.uint8)
    """
    if maps.ndim != 3 or saliency.shape != maps.shape[1:]:
        raise ValueError(
            f"pseudo_label: expected maps (n, H, W) and saliency (H, W), got {tuple(maps.shape)}, "
            f"{tuple(saliency.shape)}"
        )
    inside = saliency > salient
    background = (~inside).to(maps.dtype)
    scores = torch.cat([background[None], torch.where(maps >= alpha, maps, 0)])
    label = scores.argmax(dim=0)
    unsure = ((scores > conflict).sum(dim=0) > 2) | (inside & (label == 0))
    return label.masked_fill(unsure, IGNORE).to(torch.uint8)


def online_labels(logits: Tensor, tags: Tensor, *, official: bool = False) -> Tensor:
    """A segmentation network's own prediction, kept to the background and the image's tags.

    The authors train the last stage on it beside the pseudo-labels.

    Args:
        logits: ``(B, C + 1, H, W)``, background first.
        tags: ``(B, C)``.
        official: multiply absent classes' logits by 0, as the authors do: these then win where all others are negative.

    Returns:
        int64 ``(B, H, W)``. No gradient.

    Example:
        >>> logits = torch.tensor([-1.0, -2.0, 3.0]).view(1, 3, 1, 1)
        >>> online_labels(logits, torch.tensor([[1, 0]])).item()
        0
        >>> online_labels(logits, torch.tensor([[1, 0]]), official=True).item()
        2
    """
    allowed = F.pad(tags > 0, (1, 0), value=True)[:, :, None, None]
    kept = logits.detach() * allowed if official else logits.detach().masked_fill(~allowed, -torch.inf)
    return kept.argmax(dim=1)


class DRS(nn.Module):
    """A classifier whose activations are suppressed.

    Args:
        num_classes: number of foreground classes C.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` and
            :func:`fastcam.nn.suppress_activations` refuse.
    """

    name = "drs"
    kind = "cam"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if config.controller not in CONTROLLERS:
            raise FastcamError(f"drs: controller is '{config.controller}', expected one of {', '.join(CONTROLLERS)}")
        if config.fusion not in FUSIONS:
            raise FastcamError(f"drs: fusion is '{config.fusion}', expected one of {', '.join(FUSIONS)}")
        if not 0 < config.delta <= 1:
            raise FastcamError(f"drs: delta is {config.delta}, expected a number above 0 and at most 1")
        if config.suppressed is not None and config.suppressed < 1:
            raise FastcamError(f"drs: suppressed is {config.suppressed}, expected at least 1, or null for all")
        if config.head_layers < 0 or config.head_channels < 1:
            raise FastcamError(
                f"drs: head_layers is {config.head_layers} and head_channels {config.head_channels}, expected 0 or "
                "more layers of at least 1 channel"
            )
        self.num_classes = num_classes
        self.config = config
        delta = config.delta if config.controller == "fixed" else None
        self.backbone = create_trunk(
            config.backbone,
            output_stride=config.output_stride,
            weights=weights,
            frozen_stages=config.frozen_stages,
            frozen_norm=config.frozen_norm,
        )
        self.normalize = self.backbone.normalize
        suppress_activations(self.backbone, delta, last=config.suppressed)
        self.head = score_head(
            self.backbone.channels[-1],
            num_classes,
            width=config.head_channels,
            layers=config.head_layers,
            activation=lambda width: SuppressedReLU(delta, channels=width),
        )
        for layer in self.head:
            if isinstance(layer, nn.Conv2d):
                if config.head_std is None:
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
                else:
                    nn.init.normal_(layer.weight, std=config.head_std)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def logits(self, images: Tensor) -> Tensor:
        """Class logits at every pixel of the last feature map, ``(B, C, h, w)``; their mean is the image's logit."""
        return self.head(self.backbone(images)[-1]).float()

    def tag_logits(self, images: Tensor) -> Tensor:
        """What the classifier thinks of the tags: ``(B, C)``, a probability after a sigmoid."""
        return self.logits(images).mean(dim=(2, 3))

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Multi-label soft margin loss of the mean logits of ``batch["image"]`` with ``batch["tags"]``."""
        return {"loss": F.multilabel_soft_margin_loss(self.tag_logits(batch["image"]), batch["tags"])}

    def cams(self, images: Tensor, tags: Tensor | None = None) -> Tensor:
        """Maps ``(B, C, h, w)`` of one view, ReLU'd, not normalised; classes without a tag are 0."""
        maps = F.relu(self.logits(images))
        return maps if tags is None else maps * (tags > 0)[:, :, None, None]

    def fused_cams(
        self, views: Sequence[Tensor], size: tuple[int, int], tags: Tensor | None = None, keys: Tensor | None = None
    ) -> FusedCams:
        """Localization maps: each view's resized and divided by its maximum, the largest value of all views kept.

        With ``fusion="sum"`` those of all views and their mirror images are added first. ``keys`` ``(n,)``: only the
        maps of these classes. No background.
        """
        if self.config.fusion == "sum":
            return CamFusion("irn", multiple=1)(self.cams, views, size, tags, keys)
        return FusedCams(multi_scale_max(self.cams, views, size, tags, keys, mirror=self.config.mirror))

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with Nesterov momentum in four groups of learning rates, which fall in steps."""
        suppressed = [m for m in self.backbone.modules() if isinstance(m, SuppressedReLU)]
        return [sgd_steps(self.backbone, [*suppressed, self.head], self.config, total_steps)]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()
