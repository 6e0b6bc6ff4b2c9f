"""Reductions over regions against scatter operations and bincount."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcam import region_reduce, superpixel_slic
from fastcam.bench._harness import Case, CaseIterator
from fastcam.bench.superpixel_slic import photograph


def scatter_mean(values: Tensor, labels: Tensor, S: int) -> Tensor:
    """Sums by ``index_add``, divided by areas."""
    flat = labels.flatten().long()
    sums = values.new_zeros(S, values.shape[1]).index_add_(0, flat, values[0].flatten(1).T)
    return (sums / flat.bincount(minlength=S)[:, None])[None]


def numpy_mean(values: Tensor, labels: Tensor, S: int) -> Tensor:
    """A weighted ``bincount`` a channel."""
    flat = labels.flatten().numpy()
    area = np.bincount(flat, minlength=S)
    means = [np.bincount(flat, channel.flatten().numpy(), S) / area for channel in values[0]]
    return torch.from_numpy(np.stack(means, 1)).to(values.dtype)[None]


def scatter_max(values: Tensor, labels: Tensor, S: int) -> Tensor:
    """Maxima by ``scatter_reduce``."""
    index = labels.flatten().long()[:, None].expand(-1, values.shape[1])
    out = values.new_full((S, values.shape[1]), -torch.inf)
    return out.scatter_reduce_(0, index, values[0].flatten(1).T, "amax")[None]


def cases(device: str) -> CaseIterator:
    """Colours and class scores over the superpixels of a photograph."""
    g = torch.Generator().manual_seed(0)
    image = torch.from_numpy(photograph(500, 375)).permute(2, 0, 1)[None]
    labels = superpixel_slic(image, 500).to(device)
    S = int(labels.max()) + 1
    for C in (3, 21, 256):
        values = torch.rand(1, C, 375, 500, generator=g).to(device)
        x = values
        rivals = {"index_add": lambda x=x: scatter_mean(x, labels, S)}
        if device == "cpu":
            rivals["numpy bincount"] = lambda x=x: numpy_mean(x, labels, S)
        yield Case(
            name=f"mean, 500 x 375, {S} regions, {C} channels",
            runners={"fastcam": lambda x=x: region_reduce(x, labels, num_regions=S), **rivals},
            expected=lambda x=x: scatter_mean(x, labels, S),
            tolerance=1e-4,
            moved=4.0 * values.numel() + 4.0 * labels.numel(),
        )
    yield Case(
        name=f"max, 500 x 375, {S} regions, 256 channels",
        runners={
            "fastcam": lambda: region_reduce(x, labels, num_regions=S, reduce="max"),
            "scatter_reduce": lambda: scatter_max(x, labels, S),
        },
        expected=lambda: scatter_max(x, labels, S),
        tolerance=0.0,
        moved=4.0 * x.numel() + 4.0 * labels.numel(),
    )
