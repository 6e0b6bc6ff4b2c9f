"""SFC: shared feature calibration.

X. Zhao, F. Tang, X. Wang, J. Xiao, "SFC: Shared Feature Calibration in Weakly Supervised Semantic Segmentation", AAAI
2024 (arXiv 2401.11719). Authors' code: github.com/Barrett-python/SFC (MIT).

Tags are long-tailed and classes share features, so that a classifier's weights over-activate frequent classes and
under-activate rare ones. SFC draws rare images more often (:class:`fastcam.nn.ImageBank`), computes a second family of
maps from per-image class prototypes, which carry shared features positively, and pulls the classifier's maps towards
them and towards those of a half-size copy, with weights that grow for frequent and rare classes
(:func:`distribution_coefficient`). Both families are added at inference.

Deviations from the authors' code: unfilled bank slots are not drawn (``strict_official=True`` draws them); the others
change no result and stand in ``docs/methods/sfc.md``. ``center_features`` is an addition, off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn import FusedCams, ImageBank, background_channel, create_backbone, max_normalize, pixel_correlation
from fastcam.nn.optim import sgd_poly
from fastcam.ops.cam_fuse import cam_fuse
from fastcam.ops.prototype_similarity import prototype_similarity
from fastcam.ops.region_pool import region_pool

FAMILIES = ("classifier", "prototype", "both")


@dataclass(frozen=True)
class Config:
    """The values of the authors' VOC 2012 run."""

    backbone: str = "resnet50"
    output_stride: int = 16
    dilate: bool = False
    frozen_stages: int = 2
    frozen_norm: bool = True  # False for a backbone from random weights
    side_channels: tuple[int, ...] = (128, 128, 256, 256)
    correlation_channels: int = 2048
    correlation_steps: int = 2
    center_features: bool = False  # compare features by what differs from their image's mean
    background_scale: float = 0.3  # of the background map where seeds are chosen
    bank_draws: int = 4
    prototype_loss: float = 1.6
    weight_loss: float = 0.8
    warmup: float = 0.0  # share of the training in which the losses on maps grow from 0
    extra_images: float | None = None  # R; None scales the authors' 396 with the mean number of images a tag
    family: str = "both"
    proto_weight: float = 0.7  # the authors use 0.7 for seeds, 0.3 for propagation
    background_bias: float = 0.4
    lr: float = 0.1
    head_lr_factor: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    poly_power: float = 0.9
    grad_clip: float | None = 1.0
    strict_official: bool = False


def distribution_coefficient(counts: Tensor, extra: float | None = None) -> Tensor:
    r"""Weight of every class in the loss: large for the most and the least frequent classes, mean 1.

    .. math:: DC_k \propto \frac{\sum_j |n_k - n_j|}{n_k + R}

    Args:
        counts: number of training images with each tag, ``(C,)``.
        extra: R, how often the image bank adds an image of a class in an epoch or so. ``None`` takes 0.4812 of the mean
            count, which is the authors' 396 for the 20 counts of VOC 2012.

    Returns:
        float32 ``(C,)``. Equal counts give 1 everywhere. With ``extra`` 0, a class without images gets 0 and the mean
        is over the others.

    Example:
        >>> distribution_coefficient(torch.tensor([1, 2, 6]), extra=0)
        tensor([1.5000, 0.6250, 0.8750])
    """
    n = torch.as_tensor(counts, dtype=torch.float64)
    if n.ndim != 1 or (n < 0).any():
        raise ValueError(f"distribution_coefficient: expected counts (C,) of 0 or more, got {counts}")
    demand = (n[:, None] - n[None, :]).abs().sum(dim=1)
    supply = n + (396 / 822.9 * n.mean() if extra is None else extra)
    ratio = torch.where(supply > 0, demand / supply.clamp(min=1e-300), 0)
    if ratio.sum() == 0:
        return torch.ones_like(ratio, dtype=torch.float32)
    return (ratio / ratio[supply > 0].mean()).float()


