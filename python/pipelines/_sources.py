"""Where pseudo-label takes its rows from: folders, lists, tables, VOC's and COCO's layouts, tar shards."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastcam.data import FolderDataset, VOCDataset, load_tags, read_tag_records
from fastcam.data.tags import RECORD_SUFFIXES, image_id
from fastcam.errors import FastcamError
from fastcam.io import IMAGE_SUFFIXES

LIST_SUFFIXES = (".txt", ".csv", *RECORD_SUFFIXES)
MAX_BYTES = 2**28  # of an image file in a tar shard, which is read whole


@dataclass(frozen=True)
class FileSource:
    """Image files, cut into shards of `shard_size` in their order.

    Attributes:
        ids: names of the images, each once.
        files: their paths.
        tags: int8 `(N, C)` of 0 and 1, or -1 where an image has no tags; or `None`.
        orient: whether images are turned as their EXIF orientation says.
    """

    ids: Sequence[str]
    files: Sequence[str]
    tags: np.ndarray | None
    orient: bool
    shard_size: int

    @property
    def shards(self) -> list[str]:
        """Names of the shards."""
        return [f"{i:06d}" for i in range(-(-len(self.ids) // self.shard_size))]

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.ids)

    def record(self) -> dict[str, Any]:
        """What the output depends on."""
        digest = hashlib.sha256()
        for name in self.ids:
            digest.update(os.fsencode(name) + b"\0")
        if self.tags is not None:
            digest.update(self.tags.tobytes())
        return {"images": len(self.ids), "list": digest.hexdigest()[:16], "shard_size": self.shard_size}

    def rows(self, shard: int) -> Iterator[dict[str, Any]]:
        """The rows of a shard."""
        start = shard * self.shard_size
        for i in range(start, min(start + self.shard_size, len(self.ids))):
            row: dict[str, Any] = {"id": self.ids[i], "image": self.files[i], "source": self.files[i]}
            if self.tags is not None and self.tags[i, 0] >= 0:
                row["tags"] = self.tags[i].tolist()
            yield row


@dataclass(frozen=True)
class TarSource:
    """WebDataset shards: tar files in which the files of a sample follow each other and share their name up to the
    first dot.

    Of a sample, the image counts, `.cls` (the number of its class) and the tags of `.json`. Ids are `<shard>/<key>`.

    Attributes:
        files: paths of the tar files.
        classes: names of the classes.
        tags: id -> 0/1 vector, from a table beside the shards; or `None`.
        orient: as `FileSource.orient`.
    """

    files: Sequence[str]
    classes: Sequence[str]
    tags: dict[str, list[int]] | None
    orient: bool = True
    count: None = None

    @property
    def shards(self) -> list[str]:
        """Names of the shards."""
        return [Path(path).stem for path in self.files]

    def record(self) -> dict[str, Any]:
        """What the output depends on."""
        known = json.dumps([self.shards, [Path(path).stat().st_size for path in self.files], self.tags], sort_keys=True)
        return {"shards": len(self.files), "list": hashlib.sha256(known.encode()).hexdigest()[:16]}

    def rows(self, shard: int) -> Iterator[dict[str, Any]]:
        """The rows of a shard. What cannot be read becomes a row with an error."""
        name = self.shards[shard]
        sample: dict[str, Any] = {}
        count = 0
        try:
            whole = _ends(self.files[shard])
            with tarfile.open(self.files[shard], "r|*") as tar:
                for member in tar:
                    key, extension = _split_name(member.name)
                    if not member.isfile() or not extension:
                        continue
                    if sample and sample["id"] != f"{name}/{key}":
                        yield self._row(sample)
                        sample, count = {}, count + 1
                    sample |= {"id": f"{name}/{key}", "source": self.files[shard]}
                    self._read(tar, member, extension, sample)
        except (tarfile.TarError, OSError, EOFError) as error:
            if sample:
                yield {
                    "id": sample["id"],
                    "error": f"shard {self.files[shard]} breaks off here: {error}; copy it again",
                }
            rest = f"shard {self.files[shard]} is damaged behind {count} images: {error}; copy it again"
            yield {"id": f"{name}/(rest)", "error": rest}
            return
        if sample:
            yield self._row(sample)
        if not whole:  # tarfile takes a cut between two files for the end
            rest = f"shard {self.files[shard]} has no end behind {count + bool(sample)} images; copy it again"
            yield {"id": f"{name}/(rest)", "error": rest}

    def _read(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: dict[str, Any]) -> None:
        suffix = "." + extension.rsplit(".", 1)[-1]
        if suffix not in (*IMAGE_SUFFIXES, ".cls", ".json"):
            return
        if member.size > MAX_BYTES:
            sample["error"] = f"file {member.name} has {member.size} bytes, more than {MAX_BYTES}; remove it"
            return
        file = tar.extractfile(member)
        content = b"" if file is None else file.read()
        if len(content) < member.size:
            raise tarfile.ReadError(f"{member.name} has {len(content)} of {member.size} bytes")
        if suffix in IMAGE_SUFFIXES:
            sample.setdefault("image", content)
            return
        try:
            value = json.loads(content)
            sample[suffix] = value.get("tags") if isinstance(value, dict) else value if suffix == ".cls" else None
        except ValueError as error:
            sample["error"] = f"file {member.name} does not read as JSON: {error}; replace it"

    def _row(self, sample: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {key: sample[key] for key in ("id", "image", "source", "error") if key in sample}
        if "image" not in row and "error" not in row:
            row["error"] = f"sample {row['id']} has no image, expected a file like {row['id']}{IMAGE_SUFFIXES[0]}"
        if self.tags is not None:
            row["tags"] = self.tags.get(row["id"], self.tags.get(row["id"].split("/", 1)[1]))
            if row["tags"] is None:
                row.setdefault("error", f"sample {row['id']} has no entry in the table of tags; add it")
        elif sample.get(".json") is not None:
            row["tags"] = sample[".json"]
        elif ".cls" in sample:
            number = sample[".cls"]
            if isinstance(number, int) and 0 <= number < len(self.classes):
                row["tags"] = [self.classes[number]]
            else:
                last = len(self.classes) - 1
                row["error"] = f"class {number!r} of {row['id']} is none of 0 to {last}; correct it"
        return row


Source = FileSource | TarSource


def open_source(
    images: Path, labels: Path | None, split: str | None, classes: Sequence[str], shard_size: int
) -> Source:
    """The rows of `--images` and `--labels`, whatever they are.

    Args:
        images: a folder of images; a folder in VOC's layout (`split` names its list); a list (`.txt`) or a table
            (`.csv`, `.json`, `.jsonl`, `.parquet`) of paths below its own folder, which may hold tags; a tar shard, a
            folder of them, or a pattern like `shards/*.tar`.
        labels: tags by image, see `load_tags`; or COCO's annotations, whose images are then the ones to label; or
            `mask` or `xml` of VOC's layout.
        split: a list of VOC's layout, or the path of one.
        classes: names of the classes.
        shard_size: images in a shard, where files are cut into shards.

    Raises:
        FastcamError: something is missing, damaged, or names an image twice.
    """
    if shard_size < 1:
        raise FastcamError(f"shard_size is {shard_size}, expected at least 1")
    tars = _tar_files(images)
    if tars:
        return _tar_source(tars, labels, classes)
    if images.suffix in LIST_SUFFIXES and images.is_file():
        return _listed(read_tag_records(images, classes), images.parent, labels, classes, shard_size, f"list {images}")
    if split is not None or (images / "JPEGImages").is_dir():
        if split is None:
            raise FastcamError(f"{images} has VOC's layout; give split, the name of a list in ImageSets/Segmentation/")
        own = None if labels is None else str(labels) if str(labels) in ("mask", "xml") else str(labels.absolute())
        masks = "SegmentationClass" if own == "mask" else None
        voc = VOCDataset(images, split, classes=classes, tags=own, masks=masks)
        tags = None if voc.tags is None else voc.tags.numpy().astype(np.int8)
        return FileSource(voc.ids, [str(path) for path in voc.files], tags, False, shard_size)
    if labels is not None and labels.suffix == ".json" and _is_coco(labels):
        pairs = read_tag_records(labels, classes)
        return _listed(pairs, images, None, classes, shard_size, f"annotations {labels}", orient=False)
    folder = FolderDataset(images, None if labels is None else labels.absolute(), classes=classes)
    tags = None if folder.tags is None else folder.tags.numpy().astype(np.int8)
    return FileSource(folder.ids, [str(path) for path in folder.files], tags, True, shard_size)


def _listed(
    pairs: Sequence[tuple[str, Any]],
    root: Path,
    labels: Path | None,
    classes: Sequence[str],
    shard_size: int,
    where: str,
    orient: bool = True,
) -> FileSource:
    if not pairs:
        raise FastcamError(f"{where} names no image")
    ids = [image_id(name.removeprefix("./").lstrip("/")) for name, _ in pairs]
    twice = next((name for name, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise FastcamError(f"{where} names image {twice!r} twice; remove one")
    if labels is not None:
        tags = load_tags(labels, ids, classes).numpy().astype(np.int8)
    elif all(own is None for _, own in pairs):
        tags = None
    else:
        tags = np.full((len(ids), len(classes)), -1, np.int8)
        for row, (_, own) in zip(tags, pairs, strict=True):
            if own is not None:
                row[:] = own.numpy()
    return FileSource(ids, [str(root / name) for name, _ in pairs], tags, orient, shard_size)


def _tar_source(tars: list[str], labels: Path | None, classes: Sequence[str]) -> TarSource:
    names = Counter(Path(path).stem for path in tars)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise FastcamError(f"shards {', '.join(p for p in tars if Path(p).stem == twice)} share a name; rename one")
    table = None
    if labels is not None:
        pairs = read_tag_records(labels, classes)
        table = {image_id(name): own.int().tolist() for name, own in pairs if own is not None}
    return TarSource(tars, classes, table)


def _tar_files(images: Path) -> list[str]:
    if images.suffix == ".tar" and images.is_file():
        return [str(images)]
    if images.is_dir():
        return sorted(str(path) for path in images.glob("*.tar") if path.name[0] != ".")
    if glob.has_magic(str(images)):
        found = sorted(glob.glob(str(images)))  # noqa: PTH207 (a pattern with folders, absolute or not)
        if not found:
            raise FastcamError(f"no file matches {images}; give the tar shards, as in 'shards/*.tar'")
        return found
    return []


def _ends(path: str) -> bool:
    """Whether a tar file has its end mark, 1024 zeros; of compressed ones the reader tells."""
    with Path(path).open("rb") as file:
        if file.read(512)[257:262] != b"ustar":
            return True
        file.seek(-min(1024, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return not any(file.read())


def _is_coco(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def _split_name(name: str) -> tuple[str, str]:
    """`a/b.seg.png` as `("a/b", "seg.png")`, as WebDataset splits names."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else "", extension.lower() if stem else ""
