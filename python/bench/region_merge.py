"""Merging of superpixels against the libraries people use, each where it is installed; the graph is at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from fastcam import region_graph, region_merge, superpixel_slic
from fastcam.bench._harness import Case, CaseIterator
from fastcam.bench.superpixel_slic import photograph


def weight_mean_color(g: Any, src: int, dst: int, n: int) -> dict[str, float]:
    """Of the edge between a merged node and its neighbour in scikit-image's graph: the distance of their colours."""
    return {"weight": np.linalg.norm(g.nodes[dst]["mean color"] - g.nodes[n]["mean color"])}


def merge_mean_color(g: Any, src: int, dst: int) -> None:
    """The colour of a merged node in scikit-image's graph."""
    g.nodes[dst]["total color"] += g.nodes[src]["total color"]
    g.nodes[dst]["pixel count"] += g.nodes[src]["pixel count"]
    g.nodes[dst]["mean color"] = g.nodes[dst]["total color"] / g.nodes[dst]["pixel count"]


def scikit_image(image: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Hierarchical merging by mean colour down to one region, as scikit-image's example has it. It destroys its graph,
    so that every call begins with a copy, which is timed alone too."""
    from skimage import graph

    rag = graph.rag_mean_color(image, labels)
    return {
        "scikit-image merge_hierarchical, copy": lambda: graph.merge_hierarchical(
            labels, copy.deepcopy(rag), thresh=1e9, rag_copy=False, in_place_merge=True, merge_func=merge_mean_color,
            weight_func=weight_mean_color,
        ),
        "scikit-image, the copy alone": lambda: copy.deepcopy(rag),
    }  # fmt: skip


def higra_tree(image: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """Binary partition tree by average linkage of mean colours."""
    import higra

    pixels = higra.get_4_adjacency_graph(labels.shape)
    rag = higra.make_region_adjacency_graph_from_labelisation(pixels, labels)
    lengths = higra.rag_accumulate_on_edges(rag, higra.Accumulators.sum, np.ones(pixels.num_edges()))
    mean = higra.rag_accumulate_on_vertices(rag, higra.Accumulators.mean, image.astype(np.float64))
    weights = higra.weight_graph(rag, mean, higra.WeightFunction.L2)
    return lambda: higra.binary_partition_tree_average_linkage(rag, weights, lengths)


def cases(device: str) -> CaseIterator:
    """All superpixels of a photograph to one region, by mean colour; our own similarity beside it."""
    for n in (450, 1700):
        image = photograph(500, 375)
        x = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
        labels = superpixel_slic(x, n)
        array = labels[0].numpy()
        x, labels = x.to(device), labels.to(device)
        graphs = region_graph(labels)

        def ours(weight: str, criterion: str, x=x, labels=labels, graphs=graphs) -> Callable[[], Any]:
            return lambda: region_merge(labels, x, weight=weight, criterion=criterion, stop=0, graphs=graphs)

        runners = {
            "fastcam, mean_color, best_first": ours("mean_color", "best_first"),
            "fastcam, content_border, best_first": ours("content_border", "best_first"),
            "fastcam, content_border, adaptive": ours("content_border", "adaptive"),
        }
        notes = {}
        if device == "cpu" and find_spec("skimage") and find_spec("networkx"):
            runners |= scikit_image(image, array)
            notes["scikit-image merge_hierarchical, copy"] = "RGB means"
        if device == "cpu" and find_spec("higra"):
            runners["higra average linkage"] = higra_tree(image, array)
            notes["higra average linkage"] = "borders' mean distances, which never look at merged regions again"
        yield Case(
            name=f"500 x 375, {int(labels.max()) + 1} regions to 1, the graph at hand",
            runners=runners,
            expected=None,
            moved=7.0 * 500 * 375,
            unchecked=notes,
        )
