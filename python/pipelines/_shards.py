"""One shard of pseudo-label: rows from a source, through `PseudoLabeler`, into files that count when all are whole."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcam.errors import FastcamError, optional_module
from fastcam.io import atomic_write
from fastcam.io.coco import CocoImage, write_coco
from fastcam.pipelines._parallel import ordered_map
from fastcam.pipelines._sources import Source
from fastcam.pipelines.labeler import STAGES, PseudoLabeler, Row, Settings

OWN_PATH = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ}


@dataclass(frozen=True)
class Work:
    """All that a process needs to take part in a run; can be pickled.

    Attributes:
        source: the rows.
        out: output folder.
        weights: of the labeler.
        settings: of the labeler.
        workers: threads of the labeler.
        outputs: any of png, webdataset, coco.
    """

    source: Source
    out: Path
    weights: Path
    settings: Settings = Settings()  # noqa: RUF009 (frozen)
    outputs: tuple[str, ...] = ("png",)
    workers: int = 2

    def labeler(self, device: str) -> PseudoLabeler:
        """A labeler of these settings."""
        return PseudoLabeler(self.weights, self.settings, device=device, workers=self.workers)


def statistics_file(out: Path, shard: str) -> Path:
    """The file that makes a shard count."""
    return out / "shards" / f"{shard}.json"


def catalogue_file(out: Path, shard: str) -> Path:
    """The rows of a shard, without their masks."""
    return out / "catalogue" / f"{shard}.parquet"


def finished_shards(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> statistics of the shards that count."""
    folder = out / "shards"
    if not folder.is_dir():
        return {}
    names = sorted(path for path in folder.glob("*.json") if path.name[0] != ".")
    return {path.stem: json.loads(path.read_text()) for path in names}


