"""CycleGAN-semi: masks from few labelled images, with images and masks that do not belong together.

A. K. Mondal, A. Agarwal, J. Dolz, C. Desrosiers, "Revisiting CycleGAN for semi-supervised segmentation", 2019 (arXiv
1908.11569). Authors' code: github.com/arnab39/Semi-supervised-segmentation-cycleGAN (MIT); here its state of September
2019, which belongs to the paper.

One generator turns images into masks (the segmentation network), another turns masks into images. Labelled images teach
both directly. Beside that an image without a mask must survive the way to its mask and back, a mask the way to its
image and back, and a discriminator at either side must not tell what was generated from what is real.

Deviations from the authors' code: the label discriminator reads probabilities, so that its loss has a gradient, as the
paper needs (``label_input`` offers the two ways of the code, which have none); the learning rate falls every step, not
every epoch; more in ``docs/methods/cyclegan.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.metrics import iou
from fastcam.nn.gan import (
    ReplayPool,
    ResnetGenerator,
    frozen,
    lsgan_discriminator_loss,
    lsgan_generator_loss,
    patch_discriminator,
    pixel_discriminator,
    strided_discriminator,
)
from fastcam.nn.losses import IGNORE, cross_entropy, resize

DISCRIMINATORS = {"pixel": pixel_discriminator, "patch": patch_discriminator, "strided": strided_discriminator}
LABEL_INPUTS = ("softmax", "argmax_onehot", "argmax_index")
PAIR_LOSSES = ("mse", "l1")
FACTORS = ("pair", "adversarial_image", "adversarial_label", "cycle_image", "cycle_label")

LabelInput = Literal["softmax", "argmax_onehot", "argmax_index"]


@dataclass(frozen=True)
class Config:
    """The values of the authors' code that belongs to the paper.

    A loss whose factor is 0 is left out. With all five at 0 the image-to-label generator learns from the cross-entropy
    of labelled images alone, without unlabelled ones: the paper's baseline "Partial".

    Attributes:
        width: channels of the generators' first layer.
        blocks: residual blocks of a generator.
        dropout: in every residual block, in training.
        discriminator: ``"pixel"``, ``"patch"`` (70 x 70 pixels) or ``"strided"`` (five strided convolutions).
        discriminator_width: channels of its first layer.
        label_input: what the label discriminator reads of a prediction: its probabilities (``"softmax"``), or the best
            label as one-hot vector (``"argmax_onehot"``) or as number (``"argmax_index"``), which have no gradient.
        pair_loss: ``"mse"`` or ``"l1"`` between a labelled image and the one made of its mask.
        pair: factor of that loss. The factor of the cross-entropy of labelled images is 1.
        adversarial_image: factor of fooling the image discriminator.
        adversarial_label: factor of fooling the label discriminator.
        cycle_image: factor of the loss of an image on the way to its mask and back.
        cycle_label: factor of the loss of a mask on the way to its image and back.
        pool_size: batches of earlier fakes that each discriminator is shown; 0 for none.
        void_is_background: pixels without a label (255) count as background, as the authors have it; else they are
            left out of the losses of labelled images, and are background for the other networks.
        inference_size: side of the square that images are brought to for :meth:`CycleGAN.logits`, as they were in
            training; ``None`` leaves them as they are.
        lr: of all networks.
        betas: of Adam; the authors train the baseline with (0.9, 0.999).
        constant: share of the training behind which the learning rate falls, linearly to 0.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    width: int = 64
    blocks: int = 9
    dropout: float = 0.5
    discriminator: Literal["pixel", "patch", "strided"] = "pixel"
    discriminator_width: int = 64
    label_input: LabelInput = "softmax"
    pair_loss: Literal["mse", "l1"] = "mse"
    pair: float = 1.0
    adversarial_image: float = 0.5
    adversarial_label: float = 0.5
    cycle_image: float = 1.0
    cycle_label: float = 0.05
    pool_size: int = 50
    void_is_background: bool = True
    inference_size: int | None = None
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    constant: float = 0.25
    grad_clip: float | None = None


def one_hot(mask: Tensor, num_labels: int) -> Tensor:
    """Labels ``(B, H, W)`` as float32 ``(B, K, H, W)``, 1 at the label; 255 becomes the background."""
    mask = mask.masked_fill(mask == IGNORE, 0)
    return F.one_hot(mask, num_labels).movedim(-1, 1).float()


def discriminator_input(probabilities: Tensor, how: LabelInput) -> Tensor:
    """What the label discriminator reads of probabilities, or of the one-hot vectors of a true mask.

    Args:
        probabilities: ``(B, K, H, W)``.
        how: ``"softmax"``: as they are; ``"argmax_onehot"``: 1 at the best label; ``"argmax_index"``: the best label as
            a number. The latter two have no gradient.

    Returns:
        ``(B, K, H, W)``, or ``(B, 1, H, W)`` for ``"argmax_index"``.
    """
    if how == "softmax":
        return probabilities
    best = probabilities.argmax(dim=1)
    if how == "argmax_index":
        return best[:, None].to(probabilities.dtype)
    return one_hot(best, probabilities.shape[1]).to(probabilities.dtype)


