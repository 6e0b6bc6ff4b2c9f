"""Image-level tags from masks, VOC annotations, tables, COCO's annotations and `cls_labels.npy`."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from fastcam.data.classes import COCO_CLASSES, VOC_CLASSES, nearest
from fastcam.errors import FastcamError, optional_module
from fastcam.io import IMAGE_SUFFIXES
from fastcam.io._restricted_npy import load_object

RECORD_SUFFIXES = (".json", ".jsonl", ".parquet")
_ID_ORDER = ("image", "path", "file_name", "filename", "file", "name", "image_id", "id")  # of several, the first counts
_ID_COLUMNS = set(_ID_ORDER)
_TAG_COLUMNS = {"tags", "tag", "labels", "label", "classes", "class", "class_name"}


def tags_from_mask(mask: Tensor, num_classes: int) -> Tensor:
    """The classes that have a pixel.

    Args:
        mask: integer labels of any shape: 0 background, class k + 1; others (255) do not count.
        num_classes: C.

    Returns:
        float32 `(C,)` of 0 and 1.
    """
    labels = mask.unique().long()
    labels = labels[(labels > 0) & (labels <= num_classes)]
    return torch.zeros(num_classes).index_fill_(0, labels - 1, 1)


def tags_from_xml(path: str | os.PathLike[str], classes: Sequence[str], others: Iterable[str] = ()) -> Tensor:
    """The classes that a VOC annotation names as objects, difficult ones included (as IRN counts them).

    Args:
        path: a file of VOC's `Annotations/`.
        classes: the C names.
        others: names that may occur and do not count.

    Returns:
        float32 `(C,)` of 0 and 1.

    Raises:
        FastcamError: the file is missing or damaged, or names an unknown class.
    """
    path = Path(path)
    try:
        names = {(element.text or "").strip() for element in ElementTree.parse(path).iterfind("object/name")}
    except FileNotFoundError:
        raise FastcamError(f"annotation {path} does not exist; choose other tags or add it") from None
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise FastcamError(f"annotation {path} does not read as XML: {error}; replace it") from error
    return _multi_hot(names - (set(others) - set(classes)), classes, str(path))


def read_tag_csv(path: str | os.PathLike[str], classes: Sequence[str]) -> dict[str, Tensor]:
    """Tags of many images from a CSV file in one of two layouts.

    One 0/1 column a class: a header whose first column is the id (`id`, `image`, `file`, ...) and which has a column
    of the name of every class; further columns do not matter. Or a column of tags: `image,tags`, with or without a
    header, the tags of an image separated by blanks, or by `;` or `|` where names contain blanks.

    Args:
        path: the file, UTF-8.
        classes: the C names.

    Returns:
        Id -> float32 `(C,)` of 0 and 1, in the order of the file. An id is the first column without an image suffix.

    Raises:
        FastcamError: the file is missing, empty or not text, an id comes twice, a class has no column, a value is not
            0 or 1, or a tag is no known class.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [
                (number, row) for number, row in enumerate(csv.reader(file), 1) if any(cell.strip() for cell in row)
            ]
    except FileNotFoundError:
        raise FastcamError(f"tag file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FastcamError(f"tag file {path} does not read as CSV: {error}; save it as UTF-8 CSV") from error
    if not rows:
        raise FastcamError(f"tag file {path} is empty")
    header = [cell.strip() for cell in rows[0][1]]
    named = header[0].lower() in _ID_COLUMNS
    if named and not set(classes).isdisjoint(header[1:]):
        columns = _class_columns(header, classes, path)
        column = 0
    else:
        columns = []
        column = next((i for i, cell in enumerate(header) if i and named and cell.lower() in _TAG_COLUMNS), 1)
        if named and len(header) > 2 and column == 1 and header[1].lower() not in _TAG_COLUMNS:
            raise FastcamError(
                f"tag file {path} has columns {', '.join(header[:6])}, expected a column for every class "
                f"({classes[0]}, ...) or one named tags"
            )
    tags: dict[str, Tensor] = {}
    for number, row in rows[1:] if named else rows:
        image, where = image_id(row[0].strip()), f"tag file {path} line {number}"
        if image in tags:
            raise FastcamError(f"{where} has image {image!r} a second time; remove one")
        if len(row) <= max([column, *columns]):
            raise FastcamError(f"{where} has {len(row)} columns, expected {max([column, *columns]) + 1}")
        if columns:
            tags[image] = torch.tensor([_zero_or_one(row[i], where) for i in columns])
        else:
            tags[image] = _multi_hot(_split(row[column], classes), classes, where)
    return tags


def read_cls_labels(path: str | os.PathLike[str], classes: Sequence[str]) -> dict[str | int, Tensor]:
    """Tags from `cls_labels.npy`, the file of the IRN and PSA family, without executing its pickle.

    Args:
        path: a pickled dictionary of one 0/1 vector an image; ids are strings or integers (`2007000032` for
            `2007_000032`).
        classes: the C names. Vectors of 20 (80) entries stand for VOC's (COCO's) classes, of which `classes` may be
            some; others must have C entries.

    Returns:
        Id as in the file -> float32 `(C,)` of 0 and 1.

    Raises:
        FastcamError: the file is missing, damaged, refused by the restricted reader, or has vectors of another length.
    """
    path = Path(path)
    table = load_object(path)
    if not isinstance(table, Mapping) or not table:
        raise FastcamError(f"tag file {path} holds a {type(table).__name__}, expected a dictionary of vectors")
    try:
        labels = torch.from_numpy(np.stack([np.asarray(vector, np.float32) for vector in table.values()]))
    except (TypeError, ValueError) as error:
        raise FastcamError(f"tag file {path} has entries that are no vectors of one length ({error})") from error
    order = next((names for names in (VOC_CLASSES, COCO_CLASSES) if labels.shape[1:] == (len(names),)), None)
    if order and set(classes) <= set(order):
        labels = labels[:, [order.index(name) for name in classes]]
    elif labels.shape[1:] != (len(classes),):
        raise FastcamError(
            f"tag file {path} has vectors {tuple(labels.shape[1:])}, expected one entry for each of "
            f"{len(classes)} classes"
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise FastcamError(f"tag file {path} has entries other than 0 and 1")
    return dict(zip(table, labels, strict=True))


def load_tags(path: str | os.PathLike[str], ids: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Tags of the images `ids` from a `.csv`, `.json`, `.jsonl`, `.parquet` or `.npy` file.

    Returns:
        float32 `(len(ids), C)`.

    Raises:
        FastcamError: as `read_tag_csv`, `read_tag_records` and `read_cls_labels`; or an image has no entry.
    """
    path = Path(path)
    table: dict[Any, Tensor] = {}
    if path.suffix == ".npy":
        table |= read_cls_labels(path, classes)
    elif path.suffix == ".csv":
        table |= read_tag_csv(path, classes)
    elif path.suffix in RECORD_SUFFIXES:
        for name, tags in read_tag_records(path, classes):
            if (key := image_id(name)) in table:
                raise FastcamError(f"tag file {path} has image {key!r} a second time; remove one")
            if tags is None:
                raise FastcamError(f"tag file {path} has no tags for image {key!r}; add a field tags")
            table[key] = tags
    else:
        known = ", ".join((".csv", *RECORD_SUFFIXES, ".npy"))
        raise FastcamError(f"tag file {path} has suffix {path.suffix!r}, expected one of {known}")
    rows = torch.zeros(len(ids), len(classes))
    for row, image in zip(rows, ids, strict=True):
        tags = table.get(image, table.get(_as_int(image)))
        if tags is None:
            raise FastcamError(f"tag file {path} has no entry for image {image!r}; add it or take the image out")
        row.copy_(tags)
    return rows


def read_tag_records(path: str | os.PathLike[str], classes: Sequence[str]) -> list[tuple[str, Tensor | None]]:
    """Names of images and their tags from a table of records, or from COCO's annotations.

    - `.jsonl`: an object a line; `.json`: a list of objects, or one object of image -> tags; `.parquet` (needs
      pyarrow); `.csv` with a header. A record has the image under `image`, `id`, `file_name`, `path`, ..., and its tags
      under `tags`, `labels`, ... (names, or one string as in `read_tag_csv`), or one 0/1 field a class, or no tags.
    - `.json` with `images`, `annotations` and `categories`: the categories that an image has annotations of, by name;
      categories that are no known class do not count.
    - `.txt`: a name a line, without tags.

    Args:
        path: the file.
        classes: the C names.

    Returns:
        Pairs in the order of the file: the name as it stands there, and float32 `(C,)` of 0 and 1, or `None` without
        tags.

    Raises:
        FastcamError: the file is missing or damaged, a record names no image, or a tag is no known class.
    """
    path = Path(path)
    try:
        content = _read_records(path)
    except FileNotFoundError:
        raise FastcamError(f"tag file {path} does not exist") from None
    except (OSError, ValueError, csv.Error) as error:
        raise FastcamError(f"tag file {path} does not read as {path.suffix[1:]}: {error}; save it again") from error
    if isinstance(content, Mapping):
        if {"images", "annotations", "categories"} <= content.keys():
            return _coco_tags(content, classes, path)
        content = [{"image": name, "tags": tags} for name, tags in content.items()]
    if not isinstance(content, list) or not all(isinstance(record, Mapping) for record in content):
        raise FastcamError(f"tag file {path} holds no records, expected objects with image and tags")
    return [_record_tags(record, classes, f"tag file {path} record {i}") for i, record in enumerate(content, 1)]


def _read_records(path: Path) -> Any:
    if path.suffix == ".parquet":
        return optional_module("pyarrow.parquet", f"tag file {path}", "scale").read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    return [{"image": line} for line in text.splitlines() if line.strip()]


def _record_tags(record: Mapping[str, Any], classes: Sequence[str], where: str) -> tuple[str, Tensor | None]:
    fields = {key.strip().lower(): key for key in record if isinstance(key, str)}
    name = next((record[fields[key]] for key in _ID_ORDER if key in fields), None)
    if not isinstance(name, str | int) or not str(name).strip():
        raise FastcamError(f"{where} names no image, expected a field image; it has {', '.join(map(str, record))}")
    if set(classes) <= record.keys():
        return str(name), torch.tensor([_zero_or_one(str(record[key]), where) for key in classes])
    tags = next((record[fields[key]] for key in sorted(_TAG_COLUMNS) if key in fields), None)
    if tags is None:
        return str(name), None
    names = _split(tags, classes) if isinstance(tags, str) else tags
    if not isinstance(names, Iterable) or not all(isinstance(tag, str) for tag in names):
        raise FastcamError(f"{where} has tags {tags!r}, expected a list of names")
    return str(name), _multi_hot(set(names), classes, where)


def _coco_tags(content: Mapping[str, Any], classes: Sequence[str], path: Path) -> list[tuple[str, Tensor | None]]:
    try:
        index = {c["id"]: classes.index(c["name"]) for c in content["categories"] if c["name"] in classes}
        found = {image["id"]: (str(image["file_name"]), torch.zeros(len(classes))) for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["category_id"] in index:
                found[annotation["image_id"]][1][index[annotation["category_id"]]] = 1
    except (KeyError, TypeError) as error:
        raise FastcamError(f"tag file {path} is no COCO annotation file: {error!r} is missing; check it") from error
    if not index:
        raise FastcamError(f"tag file {path} has no category among {', '.join(classes[:6])}, ...; check the classes")
    return list(found.values())


def image_id(name: str) -> str:
    """A file name without its image suffix, with forward slashes: `sub/a.v2.jpg` is `sub/a.v2`."""
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def _as_int(image: str) -> int | None:
    digits = image.replace("_", "")
    return int(digits) if digits.isdecimal() else None


def _class_columns(header: Sequence[str], classes: Sequence[str], path: Path) -> list[int]:
    for name in classes:
        if header.count(name) != 1:
            raise FastcamError(
                f"tag file {path} has {header.count(name)} columns for class {name!r}, expected one"
                f"{nearest(name, header)}"
            )
    return [header.index(name) for name in classes]


def _zero_or_one(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if value not in (0, 1):
        raise FastcamError(f"{where} has the value {cell.strip()!r}, expected 0 or 1")
    return value


def _split(cell: str, classes: Sequence[str]) -> set[str]:
    cell = cell.strip()
    for separator in ";|":
        if separator in cell:
            return {name.strip() for name in cell.split(separator) if name.strip()}
    return {cell} if cell in classes else set(cell.split())


def _multi_hot(names: Iterable[str], classes: Sequence[str], where: str) -> Tensor:
    tags = torch.zeros(len(classes))
    for name in sorted(names):
        if name not in classes:
            raise FastcamError(f"{where} has the tag {name!r}, which is no known class{nearest(name, classes)}")
        tags[list(classes).index(name)] = 1
    return tags
