"""The probe pass: what a linear classifier makes of the features of a frozen network."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from fastcam.data.tags import image_id
from fastcam.errors import FastcamError
from fastcam.io import atomic_write, load_weights, open_pass
from fastcam.methods import create_method, load_method
from fastcam.metrics import iou
from fastcam.nn import create_backbone
from fastcam.pipelines._data import Data, Images, file_fingerprint, open_data
from fastcam.pipelines._parallel import add_time, ordered_map, withdraw
from fastcam.pipelines.make_cam import pick_device

Target = Literal["tags", "class", "pixels"]
METRIC = {"tags": "mAP", "class": "accuracy", "pixels": "mIoU"}
L2 = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FEATURES, REPLICATES = "features.npz", "replicates.npy"
IGNORED = 255
BATCH = 16  # images a call of the network


class Rows(NamedTuple):
    """Feature vectors of some images: one an image, or one a cell of their maps.

    Attributes:
        x: float32 `(N, D)`.
        y: what they show: float32 `(N, C)` tags, or int64 `(N,)`.
        image: int64 `(N,)`, the image of each row, counted from 0.
    """

    x: Tensor
    y: Tensor
    image: Tensor

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.image[-1]) + 1

    def of(self, chosen: Tensor) -> Rows:
        """The rows of the images where bool `(images,)` is set; they keep their images' numbers."""
        rows = chosen[self.image]
        return Rows(self.x[rows], self.y[rows], self.image[rows])


class ProbeResult(NamedTuple):
    """What a probe found.

    Attributes:
        out: the folder of scores.json.
        metric: mAP, accuracy or mIoU.
        score: on the test images, in 0..1.
        interval: 95 % bootstrap interval over test images.
        l2: strength that was used.
        difference: to the probe it was compared with, and its paired interval, or `None`.
    """

    out: Path
    metric: str
    score: float
    interval: tuple[float, float]
    l2: float
    difference: tuple[float, float, float] | None

    def __str__(self) -> str:
        low, high = self.interval
        text = f"{self.metric} {100 * self.score:.1f} (95 % {100 * low:.1f} to {100 * high:.1f}), l2 {self.l2:g}"
        if self.difference is not None:
            text += "; {:+.1f} ({:+.1f} to {:+.1f}) against the other".format(*(100 * x for x in self.difference))
        return text


