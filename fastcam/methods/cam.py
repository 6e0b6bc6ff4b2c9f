"""Class activation maps of a plain multi-label classifier: the baseline of every other method.

B. Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, in the form that weakly supervised
segmentation uses since IRN (J. Ahn, S. Cho, S. Kwak, CVPR 2019; code github.com/jiwoon-ahn/irn, MIT): a 1 x 1
convolution without bias on the last features, its spatial mean as the logit of a class, its ReLU as the map.

Deviations from the authors' code: none in the network. Their optimiser passes the weight decay in the place of the
momentum, so that they trained without momentum; the default here does the same, openly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.nn import CamFusion, FusedCams, create_backbone
from fastcam.nn.optim import sgd_poly


@dataclass(frozen=True)
class Config:
    """The values of IRN's CAM network on VOC 2012."""

    backbone: str = "resnet50"
    output_stride: int = 16
    dilate: bool = False
    frozen_stages: int = 2
    frozen_norm: bool = True  # False for a backbone from random weights
    lr: float = 0.1
    head_lr_factor: float = 10.0
    momentum: float = 0.0
    weight_decay: float = 1e-4
    poly_power: float = 0.9
    grad_clip: float | None = None


class CAM(nn.Module):
    """A classifier whose last layer, applied to every pixel, gives the maps.

    Args:
        num_classes: number of foreground classes C.
        config: its values.
        weights: local file with the backbone's pre-trained weights.
    """

    name = "cam"
    kind = "cam"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.config = config
        self.backbone = create_backbone(
            config.backbone,
            output_stride=config.output_stride,
            dilate=config.dilate,
            weights=weights,
            frozen_stages=config.frozen_stages,
            frozen_norm=config.frozen_norm,
            head=True,
        )
        self.normalize = self.backbone.normalize
        self.classifier = nn.Conv2d(self.backbone.channels[-1], num_classes, 1, bias=False)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits at every pixel of the last feature map, ``(B, C, h, w)``; their mean is the image's logit."""
        return self.classifier(self.backbone(images)[-1]).float()

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Multi-label soft margin loss of the mean logits of ``batch["image"]`` with ``batch["tags"]``."""
        return {"loss": F.multilabel_soft_margin_loss(self.tag_logits(batch["image"]), batch["tags"])}

    def tag_logits(self, images: Tensor) -> Tensor:
        """What the classifier thinks of the tags: ``(B, C)``, a probability after a sigmoid."""
        return self.logits(images).mean(dim=(2, 3))

    def cams(self, images: Tensor, tags: Tensor | None = None) -> Tensor:
        """Maps ``(B, C, h, w)`` of one view, ReLU'd, not normalised; classes without a tag are 0."""
        maps = F.relu(self.logits(images))
        return maps if tags is None else maps * (tags > 0)[:, :, None, None]

    def fused_cams(
        self, views: Sequence[Tensor], size: tuple[int, int], tags: Tensor | None = None, keys: Tensor | None = None
    ) -> FusedCams:
        """Maps of several scales and their mirror images, fused as IRN's ``make_cam`` does: no background.

        At the size of one of the views, whole cells of the output stride are resized and the rest is cut
        (``high_res``); at any other size the maps are resized to just that (``cam``, at stride 4).
        ``keys`` ``(n,)``: only the maps of these classes.
        """
        full = any(view.shape[-2:] == tuple(size) for view in views)
        fusion = CamFusion("irn", multiple=self.config.output_stride if full else 1)
        return fusion(self.cams, views, size, tags, keys)

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with a poly schedule; the classifier learns ``head_lr_factor`` times faster."""
        return [sgd_poly(self.backbone, [self.classifier], self.config, total_steps)]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()
