"""SSL-few-shot: a pre-trained encoder, fine-tuned by episodes as a prototypical network.

D. Chen, Y. Chen, Y. Li, F. Mao, Y. He, H. Xue, "Self-Supervised Learning for Few-Shot Image Classification", ICASSP
2021, https://arxiv.org/abs/1911.06045 (code github.com/phecy/SSL-FEW-SHOT). Stage A, the pre-training, is
:mod:`fastcam.methods.amdim`; this is stage B. Distances are squared, as in the authors' code; the paper's words and its
printed loss leave that open.

Deviations from the authors' code:

- ``weights`` must fit the encoder in full; theirs skip silently what does not match.
- The last weights are kept, not those of the epoch that validates best.
- ``joint_norm`` is ours. Off, as theirs: in training the last batch norm sees the support images and the queries apart,
  and takes both into its running statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.methods.amdim import IMAGENET, Encoder, EncoderConfig, check_side, embedding_transform, load_encoder


@dataclass(frozen=True)
class Config(EncoderConfig):
    """The values of the authors' published command; an epoch is ``episodes`` episodes."""

    way: int = 5
    shot: int = 1
    queries: int = 15
    episodes: int = 100
    temperature: float = 128.0
    joint_norm: bool = False
    lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 100  # that the training lasts, for the schedule; should be the trainer's
    drop_every: int = 10  # epochs
    drop_factor: float = 0.5
    grad_clip: float | None = None


