"""The objects of one image on disk: COCO's result records, masks run-length encoded."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io.atomic import atomic_write


@dataclass(frozen=True, eq=False)
class Instances:
    """Objects found in one image.

    Attributes:
        masks: bool `(N, H, W)`.
        classes: int64 `(N,)`, counted from 0.
        scores: float32 `(N,)`.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """

    masks: Tensor
    classes: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        masks, count = self.masks, self.masks.shape[:1]
        if masks.ndim != 3 or masks.dtype != torch.bool or self.classes.shape != count or self.scores.shape != count:
            raise ValueError(
                "Instances: expected masks bool (N, H, W), classes (N,) and scores (N,), got "
                f"{masks.dtype} {tuple(masks.shape)}, {tuple(self.classes.shape)} and {tuple(self.scores.shape)}"
            )


def encode_rle(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of 0, 1, 0, ... in a mask `(H, W)` read column by column: COCO's uncompressed encoding.

    Example:
        >>> encode_rle(np.array([[0, 1], [1, 1]]))
        [1, 3]
    """
    flat = np.asarray(mask, bool).T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    starts = [0, 0] if len(flat) and flat[0] else [0]  # the first run counts zeros
    return np.diff([*starts, *ends, len(flat)]).tolist()


def decode_rle(counts: list[int], size: tuple[int, int]) -> np.ndarray:
    """The bool mask `(H, W)` of `encode_rle`'s counts.

    Raises:
        ValueError: the runs do not add up to `H * W`.
    """
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size[1], size[0]).T


def save_instances(path: str | os.PathLike[str], image_id: str, instances: Instances) -> None:
    """Writes the objects of an image as JSON, atomically: `size`, and a list `annotations` of COCO's result records.

    A record has `image_id`, `category_id` (class + 1, the label), `score`, and `segmentation` with `size` and
    uncompressed `counts`, which `pycocotools.mask.frPyObjects` compresses.

    Raises:
        FastcamError: the file could not be written.
    """
    objects = zip(instances.masks.numpy(), instances.classes.tolist(), instances.scores.tolist(), strict=True)
    records: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": k + 1,
            "score": round(score, 6),
            "segmentation": {"size": list(mask.shape), "counts": encode_rle(mask)},
        }
        for mask, k, score in objects
    ]
    size = list(instances.masks.shape[1:])
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"size": size, "annotations": records}) + "\n")


def load_instances(path: str | os.PathLike[str]) -> Instances:
    """Reads what `save_instances` wrote.

    Raises:
        FastcamError: the file is missing, damaged, or not such a file.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        height, width = content["size"]
        records = content["annotations"]
        masks = np.zeros((len(records), height, width), bool)
        for mask, record in zip(masks, records, strict=True):
            mask[:] = decode_rle(record["segmentation"]["counts"], (height, width))
        classes = torch.tensor([int(record["category_id"]) - 1 for record in records], dtype=torch.int64)
        scores = torch.tensor([float(record["score"]) for record in records])
        return Instances(torch.from_numpy(masks), classes, scores)
    except FileNotFoundError:
        raise FastcamError(
            f"instances {path} do not exist; write them first, by refine or make-cam with --instances"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastcamError(
            f"instances {path} are damaged or not in COCO's form ({error!r}); remove them and run the pass again"
        ) from error
