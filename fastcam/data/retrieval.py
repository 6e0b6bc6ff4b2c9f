"""What is relevant to what: labels of images, UKBench's groups, and the ground truth of Oxford5k and Paris6k."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastcam.data.tags import image_id
from fastcam.errors import FastcamError

OXFORD_PREFIX = "oxc1_"  # of image names in Oxford5k's query files, which its images do not have
LISTS = ("good", "ok", "junk")
GROUP_OF = 4  # views of an object in UKBench, numbered one after the other


class Query(NamedTuple):
    """A question to a database of images.

    Attributes:
        id: its name.
        image: id of the image.
        box: the part of the image that is asked for, in pixels: left, top, right, bottom; ``None`` for all of it.
        positives: ids of the images to find.
        junk: ids of images that count neither way.
        group: queries for one object or of one class share it.
    """

    id: str
    image: str
    box: tuple[float, float, float, float] | None
    positives: frozenset[str]
    junk: frozenset[str]
    group: str


class Label(NamedTuple):
    """A row of a label file.

    Attributes:
        label: of the image.
        split: what the column of splits says, empty without one.
    """

    label: str
    split: str


def read_landmarks(path: str | os.PathLike[str], boxes: Literal["corners", "size"] = "corners") -> list[Query]:
    """Ground truth of Oxford5k and Paris6k.

    Good and ok images are the positives. The query's own image stays among them, as in the official protocol.

    Args:
        path: the folder of the original ``<query>_{query,good,ok,junk}.txt``, or a ``.json`` of
            ``{query: {"query": image, "bbox": [4 numbers], "good": [...], "ok": [...], "junk": [...]}}``.
        boxes: what the four numbers are: left, top, right, bottom (``"corners"``), or left, top, width, height
            (``"size"``), as the program of CroW and, after it, that of PWA read them. The files hold corners: as sizes,
            16 of Paris6k's 55 boxes leave their image.

    Returns:
        Queries by name; the group is the landmark: ``defense`` of ``defense_1``.

    Raises:
        FastcamError: a missing or damaged file, a query without positives or with an empty box.
    """
    path = Path(path)
    table = _landmark_files(path) if path.is_dir() else _landmark_json(path)
    queries = []
    for name, entry in sorted(table.items()):
        where = f"ground truth {path}, query {name}"
        try:
            image, lists = str(entry["query"]), {key: frozenset(map(str, entry[key])) for key in LISTS}
            left, top, right, bottom = map(float, entry["bbox"])
        except (KeyError, TypeError, ValueError) as error:
            raise FastcamError(
                f"{where}: {error!r}; expected an image, a box of 4 numbers and lists {', '.join(LISTS)}"
            ) from None
        if boxes == "size":
            right, bottom = left + right, top + bottom
        if not (right > left and bottom > top and all(map(math.isfinite, (left, top, right, bottom)))):
            raise FastcamError(f"{where}: box {entry['bbox']} is empty; expected {boxes} in pixels")
        positives = lists["good"] | lists["ok"]
        if not positives:
            raise FastcamError(f"{where}: there is no good and no ok image; take the query out")
        box, group = (left, top, right, bottom), name.rpartition("_")[0] or name
        queries.append(Query(name, image.removeprefix(OXFORD_PREFIX), box, positives, lists["junk"], group))
    if not queries:
        raise FastcamError(f"ground truth {path} has no query, expected files like defense_1_query.txt")
    return queries


def crop_box(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a box, rounded, inside an image and never empty.

    Args:
        box: four numbers, in pixels.
        size: ``(H, W)`` of the image.
    """
    left, top = (min(max(round(low), 0), most - 1) for low, most in ((box[0], size[1]), (box[1], size[0])))
    right, bottom = (min(max(round(box[2]), left + 1), size[1]), min(max(round(box[3]), top + 1), size[0]))
    return left, top, right, bottom


def read_labels(path: str | os.PathLike[str], column: str, split: str | None = None) -> dict[str, Label]:
    """Labels of images from a CSV with a header, whose first column is the image.

    Args:
        path: the file, UTF-8.
        column: that of the label.
        split: that of the split; ``None`` for none.

    Returns:
        Image id -> label.

    Raises:
        FastcamError: a missing or damaged file, no such column, an image that comes twice or has no label.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), list(reader.fieldnames or [])
    except FileNotFoundError:
        raise FastcamError(f"label file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FastcamError(f"label file {path} does not read as CSV: {error}; save it as UTF-8 CSV") from error
    for name in filter(None, (column, split)):
        if name not in header:
            raise FastcamError(f"label file {path} has no column '{name}'; it has {', '.join(header) or 'none'}")
    labels: dict[str, Label] = {}
    for number, row in enumerate(rows, 2):
        image = image_id((row[header[0]] or "").strip())
        if image in labels:
            raise FastcamError(f"label file {path} line {number} has image {image!r} a second time; remove one")
        if not (row[column] or "").strip():
            raise FastcamError(f"label file {path} line {number} has no label for image {image!r}; add it")
        labels[image] = Label(row[column].strip(), (row[split] or "").strip() if split else "")
    if not labels:
        raise FastcamError(f"label file {path} has no rows")
    return labels


def ukbench_labels(ids: Collection[str]) -> dict[str, Label]:
    """UKBench's groups: images ``4 k`` to ``4 k + 3``, by the number that a name ends in, show object k.

    Raises:
        FastcamError: a name that does not end in a number.
    """
    labels = {}
    for name in ids:
        number = re.search(r"\d+$", name)
        if number is None:
            raise FastcamError(f"image {name!r} has no number, expected names such as ukbench00000")
        labels[name] = Label(str(int(number[0]) // GROUP_OF), "")
    return labels


def label_queries(labels: Mapping[str, Label], queries: Sequence[str], database: Sequence[str]) -> list[Query]:
    """Queries to which the database's images of the same label are relevant; a query's own image is junk.

    Args:
        labels: of queries and database.
        queries: image ids.
        database: image ids.

    Returns:
        Only queries that have something to find.

    Raises:
        FastcamError: an image without label, or no query has anything to find.
    """
    for image in (*queries, *database):
        if image not in labels:
            raise FastcamError(f"image {image!r} has no label; add it to the label file")
    groups: dict[str, set[str]] = {}
    for image in database:
        groups.setdefault(labels[image].label, set()).add(image)
    found = []
    for image in queries:
        label = labels[image].label
        if positives := frozenset(groups.get(label, set()) - {image}):
            found.append(Query(image, image, None, positives, frozenset({image}), label))
    if not found:
        raise FastcamError("no query shares its label with another image of the database; check the labels")
    return found


def _landmark_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FastcamError(f"ground truth {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise FastcamError(f"ground truth {path} does not read as JSON: {error}; replace it") from error
    if not isinstance(table, dict):
        raise FastcamError(f"ground truth {path} holds a {type(table).__name__}, expected an object of queries")
    return table


def _landmark_files(folder: Path) -> dict[str, Any]:
    table = {}
    for path in folder.glob("*_query.txt"):
        name = path.name.removesuffix("_query.txt")
        words = path.read_text().split()
        entry: dict[str, Any] = {"query": words[0] if words else "", "bbox": words[1:]}
        for key in LISTS:
            file = folder / f"{name}_{key}.txt"
            if not file.is_file():
                raise FastcamError(f"ground truth {file} does not exist; copy all files of the release")
            entry[key] = file.read_text().split()
        table[name] = entry
    return table
