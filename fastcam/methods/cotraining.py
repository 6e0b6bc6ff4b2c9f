"""Deep co-training: several networks that agree on unlabelled images and are kept different by adversarial examples.

J. Peng, G. Estrada, M. Pedersoli, C. Desrosiers, "Deep Co-Training for Semi-Supervised Image Segmentation", Pattern
Recognition 107, 2020 (arXiv 1903.11233). Authors' code:
github.com/jizongFox/Deep-Co-Training-for-Semi-Supervised-Image-Segmentation (no licence; read for its behaviour).

Each of S networks learns from labelled images of its own, all or a part of them. On unlabelled images their
Jensen-Shannon divergence is made small (:func:`jsd`). So that they do not become one network, each must also give the
answer of another one on images that were changed to mislead that other (:func:`fgsm`, :func:`vat`, :func:`kl`). Both
terms grow with the training (:func:`ramp`). At the end the networks vote (:func:`vote`).

Deviations from the authors' code: reference predictions are those of the step itself, without a second forward pass;
VAT's ``xi`` is 1, since with theirs the step is lost in rounding; its radius has a unit of its own. What the paper and
its code leave open stands in ``docs/methods/cotraining.md``.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn.enet import ENet
from fastcam.nn.losses import cross_entropy
from fastcam.nn.unet import UNet

EPS = 1e-10  # in logarithms of probabilities, the authors'
Distance = Literal["kl", "l2", "l1"]
T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """The authors' values on ACDC. The numbers of epochs below count ``epochs`` equal parts of the training.

    Attributes:
        backbone: ``"enet"``, ``"unet"``, or a timm name for DeepLabv3+ on it.
        networks: S. With one, it resists examples against itself.
        channels: of the networks' input: 1 for the mean of the image's three, or 3.
        width: of ``"unet"``, channels at full resolution; of DeepLabv3+, of its head.
        overlap: share of the labelled cases that all networks see; the others are dealt out in equal parts.
        case: regular expression: images whose ids begin with the same match are of one case, such as a patient, and
            stay together. An image without a match is a case of its own.
        class_weights: of the cross-entropy, background first; empty for none.
        epochs: length of the training in the units of the numbers below.
        cot_begin, cot_end, cot_max: ramp of the factor of the agreement.
        adv_begin, adv_end, adv_max: ramp of the factor of the resistance.
        fgsm_eps: largest change of a pixel of 0 to 1.
        adversary: of unlabelled images, ``"fgsm"`` or ``"vat"``; of labelled ones it is FGSM.
        vat_eps: length of VAT's change, over all pixels of an image; ``None`` for that of an FGSM change.
        vat_xi: length of its probe.
        vat_steps: times that the direction is improved.
        vat_distance: ``"kl"``, ``"l2"`` or ``"l1"`` between probabilities.
        vat_classes: labels that count in it; empty for all.
        craft: state of batch norm while examples are made: ``"eval"``, with the running statistics, or ``"train"``.
        vote: ``"soft"``, the mean of the probabilities; ``"hard"``, that of the decisions; or the number of a network.
        rotation: largest angle by which training images are turned, in degrees.
        shrink: smallest and largest side of the windows that are cut from some, as a share of the image's.
        lr: Adam's.
        lr_every: epochs after which it falls
        lr_factor: by this factor.
        grad_clip: largest norm of each network's gradient, or ``None``.
    """

    backbone: str = "enet"
    networks: int = 2
    channels: int = 1
    width: int = 16
    overlap: float = 1.0
    case: str = r"patient\d+"
    class_weights: tuple[float, ...] = ()
    epochs: int = 120
    cot_begin: float = 0.0
    cot_end: float = 50.0
    cot_max: float = 0.5
    adv_begin: float = 20.0
    adv_end: float = 50.0
    adv_max: float = 0.05
    fgsm_eps: float = 0.03
    adversary: Literal["fgsm", "vat"] = "fgsm"
    vat_eps: float | None = None
    vat_xi: float = 1.0
    vat_steps: int = 1
    vat_distance: Distance = "kl"
    vat_classes: tuple[int, ...] = ()
    craft: Literal["eval", "train"] = "eval"
    vote: Literal["soft", "hard"] | int = "soft"
    rotation: float = 45.0
    shrink: tuple[float, float] = (0.85, 0.95)
    lr: float = 1e-3
    lr_every: int = 30
    lr_factor: float = 0.1
    weight_decay: float = 1e-4
    grad_clip: float | None = None


def entropy(probabilities: Tensor, eps: float = EPS, dim: int = 1) -> Tensor:
    """``H(p) = -sum_c p_c ln(p_c + eps)`` along ``dim``, which goes away."""
    return -(probabilities * (probabilities + eps).log()).sum(dim)


def jsd(probabilities: Tensor, eps: float = EPS) -> Tensor:
    """Jensen-Shannon divergence of S distributions at every pixel: ``H(mean) - mean of H``.

    0 where all agree, at most ln S. No member is detached.

    Args:
        probabilities: ``(S, B, K, H, W)``, sums over K are 1.
        eps: in the logarithms.

    Returns:
        ``(B, H, W)``.
    """
    return entropy(probabilities.mean(0), eps) - entropy(probabilities, eps, dim=2).mean(0)


def kl(target: Tensor, logits: Tensor, eps: float = EPS) -> Tensor:
    """``KL(y || softmax(logits))``, mean over pixels; no gradient reaches the target.

    Its gradient in the logits is ``(p - y) / pixels``, that of the cross-entropy which the paper writes.

    Args:
        target: y, probabilities ``(B, K, H, W)``.
        logits: ``(B, K, H, W)``.
        eps: in the logarithms.
    """
    y, p = target.detach(), logits.softmax(1)
    return (y * ((y + eps).log() - (p + eps).log())).sum(1).mean()


def fgsm(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    target: Tensor | None = None,
    *,
    eps: float = 0.03,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The image a small step along the sign of the gradient of the cross-entropy, which the network then gets wrong.

    Neither the parameters' gradients nor ``images`` change. Works in float32 under autocast too.

    Args:
        network: images to logits ``(B, K, H, W)``.
        images: ``(B, C, H, W)`` in 0 to 1.
        target: true labels int64 ``(B, H, W)``, 255 where nothing is known; ``None`` for the network's own decision.
        eps: length of the step of every pixel.
        class_weights: ``(K,)``, of the cross-entropy.

    Returns:
        The changed images, in 0 to 1; pixels whose gradient is 0 stay.
    """
    images = images.detach().float()
    probe = images.clone().requires_grad_()
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        logits = network(probe)
        labels = logits.argmax(1) if target is None else target
        weights = logits.new_ones(logits.shape[1]) if class_weights is None else class_weights
        (gradient,) = torch.autograd.grad(cross_entropy(logits, labels, weights), probe)
    return (images + eps * gradient.sign()).clamp(0, 1)