def run_shard(
    work: Work, labeler: PseudoLabeler, index: int, tick: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Labels a shard and writes all of it; its statistics last.

    What a killed run left of it is removed first. Files are written below a hidden folder of the shard and renamed.

    Args:
        work: the run.
        labeler: of `work.labeler`.
        index: which shard.
        tick: called after every image.

    Returns:
        The statistics: counts of `images` and `errors`, `seconds`, those of the `stages`, `images` and `pixels` of
        every label, mean `quality`.

    Raises:
        FastcamError: a file cannot be written.
    """
    name, out = work.source.shards[index], work.out
    temporary = out / f".tmp-{name}"
    start, before = time.perf_counter(), dict(labeler.seconds)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        rows: list[tuple[int, Row]] = []
        tar = _TarWriter(temporary / "shard.tar") if "webdataset" in work.outputs else None

        def store(item: tuple[int, Row]) -> tuple[int, Row]:
            return item[0], _write_files(work, temporary, *item)

        for place, row in ordered_map(store, labeler.stream(_checked(work.source.rows(index))), labeler.workers):
            if tar is not None and row["error"] is None:
                tar.add(row)
            rows.append((place, {key: value for key, value in row.items() if key not in ("mask", "cam", "image")}))
            tick()
        ordered = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
        if tar is not None:
            tar.close()
            _rename(temporary / "shard.tar", out / "shards" / f"{name}.tar")
        _write_catalogue(temporary / "rows.parquet", ordered)
        _rename(temporary / "rows.parquet", catalogue_file(out, name))
        stages = {stage: round(labeler.seconds[stage] - before[stage], 3) for stage in STAGES}
        summary = _statistics(name, ordered, time.perf_counter() - start, stages)
        (temporary / "statistics.json").write_text(json.dumps(summary) + "\n")
        _rename(temporary / "statistics.json", statistics_file(out, name))
        shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        where = error.filename or out
        reason = error.strerror or str(error)
        raise FastcamError(f"{where} could not be written: {reason}; free space or choose another folder") from error
    return summary


def _checked(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows whose id cannot be a file below the output folder, or came before, get an error."""
    seen: set[str] = set()
    for row in rows:
        name = row["id"]
        parts = name.split("/")
        if name in seen:
            row["error"] = f"id {name!r} comes a second time; rename one"
        elif "\0" in name or any(part in ("", ".", "..") for part in parts):
            row["error"] = f"id {name!r} is no name of a file below a folder; rename it"
        elif max(len(os.fsencode(part)) for part in parts) > 250:
            row["error"] = f"id {name!r} is longer than file names may be; shorten it"
        seen.add(name)
        yield row


def _write_files(work: Work, temporary: Path, place: int, row: Row) -> Row:
    """The PNG and the CAMs of a row as files, where these are wanted."""
    if row["error"] is not None or "png" not in work.outputs:
        return row
    files = [(row["mask"], work.out / f"{row['id']}.png")]
    if row.get("cam") is not None:
        files.append((row["cam"], work.out / "cams" / f"{row['id']}.npz"))
    for content, path in files:
        try:
            whole = temporary / f"{place}{path.suffix}"
            whole.write_bytes(content)
            _rename(whole, path)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in OWN_PATH:
                raise
            reason = f"its label cannot be named {path.name!r}: {error.args[-1]}; rename the image"
            return {**row, **dict.fromkeys(("mask", "cam", "quality")), "error": reason}
    return row


def _rename(whole: Path, path: Path) -> None:
    try:
        whole.replace(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.replace(path)


def tar_key(image_id: str) -> str:
    """The name of an image's files in a tar shard: WebDataset cuts names at the first dot."""
    return image_id.replace("%", "%25").replace(".", "%2E")


class _TarWriter:
    """A WebDataset shard: `<key>.png`, `<key>.json` and perhaps `<key>.cam.npz`; equal rows give equal bytes."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed by close)

    def add(self, row: Row) -> None:
        """Adds what a row holds."""
        key = tar_key(row["id"])
        about = {k: row[k] for k in ("id", "classes", "labels", "pixels", "width", "height", "quality", "fingerprint")}
        if row.get("rle") is not None:
            about["rle"] = json.loads(row["rle"])
        parts = {"png": row["mask"], "json": json.dumps(about).encode(), "cam.npz": row.get("cam")}
        for extension, content in parts.items():
            if content is not None:
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                self._tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        """Completes the file."""
        self._tar.close()


def _write_catalogue(path: Path, rows: list[Row]) -> None:
    pa = optional_module("pyarrow", "the catalogue", "scale")
    parquet = optional_module("pyarrow.parquet", "the catalogue", "scale")
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("classes", pa.list_(pa.string())),
            ("labels", pa.list_(pa.int32())),
            ("pixels", pa.list_(pa.int64())),
            ("quality", pa.float64()),
            ("rle", pa.string()),
            ("fingerprint", pa.string()),
            ("seconds", pa.float64()),
            ("error", pa.string()),
        ]
    )
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    columns["id"] = [_text(row["id"]) for row in rows]
    columns["source"] = [_text(row["source"]) if row.get("source") else None for row in rows]
    parquet.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def _text(name: str) -> str:
    """A file name as UTF-8: bytes that are none are written as \\x.."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _statistics(name: str, rows: list[Row], seconds: float, stages: dict[str, float]) -> dict[str, Any]:
    images: Counter[int] = Counter()
    pixels: Counter[int] = Counter()
    good = [row for row in rows if row["error"] is None]
    for row in good:
        images.update(row["labels"])
        pixels.update(dict(zip(row["labels"], row["pixels"], strict=True)))
    return {
        "shard": name,
        "images": len(rows),
        "errors": len(rows) - len(good),
        "seconds": round(seconds, 3),
        "stages": stages,
        "quality": round(sum(row["quality"] for row in good) / len(good), 6) if good else None,
        "labels": {str(k): {"images": images[k], "pixels": pixels[k]} for k in sorted(images)},
        "threads": torch.get_num_threads(),
    }


def read_catalogue(out: Path, columns: list[str] | None = None) -> Iterator[list[Row]]:
    """The rows of every finished shard, shard after shard.

    Raises:
        FastcamError: a file is missing or damaged.
    """
    parquet = optional_module("pyarrow.parquet", "the catalogue", "scale")
    for shard in finished_shards(out):
        path = catalogue_file(out, shard)
        try:
            yield parquet.read_table(path, columns=columns).to_pylist()
        except (OSError, ValueError) as error:
            raise FastcamError(f"catalogue {path} does not read: {error}; remove shards/{shard}.json") from error


def summarize(work: Work, classes: list[str]) -> tuple[int, int]:
    """Writes what is about all shards: `errors.csv`, `times.json`, and `coco.json` where it is wanted.

    Returns:
        Number of images, and of those without a label.
    """
    import csv

    out, shards = work.out, finished_shards(work.out)
    with atomic_write(out / "times.json") as temporary:
        total = {
            "count": sum(shard["images"] for shard in shards.values()),
            "seconds": round(sum(shard["seconds"] for shard in shards.values()), 3),
        }
        temporary.write_text(json.dumps(total) + "\n")
    errors = sum(shard["errors"] for shard in shards.values())
    with atomic_write(out / "errors.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "source", "error"])
        if errors:
            for rows in read_catalogue(out, ["id", "source", "error"]):
                table.writerows(row.values() for row in rows if row["error"] is not None)
    if "coco" in work.outputs:
        write_coco(out / "coco.json", _coco_images(out), classes)
    return total["count"], errors


def _coco_images(out: Path) -> Iterator[CocoImage]:
    for rows in read_catalogue(out, ["id", "source", "width", "height", "quality", "rle", "error"]):
        for row in rows:
            if row["error"] is None:
                name, size = row["source"] or row["id"], (row["height"], row["width"])
                yield CocoImage(row["id"], name, size, json.loads(row["rle"]), row["quality"])
