"""MCOF: seeds from CAMs, then regions and pixels in turn, each iteration a folder of passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from fastcam.data import multi_scale
from fastcam.errors import FastcamError
from fastcam.io import (
    atomic_write,
    find_saliency,
    load_cams,
    open_pass,
    read_label_png,
    read_saliency,
    write_label_png,
)
from fastcam.methods import create_method
from fastcam.methods.mcof import bayes_saliency, cam_seeds, lab_bins, mask_seeds, restrict_to_tags
from fastcam.nn.regions import geodesic_saliency
from fastcam.ops.region_graph import region_graph
from fastcam.ops.region_merge import region_merge
from fastcam.ops.region_reduce import region_reduce
from fastcam.ops.superpixel_slic import superpixel_slic
from fastcam.pipelines._data import (
    Data,
    Images,
    Transform,
    file_fingerprint,
    input_record,
    load_trained,
    open_data,
    training_transform,
)
from fastcam.pipelines._parallel import PassResult, ordered_map, run_pass
from fastcam.pipelines._settings import WEIGHTS, TrainerConfig, trainer_record
from fastcam.pipelines.make_cam import pick_device
from fastcam.pipelines.refine import Crf, crf_scores
from fastcam.pipelines.segment import predict_masks, train_segmenter

IGNORE = 255
FINER = 4  # superpixels that are merged into one region


@dataclass(frozen=True)
class Mining:
    """What the paper leaves open, with values for VOC.

    Args:
        regions: regions of an image.
        kind: merge (more superpixels, the most alike merged) or slic (superpixels).
        high: a region is a seed of a class where its mean CAM is above this,
        low: or above this and no neighbour's is higher.
        background_cam: it is a seed of the background where all CAMs are below this,
        background_saliency: and its saliency below this.
        background_rest: every region that is no seed of a class is one of the background.
        saliency_iterations: iterations in which saliency helps in images of one class.
        bins: of each CIE Lab channel, for the likelihood of colours.
        clip: saliency is kept this far from 0 and 1.
        smoothing: what is added to each bin's count.
        whole: where more than this share of an image was mined, saliency is left out.
        first_single_class: the first segmentation network sees images of one class only.
        confidence: in images of several classes, less certain regions are not trained on.
        share: a region is a seed of the next iteration where this share of its pixels agrees.
    """

    regions: int = 250
    kind: Literal["merge", "slic"] = "merge"
    high: float = 0.5
    low: float = 0.2
    background_cam: float = 0.1
    background_saliency: float = 0.2
    background_rest: bool = False
    saliency_iterations: int = 2
    bins: int = 32
    clip: float = 0.02
    smoothing: float = 1.0
    whole: float = 0.95
    first_single_class: bool = True
    confidence: float = 0.5
    share: float = 0.8

    def check(self) -> None:
        """Raises FastcamError where a value is out of range."""
        if not 1 <= self.regions <= 60000:
            raise FastcamError(f"mining.regions is {self.regions}, expected 1 to 60000")
        if self.low > self.high:
            raise FastcamError(f"mining.low is {self.low}, expected at most high, which is {self.high}")
        if not 2 <= self.bins <= 256 or not self.smoothing > 0 or not 0 < self.clip < 0.5:
            raise FastcamError(
                f"mining.bins, smoothing and clip are {self.bins}, {self.smoothing} and {self.clip}, "
                "expected 2 to 256, above 0, and between 0 and 0.5"
            )


class Regions(torch.utils.data.Dataset[dict[str, Any]]):
    """Images with their regions and the labels of these, for RegionNet.

    Args:
        images: the images.
        regions: folder of the regions' numbers.
        seeds: folder of label PNGs, each region of one label.
        transform: as `train_transform` gives them.
    """

    def __init__(self, images: Images, regions: Path, seeds: Path, transform: Transform) -> None:
        self.images = images
        self.regions = regions
        self.seeds = seeds
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        regions = read_regions(self.regions / f"{item['id']}.png")
        # One plane carries both through resizing and cropping.
        both = regions.int() * 256 + read_label_png(self.seeds / f"{item['id']}.png")
        item = self.transform({"image": item["image"], "mask": tv_tensors.Mask(both)})
        plane, valid = item["mask"], item["valid"]
        return {
            "image": item["image"],
            "regions": torch.where(valid, plane // 256, -1),
            "mask": torch.where(valid, plane % 256, IGNORE),
        }


def write_regions(path: Path, regions: Tensor) -> None:
    """Numbers of regions below 65536 as a grey PNG of 16 bits, atomically."""
    with atomic_write(path) as temporary:
        Image.fromarray(regions.numpy().astype(np.uint16)).save(temporary, format="PNG")


def read_regions(path: Path) -> Tensor:
    """The int64 `(H, W)` that `write_regions` wrote.

    Raises:
        FastcamError: the file is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image).astype(np.int64))
    except OSError as error:
        raise FastcamError(f"regions {path} do not load ({error}); remove the file and run mcof again") from error