def pair_loss(fake: Tensor, image: Tensor, how: Literal["mse", "l1"] = "mse", known: Tensor | None = None) -> Tensor:
    """Mean squared (or absolute) difference of images made of masks from the images of these masks (L_gen^I).

    Args:
        fake: ``(B, 3, H, W)``.
        image: the same shape.
        how: ``"mse"`` or ``"l1"``.
        known: bool ``(B, H, W)``, pixels that count; ``None`` for all.

    Returns:
        A number; 0 where no pixel counts.
    """
    difference = fake - image
    difference = difference.square() if how == "mse" else difference.abs()
    if known is None:
        return difference.mean()
    return (difference * known[:, None]).sum() / (known.sum() * difference.shape[1]).clamp(min=1)


def image_cycle_loss(reconstructed: Tensor, image: Tensor) -> Tensor:
    """Mean absolute difference of images from what came back from their masks (L_cycle^I)."""
    return (reconstructed - image).abs().mean()


def learning_rate_factor(step: float, total: float, constant: float = 0.25) -> float:
    """1 for the first ``constant`` of ``total`` steps, then linearly down to 0 at the last.

    The paper's 400 epochs: 1 until epoch 100, 0.5 at 250.
    """
    rest = total * (1 - constant)
    return 1.0 if step <= total - rest else max(0.0, (total - step) / rest)


def official_iou(confusion: Tensor, dataset: Literal["voc", "cityscapes", "acdc"]) -> Tensor:
    """Intersection over union as the authors count it, which is higher than the usual one but for ACDC.

    VOC loses the background's row and column of the confusion matrix before the unions are counted, so that errors
    between an object and the background do not count; Cityscapes likewise its last label, "other". ACDC keeps all four
    labels.

    Args:
        confusion: counts ``(K, K)``, rows true, as ``fastcam evaluate`` writes them.
        dataset: whose rule.

    Returns:
        float64, one number a label that is left; NaN for labels without pixels.
    """
    kept = {"voc": slice(1, None), "cityscapes": slice(None, -1), "acdc": slice(None)}
    if dataset not in kept:
        raise ValueError(f"official_iou: expected dataset voc, cityscapes or acdc, got {dataset!r}")
    return iou(confusion[kept[dataset], kept[dataset]])


