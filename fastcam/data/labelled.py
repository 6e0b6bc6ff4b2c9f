"""Images of one class each, from an archive or a list: the data of few-shot classification."""

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastcam.data.classes import nearest
from fastcam.data.tags import image_id
from fastcam.errors import FastcamError
from fastcam.io import IMAGE_SUFFIXES, read_image


class LabelledDataset(Dataset[dict[str, Any]]):
    """Images of one class each; :func:`open_archive` and :func:`open_list` make it from files.

    Args:
        read: number of an image -> uint8 RGB `(H, W, 3)`.
        ids: of all images.
        labels: class of every image, 0 to C - 1.
        classes: the C names.
        transform: takes and returns an item, see `fastcam.data.transforms`.

    Attributes:
        ids: as given.
        classes: as given.
        tags: float32 `(len, C)`, one 1 an image.
    """

    has_tags = True

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        ids: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str],
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.ids = list(ids)
        self.classes = tuple(classes)
        self.tags = torch.eye(len(classes))[torch.as_tensor(labels, dtype=torch.int64)]
        self.transform = transform
        self._read = read

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item: `"image"` uint8 `tv_tensors.Image (3, H, W)`, `"tags"` float32 `(C,)`, `"id"` str."""
        image = torch.from_numpy(self._read(index)).permute(2, 0, 1).contiguous()
        item = {"image": tv_tensors.Image(image), "tags": self.tags[index], "id": self.ids[index]}
        return item if self.transform is None else self.transform(item)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def open_archive(
    path: str | os.PathLike[str], split: str | None = None, classes: Sequence[str] | None = None
) -> LabelledDataset:
    """Images of a `.npz` archive, decoded when they are read.

    The archive holds `label`, integers `(n,)` of 0 to C - 1, and `classes` or `name`, C strings; images as one of

    - `images`: uint8 `(n, H, W)` or `(n, H, W, 3)`;
    - `jpeg` and `offset`: image files end to end, of any format; image i from `offset[i]` to `offset[i + 1]`;
    - `strokes`: squares of bits, packed `(n, ceil(S S / 8))`, 1 for ink, which becomes white on black (Omniglot).

    It may hold `split`, a word for each class; `wnid`, C strings for ids in place of the names; and `drawer` `(n,)`,
    who drew an image, for ids such as `Greek/character01/07`. Else images of a class are numbered in their ids.

    Args:
        path: the file.
        split: a word of `split`, or several joined by `+`. Where the archive has none: the parts of names before the
            `/` (alphabets), or `train` for all classes. `None` takes all.
        classes: names of classes to keep, in this order; by default those of the split.

    Raises:
        FastcamError: the file is missing, damaged or holds other arrays; an unknown split or class.
    """
    path = Path(path)
    arrays = _arrays(path)
    names = [str(name) for name in arrays["classes" if "classes" in arrays else "name"]]
    labels = np.asarray(arrays["label"], np.int64)
    kept = _split_classes(path, names, arrays.get("split"), split)
    if classes is not None:
        unknown = next((name for name in classes if name not in {names[k] for k in kept}), None)
        if unknown is not None:
            known = [names[k] for k in kept]
            raise FastcamError(f"archive {path} has no class {unknown!r} in split {split}{nearest(unknown, known)}")
        kept = [names.index(name) for name in classes]
    new = np.full(len(names), -1)
    new[kept] = np.arange(len(kept))
    chosen = np.flatnonzero(new[labels] >= 0)
    words = [str(word) for word in arrays.get("wnid", names)]
    numbers = arrays["drawer"] if "drawer" in arrays else _numbers(labels)
    ids = [f"{words[labels[i]]}/{int(numbers[i]):02d}" for i in chosen]
    twice = next((image for image, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise FastcamError(f"archive {path} has two images with id {twice!r}; each drawer must draw a class once")
    read = _reader(path, arrays)
    return LabelledDataset(lambda i: read(int(chosen[i])), ids, new[labels[chosen]].tolist(), [names[k] for k in kept])


def open_list(
    images: str | os.PathLike[str], path: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> LabelledDataset:
    """Images of a folder that a CSV file names, with their classes: the lists of miniImageNet's splits.

    A header `filename,label` and a line an image; further columns do not matter. Without `classes`, these are numbered
    by first appearance.

    Args:
        images: the folder.
        path: the CSV file, UTF-8. Its names may lack the suffix `.jpg`.
        classes: names of classes to keep, in this order.

    Raises:
        FastcamError: the file or an image is missing, the file is empty or no such CSV, an image comes twice, a class
            is not in the list.
    """
    images, path = Path(images), Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FastcamError(f"image list {path} does not read as CSV: {error}; give a file filename,label") from error
    if len(rows) < 2 or min(map(len, rows)) < 2:
        raise FastcamError(f"image list {path} has no images, expected a header filename,label and a line an image")
    listed = {image_id(name): (name, label) for name, label, *_ in rows[1:]}
    if len(listed) < len(rows) - 1:
        twice = Counter(image_id(row[0]) for row in rows[1:]).most_common(1)[0][0]
        raise FastcamError(f"image list {path} names {twice!r} more than once; remove one")
    found = list(dict.fromkeys(label for _, label in listed.values()))
    names = found if classes is None else list(classes)
    unknown = next((name for name in names if name not in found), None)
    if unknown is not None:
        raise FastcamError(f"image list {path} has no image of class {unknown!r}{nearest(unknown, found)}")
    number = {name: k for k, name in enumerate(names)}
    kept = {key: (name, number[label]) for key, (name, label) in listed.items() if label in number}
    files = [images / (name if name.lower().endswith(IMAGE_SUFFIXES) else f"{name}.jpg") for name, _ in kept.values()]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise FastcamError(f"image {missing} of list {path} does not exist; check the folder")

    def read(index: int) -> np.ndarray:
        return read_image(files[index], orient=True)

    return LabelledDataset(read, list(kept), [label for _, label in kept.values()], names)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FastcamError(f"archive {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # zip's, zlib's and numpy's readers each have exceptions of their own
        raise FastcamError(f"archive {path} does not read as .npz: {error}; copy it again") from error
    images = next((name for name in ("images", "offset", "strokes") if name in arrays), None)
    if images is None or "label" not in arrays or not {"classes", "name"} & arrays.keys():
        raise FastcamError(
            f"archive {path} holds {', '.join(arrays)}, expected label, classes (or name) and images, strokes, or jpeg "
            "with offset"
        )
    labels, names = arrays["label"], arrays["classes" if "classes" in arrays else "name"]
    count = len(arrays[images]) - (images == "offset")
    outside = labels.ndim != 1 or len(labels) != count or labels.dtype.kind not in "iu"
    if outside or (count and not 0 <= labels.min() <= labels.max() < len(names)):
        raise FastcamError(
            f"archive {path} has label {labels.dtype} {labels.shape} for {count} images, expected an integer of 0 to "
            f"{len(names) - 1} for each"
        )
    return arrays


def _split_classes(path: Path, names: list[str], splits: np.ndarray | None, wanted: str | None) -> list[int]:
    if wanted is None or (splits is None and wanted == "train"):
        return list(range(len(names)))
    of_class = [name.split("/")[0] for name in names] if splits is None else [str(word) for word in splits]
    words = wanted.split("+")
    unknown = next((word for word in words if word not in of_class), None)
    if unknown is not None:
        raise FastcamError(
            f"archive {path} has no split {unknown!r}, expected one of {', '.join(dict.fromkeys(of_class))}"
        )
    return [k for k, word in enumerate(of_class) if word in words]


def _numbers(labels: np.ndarray) -> list[int]:
    """Of every image, how many of its class came before."""
    seen: Counter[int] = Counter()
    numbers = []
    for label in labels.tolist():
        numbers.append(seen[label])
        seen[label] += 1
    return numbers


def _reader(path: Path, arrays: dict[str, np.ndarray]) -> Callable[[int], np.ndarray]:
    if "images" in arrays:
        images = arrays["images"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
            raise FastcamError(
                f"archive {path} has images {images.dtype} {images.shape}, expected uint8 (n, H, W) or (n, H, W, 3)"
            )
        return lambda i: images[i] if images.ndim == 4 else np.repeat(images[i][..., None], 3, 2)
    if "strokes" in arrays:
        strokes = arrays["strokes"]
        side = int((8 * strokes.shape[1]) ** 0.5)

        def unpack(i: int) -> np.ndarray:
            bits = np.unpackbits(strokes[i])[: side * side].reshape(side, side, 1)
            return np.repeat(bits * np.uint8(255), 3, 2)

        return unpack
    data, offset = arrays["jpeg"], arrays["offset"].astype(np.int64)

    def decode(i: int) -> np.ndarray:
        try:
            return read_image(data[offset[i] : offset[i + 1]].tobytes())
        except FastcamError as error:
            raise FastcamError(f"archive {path}, image {i}: {error}") from None

    return decode
