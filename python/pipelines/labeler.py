"""PseudoLabeler: rows with images in, the same rows with labels out, in any engine or in a job of your own."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam import __version__
from fastcam.data import multi_scale
from fastcam.data.classes import nearest
from fastcam.errors import FastcamError, optional_module
from fastcam.io import CamSet, encode_cams, encode_label_png, image_size, read_image
from fastcam.io.coco import label_rle
from fastcam.nn import fold_batch_norms
from fastcam.pipelines._data import file_fingerprint, load_trained
from fastcam.pipelines._parallel import ordered_map
from fastcam.pipelines.label import IGNORE, Rule, label_and_scores
from fastcam.pipelines.make_cam import SCALES, batch_cams, pick_device
from fastcam.pipelines.refine import Crf

MAX_PIXELS = 2**24  # at scale 2, with its mirror image, a network sees eight times as many
WINDOW = 256  # rows among which images of one size are sought
MOST = 64  # images in one batch, however small they are
STAGES = ("read", "scale", "network", "label", "encode")
Precision = Literal["float32", "bfloat16"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the labels of given weights depend on.

    Args:
        scales: factors of the image's size.
        rule: how scores become labels.
        crf: the CRF; `None` leaves the CAMs as they are.
        tag_threshold: smallest probability of a class, where there are no tags.
        cams: whether rows get `"cam"`.
        stride: pixels between two stored values of a map.
        rle: whether rows get `"rle"` (needs pycocotools).
        orient: turn images as their EXIF orientation says; off where masks were drawn on the stored pixels.
        max_pixels: larger images are refused.
        batch_pixels: pixels of the images that go through the network together; one image where it has more. Part of
            the settings because the last bits of a network's output depend on it.
        precision: of the network; bfloat16 runs its convolutions in 16 bit, several times as fast where the processor
            has instructions for that.
    """

    scales: tuple[float, ...] = SCALES
    rule: Rule = Rule()  # noqa: RUF009 (frozen)
    crf: Crf | None = Crf()  # noqa: RUF009 (frozen)
    tag_threshold: float = 0.5
    cams: bool = False
    stride: int = 4
    rle: bool = False
    orient: bool = True
    max_pixels: int = MAX_PIXELS
    batch_pixels: int = 2**20
    precision: Precision = "float32"

    def record(self, weights: Path) -> dict[str, Any]:
        """All that the labels depend on, as plain values.

        Raises:
            FastcamError: a value out of range, or there are no weights.
        """
        self.rule.check()
        if not self.scales or min(self.scales) <= 0:
            raise FastcamError(f"scales are {self.scales}, expected positive numbers")
        for name in ("stride", "max_pixels", "batch_pixels"):
            if getattr(self, name) < 1:
                raise FastcamError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.precision not in get_args(Precision):
            raise FastcamError(f"precision is {self.precision!r}, expected {' or '.join(get_args(Precision))}")
        values = {**dataclasses.asdict(self), **dataclasses.asdict(self.rule), "crf": self.crf and self.crf.resolved()}
        del values["rule"]
        return {"weights": file_fingerprint(weights), **values, "version": __version__}


