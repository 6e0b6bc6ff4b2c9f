"""The make-cam pass: images and a trained method to multi-scale CAMs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcam.data import multi_scale
from fastcam.errors import FastcamError
from fastcam.io import CamSet, open_pass, save_cams
from fastcam.pipelines._data import Data, file_fingerprint, load_trained, open_data
from fastcam.pipelines._parallel import PassResult, ordered_map, run_pass

SCALES = (1.0, 0.5, 1.5, 2.0)  # of IRN and most systems after it


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU where there is one.

    Raises:
        FastcamError: no such device.
    """
    try:
        device = torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise FastcamError(f"device {name} cannot be used: {reason}; choose auto, cpu or cuda") from None
    return device


def image_cams(
    method: Any, views: list[Tensor], size: Sequence[int], tags: Tensor | None, stride: int, tag_threshold: float
) -> CamSet:
    """`batch_cams` of one image: views `(3, h_s, w_s)`, tags `(C,)` or `None`."""
    return batch_cams(method, [view[None] for view in views], size, [tags], stride, tag_threshold)[0]


@torch.inference_mode()
def batch_cams(
    method: Any,
    views: Sequence[Tensor],
    size: Sequence[int],
    tags: Sequence[Tensor | None],
    stride: int,
    tag_threshold: float,
) -> list[CamSet]:
    """CAMs of images of one size from their views.

    Args:
        method: a trained CAM method, on its device.
        views: the B images at several scales, normalised, `(B, 3, h_s, w_s)` each.
        size: `(H, W)` of the images.
        tags: of each image float `(C,)`; `None` takes the classes that the method's classifier gives at least
            `tag_threshold`.
        stride: maps are stored at `ceil(H / stride) x ceil(W / stride)`.
        tag_threshold: a probability.

    Returns:
        One an image, on the CPU.
    """
    device = next(method.parameters()).device
    batch = [view.to(device, non_blocking=True) for view in views]
    if any(tag is None for tag in tags):
        probability = torch.stack([method.tag_logits(view) for view in batch]).sigmoid().mean(0).cpu()
        found = (probability >= tag_threshold).float()
        tags = [own if tag is None else tag for tag, own in zip(tags, found, strict=True)]
    known = torch.stack([tag for tag in tags if tag is not None])
    keys = known.any(0).nonzero().flatten()
    small = (-(-size[0] // stride), -(-size[1] // stride))
    fused = method.fused_cams(batch, small, known.to(device), keys.to(device))
    maps = fused.maps.float().cpu()
    background = None if fused.background is None else fused.background.float().cpu()
    return [
        CamSet(keys[own], maps[i, own], None if background is None else background[i], (size[0], size[1]))
        for i, own in enumerate(known[:, keys] > 0)
    ]


def make_cam(
    data: Data,
    weights: Path,
    out: Path,
    scales: tuple[float, ...] = SCALES,
    stride: int = 4,
    tag_threshold: float = 0.5,
    device: str = "auto",
    workers: int = 2,
) -> PassResult:
    """Makes class activation maps: several scales and their mirror images, fused into one map a class.

    Only the classes among an image's tags are stored, as float16 at a quarter of the image's size.

    Args:
        data: the images, with tags; without tags the classifier chooses the classes.
        weights: weights.safetensors of a finished train pass.
        out: output folder, one .npz an image.
        scales: factors of the image's size; [1.0,0.5,1.5,2.0] is usual.
        stride: pixels between two stored values of a map; 4 loses little, 1 stores every pixel.
        tag_threshold: smallest probability of a class in images without tags.
        device: auto, cpu or cuda.
        workers: threads that read images and write maps.
    """
    if not scales or min(scales) <= 0 or stride < 1:
        raise FastcamError(
            f"scales are {scales} and stride {stride}, expected positive scales and a stride of at least 1"
        )
    record = {"pass": "make-cam", "weights": file_fingerprint(weights), "scales": scales, "stride": stride}
    network, classes = load_trained(weights, "cam")
    dataset = open_data(data, classes)
    tagged = dataset.tags_known
    if not tagged:
        record["tag_threshold"] = tag_threshold
    network.to(pick_device(device), memory_format=torch.channels_last)
    open_pass(out, {**record, "tags": "given" if tagged else "predicted", "classes": classes})
    views_of = functools.partial(multi_scale, scales=scales, mean=network.normalize[0], std=network.normalize[1])

    def read(image_id: str) -> tuple[str, list[Tensor], Sequence[int], Tensor | None]:
        item = dataset.by_id(image_id)
        image = item["image"].as_subclass(Tensor)
        return image_id, views_of(image), image.shape[1:], item.get("tags")

    def compute(job: tuple[str, list[Tensor], Sequence[int], Tensor | None]) -> tuple[str, CamSet]:
        return job[0], image_cams(network, *job[1:], stride=stride, tag_threshold=tag_threshold)

    def write(done: tuple[str, CamSet]) -> None:
        save_cams(out / f"{done[0]}.npz", done[1])

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(write, map(compute, ordered_map(read, ids, workers)), workers)

    return run_pass("make-cam", out, ".npz", dataset.ids, work)
