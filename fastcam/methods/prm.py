"""PRM: peaks of class response maps, the pixels that make each of them, and the objects these belong to.

Y. Zhou, Y. Zhu, Q. Ye, Q. Qiu, J. Jiao, "Weakly Supervised Instance Segmentation using Class Peak Response", CVPR 2018
(arXiv 1804.00880). Authors' code: github.com/ZhouYanzhao/PRM, branch pytorch.

A classifier is trained through the peaks of its maps instead of their mean (``fastcam.nn.peak_stimulation``); from
every peak the response walks back to the image (``fastcam.nn.peak_backprop``); the segment proposal that fits this map
best is the object. The window, the rule of the walk, the scores and the class-agnostic suppression are those of the
authors' program where the paper differs; deviations stand in ``docs/methods/prm.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.metrics import mask_iou
from fastcam.nn import CamFusion, FusedCams, create_backbone, peak_backprop, peak_response_maps, peak_stimulation
from fastcam.nn.optim import sgd_poly

CHUNK = 64  # proposals that are scored at a time: their masks as numbers take 4 bytes a pixel


@dataclass(frozen=True)
class Config:
    """The authors' values on VOC 2012.

    Attributes:
        backbone: timm name.
        output_stride: of its last features.
        dilate: whether layers behind a removed stride are dilated.
        frozen_stages: stages that do not learn.
        frozen_norm: whether batch norm keeps its running statistics in training; the authors' does not.
        window: side of the window whose largest value is a peak.
        threshold: a map's ``"median"``, ``"mean"``, ``"max"``, or a number: peaks below it do not count. ``None``: all.
        sub_pixel: maps are enlarged by this factor before peaks are found, in training.
        inference_sub_pixel: likewise, afterwards.
        exact_grad: whether a peak's gradient is divided by the number of peaks. The authors' is not, and their learning
            rates go with that.
        lr: of the backbone; the classifier learns ``head_lr_factor`` times faster.
        poly_power: 0 keeps the learning rate.
        grad_clip: largest norm of the gradient, or ``None``.
        side: images are warped to this square before peaks are found; ``None`` keeps them.
        class_threshold: in images without tags, peaks count of classes whose logit is at least this.
        peak_threshold: and whose own value is above this. Logits know no scale: it belongs to the trained network.
        conserve: whether batch norm, activations and residual sums keep the mass of the walk, see
            ``fastcam.nn.peak_backprop``.
        balance: weight of the mass inside a proposal beside that on its contour; one number, or one a class.
        penalty: weight of the background in it; likewise.
        background_factor: background is where a map is below this times its mean; likewise.
        contour: width of the contour in pixels, odd.
        min_area: smaller proposals are skipped, as a fraction of the image.
        max_area: proposals of this fraction or more are skipped.
        proposals: how many proposals of an image are looked at.
        nms: objects that overlap a better one by this IoU or more are dropped.
        merge: whether the response of what is dropped is added to the one that stays.
        class_agnostic: whether objects of all classes suppress each other.
    """

    backbone: str = "resnet50"
    output_stride: int = 32
    dilate: bool = False
    frozen_stages: int = 0
    frozen_norm: bool = False
    window: int = 3
    threshold: str | float | None = "median"
    sub_pixel: int = 8
    inference_sub_pixel: int = 1
    exact_grad: bool = False
    lr: float = 1e-4
    head_lr_factor: float = 100.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    poly_power: float = 0.0
    grad_clip: float | None = None
    side: int | None = 448
    class_threshold: float = 0.0
    peak_threshold: float = 30.0
    conserve: bool = False
    balance: float | tuple[float, ...] = 0.8
    penalty: float | tuple[float, ...] = 1e-5
    background_factor: float | tuple[float, ...] = 0.95
    contour: int = 5
    min_area: float = 2e-5
    max_area: float = 0.85
    proposals: int = 100
    nms: float = 0.3
    merge: bool = True
    class_agnostic: bool = True


class Peaks(NamedTuple):
    """The peaks of one image.

    Attributes:
        maps: class response maps, float32 ``(C, h, w)``.
        places: int64 ``(n, 3)``: class, row, column in the maps.
        prm: peak response maps, float32 ``(n, H, W)``, each of sum 1 (or 0, where no response reaches the image).
    """

    maps: Tensor
    places: Tensor
    prm: Tensor


class Retrieved(NamedTuple):
    """Objects of one image, best first.

    Attributes:
        masks: bool ``(N, H, W)``.
        classes: int64 ``(N,)``.
        scores: float32 ``(N,)``.
        prm: responses ``(N, H, W)``, with those of the suppressed objects where they are merged.
    """

    masks: Tensor
    classes: Tensor
    scores: Tensor
    prm: Tensor


def kept_peaks(
    maps: Tensor, logits: Tensor, peaks: Tensor, allowed: Tensor, peak_threshold: float, class_threshold: float | None
) -> Tensor:
    """Peaks worth a walk (section 5.4 of the specification: strictly above one threshold, at least the other).

    Args:
        maps: of one image ``(C, h, w)``.
        logits: ``(C,)``.
        peaks: ``(n, 3)``: class, row, column.
        allowed: bool ``(C,)``.
        peak_threshold: a peak's value is larger.
        class_threshold: its class's logit is at least this; ``None``: any.

    Returns:
        Those of ``peaks`` that stay, in their order.
    """
    index, row, column = peaks.unbind(dim=1)
    keep = (maps[index, row, column] > peak_threshold) & allowed[index]
    return peaks[keep if class_threshold is None else keep & (logits[index] >= class_threshold)]


def mask_contours(masks: Tensor, width: int = 5) -> Tensor:
    """The band along the border of every mask: dilation without erosion by a square.

    Args:
        masks: bool ``(J, H, W)``.
        width: of the square, odd. What is beyond the image takes no part.

    Returns:
        bool ``(J, H, W)``.
    """

    def spread(mask: Tensor) -> Tensor:
        for axis in (1, 2):
            size, wide = mask.shape[axis], mask.clone()
            for step in range(1, min(width // 2 + 1, size)):
                wide.narrow(axis, step, size - step).logical_or_(mask.narrow(axis, 0, size - step))
                wide.narrow(axis, 0, size - step).logical_or_(mask.narrow(axis, step, size - step))
            mask = wide
        return mask

    return spread(masks) & spread(~masks)


def background_masks(maps: Tensor, size: tuple[int, int], factor: float | Sequence[float] = 0.95) -> Tensor:
    """Where each class is surely not: its map, in 256 steps and enlarged bicubically, below ``factor`` times its mean.

    Args:
        maps: ``(C, h, w)``.
        size: of the image.
        factor: one number, or one a class.

    Returns:
        bool ``(C, H, W)``. A flat map has no background.
    """
    planes = []
    for plane in maps.float().cpu():
        low, high = plane.aminmax()
        steps = (plane - low) * (255 / (high - low) if high > low else 0.0)
        grey = Image.fromarray((steps + 0.5).to(torch.uint8).numpy())
        planes.append(torch.from_numpy(np.array(grey.resize((size[1], size[0]), Image.Resampling.BICUBIC))).float())
    values = torch.stack(planes)
    limit = _per_class(factor, len(maps))[:, None, None] * values.mean(dim=(1, 2), keepdim=True)
    return (values < limit).to(maps.device)


def proposal_scores(
    prm: Tensor, background: Tensor, masks: Tensor, contours: Tensor, balance: Tensor, penalty: Tensor
) -> Tensor:
    r"""How well each proposal fits each peak (equation 5).

    .. math:: \alpha \sum R \odot S + \sum R \odot \hat S - \beta \sum Q \odot S

    Cost: three products of 0/1 matrices, 6 n J H W operations.

    Args:
        prm: peak response maps R ``(n, H, W)``.
        background: Q of each peak's class, bool ``(n, H, W)``.
        masks: proposals S, bool ``(J, H, W)``.
        contours: their contours, bool ``(J, H, W)``.
        balance: alpha, ``(n,)``.
        penalty: beta, ``(n,)``.

    Returns:
        ``(n, J)``.
    """
    response, inside = prm.flatten(1), masks.flatten(1).to(prm.dtype).T
    edge = contours.flatten(1).to(prm.dtype).T
    outside = background.flatten(1).to(prm.dtype) @ inside
    return balance[:, None] * (response @ inside) + response @ edge - penalty[:, None] * outside


def suppress(found: Retrieved, threshold: float = 0.3, merge: bool = True, class_agnostic: bool = True) -> Retrieved:
    """Keeps the best object of every heap: what overlaps a kept one by an IoU of ``threshold`` or more is dropped.

    Args:
        found: objects in any order; of equal scores the first is the better one.
        threshold: an IoU.
        merge: whether the response of what is dropped is added to the one that it overlaps.
        class_agnostic: whether objects of other classes count.

    Returns:
        The kept ones, best first; ``found`` is not changed.
    """
    order = found.scores.argsort(descending=True, stable=True)
    masks, classes, scores, prm = (x[order] for x in found)
    near = mask_iou(masks, masks) >= threshold
    if not class_agnostic:
        near &= classes[:, None] == classes[None]
    open_, kept, merged = torch.ones(len(masks), dtype=torch.bool), [], []
    near = near.cpu()
    for i in range(len(masks)):
        if open_[i]:
            group = near[i] & open_
            group[i] = True
            open_ &= ~group
            kept.append(i)
            merged.append(prm[group.to(prm.device)].sum(dim=0) if merge else prm[i])
    index = torch.tensor(kept, dtype=torch.int64, device=masks.device)
    return Retrieved(masks[index], classes[index], scores[index], torch.stack(merged) if merged else prm[:0])


def retrieve_instances(
    peaks: Peaks,
    proposals: Tensor,
    *,
    balance: float | Sequence[float] = 0.8,
    penalty: float | Sequence[float] = 1e-5,
    background_factor: float | Sequence[float] = 0.95,
    contour: int = 5,
    area: tuple[float, float] = (2e-5, 0.85),
    top: int = 100,
    nms: float = 0.3,
    merge: bool = True,
    class_agnostic: bool = True,
) -> Retrieved:
    """The best proposal of every peak, and of those that overlap the best one (section 3.4).

    Args:
        peaks: of the image.
        proposals: bool ``(J, H, W)``, the most object-like first.
        balance: alpha of :func:`proposal_scores`; one number, or one a class.
        penalty: its beta.
        background_factor: of :func:`background_masks`.
        contour: of :func:`mask_contours`.
        area: proposals below the first fraction of the image, or at or above the second, are skipped.
        top: only so many proposals are looked at.
        nms: threshold of :func:`suppress`.
        merge: likewise.
        class_agnostic: likewise.

    Returns:
        Objects, best first; none without peaks or usable proposals. Of equal scores the first proposal wins.

    Raises:
        ValueError: proposals that are not bool ``(J, H, W)`` of the response maps' size.
    """
    prm, size = peaks.prm, peaks.prm.shape[1:]
    if proposals.ndim != 3 or proposals.dtype != torch.bool or proposals.shape[1:] != size:
        raise ValueError(
            f"retrieve_instances: expected proposals bool (J, {size[0]}, {size[1]}), "
            f"got {proposals.dtype} {tuple(proposals.shape)}"
        )
    proposals = proposals[:top].to(prm.device)
    share = proposals.flatten(1).sum(dim=1) / max(1, size[0] * size[1])
    proposals = proposals[(share >= area[0]) & (share < area[1])]
    classes = peaks.places[:, 0]
    if len(prm) == 0 or len(proposals) == 0:
        return Retrieved(proposals[:0], classes[:0], prm.new_zeros(0), prm[:0])
    count = len(peaks.maps)
    background = background_masks(peaks.maps, (size[0], size[1]), background_factor)[classes]
    weights = [_per_class(value, count).to(prm)[classes] for value in (balance, penalty)]
    parts = proposals.split(CHUNK)
    scores = torch.cat([proposal_scores(prm, background, s, mask_contours(s, contour), *weights) for s in parts], dim=1)
    best, index = scores.max(dim=1)
    return suppress(Retrieved(proposals[index], classes, best, prm), nms, merge, class_agnostic)


def semantic_labels(masks: Tensor, classes: Tensor, scores: Tensor) -> Tensor:
    """Labels uint8 ``(H, W)`` from objects: class + 1 of the best object at a pixel, 0 where there is none."""
    labels = torch.zeros(masks.shape[1:], dtype=torch.uint8, device=masks.device)
    for i in scores.argsort(stable=True).tolist():
        labels[masks[i]] = int(classes[i]) + 1
    return labels


def class_points(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixel int64 ``(C, 2)`` (row, column) where each of ``maps (C, h, w)``, resized bilinearly, is largest."""
    full = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0].flatten(1)
    place = full.argmax(dim=1)
    return torch.stack([place // size[1], place % size[1]], dim=1)


def _per_class(value: float | Sequence[float], count: int) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).expand(count)


class PRM(nn.Module):
    """A classifier pooled by its peaks, and what is read from them.

    Args:
        num_classes: number of foreground classes C.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "prm"
    kind = "cam"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        _check(config, num_classes)
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
        self.classifier = nn.Conv2d(self.backbone.channels[-1], num_classes, 1)

    def response_maps(self, images: Tensor) -> Tensor:
        """Class response maps ``(B, C, h, w)`` in float32, enlarged by the factor of the mode the module is in."""
        maps = self.classifier(self.backbone(images)[-1]).float()
        factor = self.config.sub_pixel if self.training else self.config.inference_sub_pixel
        if factor == 1:
            return maps
        size = tuple(factor * side for side in maps.shape[-2:])
        return F.interpolate(maps, size, mode="bilinear", align_corners=True)

    def pool(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`fastcam.nn.peak_stimulation` with the configuration's values."""
        config = self.config
        return peak_stimulation(
            maps,
            window=config.window,
            threshold=config.threshold,  # type: ignore[arg-type]
            exact_grad=config.exact_grad,
        )

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Multi-label soft margin loss of the mean peaks of ``batch["image"]`` with ``batch["tags"]``.

        Returns:
            ``"loss"``, and ``"peaks"``, their mean number a map.
        """
        logits, _, counts = self.pool(self.response_maps(batch["image"]))
        loss = F.multilabel_soft_margin_loss(logits, batch["tags"])
        return {"loss": loss, "peaks": counts.float().mean()}

    def tag_logits(self, images: Tensor) -> Tensor:
        """What the classifier thinks of the tags: ``(B, C)``, a probability after a sigmoid."""
        return self.pool(self.response_maps(images))[0]

    def cams(self, images: Tensor, tags: Tensor | None = None) -> Tensor:
        """Maps ``(B, C, h, w)`` of one view, ReLU'd, not normalised; classes without a tag are 0."""
        maps = F.relu(self.response_maps(images))
        return maps if tags is None else maps * (tags > 0)[:, :, None, None]

    def fused_cams(
        self, views: Sequence[Tensor], size: tuple[int, int], tags: Tensor | None = None, keys: Tensor | None = None
    ) -> FusedCams:
        """Maps of several scales and their mirror images, fused as IRN's ``make_cam`` does: no background.

        ``keys`` ``(n,)``: only the maps of these classes.
        """
        full = any(view.shape[-2:] == tuple(size) for view in views)
        fusion = CamFusion("irn", multiple=self.config.output_stride if full else 1)
        return fusion(self.cams, views, size, tags, keys)

    def peaks(self, image: Tensor, keys: Tensor | None = None) -> Peaks:
        """Peaks of one image that pass the thresholds, and the walk back from each; all of them in one backward pass.

        Args:
            image: normalised ``(3, H, W)``.
            keys: the classes that are present, ``(k,)``; ``None``: those that reach ``class_threshold``.
        """
        config, (height, width) = self.config, image.shape[1:]
        square = image[None]
        if config.side is not None:
            square = F.interpolate(square, (config.side, config.side), mode="bilinear", align_corners=False)
        with torch.no_grad():
            maps = self.response_maps(square)
            logits, places, _ = self.pool(maps)
        allowed = torch.ones(self.num_classes, dtype=torch.bool, device=maps.device)
        if keys is not None:
            allowed = torch.zeros_like(allowed).index_fill_(0, keys.to(maps.device), True)
        least = config.class_threshold if keys is None else None
        places = kept_peaks(maps[0], logits[0], places[:, 1:], allowed, config.peak_threshold, least)
        prm = peak_response_maps(peak_backprop(self.response_maps, square[0], places, conserve=config.conserve))
        if config.side is not None and len(prm):
            prm = F.interpolate(prm[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
            total = prm.sum(dim=(1, 2), keepdim=True)
            prm = prm / torch.where(total > 0, total, 1)
        return Peaks(maps[0], places, prm.view(-1, height, width))

    def instances(self, image: Tensor, proposals: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Objects of one image.

        Args:
            image: normalised ``(3, H, W)``.
            proposals: bool ``(J, H, W)``, the most object-like first.
            keys: the classes that are present, ``(k,)``; ``None``: those that reach ``class_threshold``.

        Returns:
            Masks bool ``(N, H, W)``, their classes int64 ``(N,)`` and scores float32 ``(N,)``, best first, on the CPU.
        """
        c = self.config
        found = retrieve_instances(
            self.peaks(image, keys),
            proposals,
            balance=c.balance,
            penalty=c.penalty,
            background_factor=c.background_factor,
            contour=c.contour,
            area=(c.min_area, c.max_area),
            top=c.proposals,
            nms=c.nms,
            merge=c.merge,
            class_agnostic=c.class_agnostic,
        )
        return found.masks.cpu(), found.classes.cpu(), found.scores.float().cpu()

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD; the classifier learns ``head_lr_factor`` times faster."""
        return [sgd_poly(self.backbone, [self.classifier], self.config, total_steps)]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()


def _check(config: Config, num_classes: int) -> None:
    """Raises FastcamError where a value is out of range."""
    for name in ("window", "contour"):
        value = getattr(config, name)
        if value < 3 or value % 2 == 0:
            raise FastcamError(f"prm: {name} is {value}, expected an odd number of at least 3")
    if isinstance(config.threshold, str) and config.threshold not in ("median", "mean", "max"):
        raise FastcamError(f"prm: threshold is '{config.threshold}', expected median, mean, max, a number or null")
    for name in ("sub_pixel", "inference_sub_pixel", "proposals"):
        if getattr(config, name) < 1:
            raise FastcamError(f"prm: {name} is {getattr(config, name)}, expected at least 1")
    if config.side is not None and config.side < config.output_stride:
        raise FastcamError(f"prm: side is {config.side}, expected at least the output stride {config.output_stride}")
    if not 0 <= config.min_area < config.max_area:
        raise FastcamError(
            f"prm: min_area is {config.min_area} and max_area {config.max_area}, expected 0 <= min_area < max_area"
        )
    if not 0 < config.nms <= 1:
        raise FastcamError(f"prm: nms is {config.nms}, expected a number above 0 and at most 1")
    for name in ("balance", "penalty", "background_factor"):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != num_classes:
            raise FastcamError(f"prm: {name} has {len(value)} numbers, expected one, or one a class ({num_classes})")
