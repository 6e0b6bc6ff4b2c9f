"""IRN: where the CAMs of a class end and where one object ends, learned from the CAMs alone.

J. Ahn, S. Cho, S. Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019
(arXiv 1904.05044). Authors' code: github.com/jiwoon-ahn/irn (MIT).

Two heads on a frozen classification network: a boundary map, learned through the affinity of pixel pairs
``a_ij = 1 - max of the boundary on the path from i to j``, and a field of displacements to the centre of a pixel's
object. The CAMs walk at random along the affinities, and stop at boundaries: semantic labels. Pixels that the field
leads to one place are one object: instances.

Deviations from the authors' code: pairs at the border of a crop are trained too, images larger than ``pad`` are padded
instead of cropped, and backbones other than ResNet-50; see ``docs/methods/irn.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn import create_backbone
from fastcam.nn.optim import sgd_poly
from fastcam.nn.pairs import affinity_loss, displacement_loss, label_pairs, labels_at
from fastcam.ops.path_affinity import path_affinity
from fastcam.ops.random_walk import random_walk


@dataclass(frozen=True)
class Config:
    """The authors' values on VOC 2012.

    Attributes:
        backbone: timm name; it never learns.
        output_stride: of its last features.
        dilate: whether layers behind a removed stride are dilated.
        edge_channels: channels of each stage in the boundary head.
        displacement_channels: of each stage in the displacement head, from the stem on; the last also joins them. A
            network without a stem of its own drops the first.
        train_radius: pairs of the losses are closer than this, in pixels of the map (stride 4).
        radius: pairs of the random walk are closer than this.
        beta: power of the affinities.
        steps: steps of the random walk; the authors square its matrix 8 times.
        centroid_steps: how often a pixel follows the displacements.
        weak_displacement: pixels that move less are the cores of objects.
        min_area: components of an object below this fraction of the image score 0.
        pad: images are padded to at least this side, and to a multiple of the output stride.
        lr: of the boundary head; the displacement head learns ``head_lr_factor`` times faster.
        momentum: 0, as in the authors' program, which passes the weight decay in its place.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    backbone: str = "resnet50"
    output_stride: int = 16
    dilate: bool = False
    edge_channels: int = 32
    displacement_channels: tuple[int, ...] = (64, 128, 256, 256, 256)
    train_radius: int = 10
    radius: int = 5
    beta: float = 10.0
    steps: int = 256
    centroid_steps: int = 300
    weak_displacement: float = 2.5
    min_area: float = 0.01
    pad: int = 512
    lr: float = 0.1
    head_lr_factor: float = 10.0
    momentum: float = 0.0
    weight_decay: float = 1e-4
    poly_power: float = 0.9
    grad_clip: float | None = None


def refine_centroids(displacement: Tensor, steps: int = 300) -> Tensor:
    """Follows the displacements from every pixel, sampling them bilinearly on the way.

    Cost: ``steps`` rounds of 8 H W gathers, fewer where nothing moves any more.

    Args:
        displacement: rows and columns, ``(2, H, W)``.
        steps: rounds.

    Returns:
        Where every pixel arrives, inside the map, as int64 rows and columns ``(2, H, W)``; halves to even.
    """
    _, height, width = displacement.shape
    field = displacement.flatten(1)
    limit = field.new_tensor([[height - 1], [width - 1]])
    rows = torch.arange(height, device=field.device, dtype=field.dtype)
    columns = torch.arange(width, device=field.device, dtype=field.dtype)
    position = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)
    for _ in range(steps):
        low = position.floor()
        y, x = position - low
        y0, x0 = low.long()
        y1, x1 = position.ceil().long()
        top = field[:, y0 * width + x0] * (1 - x) + field[:, y0 * width + x1] * x
        bottom = field[:, y1 * width + x0] * (1 - x) + field[:, y1 * width + x1] * x
        moved = (position + top * (1 - y) + bottom * y).clamp(min=0).minimum(limit)
        if torch.equal(moved, position):
            break
        position = moved
    return position.round().long().view(2, height, width)