def unit_features(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Features ``(B, D, H, W)`` divided by their norm at every pixel plus ``eps``."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)


def with_background(logits: Tensor) -> Tensor:
    """Normalised ReLU maps behind their background ``1 - max``: ``(B, C, h, w)`` -> ``(B, C + 1, h, w)``."""
    maps = max_normalize(F.relu(logits))
    return torch.cat([background_channel(maps), maps], dim=1)


def prototype_seeds(maps: Tensor, valid: Tensor, background_scale: float = 0.3) -> Tensor:
    """The pixels that make up each class's prototype: those its map wins, against a weakened background.

    Args:
        maps: ``(B, C + 1, h, w)``, background first.
        valid: the same shape; 0 where the pixel is padding or the class is absent.
        background_scale: factor of the background map.

    Returns:
        ``(B, C + 1, h, w)``: one-hot over the classes, times ``valid``. No gradient.
    """
    maps = maps.detach()
    scale = maps.new_full((maps.shape[1], 1, 1), 1.0)
    scale[0] = background_scale
    winner = (maps * scale).argmax(dim=1)
    return F.one_hot(winner, maps.shape[1]).permute(0, 3, 1, 2).to(valid.dtype) * valid


def class_prototypes(features: Tensor, seeds: Tensor) -> Tensor:
    """Features ``(B, D, h, w)`` summed over each class's seeds ``(B, K, h, w)``, by the map's area: ``(B, K, D)``.

    The area, not the number of seeds, as the authors do: the cosine does not see the scale, and a class without seeds
    gives 0.
    """
    return region_pool(features, seeds.to(features.dtype), normalize="area")


def prototype_cams(features: Tensor, maps: Tensor, valid: Tensor, background_scale: float = 0.3) -> Tensor:
    """ReLU of every pixel's cosine with its image's prototypes, ``(B, C + 1, h, w)``; gradient to ``features``."""
    prototypes = class_prototypes(features, prototype_seeds(maps, valid, background_scale))
    return prototype_similarity(features, prototypes, activation="relu", eps=1e-8)


def weighted_l1(a: Tensor, b: Tensor, class_weight: Tensor) -> Tensor:
    """Mean over all elements of ``class_weight[k] |a - b|`` for ``(B, K, h, w)`` maps."""
    return ((a - b).abs() * class_weight[None, :, None, None]).mean()


def prototype_weight_loss(classifier_maps: Tensor, prototype_maps: Tensor, class_weight: Tensor) -> Tensor:
    """L_P before its factor: classifier maps against max-normalised prototype maps, background (weight 1) included."""
    weight = torch.cat([class_weight.new_ones(1), class_weight])
    return weighted_l1(classifier_maps, max_normalize(prototype_maps), weight)


def scale_weight_loss(maps: Tensor, half_maps: Tensor, tags: Tensor, class_weight: Tensor) -> Tensor:
    """L_W before its factor: foreground classifier maps against those of the half-size image, tagged classes only."""
    tagged = tags[:, :, None, None]
    return weighted_l1(halve(maps)[:, 1:] * tagged, half_maps[:, 1:] * tagged, class_weight)


def halve(x: Tensor) -> Tensor:
    """Half the size, bilinear; corners keep their values."""
    return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=True)


def with_background_tag(tags: Tensor) -> Tensor:
    """Tags ``(B, C)`` behind the background's, which is always 1: ``(B, C + 1)``."""
    return torch.cat([torch.ones_like(tags[:, :1]), tags], dim=1)


