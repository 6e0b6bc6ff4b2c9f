"""A plain folder of images, with a CSV of tags."""

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
from fastcam.io import IMAGE_SUFFIXES, MAX_PIXELS, read_image


class FolderDataset(Dataset[dict[str, Any]]):
    """All images in a folder and its sub-folders, turned upright as their EXIF data say.

    Args:
        images: the folder. Hidden files and files without an image suffix do not count.
        tags: `.csv` file (see `read_tag_csv`) with an entry for every image, or `.npy`; `None` for images without tags.
        classes: the C names.
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
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.images = Path(images)
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
        """One item: `"image"` uint8 `tv_tensors.Image (3, H, W)`; `"tags"` float32 `(C,)` where there are some; `"id"`
        str."""
        name = self.ids[index]
        image = read_image(self.images / self._files[name], orient=True, max_pixels=self.max_pixels)
        item: dict[str, Any] = {"image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous())}
        if self.tags is not None:
            item["tags"] = self.tags[index]
        item["id"] = name
        return item if self.transform is None else self.transform(item)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


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
