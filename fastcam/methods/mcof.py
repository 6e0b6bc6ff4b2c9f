"""MCOF: common object features mined by regions and pixels in turn.

X. Wang, S. You, X. Li, H. Ma, "Weakly-Supervised Semantic Segmentation by Iteratively Mining Common Object Features",
CVPR 2018 (arXiv 1806.04659). There is no public code.

CAMs mark small parts of objects. A classifier of superpixels (RegionNet), trained on those that the CAMs mark, finds
others that look alike; saliency, in images of one class, adds what does not (:func:`bayes_saliency`); a segmentation
network (PixelNet) trained on the result marks the superpixels of the next iteration. This file holds the formulas and
RegionNet; ``fastcam mcof`` is the loop, and PixelNet is any segmenter. What the paper does not fix is a setting; those
and the deviations are listed in ``docs/methods/mcof.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam._lab import rgb_to_lab
from fastcam.errors import FastcamError
from fastcam.nn import create_backbone
from fastcam.nn.regions import masked_roi_pool, region_cells, region_mean_pool
from fastcam.ops.region_reduce import region_reduce

IGNORE = -1  # label of a region that is not trained on


@dataclass(frozen=True)
class Config:
    """RegionNet's values; where the paper is silent, Fast R-CNN's.

    Attributes:
        backbone: timm name.
        output_stride: of its last features.
        frozen_stages: stages that do not learn.
        frozen_norm: batch norm, where there is some, keeps its running statistics.
        pooling: ``"masked"``, the largest features in the parts of a region's box; ``"mean"``, those of its cells.
        bins: rows and columns of parts, for ``"masked"``.
        hidden: width of the two hidden layers.
        dropout: behind each of them.
        regions_per_image: so many are trained on at most, half of them foreground, as much background as foreground.
        area_weighted: a region counts by its area.
        lr: of all but the last layer, which learns ``head_lr_factor`` times faster.
        decay_at: share of the training after which the learning rate is divided by 10.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    backbone: str = "vgg16"
    output_stride: int = 16
    frozen_stages: int = 0
    frozen_norm: bool = True
    pooling: str = "masked"
    bins: int = 7
    hidden: int = 4096
    dropout: float = 0.5
    regions_per_image: int = 128
    area_weighted: bool = False
    lr: float = 1e-3
    head_lr_factor: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_at: float = 2 / 3
    grad_clip: float | None = None


def cam_seeds(
    heat: Tensor,
    saliency: Tensor,
    edges: Tensor,
    *,
    high: float = 0.5,
    low: float = 0.2,
    background_heat: float = 0.1,
    background_saliency: float = 0.2,
    rest: bool = False,
) -> Tensor:
    """Labels of regions from the mean heat of CAMs: the first seeds.

    A region is a class's where its heat is above ``high``, or above ``low`` and no neighbour is hotter; of several
    classes the hottest has it. It is background where all classes are cold and it does not stand out.

    Args:
        heat: mean of each class's CAM (largest value 1) over each region, ``(K, S)``.
        saliency: mean saliency, ``(S,)``.
        edges: neighbouring regions, int64 ``(E, 2)``.
        high: see above.
        low: see above.
        background_heat: cold is below this.
        background_saliency: and not salient below this.
        rest: every region that is no class's is background.

    Returns:
        int64 ``(S,)``: class + 1, 0 background, -1 not sure.
    """
    if len(heat) == 0:
        return torch.full_like(saliency, IGNORE, dtype=torch.int64)
    hottest = heat.clone()  # of a region and its neighbours
    for a, b in ((0, 1), (1, 0)):
        index = edges[:, a].expand(len(heat), -1)
        hottest = hottest.scatter_reduce(1, index, heat[:, edges[:, b]], "amax")
    claimed = (heat > high) | ((heat >= hottest) & (heat > low))
    best, winner = heat.masked_fill(~claimed, -torch.inf).max(dim=0)
    cold = (heat.amax(dim=0) < background_heat) & (saliency < background_saliency)
    return torch.where(best > -torch.inf, winner + 1, torch.where(cold | rest, 0, IGNORE))


