"""C++ on random input, legal and illegal: a result or a ValueError, never a crash, NaN or a neighbour's memory.

FASTCAM_EXAMPLES sets how many inputs each test draws. CONTRIBUTING.md says how to run it on a build with sanitizers.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcam import Lattice, backends, crf_mean_field
from fastcam.ops.crf_mean_field import KERNELS, NORMALIZATIONS

pytestmark = pytest.mark.skipif(backends.needs_cpp(torch.zeros(1)) is not None, reason="C++ extension not built")
corpus = settings(max_examples=int(os.environ.get("FASTCAM_EXAMPLES", "60")), deadline=None, derandomize=True)

SIGMA = st.sampled_from([1e-30, 1e-3, 0.1, 0.7, 3, 13, 50, 1e6, 1e30, 0, -1, np.inf, np.nan])
SOME = st.sampled_from([0.3, 1, 3, 8, 50])
SEEDS = st.integers(0, 2**31)
ODD = st.sampled_from([None, None, None, "nan", "inf", "-inf", "huge"])


def spoil(x: torch.Tensor, how: str | None, g: torch.Generator) -> torch.Tensor:
    """One value replaced, by name."""
    if how is not None and x.numel() > 0:
        value = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 3e38}[how]
        x.view(-1)[torch.randint(0, x.numel(), (), generator=g)] = value
    return x


@corpus
@given(
    seed=SEEDS, B=st.integers(0, 3), G=st.integers(1, 2), K=st.integers(1, 40), H=st.integers(0, 40),
    W=st.integers(0, 40), kernel=st.sampled_from(KERNELS), normalization=st.sampled_from(NORMALIZATIONS),
    sigma=st.tuples(SOME | SIGMA, SOME | SIGMA, SOME | SIGMA), odd=st.tuples(ODD, ODD), steps=st.integers(0, 3),
    terms=st.sampled_from(["both", "gaussian", "bilateral"]), matrix=st.booleans(), padded=st.booleans(),
    double=st.booleans(), threads=st.integers(1, 3), backward=st.booleans(),
)  # fmt: skip
def test_crf_mean_field(
    seed, B, G, K, H, W, kernel, normalization, sigma, odd, steps, terms, matrix, padded, double, threads, backward
):
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    unary = spoil(3 * torch.randn(B, G, K, H, W, generator=g, dtype=dtype), odd[0], g)
    image = spoil(255 * torch.rand(B, 3, H, W, generator=g), odd[1], g)
    compat = torch.rand(K, K, generator=g, dtype=dtype) if matrix else 3.0
    valid = torch.tensor([[max(H - b, 0), max(W - 2 * b, 0)] for b in range(B)]).view(B, 2) if padded else None
    options = {
        "gaussian": (sigma[0], compat) if terms != "bilateral" else None,
        "bilateral": (sigma[1], sigma[2], compat) if terms != "gaussian" else None,
        "iterations": steps, "kernel": kernel, "normalization": normalization, "valid": valid, "backend": "cpp",
    }  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        unary.requires_grad_(backward)
        q = crf_mean_field(unary, image, **options)
        if backward and q.numel() > 0:
            q.square().sum().backward()
            assert unary.grad.isfinite().all()
    except ValueError as error:
        assert str(error).startswith("crf_mean_field: expected") or "Lattice: expected" in str(error)
        return
    finally:
        torch.set_num_threads(before)
    assert q.shape == unary.shape
    sums = q.detach().sum(dim=2)
    inside = torch.ones_like(sums, dtype=torch.bool)
    for b in range(B if padded else 0):
        inside[b] = False
        inside[b, :, : valid[b, 0], : valid[b, 1]] = True
    torch.testing.assert_close(sums, inside.to(dtype), rtol=0, atol=1e-4)


@corpus
@given(
    seed=SEEDS, N=st.integers(1, 700), d=st.integers(1, 17), V=st.integers(0, 40),
    scale=st.sampled_from([1e-3, 1, 30, 1e4, 1e6, 1e9]), odd=ODD, reverse=st.booleans(), double=st.booleans(),
    threads=st.integers(1, 3),
)  # fmt: skip
def test_lattice(seed, N, d, V, scale, odd, reverse, double, threads):
    g = torch.Generator().manual_seed(seed)
    features = spoil(scale * torch.randn(d, N, generator=g), odd, g)
    x = torch.rand(V, N, generator=g, dtype=torch.float64 if double else torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lattice = Lattice(features, backend="cpp")
        out = lattice.filter(x, reverse=reverse)
    except ValueError as error:
        assert "expected" in str(error)
        return
    finally:
        torch.set_num_threads(before)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert (out >= 0).all()