def distance(p: Tensor, logits: Tensor, kind: Distance = "kl", classes: Sequence[int] = ()) -> Tensor:
    """How far ``softmax(logits)`` is from p: a sum over classes, mean over pixels.

    Args:
        p: probabilities ``(B, K, H, W)``.
        logits: ``(B, K, H, W)``.
        kind: ``"kl"``, ``p (ln p - ln q)``; ``"l2"``, squared differences; ``"l1"``, absolute ones.
        classes: those that count; empty for all.
    """
    chosen = list(classes) or list(range(p.shape[1]))
    p, q = p[:, chosen], logits.softmax(1)[:, chosen]
    if kind == "kl":
        return (p * ((p + EPS).log() - (q + EPS).log())).sum(1).mean()
    return ((p - q) ** 2 if kind == "l2" else (p - q).abs()).sum(1).mean()


def unit(x: Tensor) -> Tensor:
    """Every image of ``(B, ...)`` divided by its length over all its numbers; 0 stays 0."""
    length = x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    return x / length.where(length > 0, 1)


def vat(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    noise: Tensor | None = None,
    *,
    eps: float,
    xi: float = 1.0,
    steps: int = 1,
    kind: Distance = "kl",
    classes: Sequence[int] = (),
) -> Tensor:
    """The image a step along the direction in which the network's answer changes most (virtual adversarial training).

    A power iteration on the Hessian of :func:`distance`: the gradient at ``images + xi d`` is the next d. With the
    authors' ``xi`` of 1e-6 that sum is ``images`` again in float32, and d is noise.

    Args:
        network: images to logits ``(B, K, H, W)``.
        images: ``(B, C, H, W)`` in 0 to 1.
        noise: the first direction, of the images' shape; ``None`` draws it.
        eps: length of the step, over all pixels of an image. ``fgsm_eps * sqrt(C * H * W)`` is as long as FGSM's.
        xi: length of the probe.
        steps: gradients taken.
        kind: of the distance.
        classes: labels that count in it; empty for all.

    Returns:
        The changed images, in 0 to 1; an image whose gradient is 0 stays.
    """
    images = images.detach().float()
    with torch.autocast(images.device.type, enabled=False):
        with torch.no_grad():
            p = network(images).softmax(1)
        d = unit(torch.randn_like(images) if noise is None else noise)
        for _ in range(steps):
            d.requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(distance(p, network(images + xi * d), kind, classes), d)
            d = unit(gradient)
    return (images + eps * d).clamp(0, 1)