def cluster_centroids(centroids: Tensor, displacement: Tensor, weak: float = 2.5) -> Tensor:
    """Pixels whose centroids fall into one 4-connected region of small displacements are one object.

    Args:
        centroids: int64 ``(2, H, W)``.
        displacement: ``(2, H, W)``.
        weak: displacements are small below this length.

    Returns:
        int64 ``(H, W)``: objects counted from 0. All pixels that end where displacements are large are one object too.
    """
    core = (torch.linalg.vector_norm(displacement, dim=0) < weak).cpu().numpy()
    regions = torch.from_numpy(ndimage.label(core)[0].astype(np.int64)).to(centroids.device)
    return regions[centroids[0], centroids[1]].unique(return_inverse=True)[1]


def split_by_instance(maps: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Every class's map cut into objects.

    Args:
        maps: ``(n, H, W)``.
        objects: int64 ``(H, W)``, counted from 0.

    Returns:
        Maps ``(K, H, W)`` of the pairs of class and object that are not 0 everywhere, class by class, and the class
        ``(K,)`` of each as an index into ``maps``.
    """
    masks = F.one_hot(objects).permute(2, 0, 1).to(maps.dtype)
    split = (maps[:, None] * masks).flatten(0, 1)
    index = torch.arange(len(maps), device=maps.device).repeat_interleave(len(masks))
    seen = split.flatten(1).any(dim=1)
    return split[seen], index[seen]


def detect(scores: Tensor, winner: Tensor, min_area: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """Connected components of every channel's pixels, with a score.

    Args:
        scores: ``(K, H, W)``.
        winner: integers ``(H, W)``: 0 background, channel + 1.
        min_area: components below this fraction of the image score 0.

    Returns:
        Masks bool ``(N, H, W)``, their channels int64 ``(N,)`` and scores float32 ``(N,)``: the largest value of the
        channel inside the mask. On the CPU.
    """
    labels, values = winner.cpu().numpy(), scores.detach().float().cpu().numpy()
    masks, channels, best = [], [], []
    for label in np.unique(labels[labels > 0]):
        components, count = ndimage.label(labels == label)
        for component in range(1, count + 1):
            mask = components == component
            masks.append(mask)
            channels.append(int(label) - 1)
            best.append(float(values[label - 1][mask].max()) if mask.sum() >= min_area * mask.size else 0.0)
    stacked = np.stack(masks) if masks else np.zeros((0, *labels.shape), bool)
    return torch.from_numpy(stacked), torch.tensor(channels, dtype=torch.int64), torch.tensor(best)


def _level(channels: int, out: int) -> nn.Sequential:
    """1 x 1 convolution and group norm, in groups of at least 8 channels, 16 at most (the authors' numbers)."""
    groups = math.gcd(16, out // 8) or 1
    return nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.GroupNorm(groups, out))


def _upsample(x: Tensor, factor: int, like: Tensor) -> Tensor:
    """Whole cells enlarged, cut to the size of ``like``, and what is negative cut off."""
    if factor > 1:
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    return F.relu(x[..., : like.shape[-2], : like.shape[-1]])


class BoundaryHead(nn.Module):
    """Logit of a boundary at every pixel of the finest stage.

    Args:
        channels: of every stage.
        strides: of every stage, finest first.
        out: channels kept of each.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], out: int) -> None:
        super().__init__()
        self.factors = [s // strides[0] for s in strides]
        self.levels = nn.ModuleList(_level(c, out) for c in channels)
        self.last = nn.Conv2d(out * len(channels), 1, 1)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Stages to ``(B, H, W)``."""
        levels = zip(self.levels, stages, self.factors, strict=True)
        return self.last(torch.cat([_upsample(level(x), f, stages[0]) for level, x, f in levels], dim=1))[:, 0]


class DisplacementHead(nn.Module):
    """Displacement to the object's centre at every pixel of the finest stage, in its pixels.

    Coarse stages are joined at the finest of theirs first. Out of training the mean over the training images is
    subtracted: a network learns differences of displacements only, and so an arbitrary offset.

    Args:
        channels: of every stage.
        strides: of every stage, finest first.
        out: channels kept of each; those of the last are also the head's.
    """

    mean: Tensor

    def __init__(self, channels: Sequence[int], strides: Sequence[int], out: Sequence[int]) -> None:
        super().__init__()
        self.fine = sum(s == strides[0] for s in strides)
        self.factors = [1] * self.fine + [s // strides[self.fine] for s in strides[self.fine :]]
        self.join = strides[self.fine] // strides[0]
        self.levels = nn.ModuleList(_level(c, d) for c, d in zip(channels, out, strict=True))
        self.coarse = _level(sum(out[self.fine :]), out[-1])
        self.last = nn.Sequential(
            _level(sum(out[: self.fine]) + out[-1], out[-1]), nn.ReLU(), nn.Conv2d(out[-1], 2, 1, bias=False)
        )
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Stages to ``(B, 2, H, W)``."""
        levels = [
            _upsample(level(x), factor, stages[0] if factor == 1 and i < self.fine else stages[self.fine])
            for i, (level, x, factor) in enumerate(zip(self.levels, stages, self.factors, strict=True))
        ]
        coarse = _upsample(self.coarse(torch.cat(levels[self.fine :], dim=1)), self.join, stages[0])
        field = self.last(torch.cat([*levels[: self.fine], coarse], dim=1))
        return field if self.training else field - self.mean[:, None, None]


class IRN(nn.Module):
    """The heads, their losses, and what is done with them.

    Args:
        num_classes: number of foreground classes C; the network itself knows no classes.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "irn"
    kind = "refiner"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if len(config.displacement_channels) != 5:
            count = len(config.displacement_channels)
            raise FastcamError(
                f"irn: displacement_channels has {count} numbers, expected 5: the stem's and the stages'"
            )
        for name, least in (("train_radius", 2), ("radius", 2), ("steps", 1), ("centroid_steps", 1)):
            if getattr(config, name) < least:
                raise FastcamError(f"irn: {name} is {getattr(config, name)}, expected at least {least}")
        self.num_classes = num_classes
        self.config = config
        self.backbone = create_backbone(
            config.backbone, output_stride=config.output_stride, dilate=config.dilate, weights=weights, stem=True
        ).requires_grad_(False)
        self.normalize = self.backbone.normalize
        channels = self.backbone.channels
        self.stride = self.backbone.strides[-4]
        strides = [max(s, self.stride) for s in self.backbone.strides]
        self.boundary = BoundaryHead(channels, strides, config.edge_channels)
        self.displacement = DisplacementHead(channels, strides, config.displacement_channels[-len(channels) :])

    def _stages(self, images: Tensor) -> list[Tensor]:
        """The backbone's outputs; the stem's is pooled to the first stage's size, as ResNets do."""
        with torch.no_grad():
            first, *rest = self.backbone(images)
            if (ratio := self.stride // self.backbone.strides[0]) > 1:
                first = F.max_pool2d(first, ratio + 1, ratio, ratio // 2)
        return [first, *rest]

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of the pairs.

        Args:
            batch: ``"image"`` ``(B, 3, S, S)``, and ``"mask"`` int64 ``(B, S, S)``: labels made of CAMs, 0 to C, 255
                where they are not sure.

        Returns:
            ``"loss"``, the sum of ``"loss_affinity"`` (half positive, half negative) and ``"loss_displacement"`` (half
            foreground, half background). 0 where no pair is labelled.
        """
        stages, radius = self._stages(batch["image"]), self.config.train_radius
        boundary = self.boundary(stages).float().sigmoid()
        pairs = label_pairs(labels_at(batch["mask"], boundary.shape[-2:]), radius)
        affinity = affinity_loss(path_affinity(boundary, radius=radius), pairs)
        foreground, background = displacement_loss(self.displacement(stages).float(), pairs, radius)
        displacement = (foreground + background) / 2
        return {"loss": affinity + displacement, "loss_affinity": affinity, "loss_displacement": displacement}

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with a poly schedule; the displacement head learns ``head_lr_factor`` times faster."""
        return [sgd_poly(self.boundary, [self.displacement], self.config, total_steps)]

    @torch.inference_mode()
    def calibrate(self, images: Iterable[Tensor]) -> None:
        """Sets the mean displacement that is subtracted from then on.

        Args:
            images: of the training, normalised, ``(B, 3, H, W)`` each.
        """
        mode = self.training
        self.eval()
        self.displacement.mean.zero_()
        means = [self.relations(batch)[1].mean(dim=(0, 2, 3)) for batch in images]
        if means:
            self.displacement.mean.copy_(torch.stack(means).mean(dim=0))
        self.train(mode)

    def relations(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boundaries, from each image and its mirror image, and displacements, from the image alone.

        Args:
            images: normalised ``(B, 3, H, W)``.

        Returns:
            Boundary probability ``(B, h, w)`` and displacements ``(B, 2, h, w)`` in float32 at a quarter of the size,
            rounded up.
        """
        batch, _, height, width = images.shape
        cells = self.config.output_stride
        rows, columns = (max(self.config.pad, -(-side // cells) * cells) - side for side in (height, width))
        stages = self._stages(F.pad(torch.cat([images, images.flip(-1)]), (0, columns, 0, rows)))
        h, w = -(-height // self.stride), -(-width // self.stride)
        logits = self.boundary(stages).float()[:, :h, :w]
        displacement = self.displacement([x[:batch] for x in stages]).float()[..., :h, :w]
        return ((logits[:batch] + logits[batch:].flip(-1)) / 2).sigmoid(), displacement

    def walk(self, maps: Tensor, boundary: Tensor) -> Tensor:
        """Maps ``(B, K, h, w)`` off the boundaries, walked at random along the affinities of ``(B, h, w)``."""
        affinity = path_affinity(boundary, radius=self.config.radius)
        return random_walk(
            maps * (1 - boundary[:, None]),
            affinity,
            radius=self.config.radius,
            beta=self.config.beta,
            steps=self.config.steps,
        )

    def refine(self, images: Tensor, maps: Tensor, background: float | None) -> Tensor:
        """Walked maps of images.

        Args:
            images: normalised ``(B, 3, H, W)``.
            maps: ``(B, K, ., .)`` of any size; the first is the background's where ``background`` is ``None``.
            background: constant score of the background. It stands beside the walked maps; the authors have 0.25.

        Returns:
            Scores ``(B, 1 + classes, H, W)``, background first. What walked is divided by the image's largest value; if
            that is 0 it stays 0.
        """
        scores = self._enlarged(self.walk(self._at_stride(images, maps), self.relations(images)[0]), images)
        return scores if background is None else F.pad(scores, (0, 0, 0, 0, 1, 0), value=background)

    def _at_stride(self, images: Tensor, maps: Tensor) -> Tensor:
        size = tuple(-(-side // self.stride) for side in images.shape[-2:])
        return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)

    def _enlarged(self, walked: Tensor, images: Tensor) -> Tensor:
        """At the images' size, divided by each image's largest value."""
        full = F.interpolate(walked, scale_factor=self.stride, mode="bilinear", align_corners=False)
        full = full[..., : images.shape[-2], : images.shape[-1]]
        largest = full.amax(dim=(1, 2, 3), keepdim=True)
        return full / torch.where(largest > 0, largest, 1)

    def instances(self, image: Tensor, maps: Tensor, background: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
        """Objects of one image.

        Args:
            image: normalised ``(3, H, W)``.
            maps: of the classes that are present, ``(n, ., .)``.
            background: constant score of the background.

        Returns:
            Masks bool ``(N, H, W)``, their classes int64 ``(N,)`` as indices into ``maps``, and their scores float32
            ``(N,)``, on the CPU; see :func:`detect`.
        """
        boundary, displacement = self.relations(image[None])
        centroids = refine_centroids(displacement[0], self.config.centroid_steps)
        objects = cluster_centroids(centroids, displacement[0], self.config.weak_displacement)
        split, classes = split_by_instance(self._at_stride(image[None], maps[None])[0], objects)
        if len(split) == 0:
            nothing = torch.zeros(0)
            return torch.zeros(0, *image.shape[1:], dtype=torch.bool), nothing.long(), nothing
        scores = self._enlarged(self.walk(split[None], boundary), image[None])[0]
        best, channel = scores.max(dim=0)
        winner = torch.where(best > background, channel + 1, 0)
        masks, channels, values = detect(scores, winner, self.config.min_area)
        return masks, classes.cpu()[channels], values

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()