def make_regions(image: Tensor, mining: Mining) -> Tensor:
    """Regions int64 `(H, W)` of an image uint8 `(3, H, W)`, counted from 0."""
    if mining.kind == "slic":
        return superpixel_slic(image[None], mining.regions)[0].long()
    labels = superpixel_slic(image[None], min(65535, FINER * mining.regions))
    tree = region_merge(labels, image[None], criterion="best_first", stop=0)[0]
    return tree.cut(count=min(tree.regions, max(mining.regions, tree.regions - len(tree.merges))))


def image_saliency(folder: Path | None, image_id: str, image: Tensor, regions: Tensor) -> Tensor:
    """The saliency map `(H, W)` of an image: from the folder where it has one, else `geodesic_saliency`.

    Raises:
        FastcamError: a map of another size than the image.
    """
    if folder is not None:
        try:
            path = find_saliency(folder, image_id)
        except FastcamError:
            return geodesic_saliency(image, regions)
        plane = read_saliency(path)
        if plane.shape != regions.shape:
            came = f"{plane.shape[1]} x {plane.shape[0]}"
            size = f"{regions.shape[1]} x {regions.shape[0]}"
            raise FastcamError(f"saliency map {path} is {came} pixels, but its image is {size}; make it again")
        return plane
    return geodesic_saliency(image, regions)


def refined_label(
    image: Tensor, mined: Tensor, confidence: Tensor, tags: Tensor, saliency: Tensor | None, mining: Mining, crf: Crf
) -> Tensor:
    """What the segmentation network is trained on.

    Args:
        image: uint8 `(3, H, W)`.
        mined: labels of the regions, int64 `(H, W)`.
        confidence: their probabilities, `(H, W)`.
        tags: `(C,)`.
        saliency: `(H, W)`; used in images of one class.
        mining: the constants.
        crf: takes the decision.

    Returns:
        uint8 `(H, W)`. An image without tags is background.
    """
    keys = tags.nonzero().flatten()
    labels = torch.cat([keys.new_zeros(1), keys + 1])
    if len(keys) == 1 and saliency is not None and (mined > 0).float().mean() <= mining.whole:
        inside = mined > 0
        p = saliency.clamp(mining.clip, 1 - mining.clip)
        if inside.any():
            bins = lab_bins(image, mining.bins)
            p = bayes_saliency(
                bins, saliency, inside, num_bins=mining.bins, clip=mining.clip, smoothing=mining.smoothing
            )
        scores = torch.stack([1 - p, p])
        return labels[crf_scores(scores, image, dataclasses.replace(crf, unary="softmax")).max(0).indices].to(
            torch.uint8
        )
    scores = (mined == labels[:, None, None]).float()
    sharp = crf_scores(scores, image, dataclasses.replace(crf, unary="label"))
    made = labels[sharp.max(0).indices].to(torch.uint8)
    return made if len(keys) < 2 else made.masked_fill(confidence < mining.confidence, IGNORE)