def class_means(features: Tensor, labels: Tensor, way: int) -> Tensor:
    """Prototypes: the mean features of every class.

    Args:
        features: ``(M, D)``.
        labels: int64 ``(M,)`` of 0 to ``way - 1``.
        way: number of classes N.

    Returns:
        ``(N, D)``.

    Raises:
        ValueError: other shapes, a label out of range, or a class without an image.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"class_means: expected features (M, D), labels (M,), got {tuple(features.shape)}, {tuple(labels.shape)}"
        )
    if way < 1 or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < way):
        raise ValueError(f"class_means: expected labels of 0 to {way - 1}, got {labels.unique().tolist()}")
    members = F.one_hot(labels, way).to(features.dtype)
    counts = members.sum(0)
    if not counts.all():
        raise ValueError(f"class_means: class {int(counts.argmin())} of {way} has no image; give at least one of each")
    return (members / counts).T @ features


def negative_squared_distance(query: Tensor, prototypes: Tensor) -> Tensor:
    """``-|q - p|^2`` by direct differences: ``(..., Q, D)`` and ``(..., N, D)`` -> ``(..., Q, N)``.

    Raises:
        ValueError: shapes that do not fit.
    """
    if min(query.ndim, prototypes.ndim) < 2 or query.shape[-1] != prototypes.shape[-1]:
        raise ValueError(
            f"negative_squared_distance: expected query (..., Q, D), prototypes (..., N, D), got {tuple(query.shape)}, "
            f"{tuple(prototypes.shape)}"
        )
    return -(query[..., :, None, :] - prototypes[..., None, :, :]).square().sum(-1)


def prototype_logits(support: Tensor, query: Tensor, way: int, temperature: float = 1.0) -> Tensor:
    """Logits of an episode whose rows go through the classes again and again: image 0 of each class, image 1, ...

    Args:
        support: ``(..., K N, D)``.
        query: ``(..., Q N, D)``; its labels are ``0 .. N - 1``, Q times.
        way: number of classes N.
        temperature: divides the squared distances.

    Returns:
        ``(..., Q N, N)``, at most 0.

    Raises:
        ValueError: support rows that are no positive multiple of ``way``.
    """
    if way < 1 or support.ndim < 2 or support.shape[-2] == 0 or support.shape[-2] % way:
        raise ValueError(
            f"prototype_logits: expected a multiple of {way} support rows (..., K N, D), got {tuple(support.shape)}"
        )
    prototypes = support.unflatten(-2, (-1, way)).mean(-3)
    return negative_squared_distance(query, prototypes) / temperature


class SSLFewShot(nn.Module):
    """The encoder with the episodic loss.

    Args:
        num_classes: number of classes that episodes are drawn from; no weight depends on it.
        config: its values.
        weights: those of a trained AMDIM; ``None`` trains from scratch.

    Raises:
        FastcamError: values that do not fit together, or weights that do not fit.
    """

    name = "ssl_few_shot"
    kind = "few-shot"
    learns_from_masks = False
    normalize = IMAGENET

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if config.way < 2:
            raise FastcamError(f"ssl_few_shot: way is {config.way}, expected 2 or more; one class has nothing to learn")
        for field in ("shot", "queries", "episodes", "epochs", "drop_every"):
            if getattr(config, field) < 1:
                raise FastcamError(f"ssl_few_shot: {field} is {getattr(config, field)}, expected at least 1")
        if config.temperature <= 0:
            raise FastcamError(f"ssl_few_shot: temperature is {config.temperature}, expected more than 0")
        self.config = config
        self.encoder = Encoder(config)
        if weights is not None:
            load_encoder(self.encoder, config, weights)

    def embed(self, images: Tensor) -> Tensor:
        """``(B, 3, S, S)`` -> ``(B, r)``."""
        return self.encoder(images)[-1].flatten(1)

    def training_episodes(self, images: Any, crop: int, *, flip: bool) -> torch.utils.data.Dataset[dict[str, Any]]:
        """Episodes as items: ``"image"`` ``(N (K + Q), 3, S, S)``, image 0 of every class, image 1 of every class, ...

        Args:
            images: labelled images, one class each.
            crop: S; the encoder's side.
            flip: mirror every other image. The authors do not.

        Raises:
            FastcamError: another crop, or what :class:`fastcam.data.ClassEpisodes` refuses.
        """
        from fastcam.data import ClassEpisodes

        c = self.config
        check_side(self.name, crop, c)
        transform = embedding_transform(c, flip=flip)
        return ClassEpisodes(
            images, way=c.way, images_per_class=c.shot + c.queries, episodes=c.episodes, transform=transform
        )

    def test_transform(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Of items that are embedded."""
        return embedding_transform(self.config)

    def episode_logits(self, images: Tensor, temperature: float) -> Tensor:
        """``(N (K + Q), 3, S, S)`` -> ``(Q N, N)``. Support and queries are encoded by two calls, or by one."""
        c = self.config
        sizes = [c.way * c.shot, c.way * c.queries]
        if len(images) != sum(sizes):
            raise ValueError(
                f"ssl_few_shot: expected {sum(sizes)} images an episode ({c.way} classes, {c.shot} + {c.queries} "
                f"each), got {len(images)}"
            )
        parts = images.split(sizes)
        support, query = self.embed(images).split(sizes) if c.joint_norm else map(self.embed, parts)
        return prototype_logits(support.float(), query.float(), c.way, temperature)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean cross-entropy of the queries of some episodes.

        Args:
            batch: ``"image"`` ``(E, N (K + Q), 3, S, S)``, E episodes.

        Returns:
            ``"loss"`` and ``"accuracy"``, the share of queries whose nearest prototype is their class's.
        """
        c = self.config
        labels = torch.arange(c.way, device=batch["image"].device).repeat(c.queries)
        logits = [self.episode_logits(episode, c.temperature) for episode in batch["image"]]
        losses = torch.stack([F.cross_entropy(x, labels) for x in logits])
        right = torch.stack([(x.argmax(1) == labels).float().mean() for x in logits])
        return {"loss": losses.mean(), "accuracy": right.mean()}

    def predict(self, query: Tensor, support: Tensor, labels: Tensor) -> Tensor:
        """Logits of new images for the classes of a few labelled ones.

        Args:
            query: ``(Q, 3, S, S)``, as ``test_transform`` gives them.
            support: ``(M, 3, S, S)``; classes may have different numbers of images.
            labels: int64 ``(M,)``: 0 to N - 1.

        Returns:
            ``(Q, N)``: minus the squared distances to the means of the classes.

        Raises:
            ValueError: no support, or a class below the largest label without an image.
        """
        if len(labels) == 0:
            raise ValueError("ssl_few_shot.predict: no support image; give at least one of every class")
        prototypes = class_means(self.embed(support).float(), labels, int(labels.max()) + 1)
        return negative_squared_distance(self.embed(query).float(), prototypes)

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with Nesterov momentum; epochs count from 1, and epoch ``drop_every`` is the first with a lower rate."""
        c = self.config
        optimizer = torch.optim.SGD(
            self.parameters(), c.lr, c.momentum, weight_decay=c.weight_decay, nesterov=c.momentum > 0
        )

        def rate(step: int) -> float:
            epoch = 1 + step * c.epochs // total_steps
            return c.drop_factor ** (epoch // c.drop_every)

        return [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate))]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()
