"""Few-shot classification scored on fixed episodes: every image is embedded once, episodes are gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastcam.data import class_members, fixed_episodes
from fastcam.errors import FastcamError
from fastcam.methods.ssl_few_shot import prototype_logits
from fastcam.metrics import mean_interval
from fastcam.pipelines._data import Images

DISTANCES = 2**24  # differences of features that are held at a time


@torch.inference_mode()
def embed_images(method: Any, dataset: Images, batch_size: int = 64) -> Tensor:
    """The embeddings float32 `(len, r)` of all images, on the CPU.

    Args:
        method: with `embed` and `test_transform` (amdim, ssl_few_shot); it is put into eval mode.
        dataset: without a transform.
        batch_size: images at a time.

    Raises:
        FastcamError: embeddings that are not finite.
    """
    method.eval()
    like = next(method.parameters())
    transform = method.test_transform()

    def collate(items: list[dict[str, Any]]) -> Tensor:
        return torch.stack([transform(item)["image"] for item in items])

    loader: DataLoader[Any] = DataLoader(dataset, batch_size, collate_fn=collate)
    parts = [method.embed(images.to(like)).float().cpu() for images in loader]
    embeddings = torch.cat(parts)
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
    count, rows, way = episodes.shape
    queries = rows - shot
    labels = torch.arange(way).repeat(queries)
    step = max(1, DISTANCES // (queries * way * way * embeddings.shape[1]))
    shares = []
    for start in range(0, count, step):
        features = embeddings[episodes[start : start + step].flatten(1)]
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
        `"accuracy"` and `"interval"`, the half width of its 95 % confidence interval, in percent; `"chance"`, 100 / N;
        `"way"`, `"shot"`, `"queries"`, `"episodes"`, `"seed"`, `"images"` and `"classes"` of the data set.

    Raises:
        FastcamError: fewer classes or images than an episode takes, an image without a class or of several, or numbers
            below 1.
    """
    numbers = {"way": way, "shot": shot, "queries": queries, "episodes": episodes}
    for name, number in numbers.items():
        if number < 1:
            raise FastcamError(f"{name} is {number}, expected at least 1")
    members = class_members(dataset, shot + queries)
    drawn = fixed_episodes(members, way, shot + queries, episodes, seed)
    if embeddings is None:
        embeddings = embed_images(method, dataset)
    mean, interval = mean_interval(episode_accuracies(embeddings, drawn, shot))
    scores = {"accuracy": 100 * mean, "interval": 100 * interval, "chance": 100 / way}
    return {**scores, **numbers, "seed": seed, "images": len(dataset), "classes": len(members)}
