"""The `data` section of every command, and what the passes ask of a data set."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastcam.data import (
    VOC_CLASSES,
    FolderDataset,
    LabelledDataset,
    VOCDataset,
    load_class_list,
    open_archive,
    open_list,
    train_transform,
)
from fastcam.errors import FastcamError
from fastcam.io import load_weights, read_pass
from fastcam.methods import load_method
from fastcam.pipelines._settings import TrainerConfig

Transform = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """Images and what is known about them: a folder in VOC's layout (root and split), or any folder of images (images).

    Args:
        root: folder that holds JPEGImages/ and ImageSets/Segmentation/.
        split: name of a list in ImageSets/Segmentation/ or path of one; several are joined by +, as in train+extra. For
            images: a CSV filename,label that lists them with one class each; of an archive the classes' split.
        images: plain folder of images, or an .npz archive of images of one class each, instead of root.
        classes: voc, coco, names with commas between, or a file with a name a line. By default those of the weights or
            of the pass before, else those of classes.txt in root, else voc.
        tags: image-level labels: mask (the classes in the mask), xml (Annotations/), or a .csv or .npy file, below root
            or absolute. By default mask for root, none for images.
        masks: folder of the true masks, below root or absolute; for images any folder, with the same names.
        void: value of masks and labels that means nothing is known, as 255 does.
    """

    root: str | None = None
    split: str = "train"
    images: str | None = None
    classes: str | list[str] | None = None
    tags: str | None = None
    masks: str = "SegmentationClass"
    void: int | None = None


class Images(Dataset[dict[str, Any]]):
    """The items of one or several data sets, one after the other, by number or by id.

    Attributes:
        ids: of all items.
        classes: names of the foreground classes.
    """

    def __init__(self, parts: Sequence[Any], transform: Transform | None = None) -> None:
        self.parts = parts
        self.transform = transform
        self.classes: tuple[str, ...] = tuple(parts[0].classes)
        self.ids: list[str] = [image_id for part in parts for image_id in part.ids]
        self._ends = list(accumulate(len(part) for part in parts))
        self._index = {image_id: index for index, image_id in enumerate(self.ids)}
        if len(self._index) < len(self.ids):
            twice = next(image_id for index, image_id in enumerate(self.ids) if self._index[image_id] != index)
            raise FastcamError(
                f"image {twice!r} is in more than one of the joined lists; join lists without common images"
            )

    @property
    def tags(self) -> Tensor | None:
        """Float `(len, C)`, or `None` where images have no tags."""
        tags = [part.tags for part in self.parts]
        return None if any(tag is None for tag in tags) else torch.cat(tags)

    @property
    def tags_known(self) -> bool:
        """Whether items have tags, told without reading them."""
        return all(part.has_tags for part in self.parts)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = bisect_right(self._ends, index)
        item = self.parts[part][index - (self._ends[part - 1] if part else 0)]
        return item if self.transform is None else self.transform(item)

    def by_id(self, image_id: str) -> dict[str, Any]:
        """The item of an image."""
        return self[self._index[image_id]]


def open_data(
    data: Data,
    classes: Sequence[str] | None = None,
    *,
    masks: bool = False,
    need_tags: bool = True,
    transform: Transform | None = None,
) -> Images:
    """Opens a data set.

    Args:
        data: where it is.
        classes: what is known of the classes from elsewhere; `data.classes`, if given, must agree.
        masks: whether masks are wanted; else they are only read where tags come from them.
        need_tags: whether tags are needed; else they are only read where `data.tags` names them.
        transform: of the items.

    Raises:
        FastcamError: as the data sets of `fastcam.data`; or classes that disagree, or neither root nor images, or a
            void that is no byte.
    """
    root = data.root
    if (root is None) == (data.images is None):
        raise FastcamError("expected either data.root (VOC's layout) or data.images (a plain folder); give one of them")
    if data.void is not None and not 0 <= data.void <= 255:
        raise FastcamError(f"data.void is {data.void}, expected 0 to 255")
    given = None if data.classes is None else load_class_list(data.classes)
    if given and classes and given != tuple(classes):
        raise FastcamError(
            f"data.classes are {', '.join(given)}, but the input was made for {', '.join(classes)}; leave them out"
        )
    names = given or (tuple(classes) if classes else None)
    labelled = _open_labelled(data, names)
    if labelled is not None:
        if masks:
            raise FastcamError(f"masks are needed, and {data.images} with split {data.split} has none; give data.root")
        return Images([labelled], transform)
    if data.images is not None:
        if masks and not Path(data.masks).is_dir():
            raise FastcamError(f"masks are needed, and there is no folder {data.masks}; give data.masks or data.root")
        if data.tags is not None and names is None:
            raise FastcamError("data.classes is needed to read tags; give voc, names with commas between, or a file")
        folder = data.masks if masks else None
        part = FolderDataset(data.images, data.tags, classes=names or VOC_CLASSES, masks=folder, void=data.void)
        return Images([part], transform)
    assert root is not None
    if names is None:
        own = Path(root, "classes.txt")
        names = load_class_list(own) if own.is_file() else VOC_CLASSES
    tags = data.tags or ("mask" if need_tags else None)
    folder = data.masks if masks or tags == "mask" else None
    splits = [data.split] if Path(data.split).is_file() else data.split.split("+")
    parts = [VOCDataset(root, s, classes=names, tags=tags, masks=folder, void=data.void) for s in splits]
    return Images(parts, transform)


def _open_labelled(data: Data, classes: Sequence[str] | None) -> LabelledDataset | None:
    """Images of one class each, where `data` names an archive or a list of them; their classes are their own."""
    if data.images is None:
        return None
    if Path(data.images).suffix == ".npz":
        return open_archive(data.images, data.split, classes)
    return open_list(data.images, data.split, classes) if Path(data.split).suffix == ".csv" else None


def training_transform(trainer: TrainerConfig, normalize: tuple[Sequence[float], Sequence[float]]) -> Transform:
    """The transform of training items: the trainer's augmentation, and the mean and standard deviation of a network."""
    return train_transform(
        trainer.crop,
        resize_long=trainer.resize_long,
        square=trainer.square,
        flip=trainer.flip,
        color_jitter=trainer.color_jitter,
        mean=normalize[0],
        std=normalize[1],
    )