class SFC(nn.Module):
    """The calibrated network.

    Args:
        num_classes: number of foreground classes C.
        config: its values.
        weights: local file with the backbone's pre-trained weights.
    """

    name = "sfc"
    kind = "cam"
    class_weight: Tensor
    step: Tensor

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if config.family not in FAMILIES:
            raise FastcamError(f"sfc: family is '{config.family}', expected one of {', '.join(FAMILIES)}")
        if len(config.side_channels) != 4:
            raise FastcamError(f"sfc: side_channels has {len(config.side_channels)} numbers, expected 4, one a stage")
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
        channels = self.backbone.channels
        self.sides = nn.ModuleList(
            nn.Conv2d(c, d, 1, bias=False) for c, d in zip(channels, config.side_channels, strict=True)
        )
        self.classifier = nn.Conv2d(channels[-1], num_classes, 1, bias=False)
        self.correlation = nn.Conv2d(3 + channels[-1], config.correlation_channels, 1, bias=False)  # the authors' f9
        self.bank = ImageBank(num_classes, config.bank_draws, draw_empty=config.strict_official)
        self.register_buffer("class_weight", torch.ones(num_classes))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.warmup_steps = 0

    def set_tag_counts(self, counts: Tensor) -> None:
        """Sets the loss weights of the classes from the number of training images with each tag, ``(C,)``."""
        if len(counts) != self.num_classes:
            raise ValueError(f"sfc.set_tag_counts: expected {self.num_classes} counts, got {len(counts)}")
        self.class_weight.copy_(distribution_coefficient(counts, self.config.extra_images))

    def hierarchical_features(self, stages: Sequence[Tensor]) -> Tensor:
        """Unit side features of all stages, concatenated at the third stage's size. No gradient to the backbone."""
        size = stages[2].shape[-2:]
        sides = [side(x.detach()).float() for side, x in zip(self.sides, stages, strict=True)]
        sides = [unit_features(self._centered(x)) for x in sides]
        return torch.cat([F.interpolate(x, size, mode="bilinear", align_corners=False) for x in sides], dim=1)

    def correlation_features(self, images: Tensor, last: Tensor, size: Sequence[int]) -> Tensor:
        """What the pixel correlation compares: projected colours and last features, at ``size``."""
        colours = F.interpolate(images, last.shape[-2:], mode="bilinear", align_corners=True)
        projected = self.correlation(torch.cat([colours.to(last.dtype), last], dim=1)).float()
        return self._centered(F.interpolate(projected, tuple(size), mode="bilinear", align_corners=True))

    def _centered(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=(2, 3), keepdim=True) if self.config.center_features else x

    def weight_head(self, images: Tensor, stages: Sequence[Tensor], valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score ``(B, C)``, classifier-weight maps M_W and the maps before the pixel correlation, as :meth:`heads`."""
        size = valid.shape[-2:]
        logits = self.classifier(stages[3]).float()
        original = F.interpolate(with_background(logits), size, mode="bilinear", align_corners=True) * valid
        weight_cams = self._propagate(original, self.correlation_features(images, stages[3], size))
        return logits.mean(dim=(2, 3)), weight_cams, original

    def heads(self, images: Tensor, stages: Sequence[Tensor], valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All heads in their training form.

        Args:
            images: ``(B, 3, H, W)``.
            stages: the backbone's outputs.
            valid: ``(B, C + 1, h, w)`` of the third stage's size; 0 in padding and for absent classes.

        Returns:
            Score ``(B, C)``, then ``(B, C + 1, h, w)`` each: classifier maps M_W, prototype maps M_P, and the maps
            before the pixel correlation.
        """
        score, weight_cams, original = self.weight_head(images, stages, valid)
        proto_cams = self._prototype_cams(self.hierarchical_features(stages), weight_cams, valid)
        return score, weight_cams, proto_cams, original

    # Sums over thousands of pixels, feeding losses of a few 1e-3: both stay in float32 under autocast.
    def _propagate(self, maps: Tensor, features: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            return pixel_correlation(maps, features, self.config.correlation_steps)

    def _prototype_cams(self, features: Tensor, maps: Tensor, valid: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            return prototype_cams(features, maps, valid, self.config.background_scale)

    def _stages(self, images: Tensor, inside: Tensor, tags: Tensor) -> tuple[list[Tensor], Tensor]:
        """Stage outputs, and where which class may be: ``(B, C + 1, h, w)`` of the third stage's size."""
        stages = self.backbone(images)
        inside = F.interpolate(inside[:, None].float(), stages[2].shape[-2:], mode="nearest")
        return stages, with_background_tag(tags)[:, :, None, None] * inside

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The MSDW loss: L_cls + L_P + L_W.

        Args:
            batch: ``"image"`` ``(B, 3, S, S)``, ``"tags"`` ``(B, C)``, and bool ``"valid"`` ``(B, S, S)`` where crops
                are padded.

        Returns:
            ``"loss"`` and its three parts.
        """
        images, tags = batch["image"], batch["tags"]
        inside = batch.get("valid")
        if inside is None:
            inside = torch.ones_like(images[:, 0], dtype=torch.bool)
        images, inside, tags = self.bank(images, inside, tags)
        half = halve(images)
        score, weight_cams, proto_cams, _ = self.heads(images, *self._stages(images, inside, tags))
        half_score, half_cams, _ = self.weight_head(half, *self._stages(half, inside, tags))
        loss_cls = (F.multilabel_soft_margin_loss(score, tags) + F.multilabel_soft_margin_loss(half_score, tags)) / 2
        grown = (self.step / self.warmup_steps).clamp(max=1) if self.warmup_steps else 1.0
        self.step += 1
        loss_proto = self.config.prototype_loss * prototype_weight_loss(weight_cams, proto_cams, self.class_weight)
        loss_weight = self.config.weight_loss * scale_weight_loss(weight_cams, half_cams, tags, self.class_weight)
        loss_proto, loss_weight = grown * loss_proto, grown * loss_weight
        loss = loss_cls + loss_proto + loss_weight
        return {"loss": loss, "loss_cls": loss_cls, "loss_proto": loss_proto, "loss_weight": loss_weight}

    def tag_logits(self, images: Tensor) -> Tensor:
        """What the classifier thinks of the tags: ``(B, C)``, a probability after a sigmoid."""
        return self.classifier(self.backbone(images)[3]).float().mean(dim=(2, 3))

    def view_cams(self, view: Tensor, tags: Tensor | None = None, mirror: bool = True) -> tuple[Tensor, Tensor]:
        """M_W and M_P of one view, ``(B, C + 1, h, w)`` each, from the sum of its features and its mirror image's.

        As the authors do, classes without a tag take part in the pixel correlation and in the choice of seeds; only
        their seeds are dropped.
        """
        batch = len(view)

        def merge(x: Tensor) -> Tensor:
            return x[:batch] + x[batch:].flip(-1) if mirror else x

        stages = self.backbone(torch.cat([view, view.flip(-1)]) if mirror else view)
        size = stages[2].shape[-2:]
        last = merge(stages[3])
        maps = F.interpolate(with_background(self.classifier(last).float()), size, mode="bilinear", align_corners=True)
        # The classifier and the correlation are linear: merging before them is the authors' merging behind them.
        weight_cams = self._propagate(maps, self.correlation_features(2 * view if mirror else view, last, size))
        if tags is None:
            tags = view.new_ones(batch, self.num_classes)
        valid = with_background_tag(tags)[:, :, None, None].expand_as(weight_cams)
        return weight_cams, self._prototype_cams(merge(self.hierarchical_features(stages)), weight_cams, valid)

    def cams(self, images: Tensor, tags: Tensor | None = None) -> Tensor:
        """Maps ``(B, C, h, w)`` of one view, of the configured family; classes without a tag are 0."""
        weight_cams, proto_cams = self.view_cams(images, tags, mirror=False)
        w_cam, w_proto = self._family_weights()
        maps = w_cam * weight_cams[:, 1:] + w_proto * proto_cams[:, 1:]
        return maps if tags is None else maps * (tags > 0)[:, :, None, None]

    def fused_cams(
        self, views: Sequence[Tensor], size: tuple[int, int], tags: Tensor | None = None, keys: Tensor | None = None
    ) -> FusedCams:
        """Maps and background of several scales, each with its mirror image.

        The authors decide for the background where ``b + 0.4 >= 2 max_k m_k`` (b, m: summed over scales, divided by
        their maximum; both: M_W + proto_weight M_P). The returned background is scaled so that comparing it with the
        maps is that rule. ``keys`` ``(n,)``: only the maps of these classes.
        """
        if not views:
            raise ValueError("sfc.fused_cams: expected at least one view, got none")
        weight_cams, proto_cams = zip(*(self.view_cams(view, tags) for view in views), strict=True)
        present = None if tags is None else with_background_tag(tags) > 0
        if keys is not None:  # after the correlation and the choice of seeds, where all classes take part
            channels = torch.cat([keys.new_zeros(1), keys + 1])
            weight_cams, proto_cams = (
                tuple(maps[:, channels] for maps in family) for family in (weight_cams, proto_cams)
            )
            present = None if present is None else present[:, channels]
        families = [
            weight * cam_fuse(maps, size, present=present, activation=None)
            for weight, maps in zip(self._family_weights(), (weight_cams, proto_cams), strict=True)
            if weight > 0
        ]
        fused = torch.stack(families).sum(dim=0)
        return FusedCams(fused[:, 1:], (fused[:, 0] + self.config.background_bias) / 2)

    def _family_weights(self) -> tuple[float, float]:
        """Weights of M_W and M_P, sum 1."""
        w = {"classifier": 0.0, "prototype": 1.0, "both": self.config.proto_weight / (1 + self.config.proto_weight)}
        return 1 - w[self.config.family], w[self.config.family]

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with a poly schedule, heads ``head_lr_factor`` times faster; clip the gradient at ``grad_clip``."""
        self.warmup_steps = round(self.config.warmup * total_steps)
        heads = [self.sides, self.classifier, self.correlation]
        return [sgd_poly(self.backbone, heads, self.config, total_steps)]

    def export_state_dict(self) -> dict[str, Tensor]:
        """The state without the image bank and the number of steps, which only training needs."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("bank.") and k != "step"}