def fingerprint(record: Mapping[str, Any]) -> str:
    """The SHA-256 of plain values as JSON, shortened."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


class PseudoLabeler:
    """Labels images: a batch of rows in, the same rows out, in the same order.

    A row is a dictionary with `"image"`, the path or the bytes of an image file, and where they are known `"tags"`,
    names of classes or a 0/1 vector; without (or `None`) the classifier chooses. A row that comes with an `"error"` is
    passed on. Each row returned has, besides all it came with,

    - `"mask"`: bytes of a palette PNG, 0 background, class k + 1, 255 ignored;
    - `"classes"`: names of the classes that took part; `"labels"` and `"pixels"`: the labels in the mask and the
      number of their pixels; `"width"`, `"height"`;
    - `"quality"`: see `expected_iou`;
    - `"cam"`, if asked for: bytes of a `CamSet` of the present classes, float16;
    - `"rle"`, if asked for: COCO's compressed run lengths of every label but the background, as JSON;
    - `"fingerprint"` of weights, configuration and version; `"seconds"` of work;
    - `"error"`: `None`, or why there is no mask, in one line; then all but `"fingerprint"` and `"seconds"` is `None`.

    No row fails another one, whatever its image is. Images of one size among `WINDOW` rows go through the network
    together; reading, scaling, the network, the CRF and encoding overlap in threads. The same rows in the same order
    give the same bytes on the same hardware.

    Args:
        weights: weights.safetensors of a finished train pass.
        settings: what the labels depend on besides.
        device: auto, cpu or cuda.
        workers: threads that read and scale, and as many that label and encode.

    Attributes:
        classes: names of the foreground classes.
        fingerprint: of weights, settings and version.
        seconds: time spent since the start in each of `STAGES`, summed over threads.

    Raises:
        FastcamError: weights or settings that cannot be used.

    Example::

        labeler = PseudoLabeler("weights.safetensors", Settings(crf=None, rule=Rule(threshold=0.3)))
        rows = labeler([{"image": "a.jpg", "tags": ["cat"]}, {"image": open("b.jpg", "rb").read()}])
    """

    def __init__(
        self,
        weights: str | os.PathLike[str],
        settings: Settings = Settings(),
        *,
        device: str = "auto",
        workers: int = 2,
    ) -> None:
        if settings.rle:
            optional_module("pycocotools.mask", "rle", "scale")
        self.settings = settings
        self.fingerprint = fingerprint(settings.record(Path(weights)))
        method, self.classes = load_trained(Path(weights), "cam")
        example = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

        def run(network: Any) -> Tensor:
            return torch.cat([network.fused_cams([example], (64, 64)).maps.flatten(), network.tag_logits(example)[0]])

        with torch.inference_mode():
            if not settings.rule.has_background and method.fused_cams([example], (64, 64)).background is None:
                known = "a threshold, a power, or high and low"
                raise FastcamError(f"method {method.name} leaves the background to a rule; give {known}")
        self.method = fold_batch_norms(method, run)
        self.device = pick_device(device)
        self.method.to(self.device, memory_format=torch.channels_last)
        mean, std = self.method.normalize
        self._views = functools.partial(multi_scale, scales=settings.scales, mean=mean, std=std)
        self.workers = max(1, workers)
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    def __call__(self, batch: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> Any:
        """Labels a batch.

        Args:
            batch: rows, or columns of one length by name, as Ray and pandas give them.

        Returns:
            In the form that came: a list of rows, or a dictionary of lists.
        """
        if isinstance(batch, Mapping):
            names = list(batch)
            rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            done = self(rows)
            every = dict.fromkeys([*names, *self._columns()])
            return {name: [_plain(row[name]) for row in done] for name in every}
        return [row for _, row in sorted(self.stream(batch), key=lambda pair: pair[0])]

    def stream(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Row]]:
        """Labels rows of any number as they come, and keeps few of them in memory.

        Returns:
            Pairs of a row's place and the row, in an order that depends on the rows alone.
        """
        return ordered_map(self._finish, self._through_network(self._read_ahead(self._groups(rows))), self.workers)

    def _columns(self) -> list[str]:
        optional = [name for name in ("cam", "rle") if (self.settings.cams if name == "cam" else self.settings.rle)]
        return [*RESULTS, *optional, "fingerprint", "seconds", "error"]

    def _groups(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[list[_Job]]:
        """Lists of jobs of one size, of at most `batch_pixels`."""
        peeked = ordered_map(self._peek, enumerate(rows), self.workers)
        while window := list(islice(peeked, WINDOW)):
            by_size: dict[tuple[int, int] | None, list[_Job]] = {}
            for job in window:
                by_size.setdefault(job.size, []).append(job)
            for size, jobs in by_size.items():
                most = min(MOST, max(1, self.settings.batch_pixels // (size[0] * size[1]))) if size else MOST
                yield from (jobs[i : i + most] for i in range(0, len(jobs), most))

    def _peek(self, item: tuple[int, Mapping[str, Any]]) -> _Job:
        """Checks a row and reads the size of its image."""
        job = _Job(*item)
        if job.error is not None:
            return job
        with self._guard(job, "read"):
            job.tags = self._tags(job.row.get("tags"))
            job.source = _source(job.row.get("image"))
            job.size = image_size(job.source, orient=self.settings.orient)
            if 0 in job.size or job.size[0] * job.size[1] > self.settings.max_pixels:
                read_image(job.source, max_pixels=self.settings.max_pixels)  # says what is wrong
        return job

    def _tags(self, given: Any) -> Tensor | None:
        if given is None:
            return None
        values = given.tolist() if isinstance(given, np.ndarray | Tensor) else given
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise FastcamError(f"tags are {values!r}, expected a list of names or a 0/1 vector")
        if all(isinstance(value, str) for value in values):
            for name in values:
                if name not in self.classes:
                    raise FastcamError(f"tag {name!r} is no known class{nearest(name, self.classes)}")
            return torch.tensor([float(name in values) for name in self.classes])
        if len(values) != len(self.classes) or any(value not in (0, 1) for value in values):
            raise FastcamError(
                f"tags are {values!r}, expected names of classes or a 0/1 vector of length {len(self.classes)}"
            )
        return torch.tensor([float(value) for value in values])

    def _read_ahead(self, groups: Iterator[list[_Job]]) -> Iterator[list[_Job]]:
        """Groups with their views; threads read while the network computes, about two batches ahead."""
        with ThreadPoolExecutor(self.workers) as pool:
            ahead: deque[tuple[int, list[Future[_Job]]]] = deque()
            try:
                for group in groups:
                    pixels = sum(job.size[0] * job.size[1] for job in group if job.size)
                    ahead.append((pixels, [pool.submit(self._read, job) for job in group]))
                    while len(ahead) > 1 and sum(n for n, _ in ahead) > 2 * self.settings.batch_pixels:
                        yield [future.result() for future in ahead.popleft()[1]]
                while ahead:
                    yield [future.result() for future in ahead.popleft()[1]]
            finally:
                for _, futures in ahead:
                    for future in futures:
                        future.cancel()

    def _read(self, job: _Job) -> _Job:
        if job.source is not None:
            with self._guard(job, "read"):
                pixels = read_image(job.source, orient=self.settings.orient, max_pixels=self.settings.max_pixels)
                job.image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        if job.image is not None:
            with self._guard(job, "scale"):
                job.views = self._views(job.image)
        return job

    def _through_network(self, groups: Iterable[list[_Job]]) -> Iterator[_Job]:
        for group in groups:
            ready = [job for job in group if job.error is None]
            if not self._run(ready):
                for job in ready:  # one of them is at fault: it alone
                    self._run([job], alone=True)
            yield from group

    def _run(self, jobs: list[_Job], alone: bool = False) -> bool:
        """CAMs of images of one size. False where that failed and nobody knows which image is at fault."""
        if not jobs:
            return True
        start = time.perf_counter()
        try:
            views = [torch.stack(view) for view in zip(*(job.views for job in jobs), strict=True)]
            assert jobs[0].image is not None
            size, tags = jobs[0].image.shape[1:], [job.tags for job in jobs]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
                made = batch_cams(self.method, views, size, tags, 1, self.settings.tag_threshold)
            for job, camset in zip(jobs, made, strict=True):
                job.camset = camset
        except Exception as error:  # out of memory, an image too small for the network, sizes that changed meanwhile
            if len(jobs) > 1 and not alone:
                return False
            jobs[0].error = _reason(error)
        for job in jobs:
            job.views = []
        self._spent("network", jobs, time.perf_counter() - start)
        return True

    def _finish(self, job: _Job) -> tuple[int, Row]:
        """Labels and the output row of an image."""
        result: Row = {}
        label = scores = None
        if job.camset is not None:
            with self._guard(job, "label"):
                label, scores = label_and_scores(
                    job.camset, "this image", self.settings.rule, self.settings.crf, job.image
                )
                if not bool(torch.isfinite(scores).all()):
                    raise FastcamError("the network's maps are not finite; check the weights")
        if label is not None and scores is not None and job.camset is not None:
            with self._guard(job, "encode"):
                result = self._encode(job.camset, label, scores)
        empty = dict.fromkeys(self._columns())
        about = {"fingerprint": self.fingerprint, "seconds": round(job.seconds, 4), "error": job.error}
        return job.index, {**job.row, **empty, **result, **about}

    def _encode(self, camset: CamSet, label: Tensor, scores: Tensor) -> Row:
        labels, pixels = label.unique(return_counts=True)
        row: Row = {
            "mask": encode_label_png(label),
            "classes": [self.classes[k] for k in camset.keys.tolist()],
            "labels": labels.tolist(),
            "pixels": pixels.tolist(),
            "width": camset.size[1],
            "height": camset.size[0],
            "quality": expected_iou(label, scores, camset.keys),
        }
        if self.settings.cams:
            row["cam"] = encode_cams(reduced(camset, self.settings.stride))
        if self.settings.rle:
            row["rle"] = json.dumps(label_rle(label))
        return row

    @contextmanager
    def _guard(self, job: _Job, stage: str) -> Iterator[None]:
        """Times a stage of a job; what goes wrong in it becomes the job's error."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # never more than this one image, whatever it is
            job.error = _reason(error)
            job.source = job.image = job.camset = None
        self._spent(stage, [job], time.perf_counter() - start)

    def _spent(self, stage: str, jobs: list[_Job], seconds: float) -> None:
        for job in jobs:
            job.seconds += seconds / len(jobs)
        with self._lock:
            self.seconds[stage] += seconds