def mcof(
    data: Data,
    cams: Path,
    out: Path,
    method: dict[str, Any] | None = None,
    pixelnet: dict[str, Any] | None = None,
    iterations: int = 5,
    mining: Mining = Mining(),
    crf: Crf = Crf(preset="psa"),  # noqa: B008 (frozen)
    saliency: Path | None = None,
    trainer: TrainerConfig = TrainerConfig(),  # noqa: B008 (frozen)
    pixel_trainer: TrainerConfig = TrainerConfig(),  # noqa: B008 (frozen)
    device: str = "auto",
    workers: int = 2,
) -> Path:
    """Mines objects by regions and pixels in turn, from the CAMs of images with tags to a segmentation network.

    Iteration t has a folder of its own, iteration_t, with a folder for each step: seeds (labels of regions), regionnet
    (the network trained on them), mined (what it makes of all regions), refined (with saliency and the CRF), pixelnet
    (the segmentation network trained on that), masks (what it makes of the images, which gives the seeds of the
    next). Every step is a pass: finished ones are skipped, and a run that was stopped goes on where it was. All labels
    are PNGs that evaluate scores; the last pixelnet is for segment --predict.

    Args:
        data: the images, with tags.
        cams: folder of CamSets that make-cam wrote.
        out: output folder.
        method: of the network of regions: backbone, weights and any field of its configuration.
        pixelnet: of the segmentation network: name (deeplab), backbone, weights and any field of its configuration.
        iterations: how often; a later call may ask for more.
        mining: constants of the steps between the networks.
        crf: of refined and masks.
        saliency: folder of grey images, <id>.png or .jpg; images without one get a simple one.
        trainer: of the network of regions; images are not cropped where crop is at least the larger resize_long.
        pixel_trainer: of the segmentation network.
        device: auto, cpu or cuda, of the predictions.
        workers: images that are worked on at the same time.

    Returns:
        The weights of the last segmentation network.
    """
    if iterations < 1:
        raise FastcamError(f"iterations is {iterations}, expected at least 1")
    mining.check()
    source = input_record(cams, "make-cam")
    dataset = open_data(data, source["classes"])
    if not dataset.tags_known:
        raise FastcamError(f"mcof needs tags, and the images in {data.images} have none; give data.tags")
    if mining.first_single_class and data.root is None:
        raise FastcamError("mining.first_single_class needs lists of images; give data.root, or set it to false")
    regions = out / "superpixels"
    _regions_pass(dataset, regions, mining, workers)
    before, weights = cams, Path()
    for t in range(1, iterations + 1):
        folder = out / f"iteration_{t}"
        _seeds_pass(dataset, before, regions, folder / "seeds", mining, saliency, workers)
        recipe = {"name": "mcof", **(method or {})}
        network = _train_regions(data, dataset, regions, folder / "seeds", folder / "regionnet", recipe, trainer)
        used = saliency if t <= mining.saliency_iterations else None
        helps = t <= mining.saliency_iterations
        _mine_pass(dataset, network, regions, folder, mining, crf, used, helps, device, workers)
        images = data
        if t == 1 and mining.first_single_class:
            images = dataclasses.replace(data, split=str(_single_class_list(dataset, folder / "single_class.txt")))
        segmenter = {"name": "deeplab", **(pixelnet or {})}
        weights = train_segmenter(images, folder / "refined", segmenter, pixel_trainer, folder / "pixelnet")
        masks = folder / "masks"
        predict_masks(data, weights, masks, (1.0,), True, "prob", 0, True, crf, device, workers)
        before = masks
    return weights


def _regions_pass(dataset: Images, out: Path, mining: Mining, workers: int) -> None:
    open_pass(out, {"pass": "mcof-regions", "regions": mining.regions, "kind": mining.kind})

    def one(image_id: str) -> None:
        image = dataset.by_id(image_id)["image"].as_subclass(Tensor)
        write_regions(out / f"{image_id}.png", make_regions(image, mining))

    _run("regions", out, dataset, one, workers)


def _seeds_pass(
    dataset: Images, before: Path, regions: Path, out: Path, mining: Mining, saliency: Path | None, workers: int
) -> None:
    """Seeds from CAMs, or from the masks of the iteration before."""
    source = input_record(before, "make-cam")
    names = ("high", "low", "background_cam", "background_saliency", "background_rest", "share")
    record = {"pass": "mcof-seeds", **{name: getattr(mining, name) for name in names}, **source}
    record |= {"regions": input_record(regions, "mcof")["input"], "classes": list(dataset.classes)}
    record["saliency"] = None if saliency is None else str(saliency)
    open_pass(out, record)

    def one(image_id: str) -> None:
        number = read_regions(regions / f"{image_id}.png")
        if (before / f"{image_id}.png").is_file():
            labels = mask_seeds(read_label_png(before / f"{image_id}.png"), number, share=mining.share)
        else:
            labels = _from_cams(image_id, number)
        write_label_png(out / f"{image_id}.png", torch.where(labels < 0, IGNORE, labels)[number].to(torch.uint8))

    def _from_cams(image_id: str, number: Tensor) -> Tensor:
        image = dataset.by_id(image_id)["image"].as_subclass(Tensor)
        camset = load_cams(before / f"{image_id}.npz")
        maps = camset.scores(0.0)[1:]
        maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-5)
        plane = image_saliency(saliency, image_id, image, number)
        mean = region_reduce(torch.cat([maps, plane[None]])[None], number[None])[0].T
        edges = region_graph(number[None])[0].edges
        local = cam_seeds(
            mean[:-1],
            mean[-1],
            edges,
            high=mining.high,
            low=mining.low,
            background_heat=mining.background_cam,
            background_saliency=mining.background_saliency,
            rest=mining.background_rest,
        )
        table = torch.cat([camset.keys.new_zeros(1), camset.keys + 1])
        return torch.where(local < 0, -1, table[local.clamp(min=0)])

    _run("seeds", out, dataset, one, workers)


