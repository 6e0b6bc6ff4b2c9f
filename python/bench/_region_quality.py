"""How well merged regions agree with what people drew, ours and those of scikit-image.

Covering, Rand index, variation of information and boundary F at the best scale of the data set (ODS) and of every image
(OIS), on BSDS500. Every merging starts from the same superpixels.
``python -m fastcam.bench._region_quality <folder of BSDS500>``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcam import superpixel_slic
from fastcam.io import atomic_write
from fastcam.methods.region_growing import Config, grow_regions
from fastcam.metrics.regions import (
    BoundaryCounts,
    best_overlaps,
    boundary_counts,
    boundary_ods_ois,
    covering_ods_ois,
    ods_ois,
    rand_index,
    variation_of_information,
)

SUPERPIXELS = 400
LEVELS = (1.5, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.65)  # of ours, for both criteria
Method = Callable[[np.ndarray], Sequence[Tensor]]  # an RGB image to its regions at every scale


def ours(**settings: Any) -> Method:
    """Region growing with these settings, its tree cut at all levels."""

    def segment(image: np.ndarray) -> list[Tensor]:
        rgb = torch.from_numpy(image).permute(2, 0, 1)[None]
        tree = grow_regions(rgb, Config(superpixels=SUPERPIXELS, **settings))[0]
        return [tree.cut(level) for level in LEVELS]

    return segment


def superpixels(image: np.ndarray) -> list[Tensor]:
    """What all merging starts from."""
    return [superpixel_slic(torch.from_numpy(image).permute(2, 0, 1)[None], SUPERPIXELS)[0].long()]


def merge_hierarchical(image: np.ndarray) -> list[Tensor]:
    """scikit-image: the nearest mean colours first, until they differ by more than the scale."""
    from skimage import graph

    from fastcam.bench.region_merge import merge_mean_color, weight_mean_color

    labels = superpixels(image)[0].numpy()
    rag = graph.rag_mean_color(image, labels)

    def merged(scale: float) -> Tensor:
        own = copy.deepcopy(rag)  # scikit-image's copy shares what a merge changes
        functions = {"merge_func": merge_mean_color, "weight_func": weight_mean_color}
        return torch.from_numpy(
            graph.merge_hierarchical(labels, own, scale, rag_copy=False, in_place_merge=True, **functions)
        )

    return [merged(scale) for scale in (15, 25, 35, 45, 60, 80, 110, 150)]


def cut_threshold(image: np.ndarray) -> list[Tensor]:
    """scikit-image: neighbours whose mean colours differ by less than the scale are one region."""
    from skimage import graph

    labels = superpixels(image)[0].numpy()
    rag = graph.rag_mean_color(image, labels)
    scales = (8, 12, 17, 23, 30, 40, 55, 75)
    return [torch.from_numpy(graph.cut_threshold(labels, rag, scale, in_place=False)) for scale in scales]


def felzenszwalb(image: np.ndarray) -> list[Tensor]:
    """scikit-image: Felzenszwalb and Huttenlocher's graph of pixels, at scales that double."""
    from skimage.segmentation import felzenszwalb as segment

    scales = (50, 100, 200, 400, 800, 1600, 3200, 6400)
    return [torch.from_numpy(segment(image, scale=scale, sigma=0.8, min_size=50)) for scale in scales]


METHODS: dict[str, Method] = {
    "superpixels": superpixels,
    "fastcam, adaptive": ours(),
    "fastcam, best-first": ours(criterion="best_first"),
    "scikit-image merge_hierarchical": merge_hierarchical,
    "scikit-image cut_threshold": cut_threshold,
    "scikit-image felzenszwalb": felzenszwalb,
}


def score(labels: Tensor, truths: Sequence[Tensor], lines: Sequence[Tensor]) -> dict[str, Any]:
    """Of one segmentation what the scores of the data set are made of."""
    best, area = best_overlaps(labels, truths)
    return {
        "regions": len(labels.unique()),
        "rand": rand_index(labels, truths),
        "voi": variation_of_information(labels, truths),
        "best": best.tolist(),
        "area": area.tolist(),
        "boundary": boundary_counts(labels, lines),
    }


def row(images: Sequence[Sequence[dict[str, Any]]]) -> list[float]:
    """The columns of the table, from the scores of every image at every scale."""
    pairs = [[(torch.tensor(s["best"]), torch.tensor(s["area"])) for s in scales] for scales in images]
    covering, best = covering_ods_ois(pairs)
    rand = ods_ois(torch.tensor([[s["rand"] for s in scales] for scales in images]))
    voi = ods_ois(torch.tensor([[s["voi"] for s in scales] for scales in images]), lower=True)
    boundary = boundary_ods_ois([[BoundaryCounts(*s["boundary"]) for s in scales] for scales in images])
    return [*covering, best, *rand, *voi, *boundary]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="holds images/test/*.jpg and groundtruth/test/*.npz")
    parser.add_argument("--images", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--keep", type=Path, help="folder for the scores of every image; what it holds is not redone")
    args = parser.parse_args(argv)

    found: list[dict[str, list[dict[str, Any]]]] = []
    for path in sorted((args.root / "images" / "test").glob("*.jpg"))[: args.images]:
        kept = args.keep and args.keep / f"{path.stem}.json"
        if kept and kept.is_file():
            found.append(json.loads(kept.read_text()))
            continue
        image = np.array(Image.open(path).convert("RGB"))
        with np.load(args.root / "groundtruth" / "test" / f"{path.stem}.npz") as stored:
            truths = [torch.from_numpy(one.astype(np.int64)) for one in stored["segmentations"]]
            bits = np.unpackbits(stored["boundaries"], axis=-1)[..., : int(stored["width"])]
        lines = [torch.from_numpy(one.astype(bool)) for one in bits]
        found.append({name: [score(s, truths, lines) for s in method(image)] for name, method in METHODS.items()})
        if kept:
            with atomic_write(kept) as temporary:
                temporary.write_text(json.dumps(found[-1]))

    print(f"{len(found)} images. Covering ODS, OIS, best; Rand index ODS, OIS; variation of information; boundary F")
    print("| method | regions | cov. ODS | OIS | best | PRI ODS | OIS | VOI ODS | OIS | F ODS | OIS |")
    print("|" + "---|" * 11)
    for name in METHODS:
        images = [image[name] for image in found]
        counts = [np.mean([image[scale]["regions"] for image in images]) for scale in (0, -1)]
        many = f"{counts[0]:.0f}" if len(images[0]) == 1 else f"{counts[0]:.0f} to {counts[1]:.0f}"
        print(f"| {name} | {many} | " + " | ".join(f"{value:.3f}" for value in row(images)) + " |", flush=True)


if __name__ == "__main__":
    main()
