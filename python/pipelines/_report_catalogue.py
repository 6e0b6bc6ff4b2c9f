"""The report's part on a pseudo-label run: quality, class balance, thresholds, worst images and errors."""

from __future__ import annotations

import heapq
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from fastcam.errors import FastcamError
from fastcam.io import CamSet, load_cams, read_image, read_label_png
from fastcam.pipelines import _report_pictures as pictures
from fastcam.pipelines._report_charts import Curve, bars, legend, lines
from fastcam.pipelines._shards import finished_shards, read_catalogue, tar_key

BINS = 10
SAMPLE = 300  # images whose CAMs make the threshold curve
REASONS = 12
THRESHOLDS = [round(0.02 * i, 2) for i in range(51)]


def catalogue_section(folder: Path, config: dict[str, Any], worst: int) -> str:
    """HTML about the finished shards of a pseudo-label run, or `""` where there is none.

    Args:
        folder: the output folder of the run.
        config: of its `pass.json`.
        worst: images of the lowest quality to show.

    Raises:
        FastcamError: the catalogue is damaged.
    """
    shards = finished_shards(folder)
    total = sum(shard["images"] for shard in shards.values())
    if not total:
        return ""
    step = max(1, total // SAMPLE)
    histogram, reasons = [0] * BINS, Counter[str]()
    lowest: list[tuple[float, str, dict[str, Any]]] = []
    sample: dict[str, list[str]] = {}
    seen = 0
    for name, rows in zip(shards, read_catalogue(folder, ["id", "source", "quality", "error"]), strict=True):
        for row in rows:
            seen += 1
            if row["error"] is not None:
                reasons[_reason(row)] += 1
                continue
            histogram[min(BINS - 1, int(BINS * row["quality"]))] += 1
            # the heap's root is the best of the worst
            entry = (-row["quality"], row["id"], row)
            if len(lowest) < worst:
                heapq.heappush(lowest, entry)
            elif lowest and entry > lowest[0]:
                heapq.heapreplace(lowest, entry)
            if seen % step == 0:
                sample.setdefault(name, []).append(row["id"])
    good = sum(histogram)
    errors = f", {total - good} without a label" if good < total else ""
    parts = [
        f"<h3>{escape(folder.resolve().name)}: {total} images in {len(shards)} shards{errors}</h3>",
        '<div class="charts">',
        _quality(histogram, good),
        _balance(shards, config["classes"], good),
        _curve(list(_cams(folder, sample))),
        "</div>",
        "".join(_picture_row(folder, row, config) for _, _, row in sorted(lowest, key=lambda e: (-e[0], e[1]))),
        _errors(reasons),
    ]
    return "".join(parts)


def _quality(histogram: Sequence[int], good: int) -> str:
    names = [f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}" for i in range(BINS)]
    values = [count / max(1, good) for count in histogram]
    alt = "share of images by quality: " + ", ".join(
        f"{n}: {100 * v:.0f} %" for n, v in zip(names, values, strict=True)
    )
    chart = bars(names, [("images", "var(--label)", values)], alt)
    hint = "The mIoU that a mask would have if its scores were probabilities; 1 is sure of every pixel."
    return f"<figure><figcaption>Quality, % of the images</figcaption>{chart}<p class=hint>{hint}</p></figure>"


def _balance(shards: dict[str, dict[str, Any]], classes: Sequence[str], good: int) -> str:
    images, pixels = Counter[int](), Counter[int]()
    for shard in shards.values():
        for label, counts in shard["labels"].items():
            images[int(label)] += counts["images"]
            pixels[int(label)] += counts["pixels"]
    labels = [0, *range(1, len(classes) + 1), 255]
    names = ["background", *classes, "ignored"]
    area = sum(pixels.values()) or 1
    shares = [[images[k] / max(1, good) for k in labels], [pixels[k] / area for k in labels]]
    series = [("of the images", "var(--label)", shares[0]), ("of the pixels", "var(--cam)", shares[1])]
    alt = "labels: " + ", ".join(
        f"{name} in {100 * a:.0f} % of the images, {100 * b:.0f} % of the pixels"
        for name, a, b in zip(names, *shares, strict=True)
    )
    key = legend([(name, tone, False) for name, tone, _ in series])
    return f"<figure><figcaption>Labels, %</figcaption>{key}{bars(names, series, alt)}</figure>"


def foreground_shares(camsets: Sequence[CamSet]) -> list[float]:
    """Mean share of an image's stored pixels whose largest map beats each of `THRESHOLDS`."""
    rows = []
    for camset in camsets:
        best = camset.maps.amax(0) if len(camset.maps) else torch.zeros(camset.maps.shape[1:])
        rows.append([float((best > threshold).float().mean()) for threshold in THRESHOLDS])
    return torch.tensor(rows).mean(0).tolist()


def _curve(camsets: list[CamSet]) -> str:
    if not camsets:
        return ""
    shares = foreground_shares(camsets)
    curve = Curve("foreground", list(zip(THRESHOLDS, shares, strict=True)), "var(--cam)", False, None)
    alt = "share of foreground at every threshold: " + ", ".join(
        f"{t:g}: {100 * s:.0f} %" for t, s in list(zip(THRESHOLDS, shares, strict=True))[::5]
    )
    chart = lines([curve], "threshold", "foreground, %", alt)
    hint = (
        f"From the stored CAMs of {len(camsets)} images: how much would be foreground at every constant background, "
        "before any CRF. With true masks, evaluate scores the folder cams/ at every threshold."
    )
    return f"<figure><figcaption>Thresholds</figcaption>{chart}<p class=hint>{hint}</p></figure>"


def _cams(folder: Path, sample: dict[str, list[str]]) -> Iterator[CamSet]:
    """The stored CAMs of these images, from the folder `cams` or the tars."""
    for shard, ids in sample.items():
        tar = folder / "shards" / f"{shard}.tar"
        plain = [path for path in (folder / "cams" / f"{image_id}.npz" for image_id in ids) if path.is_file()]
        yield from map(load_cams, plain)
        if not plain and tar.is_file():
            keys = {f"{tar_key(image_id)}.cam.npz" for image_id in ids}
            with tarfile.open(tar) as file:
                for member in file:
                    if member.name in keys and (content := file.extractfile(member)):
                        yield load_cams(content.read())


def _picture_row(folder: Path, row: dict[str, Any], config: dict[str, Any]) -> str:
    title = f"{row['id']} · quality {row['quality']:.3f}"
    path, shown = folder / f"{row['id']}.png", ""
    if path.is_file() and row["source"]:
        try:
            image = torch.from_numpy(read_image(row["source"], orient=config["orient"])).permute(2, 0, 1)
            label = read_label_png(path)
            uris = [("Image", pictures.photo(image))]
            if label.shape == image.shape[1:]:
                uris.append(("Label", pictures.label_overlay(image, label)))
            shown = "".join(
                f'<figure class="pic"><img src="{uri}" alt="{name.lower()} of {escape(row["id"])}" loading="lazy">'
                f"<figcaption>{name}</figcaption></figure>"
                for name, uri in uris
            )
        except FastcamError as error:  # the image is gone by now
            shown = f'<p class="note">{escape(str(error))}</p>'
    return f'<article class="row"><h4>{escape(title)}</h4><div class="strip">{shown}</div></article>'


def _errors(reasons: Counter[str]) -> str:
    if not reasons:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{count}</th><td>{escape(reason)}</td></tr>'
        for reason, count in reasons.most_common(REASONS)
    )
    more = f"<p class=hint>and {len(reasons) - REASONS} other reasons</p>" if len(reasons) > REASONS else ""
    return f'<h3>Without a label</h3><table class="config">{rows}</table>{more}'


def _reason(row: dict[str, Any]) -> str:
    """The error without what names the single image."""
    text = row["error"]
    for name in (row["source"], json.dumps(row["id"])[1:-1]):
        text = text.replace(f" {name}", "") if name else text
    return text