def ramp(epoch: float, begin: float, end: float, maximum: float) -> float:
    """The factor of a term of the loss: 0 before ``begin``, ``maximum`` from ``end`` on, and between them
    ``maximum * exp(-5 (1 - t)^2)``, t from 0 to 1."""
    if epoch < begin:
        return 0.0
    if epoch >= end:
        return maximum
    return maximum * math.exp(-5 * (1 - (epoch - begin) / (end - begin)) ** 2)


def partition(cases: Sequence[T], networks: int, overlap: float, seed: int) -> list[list[T]]:
    """The labelled cases of each network: a share of them is common to all, the others are dealt out.

    Args:
        cases: n different ones.
        networks: S.
        overlap: 0 to 1; ``round(overlap * n)`` cases are common.
        seed: of the order in which they are taken.

    Returns:
        S lists of one length; of the cases that are not common, those left over by S equal parts are in none.

    Raises:
        ValueError: no network, a share outside 0 to 1, or too few cases for a list each.
    """
    if networks < 1 or not 0 <= overlap <= 1:
        raise ValueError(f"partition: expected networks >= 1 and overlap in 0..1, got {networks} and {overlap}")
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(seed)).tolist()
    common = round(overlap * len(cases))
    part = (len(cases) - common) // networks
    if common + part == 0:
        raise ValueError(f"partition: {len(cases)} cases are too few for {networks} networks with overlap {overlap}")
    starts = [common + i * part for i in range(networks)]
    return [[cases[i] for i in order[:common] + order[start : start + part]] for start in starts]


def vote(probabilities: Tensor, kind: Literal["soft", "hard"] | int = "soft") -> Tensor:
    """What S networks say together; the largest of K decides, of equal ones the first.

    Args:
        probabilities: ``(S, B, K, H, W)``.
        kind: ``"soft"``, the mean; ``"hard"``, the share of networks that decide so; or the number of a network.

    Returns:
        ``(B, K, H, W)``, sums over K are 1.
    """
    if kind == "soft":
        return probabilities.mean(0)
    if kind == "hard":
        labels = probabilities.argmax(2)
        return F.one_hot(labels, probabilities.shape[2]).movedim(-1, 2).to(probabilities.dtype).mean(0)
    return probabilities[kind]


def diversity(probabilities: Tensor) -> Tensor:
    """Mean absolute difference of the networks' probabilities ``(S, B, K, H, W)`` from their mean."""
    return (probabilities - probabilities.mean(0)).abs().mean()


