"""Episodes of methods that segment."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fastcam.data.few_shot import (
    Episode,
    class_areas,
    draw_episodes,
    episode_mask,
    members,
    read_episodes,
    write_episodes,
)
from fastcam.errors import FastcamError
from fastcam.io import atomic_write, open_pass, write_label_png
from fastcam.metrics import (
    bootstrap_sums,
    class_sums,
    episode_counts,
    few_shot_scores,
    paired_difference,
    quantile_interval,
)
from fastcam.nn.losses import resize
from fastcam.pipelines._data import Data, Images, file_fingerprint, load_trained, open_data
from fastcam.pipelines._parallel import ordered_map, run_pass
from fastcam.pipelines.make_cam import pick_device

LIST, RESULT, SCORES = "list.json", ".episode.json", "scores.json"


class Views(NamedTuple):
    """One episode as the network sees it, and the query's true mask.

    Attributes:
        query: float32 `(1, 3, S, S)`.
        support: `(1, K, 3, S, S)`.
        masks: uint8 `(1, K, S, S)`.
        target: uint8 `(H, W)`, 1 the class, 255 unknown.
    """

    query: Tensor
    support: Tensor
    masks: Tensor
    target: Tensor


def fit_square(
    image: Tensor, mask: Tensor, size: int, normalize: tuple[Sequence[float], Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """An image whose longer side is brought to a length, and filled up to a square on its right and below.

    Args:
        image: uint8 `(3, H, W)`.
        mask: uint8 `(H, W)`.
        size: S.
        normalize: mean and standard deviation.

    Returns:
        float32 `(3, S, S)`, 0 (the mean colour) where it is filled up, and the mask, 255 there.
    """
    height, width = image.shape[1:]
    scale = size / max(height, width)
    at = [max(1, round(height * scale)), max(1, round(width * scale))]
    small = F.resize(image, at, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    view = F.normalize(F.to_dtype(small, torch.float32, scale=True), *(list(values) for values in normalize))
    border = [0, 0, size - at[1], size - at[0]]
    labels = F.resize(tv_tensors.Mask(mask), at, interpolation=v2.InterpolationMode.NEAREST)
    return F.pad(view, border), F.pad(labels, border, fill=255).as_subclass(Tensor)


def enlarge(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Scores `(1, 2, S, S)` of a `fit_square` image as labels uint8 `(H, W)` of the image itself."""
    longer = max(size)
    return resize(scores, (longer, longer), align_corners=True)[0, :, : size[0], : size[1]].argmax(0).byte()


def read_views(dataset: Images, episode: Episode, size: int, normalize: Any) -> Views:
    """Reads the images of an episode.

    Raises:
        FastcamError: an image in which the class has no pixel.
    """
    label = dataset.classes.index(episode.label) + 1

    def one(image_id: str) -> tuple[Tensor, Tensor, Tensor]:
        item = dataset.by_id(image_id)
        mask = episode_mask(item["mask"].as_subclass(Tensor), label)
        if image_id != episode.query and not bool((mask == 1).any()):
            raise FastcamError(
                f"support image {image_id} of an episode of {episode.label!r} has no pixel of it; draw the list again"
            )
        return *fit_square(item["image"].as_subclass(Tensor), mask, size, normalize), mask

    query, _, target = one(episode.query)
    supports = [one(image_id) for image_id in episode.supports]
    images, masks = (torch.stack([support[i] for support in supports])[None] for i in (0, 1))
    return Views(query[None], images, masks, target)


