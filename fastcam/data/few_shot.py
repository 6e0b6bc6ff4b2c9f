"""Few-shot segmentation: which classes are novel, and the episodes of a data set with masks.

An episode asks for one class: a query image, and K support images in which the class is marked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastcam.data.classes import VOC_CLASSES, nearest
from fastcam.errors import FastcamError
from fastcam.io import atomic_write

IGNORE_INDEX = 255

_ISAID = (
    ("ship", "storage_tank", "baseball_diamond", "tennis_court", "basketball_court"),
    ("ground_track_field", "bridge", "large_vehicle", "small_vehicle", "helicopter"),
    ("swimming_pool", "roundabout", "soccer_ball_field", "plane", "harbor"),
)


@dataclass(frozen=True)
class Protocol:
    """How a benchmark divides its classes, and which objects count.

    Attributes:
        folds: names of the novel classes of every fold; the base classes of a fold are those of the other folds.
        novel_images: what happens in training to images that show a novel class: it is ``"background"`` in them, or
            they are ``"removed"``.
        train_pixels: pixels of a class below which an image does not stand for it in training.
        test_pixels: the same in test episodes.
    """

    folds: tuple[tuple[str, ...], ...] = ()
    novel_images: Literal["background", "removed"] = "background"
    train_pixels: int = 1
    test_pixels: int = 1


PROTOCOLS = {
    # Caoql98/SDM, linhanwang/SCCNet
    "isaid_5i_sdm": Protocol(_ISAID, "background", 32 * 32, 1),
    # HanboBizl/DMNet, whose scores are much higher
    "isaid_5i_dmnet": Protocol(_ISAID, "removed", 2 * 32 * 32, 2 * 32 * 32),
    # TinyAway/PCFNet, WangXin81/TBRNet: without field and sea
    "dlrsd_pcfnet": Protocol(
        (
            ("airplane", "bare_soil", "buildings", "cars", "chaparral"),
            ("court", "dock", "grass", "mobile_home", "pavement"),
            ("sand", "ship", "tanks", "trees", "water"),
        )
    ),
    # linhanwang/SCCNet: without trees and water, and the same images for training and test
    "dlrsd_sccnet": Protocol(
        (
            ("airplane", "bare_soil", "buildings", "cars", "chaparral"),
            ("court", "dock", "field", "grass", "mobile_home"),
            ("pavement", "sand", "sea", "ship", "tanks"),
        )
    ),
    # dvlab-research/PFENet's rules on the folds of A. Shaban et al., BMVC 2017
    "pascal_5i": Protocol(
        tuple(VOC_CLASSES[i : i + 5] for i in range(0, 20, 5)), "background", 2 * 32 * 32, 2 * 32 * 32
    ),
    "own": Protocol(),
}


class ClassSplit(NamedTuple):
    """The classes of a training and of its test; names.

    Attributes:
        base: learned from.
        novel: tested on.
    """

    base: tuple[str, ...]
    novel: tuple[str, ...]


def split_classes(
    protocol: str, fold: int, classes: Sequence[str], *, base: Sequence[str] = (), novel: Sequence[str] = ()
) -> ClassSplit:
    """Base and novel classes of a fold.

    Args:
        protocol: one of ``PROTOCOLS``; ``"own"`` has no folds and takes ``base`` and ``novel`` as they are.
        fold: from 0.
        classes: all names of the data set.
        base: names instead of the protocol's.
        novel: names instead of the protocol's.

    Raises:
        FastcamError: an unknown protocol, fold or name, a class that is both, or none.

    Example:
        >>> split_classes("own", 0, ["cat", "cow", "dog"], base=["cat", "dog"], novel=["cow"])
        ClassSplit(base=('cat', 'dog'), novel=('cow',))
    """
    if protocol not in PROTOCOLS:
        raise FastcamError(f"protocol {protocol!r} is unknown; known are {', '.join(PROTOCOLS)}")
    folds = PROTOCOLS[protocol].folds
    if folds:
        if not 0 <= fold < len(folds):
            raise FastcamError(f"fold is {fold}, expected 0 to {len(folds) - 1} for protocol {protocol}")
        novel = novel or folds[fold]
        base = base or [name for i, names in enumerate(folds) if i != fold for name in names if name not in novel]
    split = ClassSplit(tuple(base), tuple(novel))
    for what, names in zip(("base", "novel"), split, strict=True):
        if not names:
            raise FastcamError(f"there are no {what} classes; name them in {what}, or choose a protocol with folds")
        unknown = next((name for name in names if name not in classes), None)
        if unknown is not None:
            raise FastcamError(
                f"{what} class {unknown!r} of protocol {protocol} is not a class of the data{nearest(unknown, classes)}"
            )
    both = sorted(set(split.base) & set(split.novel))
    if both:
        raise FastcamError(f"class {both[0]!r} is base and novel; name it in one of them")
    return split


def class_areas(images: Any) -> Tensor:
    """Pixels of every class in every image.

    Cost: reads every image and its mask once.

    Args:
        images: a data set with masks, whose ``classes`` are C names.

    Returns:
        int64 ``(N, C)``.
    """
    C = len(images.classes)
    areas = [torch.bincount(images[i]["mask"].flatten().long(), minlength=256)[1 : C + 1] for i in range(len(images))]
    return torch.stack(areas)


def members(areas: Tensor, chosen: Sequence[int], least: int = 1, without: Sequence[int] = ()) -> dict[int, list[int]]:
    """The images that stand for each class.

    Args:
        areas: see :func:`class_areas`, ``(N, C)``.
        chosen: classes from 0.
        least: pixels of the class that an image must have.
        without: classes of which an image must not have any pixel.

    Returns:
        Class -> numbers of its images, rising.
    """
    free = (areas[:, list(without)] == 0).all(1)
    return {c: ((areas[:, c] >= max(least, 1)) & free).nonzero().flatten().tolist() for c in chosen}


def check_members(members: Mapping[Any, Sequence[Any]], shots: int) -> None:
    """Refuses classes with too few images for an episode.

    Args:
        members: images by the name of their class.
        shots: support images of an episode.

    Raises:
        FastcamError: such a class, or fewer than one shot.
    """
    if shots < 1:
        raise FastcamError(f"shots is {shots}, expected at least 1")
    for name, images in members.items():
        if len(images) <= shots:
            raise FastcamError(
                f"class {name!r} has {len(images)} images with enough of its pixels, expected at least {shots + 1} "
                f"for {shots} shots and a query; leave the class out or take fewer shots"
            )


def episode_mask(mask: Tensor, label: int) -> Tensor:
    """1 where a mask has the label, 255 where it has 255, else 0; the type and dtype of the mask."""
    wanted = (mask == label).to(mask.dtype)
    wanted[mask == IGNORE_INDEX] = IGNORE_INDEX
    return wanted


class MaskEpisodes(Dataset[dict[str, Any]]):
    """Training episodes: every pair of an image and a class of it is the query of one.

    Support images are drawn from torch's global generator, which also augments; query and supports are augmented
    independently of each other.

    Args:
        images: data set with masks.
        members: class (from 0) -> numbers of its images, more than ``shots``.
        shots: K.
        transform: of items with ``"image"`` and ``"mask"`` (1 the class, 0 not, 255 unknown); results have one size.

    Example of an item: ``"image"`` float32 ``(3, S, S)``, ``"mask"`` int64 ``(S, S)``, ``"support"`` ``(K, 3, S, S)``,
    ``"support_mask"`` ``(K, S, S)``, ``"label"`` int, the class from 0, ``"id"`` str, the query's.
    """

    def __init__(
        self,
        images: Any,
        members: Mapping[int, Sequence[int]],
        shots: int,
        transform: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self.images = images
        self.members = {c: list(own) for c, own in members.items()}
        self.shots = shots
        self.transform = transform
        self.pairs = [(c, place) for c, own in self.members.items() for place in range(len(own))]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One episode; its random draws come from torch's global generator."""
        c, place = self.pairs[index]
        own = self.members[c]
        others = torch.randperm(len(own) - 1)[: self.shots].tolist()
        supports = [own[other + (other >= place)] for other in others]
        query, *shots = [self._one(number, c) for number in (own[place], *supports)]
        return {
            "image": query["image"],
            "mask": query["mask"],
            "support": torch.stack([shot["image"] for shot in shots]),
            "support_mask": torch.stack([shot["mask"] for shot in shots]),
            "label": c,
            "id": self.images.ids[own[place]],
        }

    def _one(self, number: int, c: int) -> dict[str, Any]:
        item = self.images[number]
        wanted = episode_mask(item["mask"].as_subclass(Tensor), c + 1)
        return self.transform({"image": item["image"], "mask": tv_tensors.Mask(wanted)})