def mask_seeds(mask: Tensor, regions: Tensor, *, share: float = 0.8, num_labels: int = 255) -> Tensor:
    """Labels of regions from a predicted mask: the seeds of the next iteration.

    Args:
        mask: labels ``(H, W)``; 255 is no label.
        regions: int ``(H, W)``, counted from 0.
        share: a region has the commonest label of its pixels where at least this share of them has it.
        num_labels: labels are below this.

    Returns:
        int64 ``(S,)``: a label, or -1.
    """
    count = int(regions.max()) + 1
    vote = region_reduce(mask.long()[None, None], regions[None], reduce="vote", bins=num_labels, num_regions=count)
    vote = vote[0, :, 0]
    agree = (mask.long() == vote[regions.long()]).double()[None, None]
    return torch.where(region_reduce(agree, regions[None], num_regions=count)[0, :, 0] >= share, vote, IGNORE)


def region_loss(logits: Tensor, labels: Tensor, areas: Tensor | None = None) -> Tensor:
    """Cross-entropy over the regions that have a label (section 3.2 of the paper); 0 where none has.

    Args:
        logits: ``(N, C + 1)``.
        labels: int64 ``(N,)``, -1 for none.
        areas: weights of the regions, ``(N,)``; ``None``: all count alike.
    """
    known = labels >= 0
    loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    weight = known.to(loss) if areas is None else known * areas.to(loss)
    return (loss * weight).sum() / weight.sum().clamp(min=1e-12)


def restrict_to_tags(logits: Tensor, tags: Tensor) -> Tensor:
    """Probabilities ``(N, C + 1)`` of the background and the image's classes alone; the others have 0.

    Args:
        logits: ``(N, C + 1)``, background first.
        tags: ``(C,)``.
    """
    allowed = torch.cat([tags.new_ones(1, dtype=torch.bool), tags > 0])
    return logits.masked_fill(~allowed, -torch.inf).softmax(dim=1)


def lab_bins(image: Tensor, bins: int = 32) -> Tensor:
    """The bin of every pixel's CIE Lab channels: L over 0 to 100, a and b over -110 to 110, clipped.

    Args:
        image: RGB uint8 ``(3, H, W)``.
        bins: number of bins a channel.

    Returns:
        uint8 ``(3, H, W)``.
    """
    light, a, b = rgb_to_lab(image[None])[0].double() / 2
    parts = torch.stack([light / 100, (a - 128 + 110) / 220, (b - 128 + 110) / 220])
    return (parts * bins).floor().clamp(0, bins - 1).to(torch.uint8)


def bayes_saliency(
    bins: Tensor, saliency: Tensor, mask: Tensor, *, num_bins: int = 32, clip: float = 0.02, smoothing: float = 1.0
) -> Tensor:
    r"""Probability of the object at every pixel: saliency as the prior, the colours of the mined regions as likelihood.

    .. math:: \frac{s \prod_f p_f(v | O)}{s \prod_f p_f(v | O) + (1 - s) \prod_f p_f(v | B)}, \quad
              p_f(v | X) = \frac{N_{X,f}(v) + \sigma}{|X| + \sigma n}

    Channels count as independent (Xie, Lu, Yang, "Bayesian Saliency via Low and Mid Level Cues", TIP 2013). Computed in
    logarithms; strictly between 0 and 1.

    Args:
        bins: of each pixel's channels, integers below ``num_bins``, ``(F, H, W)``.
        saliency: s, ``(H, W)``; clipped to ``clip`` and ``1 - clip``.
        mask: O, bool ``(H, W)``; B is the rest. Either may be empty: its likelihood is then flat.
        num_bins: n.
        clip: see above.
        smoothing: what is added to every bin.

    Returns:
        ``(H, W)`` in the dtype of ``saliency``.
    """
    s = saliency.clamp(clip, 1 - clip).double()
    value = s.log() - (1 - s).log()
    for channel in bins.long():
        for region, sign in ((mask, 1), (~mask, -1)):
            counts = channel[region].bincount(minlength=num_bins).double() + smoothing
            value = value + sign * (counts / counts.sum()).log()[channel]
    return value.sigmoid().to(saliency.dtype)


