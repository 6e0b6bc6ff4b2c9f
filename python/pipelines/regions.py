"""The regions pass: images to regions at several stages of merging, drawn on the images, and the trees of merges."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io import atomic_write, load_tree, open_pass, save_tree, write_region_png
from fastcam.methods.region_growing import Config, grow_regions
from fastcam.metrics.regions import boundaries
from fastcam.ops.region_merge import MergeTree
from fastcam.pipelines._data import Data, input_record, load_image, open_data
from fastcam.pipelines._parallel import PassResult, ordered_map, run_pass

LINE = (255, 32, 32)  # RGB of drawn boundaries


def draw_boundaries(image: Tensor, labels: Tensor, color: tuple[int, int, int] = LINE) -> Tensor:
    """An image with a line along the boundaries of regions.

    Args:
        image: uint8 `(3, H, W)`.
        labels: integers `(H, W)`.
        color: of the line, RGB.

    Returns:
        uint8 `(3, H, W)`; pixels that have a right, lower or lower right neighbour in another region are drawn on.
    """
    line = torch.tensor(color, dtype=torch.uint8, device=image.device)[:, None, None]
    return torch.where(boundaries(labels), line, image)


def check_stages(levels: tuple[float, ...], counts: tuple[int, ...], stop: float) -> None:
    """Raises FastcamError where there is no stage, a level that trees which end at `stop` do not reach, or no count."""
    if not levels and not counts:
        raise FastcamError("levels and counts are empty; give at least one of either")
    if not all(level >= stop for level in levels):
        raise FastcamError(
            f"levels are {list(levels)}, but merging stops at {stop}; give none below that, or a lower growing.stop"
        )
    if not all(count >= 1 for count in counts):
        raise FastcamError(f"counts are {list(counts)}, expected whole numbers of at least 1")


def cut_stages(tree: MergeTree, levels: tuple[float, ...], counts: tuple[int, ...]) -> dict[str, Tensor]:
    """The regions at levels and counts, by the name of the stage: `level_1.1`, `count_20`.

    A count that the image's tree does not reach is replaced by the nearest one that it does.

    Returns:
        int64 `(H, W)` each.
    """
    fewest = tree.regions - len(tree.merges)
    cuts = {f"level_{level:g}": tree.cut(level) for level in levels}
    return cuts | {f"count_{count}": tree.cut(count=min(max(count, fewest), tree.regions)) for count in counts}


def regions(
    data: Data,
    out: Path,
    levels: tuple[float, ...] = (1.3, 1.1, 0.9),
    counts: tuple[int, ...] = (),
    growing: Config = Config(),  # noqa: B008 (frozen)
    trees: Path | None = None,
    draw: bool = True,
    workers: int = 2,
) -> PassResult:
    """Cuts images into regions: superpixels that grow together, the most similar neighbours first.

    Needs no training and no tags. Writes the tree of merges of every image (.npz, for fastcam.io.load_tree), and for
    every stage asked for the numbers of the regions (labels/<stage>/, grey PNG of 16 bits) and the image with their
    boundaries (boundaries/<stage>/).

    Args:
        data: the images.
        out: output folder.
        levels: stages, as thresholds of similarity: 2 is the superpixels, 1.3 many regions, 0.9 few.
        counts: stages, as numbers of regions; where an image does not come to such a number, the nearest it comes to.
        growing: the superpixels, and how they grow together.
        trees: folder of a regions pass, whose trees are cut instead of growing them again.
        draw: also draw the boundaries.
        workers: images that are worked on at the same time.
    """
    growing.check()
    if trees is not None and growing != Config():
        raise FastcamError("growing is for trees that are yet to grow, and trees are given; leave one of them out")
    check_stages(levels, counts, 0.0 if trees else growing.stop)
    dataset = open_data(data, need_tags=False)
    record: dict[str, Any] = {"pass": "regions", "levels": levels, "counts": counts, "draw": draw}
    if trees is None:
        record["growing"] = dataclasses.asdict(growing)
    else:
        record["input"] = input_record(trees, "regions")["input"]
    open_pass(out, record)

    def one(image_id: str) -> None:
        name = f"{image_id}.png"
        if trees is None:
            image = dataset.by_id(image_id)["image"].as_subclass(Tensor)
            tree = grow_regions(image[None], growing)[0]
        else:
            tree = load_tree(trees / f"{image_id}.npz")
            image = load_image(dataset, image_id, tree.labels.shape)
            check_stages(levels, counts, tree.stop)
        for stage, cut in cut_stages(tree, levels, counts).items():
            write_region_png(out / "labels" / stage / name, cut)
            if draw:
                with atomic_write(out / "boundaries" / stage / name) as temporary:
                    Image.fromarray(draw_boundaries(image, cut).permute(1, 2, 0).numpy()).save(temporary)
        save_tree(out / f"{image_id}.npz", tree)  # last: an image with a tree is finished

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(one, ids, workers)

    return run_pass("regions", out, ".npz", dataset.ids, work)
