"""A plain folder of images, with a CSV of tags and a folder of masks."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastcam.data.classes import load_class_list
from fastcam.data.tags import image_id, load_tags
from fastcam.errors import FastcamError
from fastcam.io import IMAGE_SUFFIXES, MAX_PIXELS, read_image, read_label_png


class FolderDataset(Dataset[dict[str, Any]]):
    """All images in a folder and its sub-folders, turned upright as their EXIF data say.

    Args:
        images: the folder. Hidden files and files without an image suffix do not count.
        tags: `.csv` file (see `read_tag_csv`) with an entry for every image, or `.npy`; `None` for images without tags.
        classes: the C names.
        masks: folder of palette PNGs with the images' ids; `None` for images without masks.
        void: value of masks that means nothing is known, and becomes 255.
        transform: takes and returns an item, see `fastcam.data.transforms`.
        max_pixels: larger images are refused.

    Attributes:
        ids: paths below `images` without suffix, sorted: `sub/a` for `sub/a.jpg`.
        classes: as given.
        tags: float32 `(len, C)`, or `None`.

    Raises:
        FastcamError: the folder is missing or has no image, two images share an id, or an image has no tags. Damaged
            images are found when an item is read.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        tags: str | os.PathLike[str] | None = None,
        *,
        classes: Sequence[str],
        masks: str | os.PathLike[str] | None = None,
        void: int | None = None,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.images = Path(images)
        self.masks = None if masks is None else Path(masks)
        self.void = void
        self.classes = load_class_list(classes)
        self.transform = transform
        self.max_pixels = max_pixels
        self._files = _list_images(self.images)
        self.ids = list(self._files)
        self.tags: Tensor | None = None if tags is None else load_tags(tags, self.ids, self.classes)

    @property
    def files(self) -> list[Path]:
        """The file of every image."""
        return [self.images / name for name in self._files.values()]

    @property
    def has_tags(self) -> bool:
        """Whether items have tags."""
        return self.tags is not None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item: `"image"` uint8 `tv_tensors.Image (3, H, W)`; `"mask"` uint8 `tv_tensors.Mask (H, W)` and `"tags"`
        float32 `(C,)` where there are some; `"id"` str."""
        name = self.ids[index]
        image = read_image(self.images / self._files[name], orient=True, max_pixels=self.max_pixels)
        item: dict[str, Any] = {"image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous())}
        if self.masks is not None:
            path = self.masks / f"{name}.png"
            item["mask"] = tv_tensors.Mask(read_mask(path, len(self.classes), image.shape[:2], self.void))
        if self.tags is not None:
            item["tags"] = self.tags[index]
        item["id"] = name
        return item if self.transform is None else self.transform(item)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def read_mask(path: Path, num_classes: int, size: Sequence[int], void: int | None = None) -> Tensor:
    """Labels uint8 `(H, W)` of a PNG: 0 to `num_classes`, or 255.

    Args:
        path: as `read_label_png` takes it.
        num_classes: the largest label.
        size: `(H, W)` of the image it belongs to.
        void: value that becomes 255.

    Raises:
        FastcamError: the file does not load, has another size, or another label.
    """
    label = read_label_png(path)
    if label.shape != tuple(size):
        raise FastcamError(
            f"label {path} is {label.shape[1]} x {label.shape[0]} pixels, but its image is {size[1]} x {size[0]}; "
            "make it again"
        )
    if void is not None:
        label[label == void] = 255
    beyond = label[(label > num_classes) & (label != 255)]
    if len(beyond):
        raise FastcamError(
            f"label {path} has value {int(beyond[0])}, expected 0 to {num_classes} or 255; check data.classes, or name "
            "it as data.void"
        )
    return label


def _list_images(root: Path) -> dict[str, str]:
    """Id -> path below `root`, sorted by id."""
    if not root.is_dir():
        raise FastcamError(f"image folder {root} does not exist")
    files: dict[str, str] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") or not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            path = (Path(folder) / name).relative_to(root).as_posix()
            other = files.setdefault(image_id(path), path)
            if other != path:
                first, second = sorted((other, path))
                raise FastcamError(f"image folder {root} has {first} and {second} for one id; rename one")
    if not files:
        raise FastcamError(f"image folder {root} has no image, expected files like a{IMAGE_SUFFIXES[0]}")
    return dict(sorted(files.items()))
