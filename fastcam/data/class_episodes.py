"""Episodes of few-shot classification: N classes, and of each K images with and Q images without a label.

How episodes of segmentation are drawn is in :mod:`fastcam.data.few_shot`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastcam.data.classes import nearest
from fastcam.errors import FastcamError
from fastcam.io import atomic_write


def class_members(images: Any, images_per_class: int, names: Sequence[str] | None = None) -> list[Tensor]:
    """The numbers of the images of every class that has images.

    Args:
        images: a data set with `ids`, `classes` and `tags` `(len, C)`.
        images_per_class: that an episode takes.
        names: classes to keep; all by default.

    Returns:
        int64, one tensor a class. Classes without images are left out: they belong to other splits.

    Raises:
        FastcamError: an image without a class or of several, an unknown class, or a class of fewer images.
    """
    tags = images.tags
    if tags is None:
        raise FastcamError("episodes need the classes of the images, and these have no tags; give data.tags")
    counts = (tags > 0).sum(1)
    if (counts != 1).any():
        wrong = int((counts != 1).nonzero()[0])
        raise FastcamError(
            f"image {images.ids[wrong]!r} has {int(counts[wrong])} tags, but episodes need images of one class"
        )
    labels, classes = tags.argmax(1), list(images.classes)
    names = classes if names is None else names
    unknown = next((name for name in names if name not in classes), None)
    if unknown is not None:
        raise FastcamError(f"class {unknown!r} is not a class of the data{nearest(unknown, classes)}")
    members = [(labels == classes.index(name)).nonzero().flatten() for name in names]
    for name, own in zip(names, members, strict=True):
        if 0 < len(own) < images_per_class:
            raise FastcamError(
                f"class {name} has {len(own)} images, but an episode takes {images_per_class} (shot + queries); leave "
                "the class out or lower them"
            )
    return [own for own in members if len(own)]


def draw_episode(
    members: Sequence[Tensor], way: int, images_per_class: int, generator: torch.Generator | None = None
) -> Tensor:
    """One episode: classes by a permutation, then the images of each by a permutation of its own.

    Args:
        members: the numbers of the images of every class.
        way: classes N.
        images_per_class: K + Q.
        generator: of the permutations; torch's global one by default.

    Returns:
        int64 `(K + Q, N)`: row s has image s of every class, so that its rows one after the other are the authors'
        order; the first K rows are the support.

    Raises:
        FastcamError: fewer classes.
    """
    if way > len(members):
        raise FastcamError(f"episodes take {way} classes, but there are {len(members)}; lower way or add classes")
    chosen = torch.randperm(len(members), generator=generator)[:way].tolist()
    columns = [members[k][torch.randperm(len(members[k]), generator=generator)[:images_per_class]] for k in chosen]
    return torch.stack(columns, dim=1)


def fixed_episodes(members: Sequence[Tensor], way: int, images_per_class: int, episodes: int, seed: int) -> Tensor:
    """A list of episodes that depends on the seed alone: int64 `(E, K + Q, N)`, as `draw_episode`.

    Longer lists begin with the shorter ones.

    Raises:
        FastcamError: fewer classes, or no episode.
    """
    if episodes < 1:
        raise FastcamError(f"episodes is {episodes}, expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([draw_episode(members, way, images_per_class, generator) for _ in range(episodes)])


class ClassEpisodes(Dataset[dict[str, Any]]):
    """Random episodes as items, drawn from torch's global generator.

    Args:
        images: a data set with `ids`, `classes` and `tags`, one class an image.
        way: classes N.
        images_per_class: K + Q.
        episodes: the length of this data set.
        transform: of every image; to tensors of one shape.

    Raises:
        FastcamError: as `class_members` and `draw_episode`.
    """

    def __init__(
        self,
        images: Any,
        *,
        way: int,
        images_per_class: int,
        episodes: int,
        transform: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self.images = images
        self.way, self.images_per_class, self.episodes = way, images_per_class, episodes
        self.transform = transform
        self.members = class_members(images, images_per_class)
        if way > len(self.members):
            raise FastcamError(
                f"episodes take {way} classes, but there are {len(self.members)}; lower way or add classes"
            )

    def __len__(self) -> int:
        return self.episodes

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`"image"` `(N (K + Q), ...)`: image 0 of every class, image 1 of every class, ..."""
        chosen = draw_episode(self.members, self.way, self.images_per_class).flatten().tolist()
        return {"image": torch.stack([self.transform(self.images[i])["image"] for i in chosen])}


def write_class_episodes(path: str | os.PathLike[str], episodes: Tensor, shot: int, ids: Sequence[str]) -> None:
    """Writes episodes as JSON, atomically: the shots, the ids of the images in use, and their places in every episode.

    Args:
        path: the file.
        episodes: int64 `(E, K + Q, N)`, as `fixed_episodes` draws them.
        shot: K.
        ids: of all images.
    """
    used, places = episodes.unique(return_inverse=True)
    names = json.dumps([ids[i] for i in used.tolist()])
    rows = ",\n".join(json.dumps(rows) for rows in places.tolist())
    with atomic_write(path) as temporary:
        temporary.write_text(f'{{"shot": {shot},\n"ids": {names},\n"episodes": [\n{rows}\n]}}\n')


def read_class_episodes(path: str | os.PathLike[str], ids: Sequence[str]) -> tuple[Tensor, int]:
    """Reads what `write_class_episodes` wrote.

    Args:
        path: the file.
        ids: of all images of the data set.

    Returns:
        The episodes as numbers of images, int64 `(E, K + Q, N)`, and K.

    Raises:
        FastcamError: the file is missing or holds something else, episodes of different sizes, or an image that the
            data set lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise FastcamError(f"episode list {path} does not exist")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        shot, names, places = int(saved["shot"]), list(saved["ids"]), torch.tensor(saved["episodes"])
        right = places.ndim == 3 and places.dtype == torch.int64 and 1 <= shot < places.shape[1]
        right = right and places.numel() > 0 and 0 <= int(places.min()) <= int(places.max()) < len(names)
    except (ValueError, TypeError, KeyError):
        right = False
    if not right:
        raise FastcamError(
            f"episode list {path} holds no episodes of one size, expected shot, ids and episodes (rows of an image of "
            "every class)"
        )
    number = {name: i for i, name in enumerate(ids)}
    missing = next((name for name in names if name not in number), None)
    if missing is not None:
        raise FastcamError(f"episode list {path} names image {missing!r}, which the data lack; give the data it is of")
    return torch.tensor([number[name] for name in names])[places], shot