def draw_pair(networks: int) -> tuple[int, int]:
    """Two different numbers below ``networks``, the smaller first, from torch's global generator; (0, 0) for one."""
    if networks == 1:
        return 0, 0
    first, second = sorted(torch.randperm(networks)[:2].tolist())
    return first, second


@contextlib.contextmanager
def mode(network: nn.Module, craft: Literal["eval", "train"]) -> Iterator[None]:
    """The network in evaluation mode for ``"eval"``, put back afterwards; as it is for ``"train"``."""
    before = {module: module.training for module in network.modules()}
    if craft == "eval":
        network.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


class Trunk(nn.Module):
    """DeepLabv3+ on a timm network as one of the networks: takes one or three channels of 0 to 1."""

    stride = 1
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, num_classes: int, width: int, weights: str | Path | None) -> None:
        super().__init__()
        from fastcam.methods import deeplab

        frozen = weights is not None
        config = deeplab.Config(backbone=name, head_channels=width, low_level_channels=width, frozen_norm=frozen)
        self.net = deeplab.DeepLab(num_classes, config, weights=weights)
        mean, std = self.net.normalize
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 1 or 3, H, W)`` -> logits ``(B, K, H, W)``."""
        return self.net.logits((x - self.mean) / self.std)


class CoTraining(nn.Module):
    """The networks, their losses and their recipe.

    Args:
        num_classes: number of foreground classes C; label 0 is the background.
        config: its values.
        weights: local file with pre-trained weights of a timm network.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "cotraining"
    kind = "segmenter"
    normalize = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # images stay in 0 to 1, to which adversarial ones are clipped
    step: Tensor

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        _check(config, num_classes)
        if weights is not None and config.backbone in ("enet", "unet"):
            raise FastcamError(
                f"cotraining: {config.backbone} takes no weights; leave them out, or name a timm backbone"
            )
        self.num_classes = num_classes
        self.config = config
        self.networks = nn.ModuleList([create_network(config, num_classes, weights) for _ in range(config.networks)])
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.tensor(config.class_weights or [1.0] * (num_classes + 1)))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.total_steps = 0

    @property
    def learns_from_unlabelled(self) -> bool:
        """Whether a training step needs unlabelled images: not if both terms are switched off."""
        return self.config.cot_max > 0 or self.config.adv_max > 0

    def labelled_subsets(self, ids: Sequence[str], seed: int) -> list[list[int]]:
        """Indices of the labelled images that each network learns from: whole cases of ``config.case``.

        Raises:
            FastcamError: too few cases for the networks.
        """
        cases: dict[str, list[int]] = {}
        for index, image_id in enumerate(ids):
            found = re.match(self.config.case, image_id)
            cases.setdefault(found[0] if found and found[0] else image_id, []).append(index)
        c = self.config
        try:
            parts = partition(sorted(cases), c.networks, c.overlap, seed)
        except ValueError:
            raise FastcamError(
                f"cotraining: {len(cases)} labelled cases are too few for {c.networks} networks with overlap "
                f"{c.overlap}; raise overlap"
            ) from None
        return [sorted(index for case in part for index in cases[case]) for part in parts]

    def train_transform(
        self, crop: int, *, resize_long: Any, flip: bool, mean: Sequence[float], std: Sequence[float]
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Whole images, turned and mirrored, as squares of side ``crop``; ``resize_long`` plays no part."""
        from fastcam.data.transforms import turn_transform

        c = self.config
        return turn_transform(crop, degrees=c.rotation, shrink=c.shrink, flip=flip, mean=mean, std=std)

    def network_logits(self, index: int, x: Tensor) -> Tensor:
        """Logits of one network, ``(B, channels, H, W)`` -> float32 ``(B, C + 1, H, W)``, for any H and W."""
        network: Any = self.networks[index]
        height, width = x.shape[-2:]
        down, right = (-side % network.stride for side in (height, width))
        if down or right:
            x = F.pad(x, (0, right, 0, down), mode="replicate")
        return network(x)[..., :height, :width].float()

    def probabilities(self, images: Tensor) -> Tensor:
        """Of every network: ``(B, 3, H, W)`` -> ``(S, B, C + 1, H, W)``."""
        x = self._input(images)
        return torch.stack([self.network_logits(s, x).softmax(1) for s in range(len(self.networks))])

    def logits(self, images: Tensor) -> Tensor:
        """Logarithm of the vote: ``(B, 3, H, W)`` -> ``(B, C + 1, H, W)``; its softmax is the vote again."""
        return vote(self.probabilities(images), self.config.vote).clamp(min=1e-12).log()

    def factors(self) -> tuple[float, float]:
        """Of agreement and resistance in this step."""
        c = self.config
        epoch = int(self.step) * c.epochs // max(self.total_steps, 1)
        return ramp(epoch, c.cot_begin, c.cot_end, c.cot_max), ramp(epoch, c.adv_begin, c.adv_end, c.adv_max)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropies of all networks, and by their factors agreement and resistance.

        Args:
            batch: ``"image"`` ``(B, S, 3, H, W)`` and ``"mask"`` int64 ``(B, S, H, W)``, labelled images of every
                network, or ``(B, 3, H, W)`` and ``(B, H, W)`` for all; ``"unlabelled"`` ``(B', 3, H, W)``.

        Returns:
            ``"loss"``; its terms ``"supervised"``, ``"jsd"`` and ``"adversarial"`` without their factors, 0 where a
            factor is 0; ``"diversity"`` on unlabelled images, 0 where none were seen; and the factors.
        """
        image, mask = batch["image"], batch["mask"]
        if image.ndim == 4:
            image, mask = (x[:, None].expand(-1, len(self.networks), *x.shape[1:]) for x in (image, mask))
        cot, adv = self.factors()
        self.step += 1
        labelled = [self._input(x) for x in image.unbind(1)]
        truth = list(mask.unbind(1))
        known = [self.network_logits(s, x) for s, x in enumerate(labelled)]
        supervised = torch.stack(
            [cross_entropy(scores, y, self.class_weights) for scores, y in zip(known, truth, strict=True)]
        ).sum()
        agreement, resistance, spread = supervised.new_zeros(3).unbind()
        if cot > 0 or adv > 0:
            u = self._input(batch["unlabelled"])
            with torch.set_grad_enabled(cot > 0):
                free = [self.network_logits(s, u) for s in range(len(self.networks))]
                probabilities = torch.stack([scores.softmax(1) for scores in free])
            spread = diversity(probabilities.detach())
            if cot > 0:
                agreement = jsd(probabilities).mean()
            if adv > 0:
                a, b = draw_pair(len(self.networks))
                terms = []
                for crafter, resister in ((a, b), (b, a)):
                    for x, scores, y in ((labelled[crafter], known[crafter], truth[crafter]), (u, free[crafter], None)):
                        changed = self.adversarial(crafter, x, y)
                        terms.append(kl(scores.softmax(1), self.network_logits(resister, changed)))
                resistance = torch.stack(terms).mean()
        loss = supervised + cot * agreement + adv * resistance
        return {
            "loss": loss,
            "supervised": supervised,
            "jsd": agreement,
            "adversarial": resistance,
            "diversity": spread,
            "cot_factor": supervised.new_tensor(cot),
            "adv_factor": supervised.new_tensor(adv),
        }

    def adversarial(self, crafter: int, x: Tensor, target: Tensor | None) -> Tensor:
        """Images changed against one network: by FGSM, or without a target as ``config.adversary`` says."""
        c = self.config

        def network(images: Tensor) -> Tensor:
            return self.network_logits(crafter, images)

        with mode(self.networks[crafter], c.craft):
            if target is not None or c.adversary == "fgsm":
                return fgsm(network, x, target, eps=c.fgsm_eps, class_weights=self.class_weights)
            eps = c.fgsm_eps * math.sqrt(x[0].numel()) if c.vat_eps is None else c.vat_eps
            settings: dict[str, Any] = {"xi": c.vat_xi, "steps": c.vat_steps, "kind": c.vat_distance}
            return vat(network, x, eps=eps, classes=c.vat_classes, **settings)

    def _input(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True) if self.config.channels == 1 else images

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """Adam for every network, its rate multiplied by ``lr_factor`` after every ``lr_every`` epochs."""
        c = self.config
        self.total_steps = total_steps

        def factor(step: int) -> float:
            return c.lr_factor ** (step * c.epochs // total_steps // c.lr_every)

        pairs: list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]] = []
        for network in self.networks:
            learning = [p for p in network.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(learning, lr=c.lr, weight_decay=c.weight_decay)
            pairs.append((optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)))
        return pairs

    def export_state_dict(self) -> dict[str, Tensor]:
        """The state without the number of steps, which only training needs."""
        return {key: value for key, value in self.state_dict().items() if key != "step"}


