"""Region adjacency graphs against numpy and the libraries people use, each where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from fastcam import region_graph, superpixel_slic
from fastcam.bench._harness import Case, CaseIterator
from fastcam.bench.superpixel_slic import photograph


def numpy_unique(labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Edges and borders from sorted pairs, what a careful user writes."""
    n = int(labels.max()) + 1
    a = np.concatenate([labels[:, :-1].ravel(), labels[:-1].ravel()])
    b = np.concatenate([labels[:, 1:].ravel(), labels[1:].ravel()])
    differ = a != b
    a, b = a[differ].astype(np.int64), b[differ].astype(np.int64)
    key, border = np.unique(np.minimum(a, b) * n + np.maximum(a, b), return_counts=True)
    return torch.from_numpy(np.stack([key // n, key % n], 1)), torch.from_numpy(border)


def cases(device: str) -> CaseIterator:
    """Superpixels of one photograph."""
    for W, H, n in ((500, 375, 450), (500, 375, 1700), (2048, 1024, 1800)):
        image = photograph(W, H)
        labels = superpixel_slic(torch.from_numpy(image).permute(2, 0, 1)[None], n)
        there, array = labels.to(device), labels[0].numpy()
        runners: dict[str, Callable[[], object]] = {
            "fastcam": lambda x=there: region_graph(x)[0][:2],
            "numpy unique": lambda a=array: numpy_unique(a),
        }
        notes = {}
        if find_spec("higra"):
            import higra

            runners["higra"] = lambda a=array: higra.make_region_adjacency_graph_from_labelisation(
                higra.get_4_adjacency_graph(a.shape), a
            )
            notes["higra"] = "gives its own structure"
        if find_spec("skimage") and find_spec("networkx"):
            from skimage import graph

            runners["scikit-image rag_mean_color"] = lambda i=image, a=array: graph.rag_mean_color(i, a)
            notes["scikit-image rag_mean_color"] = "gives its own structure, with mean colours, corners as neighbours"
        yield Case(
            name=f"{W} x {H}, {int(labels.max()) + 1} regions",
            runners=runners,
            expected=lambda a=array: numpy_unique(a),
            tolerance=0.0,
            moved=4.0 * W * H,
            unchecked=notes,
        )