def _train_regions(
    data: Data, dataset: Images, regions: Path, seeds: Path, out: Path, recipe: dict[str, Any], trainer: TrainerConfig
) -> Path:
    """RegionNet's training, begun from its own weights in every iteration, so that old mistakes are forgotten."""
    record = {"pass": "mcof-train", "data": dataclasses.asdict(data), "method": recipe, **input_record(seeds, "mcof")}
    record |= {"trainer": trainer_record(trainer), "regions": input_record(regions, "mcof")["input"]}
    if (out / WEIGHTS).is_file():
        open_pass(out, record)
        return out / WEIGHTS
    from fastcam.pipelines._fit import fit, seeded_init

    with seeded_init(trainer.seed):
        network: Any = create_method(num_classes=len(dataset.classes), **recipe)
    if network.kind != "regions":
        raise FastcamError(f"method.name is {recipe['name']}, expected mcof; leave the name out")
    transform = training_transform(trainer, network.normalize)
    return fit(network, Regions(dataset, regions, seeds, transform), dataset.classes, trainer, out, record)


def _mine_pass(
    dataset: Images,
    weights: Path,
    regions: Path,
    folder: Path,
    mining: Mining,
    crf: Crf,
    saliency: Path | None,
    helps: bool,
    device: str,
    workers: int,
) -> None:
    """What RegionNet makes of all regions (mined), and what is trained on next (refined)."""
    out, mined = folder / "refined", folder / "mined"
    record: dict[str, Any] = {"pass": "mcof-mine", "weights": file_fingerprint(weights), "crf": crf.resolved()}
    record |= {name: getattr(mining, name) for name in ("bins", "clip", "smoothing", "whole", "confidence")}
    record |= {"saliency": None if saliency is None else str(saliency), "uses_saliency": helps}
    network, classes = load_trained(weights, "regions")
    network.to(pick_device(device), memory_format=torch.channels_last)
    open_pass(mined, {"pass": "mcof-mined", "weights": record["weights"], "classes": classes})
    open_pass(out, {**record, "classes": classes})
    mean, std = network.normalize

    def read(image_id: str) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
        item = dataset.by_id(image_id)
        image = item["image"].as_subclass(Tensor)
        (view,) = multi_scale(image, (1.0,), mean=mean, std=std)
        return image_id, image, view, read_regions(regions / f"{image_id}.png"), item["tags"]

    @torch.inference_mode()
    def compute(job: tuple[str, Tensor, Tensor, Tensor, Tensor]) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
        image_id, image, view, number, tags = job
        target = next(network.parameters()).device
        logits = network.classify(view.to(target), number.to(target)).cpu()
        return image_id, image, restrict_to_tags(logits, tags), number, tags

    def write(done: tuple[str, Tensor, Tensor, Tensor, Tensor]) -> None:
        image_id, image, probabilities, number, tags = done
        best, label = (x[number] for x in probabilities.max(dim=1))
        plane = image_saliency(saliency, image_id, image, number) if helps and int((tags > 0).sum()) == 1 else None
        write_label_png(mined / f"{image_id}.png", label.to(torch.uint8))
        write_label_png(out / f"{image_id}.png", refined_label(image, label, best, tags, plane, mining, crf))

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(write, map(compute, ordered_map(read, ids, workers)), workers)

    run_pass("mine", out, ".png", dataset.ids, work)


def _single_class_list(dataset: Images, path: Path) -> Path:
    """Writes the ids of the images with one tag.

    Raises:
        FastcamError: there are none.
    """
    tags = dataset.tags
    assert tags is not None
    ids = [image_id for image_id, row in zip(dataset.ids, tags, strict=True) if int((row > 0).sum()) == 1]
    if not ids:
        raise FastcamError("no image has a single class; set mining.first_single_class to false")
    text = "\n".join(ids) + "\n"
    if not path.is_file() or path.read_text() != text:
        with atomic_write(path) as temporary:
            temporary.write_text(text)
    return path


def _run(name: str, out: Path, dataset: Images, one: Any, workers: int) -> PassResult:
    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(one, ids, workers)

    return run_pass(name, out, ".png", dataset.ids, work)
