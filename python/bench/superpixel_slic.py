"""Superpixels against the libraries people use: scikit-image, OpenCV, fast-slic, each where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from fastcam import superpixel_slic
from fastcam.bench._harness import Case, CaseIterator


def rivals() -> dict[str, Callable[[np.ndarray, int, int], np.ndarray]]:
    """Name -> function of an RGB image, a number of segments, a number of threads, set up as its manual says."""
    found: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {}
    if find_spec("skimage"):
        from skimage.segmentation import slic

        found["scikit-image slic"] = lambda image, n, _: slic(
            image, n, compactness=10, max_num_iter=10, start_label=0, channel_axis=-1
        )
    if find_spec("cv2"):
        import cv2

        def opencv(image: np.ndarray, n: int, threads: int) -> np.ndarray:
            cv2.setNumThreads(threads)
            step = round((image.shape[0] * image.shape[1] / n) ** 0.5)
            lab = cv2.cvtColor(image, cv2.COLOR_RGB2Lab)
            slic = cv2.ximgproc.createSuperpixelSLIC(lab, cv2.ximgproc.SLIC, step, 10.0)
            slic.iterate(10)
            slic.enforceLabelConnectivity(25)
            return slic.getLabels()

        if hasattr(cv2, "ximgproc"):
            found["OpenCV SLIC"] = opencv
    if find_spec("fast_slic"):
        from fast_slic.avx2 import SlicAvx2

        def fast_slic(image: np.ndarray, n: int, threads: int) -> np.ndarray:
            slic = SlicAvx2(num_components=n, compactness=10)
            slic.num_threads = threads
            return slic.iterate(image)

        found["fast-slic AVX2"] = fast_slic
    return found


def photograph(width: int, height: int) -> np.ndarray:
    """The photograph of a cup that scikit-image ships, at another size, uint8 ``(H, W, 3)``."""
    from skimage import data

    image = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].round().byte().permute(1, 2, 0).numpy())


def cases(device: str) -> CaseIterator:
    """One photograph; a batch only against ourselves."""
    threads = torch.get_num_threads()
    for W, H, n in ((500, 375, 200), (500, 375, 500), (500, 375, 1000), (640, 480, 500), (2048, 1024, 1000)):
        image = photograph(W, H)
        ours = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous().to(device)
        others = rivals() if device == "cpu" else {}
        yield Case(
            name=f"{W} x {H}, {n} segments, 10 iterations",
            runners={
                "fastcam": lambda x=ours, n=n: superpixel_slic(x, n),
                **{name: lambda f=f, i=image, n=n: f(i, n, threads) for name, f in others.items()},
            },
            expected=None,
            moved=3.0 * W * H + 4.0 * W * H,
            operations=0.0,
            unchecked=dict.fromkeys(
                others, "superpixels of its own; quality: python -m fastcam.bench._superpixel_quality"
            ),
        )
