"""Episodes of methods that classify: every image is embedded once, episodes are gathered from the embeddings."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcam.data.class_episodes import class_members, fixed_episodes, read_class_episodes, write_class_episodes
from fastcam.errors import FastcamError
from fastcam.io import atomic_write, open_pass
from fastcam.methods import load_method
from fastcam.methods.ssl_few_shot import prototype_logits
from fastcam.metrics import mean_interval
from fastcam.pipelines._data import Data, Images, file_fingerprint, open_data
from fastcam.pipelines._parallel import add_time, ordered_map
from fastcam.pipelines.make_cam import pick_device

LIST, ACCURACIES, SCORES = "list.json", "accuracies.json", "scores.json"
BATCH = 64  # images embedded at a time
DIFFERENCES = 2**24  # of features, held at a time


@torch.inference_mode()
def embed_images(method: Any, dataset: Images, workers: int = 2) -> Tensor:
    """The embeddings float32 `(len, r)` of all images, on the CPU.

    Args:
        method: with `embed` and `test_transform` (amdim, ssl_few_shot); it is put into eval mode.
        dataset: without a transform.
        workers: threads that read images.

    Raises:
        FastcamError: an embedding that is not finite.
    """
    method.eval()
    like, transform = next(method.parameters()), method.test_transform()
    starts = range(0, len(dataset), BATCH)

    def read(start: int) -> Tensor:
        numbers = range(start, min(start + BATCH, len(dataset)))
        return torch.stack([transform(dataset[i])["image"] for i in numbers])

    def embed(images: Tensor) -> Tensor:
        return method.embed(images.to(like)).float().cpu()

    embeddings = torch.cat(list(map(embed, ordered_map(read, starts, workers))))
    finite = embeddings.isfinite().all(1)
    if not finite.all():
        first = dataset.ids[int((~finite).nonzero()[0])]
        raise FastcamError(f"the embedding of image {first!r} is not finite; train the method again")
    return embeddings


@torch.inference_mode()
def episode_accuracies(embeddings: Tensor, episodes: Tensor, shot: int) -> Tensor:
    """The share of queries whose nearest prototype, by squared distance, is that of their class.

    Args:
        embeddings: `(M, r)`.
        episodes: int64 `(E, K + Q, N)` of image numbers, as `fastcam.data.fixed_episodes` draws them.
        shot: K; the rest are queries.

    Returns:
        float64 `(E,)`. Of equally near prototypes the first counts.
    """
    way, queries = episodes.shape[2], episodes.shape[1] - shot
    labels = torch.arange(way).repeat(queries)
    step = max(1, DIFFERENCES // (queries * way * way * embeddings.shape[1]))
    shares = []
    for some in episodes.split(step):
        features = embeddings[some.flatten(1)]
        logits = prototype_logits(features[:, : shot * way], features[:, shot * way :], way)
        shares.append((logits.argmax(2) == labels).double().mean(1))
    return torch.cat(shares)


def few_shot_accuracy(
    method: Any,
    dataset: Images,
    *,
    way: int = 5,
    shot: int = 1,
    queries: int = 15,
    episodes: int = 600,
    seed: int = 0,
    embeddings: Tensor | None = None,
) -> dict[str, Any]:
    """Accuracy of nearest prototypes over episodes that depend on the data set, the numbers and the seed alone.

    Args:
        method: trained; amdim (its features as they are) or ssl_few_shot.
        dataset: images of one class each, of classes that the training has not seen.
        way: classes an episode, N.
        shot: labelled images of each, K.
        queries: images of each that are classified.
        episodes: their number. The authors take 10,000.
        seed: of the list of episodes.
        embeddings: what :func:`embed_images` gave for these images; computed by default.

    Returns:
        `"accuracy"` and `"interval"`, the half width of its 95 % confidence interval, as shares of 1; `"ways"`,
        `"shots"`, `"queries"` and `"episodes"`.

    Raises:
        FastcamError: fewer classes or images than an episode takes, an image without a class or of several, or numbers
            below 1.
    """
    drawn = _draw(dataset, None, way, shot, queries, episodes, seed)
    if embeddings is None:
        embeddings = embed_images(method, dataset)
    return _score(episode_accuracies(embeddings, drawn, shot), drawn, shot)


def classify_episodes(
    data: Data,
    weights: Path,
    out: Path,
    *,
    shots: int,
    ways: int,
    queries: int,
    count: int,
    seed: int,
    names: Sequence[str] | None,
    episode_list: Path | None,
    against: Path | None,
    device: str,
    workers: int,
) -> dict[str, Any]:
    """The few-shot pass of methods that classify; arguments as of :func:`fastcam.pipelines.few_shot.few_shot`."""
    network: Any = load_method(weights)
    dataset = open_data(data)
    record: dict[str, Any] = {
        "pass": "few-shot",
        "data": dataclasses.asdict(data),
        "weights": file_fingerprint(weights),
        "classes": list(names or dataset.classes),
    }
    if episode_list is None:
        record |= {"shots": shots, "ways": ways, "queries": queries, "episodes": count, "seed": seed}
        drawn = _draw(dataset, names, ways, shots, queries, count, seed)
    else:
        record["episode_list"] = file_fingerprint(episode_list)
        drawn, shots = read_class_episodes(episode_list, dataset.ids)
    open_pass(out, record)
    if not (out / ACCURACIES).is_file():
        start = time.perf_counter()
        write_class_episodes(out / LIST, drawn, shots, dataset.ids)
        network.to(pick_device(device), memory_format=torch.channels_last)
        accuracies = episode_accuracies(embed_images(network, dataset, workers), drawn, shots)
        with atomic_write(out / ACCURACIES) as temporary:
            temporary.write_text(json.dumps(accuracies.tolist()) + "\n")
        add_time(out, len(drawn), time.perf_counter() - start)
    accuracies = _read_accuracies(out)
    scores = {"data": record["data"], "method": network.name, **_score(accuracies, drawn, shots)}
    if against is not None:
        if _list_text(against) != _list_text(out):
            raise FastcamError(f"{against} is of other episodes than {out}; give its list.json as episode_list")
        mean, half = mean_interval(accuracies - _read_accuracies(against))
        scores |= {"against": str(against), "difference": mean, "difference_interval": half}
    with atomic_write(out / SCORES) as temporary:
        temporary.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def _draw(
    dataset: Images, names: Sequence[str] | None, way: int, shot: int, queries: int, episodes: int, seed: int
) -> Tensor:
    for name, number in {"ways": way, "shots": shot, "queries": queries}.items():
        if number < 1:
            raise FastcamError(f"{name} is {number}, expected at least 1")
    members = class_members(dataset, shot + queries, names)
    return fixed_episodes(members, way, shot + queries, episodes, seed)


def _score(accuracies: Tensor, episodes: Tensor, shot: int) -> dict[str, Any]:
    mean, half = mean_interval(accuracies)
    count, rows, way = episodes.shape
    numbers = {"ways": way, "shots": shot, "queries": rows - shot, "episodes": count}
    return {"accuracy": mean, "interval": half, **numbers}


def _list_text(folder: Path) -> str:
    path = folder / LIST
    if not path.is_file():
        raise FastcamError(f"{path} does not exist; give the folder of a finished few-shot pass of a classifier")
    return path.read_text()


def _read_accuracies(folder: Path) -> Tensor:
    try:
        return torch.tensor(json.loads((folder / ACCURACIES).read_text()), dtype=torch.float64)
    except (OSError, ValueError, TypeError):
        raise FastcamError(
            f"{folder / ACCURACIES} is missing or damaged; finish that few-shot pass first, or remove its folder"
        ) from None