def method_transform(trainer: TrainerConfig, network: Any) -> Transform:
    """The transform of training items for a method: its own, if it trains on views of its own, else the trainer's."""
    if not hasattr(network, "train_transform"):
        return training_transform(trainer, network.normalize)
    mean, std = network.normalize
    return network.train_transform(trainer.crop, resize_long=trainer.resize_long, flip=trainer.flip, mean=mean, std=std)


def load_image(dataset: Images, image_id: str, size: Sequence[int]) -> Tensor:
    """The image uint8 `(3, H, W)` of an id.

    Raises:
        FastcamError: its size is not `size`.
    """
    image = dataset.by_id(image_id)["image"].as_subclass(Tensor)
    _check_size(f"image of {image_id}", image.shape[1:], size)
    return image


def load_mask(dataset: Images, image_id: str, size: Sequence[int]) -> Tensor:
    """The true mask uint8 `(H, W)` of an id.

    Raises:
        FastcamError: its size is not `size`.
    """
    mask = dataset.by_id(image_id)["mask"].as_subclass(Tensor)
    _check_size(f"mask of {image_id}", mask.shape, size)
    return mask


def _check_size(what: str, came: Sequence[int], size: Sequence[int]) -> None:
    if tuple(came) != tuple(size):
        made = f"its prediction is {size[1]} x {size[0]}"
        raise FastcamError(f"{what} is {came[1]} x {came[0]} pixels, but {made}; make the prediction from this image")


def input_record(folder: Path, maker: str) -> dict[str, Any]:
    """What a pass stores about the folder it reads: its fingerprint and classes.

    Raises:
        FastcamError: the folder is missing.
    """
    if not folder.is_dir():
        raise FastcamError(f"input folder {folder} does not exist; run {maker} first")
    record = read_pass(folder)
    if record is None:
        return {"input": str(folder), "classes": None}
    return {"input": record["fingerprint"], "classes": record["config"].get("classes")}


def folder_classes(folder: Path) -> list[str] | None:
    """The classes that the pass of a folder knew, or `None`."""
    record = read_pass(folder)
    return record["config"].get("classes") if record else None


def load_trained(path: Path, kind: str, change: Mapping[str, Any] | None = None) -> tuple[Any, list[str]]:
    """A trained method of a kind ("cam", "segmenter", "few-shot", "refiner", "regions") and the names of its classes.

    Args:
        path: its weights.
        kind: what it must be.
        change: fields of its configuration that take another value than in the training.

    Raises:
        FastcamError: the weights are missing, damaged, of another kind, or not written by train, segment or refine.
    """
    saved = load_weights(path)[1]
    if "method" not in saved:
        maker = {"cam": "train", "few-shot": "train", "segmenter": "segment", "refiner": "refine", "regions": "mcof"}[
            kind
        ]
        raise FastcamError(
            f"weights {path} say nothing of their method; expected the {maker} pass's weights.safetensors"
        )
    method = load_method(path, **(change or {}))
    if method.kind != kind:
        raise FastcamError(
            f"weights {path} are of a {method.kind} ({method.name}), expected a {kind}; give other weights"
        )
    return method, saved["classes"]


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file, shortened: names weights in `pass.json`.

    Raises:
        FastcamError: the file is missing.
    """
    if not path.is_file():
        raise FastcamError(f"weights {path} do not exist; give the weights.safetensors of a finished training")
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