class MCOF(nn.Module):
    """RegionNet: the classifier of regions.

    Args:
        num_classes: number of foreground classes C; label 0 is the background.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "mcof"
    kind = "regions"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if config.pooling not in ("masked", "mean"):
            raise FastcamError(f"mcof: pooling is '{config.pooling}', expected masked or mean")
        for name in ("bins", "hidden", "regions_per_image"):
            if getattr(config, name) < 1:
                raise FastcamError(f"mcof: {name} is {getattr(config, name)}, expected at least 1")
        if not 0 <= config.dropout < 1:
            raise FastcamError(f"mcof: dropout is {config.dropout}, expected a number from 0 to below 1")
        self.num_classes = num_classes
        self.config = config
        self.backbone = create_backbone(
            config.backbone,
            output_stride=config.output_stride,
            dilate=False,
            weights=weights,
            frozen_stages=config.frozen_stages,
            frozen_norm=config.frozen_norm,
            head=True,
        )
        self.normalize = self.backbone.normalize
        side = config.bins if config.pooling == "masked" else 1
        self.hidden = nn.Sequential(
            nn.Linear(self.backbone.channels[-1] * side**2, config.hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
        )
        self.classifier = nn.Linear(config.hidden, num_classes + 1)

    def region_logits(self, features: Tensor, cells: Tensor, count: int) -> Tensor:
        """Logits ``(N, C + 1)`` of one image's regions from its features ``(D, h, w)`` and :func:`region_cells`."""
        if self.config.pooling == "mean":
            pooled = region_mean_pool(features, cells, count)
        else:
            pooled = masked_roi_pool(features, cells, count, self.config.bins)
        return self.classifier(self.hidden(pooled.flatten(1)))

    def features(self, images: Tensor) -> Tensor:
        """The last features of ``(B, 3, H, W)``, not negative: what is outside a region counts as 0."""
        return F.relu(self.backbone(images)[-1])

    def classify(self, image: Tensor, regions: Tensor) -> Tensor:
        """Logits ``(S, C + 1)`` of the regions of a normalised image ``(3, H, W)``.

        Args:
            image: normalised ``(3, H, W)``.
            regions: int64 ``(H, W)``, counted from 0.
        """
        cells = region_cells(regions, self.config.output_stride)
        return self.region_logits(self.features(image[None])[0], cells, int(regions.max()) + 1).float()

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of a random choice of each image's labelled regions.

        Args:
            batch: ``"image"`` ``(B, 3, H, W)``; ``"regions"`` int64 ``(B, H, W)``, negative in the padding;
                ``"mask"`` int64 ``(B, H, W)``, the label of each pixel's region, 255 for one that is not trained on.

        Returns:
            ``"loss"``, 0 where no region has a label; and ``"regions"``, how many were trained on.
        """
        features = self.features(batch["image"])
        logits, labels, areas = [], [], []
        for x, regions, mask in zip(features, batch["regions"], batch["mask"], strict=True):
            inside = regions >= 0
            label = mask.new_full((int(regions.max()) + 1,), 255).scatter_(0, regions[inside], mask[inside])
            chosen = choose_regions(torch.where(label == 255, IGNORE, label), self.config.regions_per_image)
            if len(chosen) == 0:
                continue
            number = torch.full_like(label, IGNORE)
            number[chosen] = torch.arange(len(chosen), device=label.device)
            small = torch.where(inside, number[regions.clamp(min=0)], IGNORE)
            cells = region_cells(small, self.config.output_stride)
            logits.append(self.region_logits(x, cells, len(chosen)))
            labels.append(label[chosen])
            areas.append(small[small >= 0].bincount(minlength=len(chosen)))
        if not logits:
            nothing = sum(p.sum() for p in self.parameters() if p.requires_grad) * 0
            return {"loss": nothing + features.sum() * 0, "regions": features.new_zeros(())}
        all_areas = torch.cat(areas) if self.config.area_weighted else None
        loss = region_loss(torch.cat(logits).float(), torch.cat(labels), all_areas)
        return {"loss": loss, "regions": loss.new_tensor(sum(len(x) for x in labels))}

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD; the learning rate falls to a tenth after ``decay_at`` of the steps."""
        config = self.config
        body = [p for part in (self.backbone, self.hidden) for p in part.parameters() if p.requires_grad]
        last = {"params": list(self.classifier.parameters()), "lr": config.lr * config.head_lr_factor}
        groups = [{"params": body, "lr": config.lr}, last]
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
        step = max(1, round(config.decay_at * total_steps))
        return [(optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [step], gamma=0.1))]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()


def choose_regions(labels: Tensor, most: int) -> Tensor:
    """A random choice of regions to train on: foreground up to half of ``most``, and as much background.

    Args:
        labels: int64 ``(S,)``, -1 for none.
        most: at most so many.

    Returns:
        Their numbers, int64. Of an image without foreground one of the background.
    """
    foreground, background = (labels > 0).nonzero()[:, 0], (labels == 0).nonzero()[:, 0]
    half = foreground[torch.randperm(len(foreground), device=labels.device)[: max(1, most // 2)]]
    other = background[torch.randperm(len(background), device=labels.device)[: max(1, min(len(half), most // 2))]]
    return torch.cat([half, other])