def create_network(config: Config, num_classes: int, weights: str | Path | None = None) -> nn.Module:
    """One network of ``config.backbone``, from random weights or those of a file."""
    if config.backbone == "enet":
        return ENet(config.channels, num_classes + 1)
    if config.backbone == "unet":
        return UNet(config.channels, num_classes + 1, config.width)
    return Trunk(config.backbone, num_classes, config.width, weights)


def _check(c: Config, num_classes: int) -> None:
    def refuse(field: str, expected: str) -> None:
        raise FastcamError(f"cotraining: {field} is {getattr(c, field)!r}, expected {expected}")

    if c.networks < 1:
        refuse("networks", "at least 1")
    if c.channels not in (1, 3):
        refuse("channels", "1 (grey) or 3")
    if c.width < 1:
        refuse("width", "at least 1")
    if not 0 <= c.overlap <= 1:
        refuse("overlap", "0 to 1")
    try:
        re.compile(c.case)
    except re.error as error:
        raise FastcamError(f"cotraining: case {c.case!r} is no regular expression: {error}") from None
    if c.class_weights and len(c.class_weights) != num_classes + 1:
        raise FastcamError(
            f"cotraining: class_weights has {len(c.class_weights)} numbers, expected {num_classes + 1}: the "
            "background's, then one a class"
        )
    if c.epochs < 1 or c.lr_every < 1:
        refuse("epochs" if c.epochs < 1 else "lr_every", "at least 1")
    for term in ("cot", "adv"):
        begin, end = getattr(c, f"{term}_begin"), getattr(c, f"{term}_end")
        if not begin <= end:
            refuse(f"{term}_end", f"{term}_begin, {begin}, or more")
        if not getattr(c, f"{term}_max") >= 0:
            refuse(f"{term}_max", "0 or more")
    if not c.fgsm_eps >= 0:
        refuse("fgsm_eps", "0 or more")
    if c.adversary not in ("fgsm", "vat"):
        refuse("adversary", "fgsm or vat")
    if c.vat_eps is not None and not c.vat_eps >= 0:
        refuse("vat_eps", "0 or more, or null")
    if not c.vat_xi > 0:
        refuse("vat_xi", "more than 0")
    if c.vat_steps < 1:
        refuse("vat_steps", "at least 1")
    if c.vat_distance not in ("kl", "l2", "l1"):
        refuse("vat_distance", "kl, l2 or l1")
    if not set(c.vat_classes) <= set(range(num_classes + 1)):
        refuse("vat_classes", f"labels 0 to {num_classes}")
    if c.craft not in ("eval", "train"):
        refuse("craft", "eval or train")
    if c.vote not in ("soft", "hard", *range(c.networks)):
        refuse("vote", f"soft, hard, or the number of a network, 0 to {c.networks - 1}")
    if len(c.shrink) != 2 or not 0 < c.shrink[0] <= c.shrink[1] <= 1:
        refuse("shrink", "two shares of a side, the smaller first")
