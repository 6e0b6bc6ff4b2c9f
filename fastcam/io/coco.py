"""Label maps as COCO's JSON: one run-length mask for every label of an image. Needs pycocotools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcam.errors import FastcamError, optional_module
from fastcam.io.atomic import atomic_write

IGNORED = {"id": 255, "name": "ignored"}  # the category of pixels that are neither background nor of a class


class CocoImage(NamedTuple):
    """An image of a COCO file: `size` is `(H, W)`, `records` are those of `label_rle`, `score` of all of them."""

    image_id: str
    file_name: str
    size: tuple[int, int]
    records: list[dict[str, Any]]
    score: float | None = None


def label_rle(label: Tensor | np.ndarray) -> list[dict[str, Any]]:
    """COCO's compressed run lengths of every label but 0 in a mask.

    Args:
        label: integers `(H, W)`.

    Returns:
        One `{"category_id", "area", "bbox", "segmentation"}` a label, by increasing label, which is the category's id.

    Raises:
        FastcamError: pycocotools is not installed.
    """
    mask = optional_module("pycocotools.mask", "rle", "scale")
    array = np.asarray(label)
    records = []
    for value in np.unique(array[array > 0]).tolist():
        run = mask.encode(np.asfortranarray(array == value, dtype=np.uint8))
        segmentation = {"size": list(array.shape), "counts": run["counts"].decode("ascii")}
        area, box = int(mask.area(run)), mask.toBbox(run).tolist()
        records.append({"category_id": value, "area": area, "bbox": box, "segmentation": segmentation})
    return records


def rle_label(records: Sequence[dict[str, Any]], size: tuple[int, int]) -> Tensor:
    """The label map of `label_rle`'s records; of overlapping ones the smaller lies on top.

    Args:
        records: with `category_id` and `segmentation`: compressed or plain run lengths, or polygons.
        size: `(H, W)`.

    Returns:
        uint8 `(H, W)`.

    Raises:
        FastcamError: pycocotools is not installed, or a record does not fit the size or a byte.
    """
    mask = optional_module("pycocotools.mask", "rle", "scale")
    label = np.zeros(size, np.uint8)
    runs = []
    for record in records:
        segmentation, value = record["segmentation"], record["category_id"]
        if not 0 < value <= 255:
            raise FastcamError(f"category {value} is no label, expected 1 to 255; give the classes to convert")
        if isinstance(segmentation, list):
            run = mask.merge(mask.frPyObjects(segmentation, *size))
        elif isinstance(segmentation["counts"], list):
            run = mask.frPyObjects(segmentation, *size)
        else:
            run = segmentation
        if tuple(run["size"]) != tuple(size):
            raise FastcamError(f"a mask is {run['size'][1]} x {run['size'][0]}, its image {size[1]} x {size[0]} pixels")
        runs.append((int(mask.area(run)), value, run))
    for _, value, run in sorted(runs, key=lambda item: -item[0]):
        label[np.asarray(mask.decode([run]))[:, :, 0] > 0] = value
    return torch.from_numpy(label)


def write_coco(path: str | os.PathLike[str], images: Iterable[CocoImage], classes: Sequence[str]) -> None:
    """Writes images and the run-length masks of their labels as one COCO file, atomically, one image in memory.

    Category k + 1 is class k, category 255 "ignored". Images are numbered from 1 in their order; their own ids are
    kept in the field `image`.

    Raises:
        FastcamError: the file could not be written.
    """
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, 1)] + [IGNORED]
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        second = temporary.with_suffix(".annotations")
        try:
            with second.open("w+", encoding="utf-8") as annotations:
                file.write('{"categories": ' + json.dumps(categories) + ',\n"images": [')
                count = 0
                for number, image in enumerate(images, 1):
                    height, width = image.size
                    about = {"id": number, "file_name": image.file_name, "width": width, "height": height}
                    file.write((",\n" if number > 1 else "\n") + json.dumps({**about, "image": image.image_id}))
                    for record in image.records:
                        count += 1
                        about = {"id": count, "image_id": number, "iscrowd": 0}
                        about |= {} if image.score is None else {"score": image.score}
                        annotations.write((",\n" if count > 1 else "\n") + json.dumps({**about, **record}))
                file.write('],\n"annotations": [')
                annotations.seek(0)
                while block := annotations.read(1 << 20):
                    file.write(block)
                file.write("]}\n")
        finally:
            second.unlink(missing_ok=True)


def read_coco(path: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The label maps of a COCO file, of `write_coco` or foreign.

    Args:
        path: the file.
        classes: names of the classes: category of name k has label k + 1, other categories become 255. `None`:
            categories get labels 1, 2, ... by increasing id.

    Returns:
        Pairs of an image's id (its file name without suffix, where `write_coco` left none) and uint8 `(H, W)`.

    Raises:
        FastcamError: the file is missing, damaged, or has no such fields.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {category["id"]: category["name"] for category in content["categories"]}
        names = classes or [known[k] for k in sorted(known) if (k, known[k]) != (IGNORED["id"], IGNORED["name"])]
        lookup = {k: names.index(name) + 1 if name in names else 255 for k, name in known.items()}
        of_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            record = {**annotation, "category_id": lookup[annotation["category_id"]]}
            of_image[annotation["image_id"]].append(record)
        for image in content["images"]:
            name = image.get("image") or str(PurePosixPath(image["file_name"]).with_suffix(""))
            yield name, rle_label(of_image[image["id"]], (image["height"], image["width"]))
    except FileNotFoundError:
        raise FastcamError(f"COCO file {path} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastcamError(f"COCO file {path} does not read: {error!r}; check it") from error
