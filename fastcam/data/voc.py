"""Data sets in the layout of PASCAL VOC."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastcam.data.classes import VOC_CLASSES, load_class_list, nearest
from fastcam.data.tags import image_id, load_tags, tags_from_mask, tags_from_xml
from fastcam.errors import FastcamError
from fastcam.io import IMAGE_SUFFIXES, MAX_PIXELS, read_image, read_label_png


class VOCDataset(Dataset[dict[str, Any]]):
    """Images, tags and masks in VOC's folders.

    The labels in masks count the data set's own classes: the file `classes.txt` in `root` (a name a line) where there
    is one, else VOC's 20 if `classes` are among them, else `classes` itself.

    Args:
        root: the folder that holds `JPEGImages/`.
        split: a name in `ImageSets/Segmentation/`, or the path of a list. Of each line the first word counts; it may
            be a path.
        classes: C names, all or some of the data set's. Class k of this list has label k + 1; mask labels of the data
            set's other classes become 255, and their tags do not count.
        tags: `"mask"` (the classes in the mask), `"xml"` (`Annotations/`), or a `.csv` or `.npy` path, absolute or
            below `root`; `None` for items without tags.
        masks: folder of palette PNGs, absolute or below `root`; `None` for images without masks.
        void: value of masks that means nothing is known, and becomes 255.
        transform: takes and returns an item, see `fastcam.data.transforms`.
        max_pixels: larger images are refused.

    Attributes:
        ids: names of the images, without suffix, in the order of the list.
        classes: as given.

    Raises:
        FastcamError: a folder, list or file is missing, the list is empty or names an image twice, or a class is
            unknown. Damaged files, masks of another size and labels outside the range are found when an item is read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | os.PathLike[str],
        *,
        classes: Sequence[str] = VOC_CLASSES,
        tags: str | os.PathLike[str] | None = "mask",
        masks: str | os.PathLike[str] | None = "SegmentationClass",
        void: int | None = None,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root = Path(root)
        self.classes = load_class_list(classes)
        self.transform = transform
        self.max_pixels = max_pixels
        self._lookup, self._other_classes = self._label_lookup()
        if void is not None:
            self._lookup[void] = 255
        self.ids = _read_split(self.root, split)
        self._images = _find(self.root / "JPEGImages", self.ids, IMAGE_SUFFIXES, "image")
        self._masks = None if masks is None else _find(self.root / masks, self.ids, (".png",), "mask")
        if tags == "mask" and masks is None:
            raise FastcamError("tags='mask' needs masks, got masks=None; choose tags='xml' or the path of a tag file")
        self._tags = (
            tags if tags is None or tags in ("mask", "xml") else load_tags(self.root / tags, self.ids, self.classes)
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item.

        Returns:
            `"image"` uint8 `tv_tensors.Image (3, H, W)`; `"mask"` uint8 `tv_tensors.Mask (H, W)` where there is one;
            `"tags"` float32 `(C,)` unless `tags` is `None`; `"id"` str.
        """
        image = torch.from_numpy(read_image(self._images[index], max_pixels=self.max_pixels)).permute(2, 0, 1)
        item: dict[str, Any] = {"image": tv_tensors.Image(image.contiguous())}
        mask = None
        if self._masks is not None:
            mask = self._read_mask(index)
            if mask.shape != image.shape[1:]:
                raise FastcamError(
                    f"mask {self._masks[index]} is {mask.shape[1]} x {mask.shape[0]} pixels, but its image is "
                    f"{image.shape[2]} x {image.shape[1]}; make them the same size"
                )
            item["mask"] = tv_tensors.Mask(mask)
        if self._tags is not None:
            item["tags"] = self._tags_of(index, mask)
        item["id"] = self.ids[index]
        return item if self.transform is None else self.transform(item)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def files(self) -> list[Path]:
        """The file of every image."""
        return list(self._images)

    @property
    def has_tags(self) -> bool:
        """Whether items have tags, told without reading them."""
        return self._tags is not None

    @cached_property
    def tags(self) -> Tensor | None:
        """Tags of all images, float32 `(len, C)`, or `None` where none were asked for.

        With `tags="mask"` the first use reads every mask.
        """
        if self._tags is None:
            return None
        return torch.stack([self._tags_of(index) for index in range(len(self))])

    def _tags_of(self, index: int, mask: Tensor | None = None) -> Tensor:
        if isinstance(self._tags, Tensor):
            return self._tags[index]
        if self._tags == "mask":
            return tags_from_mask(self._read_mask(index) if mask is None else mask, len(self.classes))
        return tags_from_xml(self.root / "Annotations" / f"{self.ids[index]}.xml", self.classes, self._other_classes)

    def _read_mask(self, index: int) -> Tensor:
        assert self._masks is not None
        path = self._masks[index]
        labels = self._lookup[read_label_png(path).long()]
        if bool((labels < 0).any()):
            wrong = int(read_label_png(path)[labels < 0][0])
            known = len(self.classes) + len(self._other_classes)
            raise FastcamError(f"mask {path} has label {wrong}, expected 0 to {known} or 255; check the class list")
        return labels.to(torch.uint8)

    def _label_lookup(self) -> tuple[Tensor, tuple[str, ...]]:
        """Stored label -> label among `classes`, int64 `(256,)`, -1 where no class has the label; and the classes left
        out."""
        own = self.root / "classes.txt"
        everything = load_class_list(own) if own.is_file() else VOC_CLASSES
        if not own.is_file() and not set(self.classes) <= set(VOC_CLASSES):
            everything = self.classes
        unknown = next((name for name in self.classes if name not in everything), None)
        if unknown:
            raise FastcamError(f"class {unknown!r} is not in {own}{nearest(unknown, everything)}")
        if len(everything) > 254:
            raise FastcamError(f"{own} names {len(everything)} classes, expected at most 254 (labels are bytes)")
        lookup = torch.full((256,), -1)
        lookup[0], lookup[255] = 0, 255
        for label, name in enumerate(everything, 1):
            lookup[label] = self.classes.index(name) + 1 if name in self.classes else 255
        return lookup, tuple(name for name in everything if name not in self.classes)


def _read_split(root: Path, split: str | os.PathLike[str]) -> list[str]:
    if not (root / "JPEGImages").is_dir():
        raise FastcamError(
            f"folder {root / 'JPEGImages'} does not exist; root must be the folder that holds JPEGImages/"
        )
    lists = root / "ImageSets" / "Segmentation"
    path = lists / f"{os.fspath(split)}.txt"
    if not path.is_file():
        path = Path(split)
    try:
        words = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        known = sorted(file.stem for file in lists.glob("*.txt"))
        hint = f"; {lists} has {', '.join(known)}" if known else f"; {lists} has no list"
        raise FastcamError(
            f"split {os.fspath(split)!r} is neither a list in {lists} nor a readable file{hint}"
        ) from None
    ids = [image_id(word).rsplit("/", 1)[-1] for word in words]
    if not ids:
        raise FastcamError(f"list {path} names no image")
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise FastcamError(f"list {path} names image {name!r} twice; remove one")
        seen.add(name)
    return ids


def _find(folder: Path, ids: Sequence[str], suffixes: Sequence[str], what: str) -> list[Path]:
    """The file of every id, by one listing of the folder."""
    if not folder.is_dir():
        raise FastcamError(f"{what} folder {folder} does not exist")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and (other := files.setdefault(path.stem, path)) != path:
            raise FastcamError(f"{what} folder {folder} has {other.name} and {path.name} for one id; remove one")
    missing = [name for name in ids if name not in files]
    if missing:
        raise FastcamError(
            f"{what} {folder / missing[0]}{suffixes[0]} does not exist ({len(missing)} of {len(ids)} are missing)"
        )
    return [files[name] for name in ids]
