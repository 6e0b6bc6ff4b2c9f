"""How well superpixels keep to the objects that people drew, ours and those of other libraries.

Boundary recall (2 pixels), under-segmentation error, achievable accuracy, compactness, number; means over images and
annotators of BSDS500. ``python -m fastcam.bench._superpixel_quality <folder of BSDS500>``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcam import superpixel_slic
from fastcam.bench.superpixel_slic import rivals
from fastcam.metrics.regions import achievable_accuracy, boundary_recall, compactness, undersegmentation_error
from fastcam.nn.regions import gradient_contour
from fastcam.nn.waterpixels import waterpixels


def scores(labels: Tensor, truths: np.ndarray) -> list[float]:
    """Means over annotators of the four scores, and the number of superpixels."""
    each = [
        (boundary_recall(labels, truth), undersegmentation_error(labels, truth), achievable_accuracy(labels, truth))
        for truth in torch.from_numpy(truths.astype(np.int64))
    ]
    return [*np.nanmean(each, axis=0), compactness(labels), len(labels.unique())]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="holds images/test/*.jpg and groundtruth/test/*.npz")
    parser.add_argument("--images", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--segments", type=int, nargs="+", default=[200, 500, 1000])
    parser.add_argument("--variants", action="store_true", help="also ours held back by contours, and waterpixels")
    args = parser.parse_args()

    def ours(image: np.ndarray, n: int, threads: int) -> np.ndarray:
        return superpixel_slic(torch.from_numpy(image).permute(2, 0, 1)[None], n)[0].numpy()

    def held(weight: float) -> Callable[[np.ndarray, int, int], np.ndarray]:
        def segment(image: np.ndarray, n: int, threads: int) -> np.ndarray:
            x = torch.from_numpy(image).permute(2, 0, 1)[None]
            return superpixel_slic(x, n, contour=gradient_contour(x), contour_weight=weight)[0].numpy()

        return segment

    def basins(image: np.ndarray, n: int, threads: int) -> np.ndarray:
        return waterpixels(torch.from_numpy(image).permute(2, 0, 1)[None], n)[0].numpy()

    methods: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {"fastcam": ours}
    if args.variants:
        methods |= {f"fastcam, contour weight {w}": held(w) for w in (10, 50)} | {"fastcam, waterpixels": basins}
    methods |= rivals()
    paths = sorted((args.root / "images" / "test").glob("*.jpg"))[: args.images]
    print("| segments | library | boundary recall | under-segmentation error | accuracy | compactness | returned |")
    for n in args.segments:
        total = {name: np.zeros(5) for name in methods}
        for path in paths:
            image = np.array(Image.open(path).convert("RGB"))
            with np.load(args.root / "groundtruth" / "test" / f"{path.stem}.npz") as stored:
                truths = stored["segmentations"]
            for name, method in methods.items():
                labels = torch.from_numpy(np.asarray(method(image, n, 1)).astype(np.int64))
                total[name] += scores(labels, truths)
        for name, sums in total.items():
            recall, leaking, accuracy, round_, count = sums / len(paths)
            print(
                f"| {n} | {name} | {recall:.4f} | {leaking:.4f} | {accuracy:.4f} | {round_:.3f} | {count:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