def fit_linear(x: Tensor, y: Tensor, l2: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """The linear classifier of least loss, by L-BFGS in float64; it draws nothing.

    Minimises the mean over rows of the logistic losses of all classes (tags) or of the softmax loss (one class a row),
    plus `l2 / 2` times the squared norm of the weights; biases are free.

    Args:
        x: `(N, D)`.
        y: float `(N, C)` of 0 and 1, or int64 `(N,)`.
        l2: positive.
        num_classes: C.

    Returns:
        Weights `(C, D)` and biases `(C,)`, float64.
    """
    x = x.double()
    weight = x.new_zeros(num_classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=300, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight.T + bias
        if y.ndim == 2:
            loss = F.binary_cross_entropy_with_logits(logits, y.double(), reduction="sum") / len(x)
        else:
            loss = F.cross_entropy(logits, y)
        loss = loss + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def predict(train: Rows, test: Rows, l2: float, num_classes: int) -> Tensor:
    """Logits float64 `(N, C)` of test rows by a classifier of the training rows, both standardised by the latter."""
    mean, std = train.x.double().mean(0), train.x.double().std(0, correction=0).clamp(min=1e-8)
    weight, bias = fit_linear((train.x - mean) / std, train.y, l2, num_classes)
    return (test.x - mean) / std @ weight.T + bias


def weighted_average_precision(scores: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Average precision where every item counts as often as its weight says, for many sets of weights at once.

    Args:
        scores: `(N,)`; equal ones enter together.
        positive: bool `(N,)`.
        weights: `(R, N)`, not negative.

    Returns:
        `(R,)`; NaN where no positive item has a weight.
    """
    order = scores.argsort(descending=True)
    group = torch.unique_consecutive(scores[order], return_inverse=True)[1]
    empty = weights.new_zeros(len(weights), int(group[-1]) + 1)
    hits = empty.index_add(1, group, weights[:, order] * positive[order])
    precision = hits.cumsum(1) / empty.index_add(1, group, weights[:, order]).cumsum(1).clamp(min=1e-12)
    return (precision * hits).sum(1) / hits.sum(1)


def scores_of(logits: Tensor, rows: Rows, weights: Tensor, target: Target) -> Tensor:
    """mAP, accuracy or mean IoU where every image counts as often as its weight says.

    Args:
        logits: `(N, C)`.
        rows: what they belong to.
        weights: `(R, images)`.
        target: which of the three.

    Returns:
        float64 `(R,)`. Classes without a positive image, or without a pixel, do not count.
    """
    weights, num_classes = weights.double(), logits.shape[1]
    if target == "tags":
        columns = zip(logits.T, rows.y.T > 0, strict=True)
        each = [weighted_average_precision(score, positive, weights) for score, positive in columns]
        return torch.stack(each).nanmean(0)
    if target == "class":
        return weights @ (logits.argmax(1) == rows.y).double() / weights.sum(1)
    entry = (rows.image * num_classes + rows.y) * num_classes + logits.argmax(1)
    counts = torch.bincount(entry, minlength=weights.shape[1] * num_classes**2).double()
    confusion = (weights @ counts.view(weights.shape[1], -1)).unflatten(1, (num_classes, num_classes))
    return torch.stack([iou(matrix.long()).nanmean() for matrix in confusion]).double()


def folds_of(rows: Rows, folds: int, seed: int) -> Tensor:
    """The fold of every image int64 `(images,)`: random, and of classes, where images have one, even."""
    order = torch.randperm(rows.images, generator=torch.Generator().manual_seed(seed))
    if rows.y.ndim == 1 and len(rows.y) == rows.images:  # a class an image
        order = order[rows.y[order].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(rows.images) % folds
    return fold


def choose_l2(
    rows: Rows, grid: Sequence[float], folds: int, seed: int, num_classes: int, target: Target
) -> tuple[float, list[float]]:
    """The strength whose classifiers score best on the images they have not seen, the larger one of equals.

    Args:
        rows: of the training images.
        grid: strengths to try.
        folds: number of parts, each scored by a classifier of the others; at most the number of images.
        seed: of the parts.
        num_classes: C.
        target: what is scored, see :func:`scores_of`.

    Returns:
        The strength, and the score of each in `grid`.
    """
    fold = folds_of(rows, min(folds, rows.images), seed)
    every = torch.ones(1, rows.images)
    scores = []
    for l2 in grid:
        logits = torch.empty(len(rows.x), num_classes, dtype=torch.float64)
        for k in range(int(fold.max()) + 1):
            held = fold == k
            logits[held[rows.image]] = predict(rows.of(~held), rows.of(held), l2, num_classes)
        scores.append(float(scores_of(logits, rows, every, target)))
    return max(zip(scores, grid, strict=True))[1], scores


def image_rows(outputs: Sequence[Tensor], stages: Sequence[int]) -> Tensor:
    """Means over pixels of the chosen stage outputs `(B, D_i, h_i, w_i)`, side by side: `(B, D)`."""
    return torch.cat([outputs[i].float().mean((2, 3)) for i in stages], 1)


def pixel_rows(outputs: Sequence[Tensor], stages: Sequence[int]) -> Tensor:
    """The chosen stage outputs, bilinearly enlarged to the finest of all, side by side: `(B, D, h, w)`."""
    size = outputs[0].shape[2:]
    return torch.cat([F.interpolate(outputs[i].float(), size, mode="bilinear", align_corners=False) for i in stages], 1)


def frozen_network(
    weights: Path | None, backbone: str | None, random: bool, seed: int
) -> tuple[Callable[[Tensor], list[Tensor]], Any, dict[str, Any]]:
    """Features of a network, the network, and its record for pass.json; see `probe`."""
    from fastcam.pipelines._fit import seeded_init

    if weights is None and not (random and backbone is not None):
        raise FastcamError("weights are missing; give them, or backbone and --random true for a network without any")
    record: dict[str, Any] = {"backbone": backbone, "random": seed if random else None}
    saved: dict[str, Any] = {}
    if backbone is None:
        assert weights is not None
        saved = load_weights(weights)[1]
        if "method" not in saved:
            raise FastcamError(f"weights {weights} say nothing of their method; give backbone, the network's timm name")
        record["method"] = {key: saved[key] for key in ("method", "backbone", "config")}
    if weights is not None and not random:
        record["weights"] = file_fingerprint(weights)
    with seeded_init(seed):
        if backbone is not None:
            net: Any = create_backbone(backbone, output_stride=32, weights=None if random else weights)
            features: Any = net
        elif random:
            config = {key: value for key, value in saved["config"].items() if key != "backbone"}
            net = create_method(saved["method"], num_classes=saved["num_classes"], backbone=saved["backbone"], **config)
        else:
            assert weights is not None
            net = load_method(weights)
    if backbone is None:
        if net.kind != "pretraining":
            raise FastcamError(f"weights {weights} are of a {net.kind} ({net.name}); give backbone, its network's name")
        features = net.features
    return features, net.eval(), record


def open_splits(data: Data, test: str, target: Target) -> tuple[list[tuple[Images, str]], list[tuple[Images, str]]]:
    """The training and the test images, each as a data set and an id; see `probe`."""
    need: dict[str, Any] = {"masks": target == "pixels", "need_tags": target != "pixels"}
    if data.images is None:
        parts = [open_data(dataclasses.replace(data, split=split), **need) for split in (data.split, test)]
        train, held = ([(part, name) for name in part.ids] for part in parts)
    else:
        if not Path(test).is_file():
            raise FastcamError(f"test is '{test}', expected a file with the path of a test image in every line")
        lines = Path(test).read_text(encoding="utf-8").split("\n")
        names = {image_id(line.strip()) for line in lines if line.strip()}
        part = open_data(data, **need)
        if lost := sorted(names - set(part.ids)):
            raise FastcamError(
                f"test names {lost[0]}, which is no image in {data.images}; give paths below that folder"
            )
        train = [(part, name) for name in part.ids if name not in names]
        held = [(part, name) for name in part.ids if name in names]
        if target != "pixels" and part.tags is None:
            raise FastcamError(f"the images in {data.images} have no tags; give data.tags")
    if both := sorted({name for _, name in train} & {name for _, name in held}):
        raise FastcamError(f"image {both[0]} is both a training and a test image; give lists without common images")
    if len(train) < 2 or not held:
        raise FastcamError(f"there are {len(train)} training and {len(held)} test images, expected at least 2 and 1")
    return train, held


@torch.inference_mode()
def compute_rows(
    items: Sequence[tuple[Images, str]],
    features: Callable[[Tensor], list[Tensor]],
    net: Any,
    size: int,
    stages: Sequence[int],
    target: Target,
    device: torch.device,
    workers: int,
) -> Rows:
    """Rows of images that are resized to `size` x `size`; see `probe`."""
    mean, std = (list(values) for values in net.normalize)
    num_classes = len(items[0][0].classes)

    def read(item: tuple[Images, str]) -> tuple[Tensor, Tensor]:
        part, name = item
        found = part.by_id(name)
        image = TF.resize(
            found["image"].as_subclass(Tensor), [size, size], v2.InterpolationMode.BICUBIC, antialias=True
        )
        image = TF.normalize(TF.to_dtype(image, torch.float32, scale=True), mean, std)
        if target == "pixels":
            return image, found["mask"].as_subclass(Tensor)
        if target == "class" and int(found["tags"].sum()) != 1:
            raise FastcamError(
                f"image {name} has {int(found['tags'].sum())} tags, expected one class an image; use target tags"
            )
        return image, found["tags"] if target == "tags" else found["tags"].argmax()

    def compute(batch: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        outputs = features(torch.stack([image for image, _ in batch]).to(device))
        if bad := [i for i in stages if not -len(outputs) <= i < len(outputs)]:
            raise FastcamError(f"stages has {bad[0]}, but the network has {len(outputs)} outputs, counted from 0")
        chosen = stages or range(len(outputs))
        if target != "pixels":
            yield image_rows(outputs, chosen).cpu(), torch.stack([y for _, y in batch])
            return
        for maps, (_, mask) in zip(pixel_rows(outputs, chosen).cpu(), batch, strict=True):
            y = F.interpolate(mask[None, None].float(), maps.shape[1:], mode="nearest-exact").long().flatten()
            known = (y != IGNORED) & (y <= num_classes)
            yield maps.flatten(1).T[known], y[known]

    xs, ys, batch = [], [], []
    bar = {"desc": "probe", "unit": "image", "total": len(items), "disable": None}
    for number, item in enumerate(tqdm(ordered_map(read, items, workers), **bar), 1):
        batch.append(item)
        if len(batch) == BATCH or number == len(items):
            for x, y in compute(batch):
                xs.append(x)
                ys.append(y)
            batch = []
    if target != "pixels":
        return Rows(torch.cat(xs), torch.cat(ys), torch.arange(len(items)))
    counts = torch.tensor([len(x) for x in xs])
    counts = counts[counts > 0]  # an image of nothing but ignored pixels teaches and tests nothing
    if not len(counts):
        raise FastcamError(f"the masks of {len(items)} images have no labelled pixel; check data.masks and classes")
    return Rows(torch.cat(xs), torch.cat(ys), torch.arange(len(counts)).repeat_interleave(counts))


def probe(
    data: Data,
    test: str,
    out: Path,
    weights: Path | None = None,
    backbone: str | None = None,
    random: bool = False,
    target: Target = "tags",
    size: int = 224,
    stages: tuple[int, ...] = (),
    l2: tuple[float, ...] = L2,
    folds: int = 5,
    bootstrap: int = 2000,
    against: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 2,
) -> ProbeResult:
    """Scores the features of a frozen network by a linear classifier that is trained on them.

    Images are resized to a square and seen once, without augmentation. Features are kept in features.npz, so that
    another l2, folds, bootstrap or against costs no network. The classifier is logistic, of standardised features; the
    same command gives the same numbers. Writes scores.json.

    Args:
        data: the training images. With images, those that test does not name.
        test: the test images: a split like data.split, or for images a file with a path below that folder in every
            line.
        out: output folder.
        weights: of a trained pre-training method such as mevt; with backbone any that this network can start from.
        backbone: timm name of a network, where the weights do not say it.
        random: a network of that architecture with random weights drawn from seed instead: the baseline.
        target: tags (several an image, mAP), class (one tag an image, accuracy), or pixels (labels of masks at the
            resolution of the finest output, mean IoU).
        size: side that images are resized to, in pixels.
        stages: numbers of the outputs that are used, finest first, -1 for the coarsest; none for all. Their means are
            joined; for pixels they are enlarged to the finest.
        l2: strengths of the penalty; of several, the one that scores best in cross-validation of the training images.
        folds: of the cross-validation.
        bootstrap: resamplings of the test images for the 95 % interval.
        against: output folder of another probe of the same test images; the interval of the difference is paired.
        seed: of random weights, folds and resamplings.
        device: auto, cpu or cuda.
        workers: threads that read images.

    Returns:
        Score and interval, which are printed.
    """
    for name, value, least in (("size", size, 1), ("folds", folds, 2), ("bootstrap", bootstrap, 1)):
        if value < least:
            raise FastcamError(f"{name} is {value}, expected at least {least}")
    if not l2 or min(l2) <= 0:
        raise FastcamError(f"l2 is {l2}, expected one or more positive numbers")
    features, net, record = frozen_network(weights, backbone, random, seed)
    items = open_splits(data, test, target)
    classes = list(items[0][0][0].classes)
    num_classes = len(classes) + (target == "pixels")
    record |= {"pass": "probe", "data": dataclasses.asdict(data), "test": test, "target": target, "classes": classes}
    open_pass(out, {**record, "size": size, "stages": stages})
    if not (out / FEATURES).is_file():
        on = net.to(pick_device(device), memory_format=torch.channels_last)
        start = time.perf_counter()
        how = (features, on, size, stages, target, pick_device(device), workers)
        try:
            _save_rows(out / FEATURES, [compute_rows(part, *how) for part in items])
        except BaseException:
            withdraw(out)
            raise
        add_time(out, sum(map(len, items)), time.perf_counter() - start)
    train, held = _load_rows(out / FEATURES)
    strength, table = (l2[0], []) if len(l2) == 1 else choose_l2(train, l2, folds, seed, num_classes, target)
    logits = predict(train, held, strength, num_classes)
    score = float(scores_of(logits, held, torch.ones(1, held.images), target))
    draws = torch.randint(held.images, (bootstrap, held.images), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(bootstrap, held.images).scatter_add_(1, draws, torch.ones(draws.shape))
    replicates = scores_of(logits, held, counts, target)
    result: dict[str, Any] = {
        "metric": METRIC[target],
        "score": score,
        "interval": _interval(replicates),
        "l2": strength,
        "cross_validation": dict(zip(map(str, l2), table, strict=False)),
        "train_images": train.images,
        "test_images": held.images,
        "features": train.x.shape[1],
        "resampled": {"test": test, "target": target, "images": held.images, "bootstrap": bootstrap, "seed": seed},
    }
    difference = None
    if against is not None:
        other, theirs = _read_other(against, result["resampled"])
        between = replicates - theirs
        difference = (score - other, *_interval(between))
        result["against"] = {"probe": str(against), "difference": difference[0], "interval": difference[1:]}
    with atomic_write(out / REPLICATES) as temporary, temporary.open("wb") as file:
        np.save(file, replicates.numpy())
    with atomic_write(out / "scores.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    return ProbeResult(out, METRIC[target], score, _interval(replicates), strength, difference)


def _interval(values: Tensor) -> tuple[float, float]:
    low, high = np.nanquantile(values.numpy(), [0.025, 0.975])
    return float(low), float(high)


def _save_rows(path: Path, parts: Sequence[Rows]) -> None:
    arrays = {f"{name}_{i}": x.numpy() for i, rows in enumerate(parts) for name, x in rows._asdict().items()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _load_rows(path: Path) -> list[Rows]:
    with np.load(path) as stored:
        return [Rows(*(torch.from_numpy(stored[f"{name}_{i}"]) for name in Rows._fields)) for i in range(2)]


def _read_other(folder: Path, resampled: dict[str, Any]) -> tuple[float, Tensor]:
    """Score and replicates of another probe of the same resamplings."""
    if not (folder / "scores.json").is_file():
        raise FastcamError(f"against is {folder}, which holds no scores.json; give the output folder of another probe")
    other = json.loads((folder / "scores.json").read_text())
    if other["resampled"] != resampled:
        changed = next(key for key in resampled if other["resampled"].get(key) != resampled[key])
        raise FastcamError(f"against {folder} has another {changed}, {other['resampled'].get(changed)}; run it alike")
    return other["score"], torch.from_numpy(np.load(folder / REPLICATES))