class CycleGAN(nn.Module):
    """Two generators, two discriminators, their losses and their recipe.

    Args:
        num_classes: number of foreground classes C; label 0 is the background.
        config: its values.
        weights: must be ``None``: the networks start from scratch.

    Raises:
        FastcamError: values that do not fit together, or ``weights``.
    """

    name = "cyclegan"
    kind = "segmenter"
    normalize = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        _check(config)
        if weights is not None:
            raise FastcamError(f"cyclegan: has no backbone to load {weights} into; leave weights out")
        self.num_classes = num_classes
        self.config = config
        labels = num_classes + 1
        seen = 1 if config.label_input == "argmax_index" else labels
        shape = config.width, config.blocks, config.dropout
        discriminator = DISCRIMINATORS[config.discriminator]
        self.image_to_label = ResnetGenerator(3, labels, *shape)
        self.label_to_image = nn.Sequential(ResnetGenerator(labels, 3, *shape), nn.Tanh())
        self.image_discriminator = discriminator(3, config.discriminator_width)
        self.label_discriminator = discriminator(seen, config.discriminator_width)
        self.image_pool, self.label_pool = ReplayPool(config.pool_size), ReplayPool(config.pool_size)

    @property
    def learns_from_unlabelled(self) -> bool:
        """Whether there is any loss but the cross-entropy of labelled images."""
        return any(getattr(self.config, name) for name in FACTORS)

    def logits(self, images: Tensor) -> Tensor:
        """Logits of the labels at every pixel: ``(B, 3, H, W)`` -> float32 ``(B, C + 1, H, W)``, background first."""
        side = self.config.inference_size
        if side is None:
            return self.image_to_label(images).float()
        small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return resize(self.image_to_label(small).float(), images.shape[-2:], align_corners=False)

    def images(self, labels: Tensor) -> Tensor:
        """Images made of label probabilities ``(B, C + 1, H, W)``, see :func:`one_hot`: float32 in (-1, 1)."""
        return self.label_to_image(labels).float()

    def training_phases(self, batch: dict[str, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """One step of the generators, then one of the discriminators.

        Args:
            batch: ``"image"`` ``(B, 3, S, S)`` and ``"mask"`` int64 ``(B, S, S)`` of labelled images, and
                ``"unlabelled"`` ``(U, 3, S, S)``, which the baseline does without.

        Yields:
            The number of the optimiser, and its ``"loss"`` with the terms that have a part in it.
        """
        config, image, mask, known = self.config, batch["image"], batch["mask"], None
        if config.void_is_background:
            mask = mask.masked_fill(mask == IGNORE, 0)
        else:
            known = mask != IGNORE
        even = image.new_ones(self.num_classes + 1)  # all labels weigh the same
        if not self.learns_from_unlabelled:
            yield 0, _total({"label": cross_entropy(self.image_to_label(image).float(), mask, even)})
            return
        if "unlabelled" not in batch:
            raise FastcamError("cyclegan: a batch has no unlabelled images; give some, or set all factors to 0")
        others, labels = batch["unlabelled"], one_hot(mask, self.num_classes + 1)
        logits, logits_of_others = _on_both(self.image_to_label, image, others)
        terms = {"label": cross_entropy(logits, mask, even)}
        fake_labels = logits_of_others.softmax(dim=1)
        seen = discriminator_input(fake_labels, config.label_input)
        if config.cycle_image:
            fake_image, reconstructed = _on_both(self.label_to_image, labels, fake_labels)
            terms["cycle_image"] = image_cycle_loss(reconstructed, others)
        else:
            fake_image = self.images(labels)
        if config.pair:
            terms["pair"] = pair_loss(fake_image, image, config.pair_loss, known)
        if config.cycle_label:
            terms["cycle_label"] = cross_entropy(self.image_to_label(fake_image).float(), mask, even)
        with frozen(self.image_discriminator, self.label_discriminator):
            if config.adversarial_image:
                terms["adversarial_image"] = lsgan_generator_loss(self.image_discriminator(fake_image).float())
            if config.adversarial_label:
                terms["adversarial_label"] = lsgan_generator_loss(self.label_discriminator(seen).float())
        yield 0, _total(terms, {name: getattr(config, name) for name in FACTORS})

        terms = {}
        if config.adversarial_image:
            scores = _on_both(self.image_discriminator, others, self.image_pool(fake_image))
            terms["image_discriminator"] = lsgan_discriminator_loss(*scores)
        if config.adversarial_label:
            real = discriminator_input(labels, config.label_input)
            scores = _on_both(self.label_discriminator, real, self.label_pool(seen))
            terms["label_discriminator"] = lsgan_discriminator_loss(*scores)
        if terms:
            yield 1, _total(terms)

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """Adam for the generators, and another for the discriminators; see :func:`learning_rate_factor`."""
        pairs: list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]] = []
        for networks in (
            (self.image_to_label, self.label_to_image),
            (self.image_discriminator, self.label_discriminator),
        ):
            parameters = [p for network in networks for p in network.parameters()]
            optimizer = torch.optim.Adam(parameters, lr=self.config.lr, betas=self.config.betas)
            decay = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: learning_rate_factor(step, total_steps, self.config.constant)
            )
            pairs.append((optimizer, decay))
        return pairs

    def export_state_dict(self) -> dict[str, Tensor]:
        """The generators: discriminators and pools belong to the training."""
        return {k: v for k, v in self.state_dict().items() if k.startswith(("image_to_label.", "label_to_image."))}


def _on_both(network: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A network on two batches at once, in float32; no image knows of the others, as instance norm is all it has."""
    first, second = network(torch.cat([a, b])).float().split([len(a), len(b)])
    return first, second


def _total(terms: dict[str, Tensor], factors: Mapping[str, float] = {}) -> dict[str, Tensor]:
    """Terms as scalars of a step, and before them their sum by factors, 1 where none is given."""
    loss = torch.stack([factors.get(name, 1.0) * term for name, term in terms.items()]).sum()
    return {"loss": loss, **{f"loss_{name}": term for name, term in terms.items()}}


def _check(config: Config) -> None:
    for name, allowed in (
        ("discriminator", tuple(DISCRIMINATORS)),
        ("label_input", LABEL_INPUTS),
        ("pair_loss", PAIR_LOSSES),
    ):
        if getattr(config, name) not in allowed:
            raise FastcamError(f"cyclegan: {name} is {getattr(config, name)!r}, expected {', '.join(allowed)}")
    for name, least in (("width", 1), ("blocks", 0), ("discriminator_width", 1), ("pool_size", 0)):
        if getattr(config, name) < least:
            raise FastcamError(f"cyclegan: {name} is {getattr(config, name)}, expected at least {least}")
    if config.inference_size is not None and config.inference_size < 1:
        raise FastcamError(f"cyclegan: inference_size is {config.inference_size}, expected at least 1, or null")
    for name in FACTORS:
        if not getattr(config, name) >= 0:
            raise FastcamError(f"cyclegan: {name} is {getattr(config, name)}, expected at least 0")
    for name in ("dropout", "constant"):
        if not 0 <= getattr(config, name) < 1:
            raise FastcamError(f"cyclegan: {name} is {getattr(config, name)}, expected at least 0 and below 1")