RESULTS = ("mask", "classes", "labels", "pixels", "width", "height", "quality")


class _Job:
    """A row on its way through the stages."""

    def __init__(self, index: int, row: Mapping[str, Any]) -> None:
        self.index = index
        self.row = dict(row)
        self.error: str | None = row.get("error")
        self.source: str | bytes | None = None
        self.size: tuple[int, int] | None = None
        self.tags: Tensor | None = None
        self.image: Tensor | None = None
        self.views: list[Tensor] = []
        self.camset: CamSet | None = None
        self.seconds = 0.0


def expected_iou(label: Tensor, scores: Tensor, keys: Tensor) -> float:
    r"""The quality of a mask: the mIoU it would have if the scores were the probabilities of the labels.

    With :math:`p_k` the scores of a pixel divided by their sum and :math:`M_k` the pixels of label k, the mean of
    :math:`\sum_{M_k} p_k / (|M_k| + \sum_{\bar M_k} p_k)` over the background and the classes that took part. 1 where
    every pixel is sure, low where scores are even, or where a class that should be there has no pixel. Ignored pixels
    (255) do not count.

    Args:
        label: uint8 `(H, W)`.
        scores: `(K, H, W)` that decided, background first; negative ones count as 0.
        keys: `(K - 1,)`, classes of the other channels.

    Returns:
        In [0, 1]; 0 where every pixel is ignored.
    """
    kept = label != IGNORE
    if not bool(kept.any()):
        return 0.0
    p = scores.clamp(min=0)
    p = p * (kept / p.sum(0).clamp(min=1e-12))
    values = torch.cat([keys.new_zeros(1), keys + 1]).to(torch.uint8)
    inside = label == values[:, None, None]
    hit = (p * inside).sum((1, 2), dtype=torch.float64)
    union = inside.sum((1, 2)) + p.sum((1, 2), dtype=torch.float64) - hit
    return round(float((hit / union.clamp(min=1e-12)).mean()), 6)


