"""Random walks against IRN's dense squaring and a loop over a sparse matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcam import path_affinity, random_walk
from fastcam._chebyshev import walk_degree
from fastcam._paths import count, crop, destinations, sources
from fastcam.bench._harness import Case, CaseIterator


def sparse_transition(affinity: Tensor, beta: float = 10.0, radius: int = 5) -> Tensor:
    """The transpose of T in CSR form, from affinities (P, H, W)."""
    _, H, W = affinity.shape
    every = torch.arange(H * W, device=affinity.device).reshape(H, W)
    i, j, values = [every.flatten()], [every.flatten()], [affinity.new_ones(H * W)]
    for p, offset in enumerate(destinations(radius)):
        window = sources(offset, H, W)
        here, there = crop(every, window).flatten(), crop(every, window, offset).flatten()
        a = crop(affinity[p], window).flatten().clamp_min(0) ** beta
        i, j, values = [*i, here, there], [*j, there, here], [*values, a, a]
    indices, a = torch.stack([torch.cat(i), torch.cat(j)]), torch.cat(values)
    sums = a.new_zeros(H * W).index_add_(0, indices[1], a)
    return torch.sparse_coo_tensor(indices.flip(0), a / sums[indices[1]], (H * W, H * W)).to_sparse_csr()


def sparse_walk(x: Tensor, transition: Tensor, steps: int = 256) -> Tensor:
    """One sparse product a step."""
    y = x[0].flatten(1).T.contiguous()
    for _ in range(steps):
        y = torch.sparse.mm(transition, y)
    return y.T.reshape(x.shape)


def dense_walk(x: Tensor, affinity: Tensor, times: int = 8) -> Tensor:
    """IRN's form: the dense matrix, squared again and again."""
    T = sparse_transition(affinity[0]).to_dense().T
    for _ in range(times):
        T = T @ T
    return (x[0].flatten(1) @ T).reshape(x.shape)


def cases(device: str) -> CaseIterator:
    """VOC at a quarter of the size with the channels of IRN's steps; a quarter of that for the dense form, whose cost
    is cubic (59 times as much at 94 x 125); and a large image."""
    g = torch.Generator().manual_seed(0)
    for H, W, C in ((94, 125, 1), (94, 125, 4), (94, 125, 20), (47, 63, 4), (512, 1024, 2)):
        edge = torch.rand(1, H, W, generator=g).pow(6).to(device)
        affinity, x = path_affinity(edge), torch.rand(1, C, H, W, generator=g).to(device)
        transition = sparse_transition(affinity[0])
        runners: dict[str, Callable[[], Any]] = {
            "fastcam": lambda x=x, a=affinity: random_walk(x, a),
            "fastcam, step by step": lambda x=x, a=affinity: random_walk(x, a, method="steps"),
            "torch CSR, 256 steps": lambda x=x, t=transition: sparse_walk(x, t),
        }
        if H < 100:
            runners["the same with building it"] = lambda x=x, a=affinity: sparse_walk(x, sparse_transition(a[0]))
        if H < 50:
            runners["IRN: 8 dense squarings"] = lambda x=x, a=affinity: dense_walk(x, a)
        if device == "cuda":
            runners["fastcam triton"] = lambda x=x, a=affinity: random_walk(x, a, backend="triton")
        exact = sparse_walk(x.double(), sparse_transition(affinity[0].double()))
        products = walk_degree("chebyshev", 256, count(5), H * W)
        yield Case(
            name=f"{H} x {W}, {C} channels, radius 5, 256 steps",
            runners=runners,
            expected=lambda exact=exact: exact,
            tolerance=2e-5,
            unchecked=dict.fromkeys(
                [name for name in runners if not name.startswith("fastcam")],
                "rounds the same way at every step: float32 results are off by up to 1e-3",
            ),
            moved=4 * H * W * (count(5) + 2 * C),
            operations=4 * products * C * H * W * count(5),
        )
