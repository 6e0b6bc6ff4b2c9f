"""The make-cam pass: images and a trained method to multi-scale CAMs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam.data import multi_scale
from fastcam.errors import FastcamError
from fastcam.io import CamSet, Instances, load_instances, open_pass, save_cams, save_instances
from fastcam.nn import tree_proposals
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
    batch = [view.to(device, non_blocking=True, memory_format=torch.channels_last) for view in views]
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


@torch.inference_mode()
def image_instances(method: Any, view: Tensor, keys: Tensor | None, proposals: Tensor) -> Instances:
    """Objects of one image.

    Args:
        method: a trained CAM method that finds objects (PRM), on its device.
        view: the image, normalised, `(3, H, W)`.
        keys: the classes that are present; `None` leaves that to the method.
        proposals: bool `(J, h, w)`, the most object-like first; of another size than the image they are resized.
    """
    if proposals.shape[1:] != view.shape[1:]:
        proposals = F.interpolate(proposals[None].float(), view.shape[1:], mode="nearest")[0] > 0
    device = next(method.parameters()).device
    return Instances(*method.instances(view.to(device), proposals.to(device), keys))


def make_cam(
    data: Data,
    weights: Path,
    out: Path,
    scales: tuple[float, ...] = SCALES,
    stride: int = 4,
    tag_threshold: float = 0.5,
    instances: Path | None = None,
    proposals: Path | None = None,
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
        instances: folder for the objects in each image, .json with COCO's run-length masks, for method prm.
        proposals: folder of .json files of the same kind, masks that may be objects, the most likely first. By default
            the regions of the image's merge tree.
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
    if instances is not None:
        if not hasattr(network, "instances"):
            raise FastcamError(
                f"instances are for methods that find objects, and {network.name} does not; leave them out"
            )
        record["proposals"] = None if proposals is None else str(proposals)
    elif proposals is not None:
        raise FastcamError("proposals are for instances; give a folder for them, or leave the proposals out")
    network.to(pick_device(device), memory_format=torch.channels_last)
    open_pass(out, {**record, "tags": "given" if tagged else "predicted", "classes": classes})
    views_of = functools.partial(multi_scale, scales=scales, mean=network.normalize[0], std=network.normalize[1])

    def read(image_id: str) -> tuple[str, Tensor, list[Tensor], Tensor | None, Tensor | None]:
        item = dataset.by_id(image_id)
        image = item["image"].as_subclass(Tensor)
        masks = None
        if instances is not None:
            given = None if proposals is None else load_instances(proposals / f"{image_id}.json").masks
            masks = tree_proposals(image) if given is None else given
        return image_id, image, views_of(image), item.get("tags"), masks

    def compute(
        job: tuple[str, Tensor, list[Tensor], Tensor | None, Tensor | None],
    ) -> tuple[str, CamSet, Instances | None]:
        image_id, image, views, tags, masks = job
        cams = image_cams(network, views, image.shape[1:], tags, stride=stride, tag_threshold=tag_threshold)
        if masks is None:
            return image_id, cams, None
        (view,) = views_of(image, scales=(1.0,))
        return image_id, cams, image_instances(network, view, None if tags is None else cams.keys, masks)

    def write(done: tuple[str, CamSet, Instances | None]) -> None:
        image_id, cams, objects = done
        if instances is not None and objects is not None:
            save_instances(instances / f"{image_id}.json", image_id, objects)
        save_cams(out / f"{image_id}.npz", cams)  # last: an image with CAMs is finished

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(write, map(compute, ordered_map(read, ids, workers)), workers)

    return run_pass("make-cam", out, ".npz", dataset.ids, work)