def segment_episodes(
    data: Data,
    weights: Path,
    out: Path,
    *,
    shots: int,
    count: int,
    seed: int,
    names: Sequence[str],
    episode_list: Path | None,
    size: int,
    predictor: str,
    threshold: float,
    predictions: bool,
    against: Path | None,
    device: str,
    workers: int,
) -> dict[str, Any]:
    """The few-shot pass of methods that segment; arguments as of :func:`fastcam.pipelines.few_shot.few_shot`."""
    if size < 1:
        raise FastcamError(f"size is {size}, expected at least 1")
    network, known = load_trained(weights, "few-shot")
    dataset = open_data(data, known, masks=True, need_tags=False)
    split = network.split(dataset.classes)
    tested = tuple(names) or split.novel
    for name in tested:
        if name not in dataset.classes:
            raise FastcamError(f"class {name!r} is not a class of the data; known are {', '.join(dataset.classes)}")
    record: dict[str, Any] = {
        "pass": "few-shot",
        "data": dataclasses.asdict(data),
        "weights": file_fingerprint(weights),
        "predictor": predictor if predictor != "prior" else f"prior at {threshold}",
        "size": size,
        "classes": list(tested),
    }
    given = None if episode_list is None else read_episodes(episode_list)
    if episode_list is None:
        record |= {"shots": shots, "episodes": count, "seed": seed}
    else:
        record["episode_list"] = file_fingerprint(episode_list)
    if not (out / LIST).is_file():
        if given is None:
            number = [dataset.classes.index(name) for name in tested]
            own = members(class_areas(dataset), number, network.test_pixels())
            by_name = {dataset.classes[c]: [dataset.ids[i] for i in images] for c, images in own.items()}
            chosen = draw_episodes(by_name, shots, count, seed)
        else:
            chosen = given
        _check_list(chosen, tested, set(dataset.ids))
        open_pass(out, record)
        write_episodes(out / LIST, chosen)
    open_pass(out, record)
    chosen = read_episodes(out / LIST)
    network.to(pick_device(device), memory_format=torch.channels_last)
    scores_of = {
        "network": network.predict,
        "prototype": getattr(network, "prototype_scores", None),
        "prior": getattr(network, "prior_scores", None) and (lambda *views: network.prior_scores(*views, threshold)),
    }.get(predictor)
    if scores_of is None:
        raise FastcamError(f"predictor is {predictor!r}, which method {network.name} does not have; use network")
    number_of = {f"{i:05d}": i for i in range(len(chosen))}

    def read(name: str) -> tuple[str, Views]:
        return name, read_views(dataset, chosen[number_of[name]], size, network.normalize)

    @torch.inference_mode()
    def compute(job: tuple[str, Views]) -> tuple[str, Tensor, Tensor]:
        name, views = job
        where = next(network.parameters()).device
        scores = scores_of(*(part.to(where) for part in views[:3]))
        found = enlarge(scores.float(), views.target.shape).cpu()
        return name, found, episode_counts(found, views.target)

    def write(done: tuple[str, Tensor, Tensor]) -> None:
        name, found, counts = done
        if predictions:
            write_label_png(out / f"{name}.png", found)
        with atomic_write(out / f"{name}{RESULT}") as temporary:  # last: an episode with a result is finished
            temporary.write_text(json.dumps({**chosen[number_of[name]]._asdict(), "counts": counts.tolist()}) + "\n")

    def work(todo: Iterable[str]) -> Iterator[None]:
        return ordered_map(write, map(compute, ordered_map(read, todo, workers)), workers)

    run_pass("few-shot", out, RESULT, list(number_of), work)
    scores = {
        "data": record["data"],
        "method": network.name,
        "predictor": record["predictor"],
        "shots": len(chosen[0].supports),
        "episodes": len(chosen),
        "size": size,
        **summarize(*read_counts(out, chosen, tested), tested),
    }
    if against is not None:
        scores |= {"against": str(against), "difference": compare(out, against, chosen, tested)}
    with atomic_write(out / SCORES) as temporary:
        temporary.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def read_counts(out: Path, episodes: Sequence[Episode], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Counts int64 `(N, 2, 2)` of the episodes of a finished run, and the place in `names` of their classes `(N,)`.

    Raises:
        FastcamError: an episode is missing, or is another one.
    """
    counts = []
    for i, episode in enumerate(episodes):
        path = out / f"{i:05d}{RESULT}"
        try:
            row = json.loads(path.read_text())
        except (OSError, ValueError):
            raise FastcamError(f"{path} is missing or damaged; finish that few-shot pass first") from None
        if (row["label"], row["query"], tuple(row["supports"])) != episode:
            raise FastcamError(f"{path} is of another episode; give runs on one episode list")
        counts.append(row["counts"])
    return torch.tensor(counts), torch.tensor([list(names).index(episode.label) for episode in episodes])


def summarize(counts: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Scores and their 95 % intervals, as scores.json holds them; null for a class without a pixel."""
    plain = few_shot_scores(class_sums(counts, labels, len(names)))
    drawn = few_shot_scores(bootstrap_sums(counts, labels, len(names)))
    return {
        "iou": {name: _number(value) for name, value in zip(names, plain.iou.tolist(), strict=True)},
        "mean_iou": _number(float(plain.mean_iou)),
        "fb_iou": _number(float(plain.fb_iou)),
        "intervals": {
            "iou": {name: _numbers(quantile_interval(drawn.iou[:, k])) for k, name in enumerate(names)},
            "mean_iou": _numbers(quantile_interval(drawn.mean_iou)),
            "fb_iou": _numbers(quantile_interval(drawn.fb_iou)),
        },
    }


def compare(out: Path, against: Path, episodes: Sequence[Episode], names: Sequence[str]) -> dict[str, Any]:
    """How much better a run is than another on the same episodes, with the 95 % interval of the difference."""
    counts, labels = read_counts(out, episodes, names)
    others, _ = read_counts(against, episodes, names)
    return {name: _numbers(values) for name, values in paired_difference(counts, others, labels, len(names)).items()}


def _check_list(episodes: Sequence[Episode], names: Sequence[str], ids: set[str]) -> None:
    for episode in episodes:
        if episode.label not in names:
            raise FastcamError(
                f"the episode list asks for class {episode.label!r}, but tested are {', '.join(names)}; give classes"
            )
        missing = next((image_id for image_id in (episode.query, *episode.supports) if image_id not in ids), None)
        if missing is not None:
            raise FastcamError(f"the episode list names image {missing!r}, which the data lack; give the data it is of")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_number(value) for value in values]