class Episode(NamedTuple):
    """One test episode, by names.

    Attributes:
        label: the class that is asked for.
        query: id of the image to segment.
        supports: ids of the images that show the class.
    """

    label: str
    query: str
    supports: tuple[str, ...]


def draw_episodes(members: Mapping[str, Sequence[str]], shots: int, count: int, seed: int) -> list[Episode]:
    """Test episodes, a function of the arguments alone.

    Every pair of a class and an image of it is the query once, in random order, before any is again; so classes occur
    as often as in the data. The supports of fewer shots are the first of those of more, with the same seed.

    Args:
        members: class -> ids of its images.
        shots: K.
        count: number of episodes.
        seed: of the draw.

    Raises:
        FastcamError: a class with too few images, or no episode asked for.
    """
    check_members(members, shots)
    if count < 1:
        raise FastcamError(f"episodes is {count}, expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    pairs = [(label, place) for label, own in members.items() for place in range(len(own))]
    episodes: list[Episode] = []
    while len(episodes) < count:
        for pair in torch.randperm(len(pairs), generator=generator).tolist()[: count - len(episodes)]:
            label, place = pairs[pair]
            own = members[label]
            others = torch.randperm(len(own) - 1, generator=generator)[:shots].tolist()
            supports = tuple(own[other + (other >= place)] for other in others)
            episodes.append(Episode(label, own[place], supports))
    return episodes


def write_episodes(path: str | os.PathLike[str], episodes: Sequence[Episode]) -> None:
    """Writes episodes as JSON, one a line, atomically."""
    lines = ",\n".join(json.dumps([e.label, e.query, *e.supports]) for e in episodes)
    with atomic_write(path) as temporary:
        temporary.write_text(f"[\n{lines}\n]\n")


def read_episodes(path: str | os.PathLike[str]) -> list[Episode]:
    """Reads what :func:`write_episodes` wrote: lists of the class, the query and its supports.

    Raises:
        FastcamError: the file is missing or holds something else, no episode, episodes with different numbers of
            supports, or an image twice in one.
    """
    path = Path(path)
    if not path.is_file():
        raise FastcamError(f"episode list {path} does not exist")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        right = all(isinstance(word, str) for row in rows for word in row) and all(len(row) > 2 for row in rows)
    except (ValueError, TypeError):
        right = False
    if not right or not rows:
        raise FastcamError(
            f"episode list {path} holds no episodes, expected lists of a class, a query and its supports"
        )
    if len({len(row) for row in rows}) > 1:
        raise FastcamError(f"episode list {path} has episodes with different numbers of supports; make a list for each")
    for number, row in enumerate(rows):
        if len(set(row[1:])) < len(row) - 1:
            raise FastcamError(f"episode list {path}: episode {number} has an image twice; remove it")
    return [Episode(row[0], row[1], tuple(row[2:])) for row in rows]