def reduced(camset: CamSet, stride: int) -> CamSet:
    """Maps of full size, resized bilinearly to `ceil(H / stride) x ceil(W / stride)`."""
    small = [-(-n // stride) for n in camset.size]

    def resize(maps: Tensor) -> Tensor:
        if len(maps) == 0:  # interpolate refuses empty batches
            return maps.new_zeros(0, *small)
        return F.interpolate(maps[None], small, mode="bilinear", align_corners=False)[0]

    background = None if camset.background is None else resize(camset.background[None])[0]
    return CamSet(camset.keys, resize(camset.maps), background, camset.size)


def _plain(value: Any) -> Any:
    """An array as a list: tables hold lists of any length in a column, but no arrays."""
    return value.tolist() if isinstance(value, np.ndarray | Tensor) else value


def _source(image: Any) -> str | bytes:
    """The image of a row, as `read_image` takes it."""
    if isinstance(image, bytes | bytearray | memoryview):
        if len(image) == 0:
            raise FastcamError("image has no bytes; replace or remove it")
        return bytes(image)
    if not isinstance(image, str | os.PathLike):
        raise FastcamError(f"image is a {type(image).__name__}, expected a path or bytes")
    path = os.fspath(image)
    try:
        status = Path(path).stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FastcamError(f"image {path} cannot be read: {reason}") from None
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise FastcamError(f"image {path} is no regular file; remove it")
    if status.st_size == 0:
        raise FastcamError(f"image {path} has no bytes; replace or remove it")
    return path


def _reason(error: Exception) -> str:
    """An exception in one line that any file can hold."""
    text = str(error) if isinstance(error, FastcamError) else f"{type(error).__name__}: {error}"
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())[:500]
